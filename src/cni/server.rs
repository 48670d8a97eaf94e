//! The agent's end of the start of a pod: takes its namespace, and answers once the pod is captured.

use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};

use super::SOCKET;
use super::roster::Roster;
use super::wire::{Answer, PodNames, Request};
use crate::capture::show::{CaptureStatus, PodState};
use crate::capture::{HandedOver, NetNs};
use crate::handover::{Channel, Door};
use crate::mesh::{NamespacedName, PodUid, Workload};
use crate::model::Model;

/// What the server works with.
#[derive(Clone, Debug)]
pub struct ServerSettings {
    /// The folder that the plugin finds the socket in. Made root's alone.
    pub shared: PathBuf,
    pub model: Arc<Model>,
    pub handed: HandedOver,
    pub status: CaptureStatus,
}

/// Listens for the plugin. Until it is dropped, pods that start are this agent's.
#[derive(Debug)]
pub struct CniServer {
    door: Door,
    settings: ServerSettings,
}

impl CniServer {
    /// Takes the socket's place in the folder, from an agent before this one too. Call within a runtime.
    pub fn open(settings: ServerSettings) -> io::Result<Self> {
        Ok(Self { door: Door::open(&settings.shared.join(SOCKET))?, settings })
    }

    /// Serves until it is dropped: a plugin that is not answered then calls the next agent.
    pub async fn run(self) {
        let mut calls = JoinSet::new();
        loop {
            let caller = tokio::select! {
                caller = self.door.caller() => caller,
                Some(_) = calls.join_next() => continue,
            };
            match caller {
                Ok(caller) => drop(calls.spawn(serve(caller, self.settings.clone()))),
                Err(error) => {
                    tracing::warn!(%error, "A call of the CNI plugin could not be taken; it calls again.");
                    tokio::time::sleep(BREATH).await;
                }
            }
        }
    }
}

async fn serve(caller: Channel, settings: ServerSettings) {
    if let Err(error) = converse(&caller, &settings).await {
        tracing::warn!(%error, "A call of the CNI plugin could not be served; it calls again.");
    }
}

async fn converse(caller: &Channel, settings: &ServerSettings) -> io::Result<()> {
    let Some((request, fd)) = timeout(HEARING, caller.receive()).await.map_err(io::Error::from)?? else {
        return Ok(());
    };
    match request {
        Request::Add { pod, sandbox, ips, annotations } => {
            let netns = fd.ok_or_else(|| io::Error::other("a namespace did not arrive: no descriptor is left"))?;
            let arrival = Arrival { names: pod, sandbox, ips, annotations };
            let began = Instant::now();
            // A plugin that is gone was given up by its runtime: nobody waits for this sandbox any more.
            let (answer, outcome) = tokio::select! {
                decided = arrival.decide(netns, settings) => decided,
                _ = caller.receive::<Request>() => return Ok(()),
            };
            metrics::counter!("selvedge_cni_requests_total", "outcome" => outcome).increment(1);
            if let Answer::Refused(why) = &answer {
                tracing::warn!(pod = %arrival.name(), %why, "The pod is kept from starting: it is not captured yet.");
            } else {
                tracing::debug!(pod = %arrival.name(), outcome, took = ?began.elapsed(), "A pod starts.");
            }
            caller.send(&answer, None).await
        }
        Request::Del { pod, sandbox } => {
            if let Some(uid) = pod.uid {
                settings.model.update(|state| state.mesh.take_back(&PodUid::new(uid), &sandbox));
            }
            Ok(())
        }
    }
}

/// One pod that starts.
struct Arrival {
    names: PodNames,
    sandbox: String,
    ips: Vec<IpAddr>,
    annotations: std::collections::BTreeMap<String, String>,
}

