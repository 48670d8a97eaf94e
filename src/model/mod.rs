//! `mesh` and `policy` together: fed by deltas, read by every shell.

#![forbid(unsafe_code)]

pub mod explain;

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use tokio::sync::{broadcast, watch};

use crate::mesh::{self, Change, Mesh, MeshSettings};
use crate::policy::{self, Policies};

/// The one model of an agent. Readers hold the lock for one look-up and never across an await.
#[derive(Debug)]
pub struct Model {
    state: RwLock<State>,
    /// How many deltas were applied: who follows the model waits for it to move.
    generation: watch::Sender<u64>,
    synced: watch::Sender<bool>,
    steps: broadcast::Sender<Arc<Step>>,
}

#[derive(Debug)]
pub struct State {
    pub mesh: Mesh,
    pub policies: Policies,
}

/// One step of the model.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "most steps are of the mesh, and none is kept")]
pub enum Delta {
    Mesh(mesh::Delta),
    Policy(policy::Delta),
}

/// What one step of the model changed.
#[derive(Debug, Default)]
pub struct Step {
    pub change: Change,
    pub policies: bool,
}

impl Model {
    pub fn new(settings: MeshSettings) -> Self {
        let policies = Policies::new(settings.trust_domain.clone());
        Self {
            state: RwLock::new(State { mesh: Mesh::new(settings), policies }),
            generation: watch::Sender::new(0),
            synced: watch::Sender::new(false),
            steps: broadcast::Sender::new(STEPS_KEPT),
        }
    }

    /// Applies deltas as one step: no reader sees a part of them.
    pub fn apply(&self, deltas: impl IntoIterator<Item = Delta>) {
        let mut step = Step::default();
        {
            let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
            for delta in deltas {
                match delta {
                    Delta::Mesh(delta) => step.change.merge(state.mesh.apply(delta)),
                    Delta::Policy(delta) => {
                        state.policies.apply(delta);
                        step.policies = true;
                    }
                }
            }
        }
        self.generation.send_modify(|generation| *generation += 1);
        // Nobody may be listening, and that is no error.
        let _ = self.steps.send(Arc::new(step));
    }

    /// Changes what is not an object, such as the node's own addresses.
    pub fn update(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.write().unwrap_or_else(PoisonError::into_inner));
        self.generation.send_modify(|generation| *generation += 1);
    }

    pub fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
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
}

const STEPS_KEPT: usize = 256;
