//! `mesh`, `policy`, `route` and `authorizer` together: fed by deltas, read by every shell.

#![forbid(unsafe_code)]

pub mod explain;

mod interner;
mod unread;

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::{ArcSwap, Guard};
use tokio::sync::{broadcast, watch};

use crate::authorizer::{self, Authorizers};
use crate::mesh::{self, Change, Identity, Mesh, MeshSettings, Requests, Workload};
use crate::policy::{self, Policies, Query, Reads, Scope, Selection};
use crate::route::{self, traffic};
use interner::Interner;

/// The one model of an agent. A step is made beside what readers see, and put in its place when it is whole: nobody
/// waits for a writer, however large the step is.
#[derive(Debug)]
pub struct Model {
    state: ArcSwap<State>,
    /// Held by whoever makes a step.
    interner: Mutex<Interner>,
    /// How many deltas were applied: who follows the model waits for it to move.
    generation: watch::Sender<u64>,
    synced: watch::Sender<bool>,
    steps: broadcast::Sender<Arc<Step>>,
}

/// What readers see: one version of everything. A clone shares all that the next step leaves as it is.
#[derive(Clone, Debug)]
pub struct State {
    pub mesh: Mesh,
    pub policies: Policies,
    pub routes: route::Table,
    pub authorizers: Authorizers,
    pub traffic: traffic::Table,
}

impl State {
    /// What policy is asked about a connection to a pod, and whether its requests are to be read for that.
    pub fn query<'a>(
        &'a self,
        source_ip: IpAddr,
        source_identity: Option<&'a Identity>,
        destination: &'a Workload,
        destination_addr: SocketAddr,
    ) -> (Query<'a>, Reads) {
        let services = self.mesh.services_at(destination_addr).as_slice();
        let mut query = Query { source_ip, source_identity, destination, destination_addr, services, requests: false };
        let is_limited = query.own_services().any(|service| self.traffic.rate_limits(service).is_some());
        let limits = if is_limited { Reads::ToDecide } else { Reads::Nothing };
        let reads = match self.policies.reads(&query).max(limits) {
            Reads::Nothing => Reads::Nothing,
            reads => match (reads, self.mesh.requests_at(destination, destination_addr)) {
                (_, Requests::Unread) => Reads::Nothing,
                // Whoever only observes keeps nobody from speaking something else.
                (Reads::ToObserve, Requests::Guessed) => Reads::Nothing,
                (reads, _) => reads,
            },
        };
        query.requests = reads != Reads::Nothing;
        (query, reads)
    }
}

/// One step of the model.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "most steps are of the mesh, and none is kept")]
pub enum Delta {
    Mesh(mesh::Delta),
    Policy(policy::Delta),
    Route(route::Delta),
    Authorizer(authorizer::Delta),
    Traffic(traffic::Delta),
}

/// What one step of the model changed.
#[derive(Debug, Default)]
pub struct Step {
    pub change: Change,
    /// What the policies stand over that came, changed or went.
    pub policies: Vec<Scope>,
}

impl Model {
    pub fn new(settings: MeshSettings) -> Self {
        let policies = Policies::new(settings.trust_domain.clone());
        Self {
            state: ArcSwap::from_pointee(State {
                mesh: Mesh::new(settings),
                policies,
                routes: route::Table::default(),
                authorizers: Authorizers::default(),
                traffic: traffic::Table::default(),
            }),
            interner: Mutex::default(),
            generation: watch::Sender::new(0),
            synced: watch::Sender::new(false),
            steps: broadcast::Sender::new(STEPS_KEPT),
        }
    }

    /// Applies deltas as one step: no reader sees a part of them.
    pub fn apply(&self, deltas: impl IntoIterator<Item = Delta>) {
        let mut step = Step::default();
        self.next(|state, interner| {
            for delta in deltas {
                match delta {
                    Delta::Mesh(delta) => step.change.merge(state.mesh.apply(interner.intern(delta))),
                    Delta::Policy(delta) => step.policies.extend(state.policies.apply(delta)),
                    Delta::Route(delta) => state.routes.apply(delta),
                    Delta::Authorizer(delta) => state.authorizers.apply(delta),
                    Delta::Traffic(delta) => {
                        // As for a policy that speaks of requests: those to their pods are to be read now.
                        step.policies.extend(state.traffic.apply(delta).into_iter().map(|service| Scope {
                            namespace: service.namespace.clone(),
                            selection: Selection::Services(BTreeSet::from([service])),
                        }));
                    }
                }
            }
        });
        self.generation.send_modify(|generation| *generation += 1);
        // Nobody may be listening, and that is no error.
        let _ = self.steps.send(Arc::new(step));
    }

    /// Changes what is not an object, such as the node's own addresses.
    pub fn update(&self, change: impl FnOnce(&mut State)) {
        self.next(|state, _| change(state));
        self.generation.send_modify(|generation| *generation += 1);
    }

    /// The model as it is now, and as it stays for as long as this is held.
    pub fn read(&self) -> Guard<Arc<State>> {
        self.state.load()
    }

    /// Says that every kind has been read once: until then no connection is decided.
    pub fn set_synced(&self) {
        self.synced.send_replace(true);
    }

    pub fn is_synced(&self) -> bool {
        *self.synced.borrow()
    }

    pub async fn synced(&self) {
        let mut synced = self.synced.subscribe();
        // The sender lives as long as `self`, which this borrow keeps.
        let _ = synced.wait_for(|synced| *synced).await;
    }

    /// What each later step changes. Who falls behind is told so, and looks at everything.
    pub fn steps(&self) -> broadcast::Receiver<Arc<Step>> {
        self.steps.subscribe()
    }

    /// Moves whenever the model did.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }

    fn next(&self, change: impl FnOnce(&mut State, &mut Interner)) {
        let mut interner = self.interner.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = State::clone(&self.state.load());
        change(&mut state, &mut interner);
        self.state.store(Arc::new(state));
    }
}

const STEPS_KEPT: usize = 256;