impl Arrival {
    async fn decide(&self, netns: OwnedFd, settings: &ServerSettings) -> (Answer, &'static str) {
        let deadline = Instant::now() + PATIENCE;
        let mut moved = settings.model.subscribe();
        let workload = loop {
            moved.borrow_and_update();
            if let Some(workload) = self.workload(settings) {
                break workload;
            }
            if !matches!(timeout_at(deadline, moved.changed()).await, Ok(Ok(()))) {
                return self.without_object(settings);
            }
        };
        if !workload.membership.is_joined() || !workload.pod.is_live() {
            return (Answer::Start, "outside");
        }
        let uid = workload.uid().clone();
        let netns = match settings.handed.put(uid.clone(), netns, &self.ips) {
            Ok(netns) => netns,
            Err(error) => return refused(format!("its network namespace cannot be used: {error}")),
        };
        // The kubelet tells the addresses only once the pod has started.
        settings.model.update(|state| state.mesh.hand_over(&uid, &self.sandbox, self.ips.clone()));
        let answer = self.captured(&uid, &netns, deadline, settings).await;
        settings.handed.forget(&uid, &netns);
        answer
    }

    async fn captured(
        &self,
        uid: &PodUid,
        netns: &NetNs,
        deadline: Instant,
        settings: &ServerSettings,
    ) -> (Answer, &'static str) {
        let mut published = settings.status.subscribe();
        loop {
            published.borrow_and_update();
            let snapshot = settings.status.snapshot();
            let status = snapshot.pods.iter().find(|status| status.uid == uid.as_str());
            let here = status.filter(|status| status.netns == Some(netns.id().to_string()));
            match here.map(|status| status.state) {
                Some(PodState::Captured) => return (Answer::Start, "captured"),
                Some(PodState::Failed) => {
                    let why = here.and_then(|status| status.reason.clone()).unwrap_or_default();
                    return refused(why);
                }
                _ => {}
            }
            let joined = settings.model.read().mesh.workload(uid).is_some_and(|w| w.membership.is_joined());
            if !joined {
                return (Answer::Start, "outside");
            }
            if !matches!(timeout_at(deadline, published.changed()).await, Ok(Ok(()))) {
                let why = status.and_then(|status| status.reason.clone());
                return refused(why.unwrap_or_else(|| "the agent has not come to it yet".to_owned()));
            }
        }
    }

    /// By its UID; where the runtime passes none, by its name.
    fn workload(&self, settings: &ServerSettings) -> Option<Arc<Workload>> {
        if !settings.model.is_synced() {
            return None;
        }
        let state = settings.model.read();
        match &self.names.uid {
            Some(uid) => state.mesh.workload(&PodUid::new(&**uid)).cloned(),
            None => state.mesh.workload_by_name(&self.name()).cloned(),
        }
    }

    /// The API server has not told of the pod: its namespace and its own annotations decide.
    fn without_object(&self, settings: &ServerSettings) -> (Answer, &'static str) {
        // The object of a static pod has another UID than its sandbox. It runs as nobody, and is captured by its name.
        let state = settings.model.read();
        let mirror = state.mesh.workload_by_name(&self.name()).filter(|workload| workload.pod.node.is_some());
        let joins = match mirror {
            Some(workload) => workload.membership.is_joined(),
            None => Roster::read(&settings.shared).map_or(true, |roster| roster.joins(&self.name(), &self.annotations)),
        };
        if !joins {
            return (Answer::Start, "outside");
        }
        refused("the API server has not told the agent of this pod yet".to_owned())
    }

    fn name(&self) -> NamespacedName {
        NamespacedName::new(&*self.names.namespace, &*self.names.name)
    }
}

fn refused(why: String) -> (Answer, &'static str) {
    (Answer::Refused(why), "refused")
}

/// How long a pod may wait for its object and for its capture. The kubelet tries again what is refused.
const PATIENCE: Duration = Duration::from_secs(20);
const HEARING: Duration = Duration::from_secs(5);
const BREATH: Duration = Duration::from_millis(100);
