//! What the agent tells of its node: to its own model at once, and to peers in the MeshNode object.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use kube::Api;
use kube::api::{Patch, PatchParams};
use kube::core::PartialObjectMeta;
use kube::runtime::watcher::DefaultBackoff;
use serde_json::json;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{debug, info, warn};

use super::turns::Standing;
use crate::api::{CaptureFailure, GROUP, MeshNode, MeshNodeStatus, NotEnforced, VERSION};
use crate::capture::Event;
use crate::capture::show::{CaptureStatus, PodState};
use crate::identity::Identities;
use crate::mesh::{self, PodUid};
use crate::model::{Delta, Model};
use crate::source::Report;
use crate::source::kube::sentence;

/// The pods of this node that are captured: the agent's own model knows it before any peer does.
#[derive(Debug)]
pub struct Captured {
    node: Arc<str>,
    model: Arc<Model>,
    pods: Mutex<BTreeSet<PodUid>>,
    moved: watch::Sender<()>,
}

impl Captured {
    pub fn new(node: &str, model: Arc<Model>) -> Self {
        Self { node: node.into(), model, pods: Mutex::default(), moved: watch::Sender::new(()) }
    }

    /// Takes what the capture tells, as one step of the model.
    pub fn take(&self, events: &[Event]) {
        let captured = {
            let mut pods = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
            let before = pods.clone();
            for event in events {
                match event {
                    Event::Captured(pod) => _ = pods.insert(pod.workload.uid().clone()),
                    Event::Leaving(pod) | Event::Gone(pod) => _ = pods.remove(pod),
                }
            }
            if *pods == before {
                return;
            }
            pods.clone()
        };
        let object = mesh::Object::MeshNode { node: self.node.clone(), captured };
        self.model.apply([Delta::Mesh(mesh::Delta::Apply(object))]);
        self.moved.send_replace(());
    }

    fn list(&self) -> BTreeSet<PodUid> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Writes the MeshNode of this node whenever what it says changes.
pub struct Publisher {
    pub client: kube::Client,
    pub node: String,
    pub captured: Arc<Captured>,
    pub capture: CaptureStatus,
    pub model: Arc<Model>,
    pub identities: Arc<Identities>,
    pub report: Arc<Report>,
    /// Of several agents of a node the one that programs its rules speaks.
    pub(super) standing: watch::Receiver<Standing>,
}

impl Publisher {
    pub async fn run(mut self) {
        // The sender lives as long as the agent.
        while self.standing.wait_for(|standing| *standing == Standing::Works).await.is_ok() {
            let mut standing = self.standing.clone();
            tokio::select! {
                () = self.follow() => {}
                _ = standing.wait_for(|standing| *standing != Standing::Works) => {}
            }
        }
    }

    async fn follow(&self) {
        let mut looked = self.capture.subscribe();
        let begun = looked.borrow_and_update().count;
        self.model.synced().await;
        if looked.wait_for(|looks| !looks.resting && looks.count > begun).await.is_err() {
            return;
        }
        let (mut captured, mut model) = (self.captured.moved.subscribe(), self.model.subscribe());
        let mut rewritten = self.report.own_node();
        let mut before = rewritten.borrow().clone().unwrap_or_default();
        // A rotation of the root waits until every node has told that it trusts the new one.
        let mut trust = self.identities.subscribe();
        let mut told: Option<MeshNodeStatus> = None;
        let mut pauses = DefaultBackoff::default();
        let mut next_write = Instant::now();
        let mut doubtful = false;
        loop {
            captured.mark_unchanged();
            looked.mark_unchanged();
            model.mark_unchanged();
            trust.mark_unchanged();
            // What comes sooner may be of an earlier write of ours.
            if doubtful && next_write <= Instant::now() {
                doubtful = false;
                let listed = rewritten.borrow_and_update();
                if told.as_ref().is_some_and(|told| !lists(listed.as_ref(), told)) {
                    info!("Somebody else changed or deleted the MeshNode of this node; it is written anew.");
                    told = None;
                }
            }
            let status = self.status(&mut before);
            if told.as_ref() != Some(&status) {
                sleep_until(next_write).await;
                let status = self.status(&mut before);
                match self.write(&status).await {
                    Ok(()) => {
                        debug!(captured = status.captured.len(), "The MeshNode says what is so.");
                        told = Some(status);
                        pauses = DefaultBackoff::default();
                        next_write = Instant::now() + WRITE_INTERVAL;
                    }
                    Err(cause) => {
                        let pause = pauses.next().unwrap_or(LONGEST_PAUSE);
                        let cause = sentence(&cause);
                        warn!(cause, again = ?pause, "The MeshNode of this node cannot be written; peers know what it last said.");
                        metrics::counter!(FAILURES).increment(1);
                        sleep(pause).await;
                    }
                }
                continue;
            }
            tokio::select! {
                _ = captured.changed() => {}
                _ = looked.changed() => {}
                _ = rewritten.changed() => doubtful = true,
                () = sleep_until(next_write), if doubtful => {}
                _ = trust.changed() => {}
                _ = model.changed() => sleep(MODEL_BREATH).await,
            }
        }
    }

    /// What is so now. What an agent or a worker `before` this one listed stays listed as long as it may be so.
    fn status(&self, before: &mut BTreeSet<PodUid>) -> MeshNodeStatus {
        let mut captured = self.captured.list();
        let (mode, connect, mut failed) = self.capture.read(|snapshot| {
            carry_over(before, &mut captured, |uid| {
                snapshot.pods.iter().find(|pod| pod.uid == uid.as_str()).map(|pod| pod.state)
            });
            let failed = snapshot.pods.iter().filter(|pod| pod.state == PodState::Failed);
            let failed = failed.map(|pod| {
                let (namespace, name) = pod.pod.split_once('/').unwrap_or_default();
                CaptureFailure {
                    uid: pod.uid.clone(),
                    namespace: namespace.to_owned(),
                    name: name.to_owned(),
                    reason: "CaptureFailed".to_owned(),
                    message: cut(pod.reason.as_deref().unwrap_or_default()),
                }
            });
            (snapshot.mode.name(), snapshot.connect.name(), failed.collect::<Vec<_>>())
        });
        failed.sort();
        failed.truncate(MOST_PODS);
        MeshNodeStatus {
            captured: captured.iter().take(MOST_PODS).map(ToString::to_string).collect(),
            failed,
            capture_mode: mode.to_owned(),
            connect: connect.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            trust_bundle_hash: self.identities.trust().hash(),
            policies_not_enforced: self.not_enforced(),
        }
    }

    fn not_enforced(&self) -> Vec<NotEnforced> {
        let generations = self.report.generations();
        let generations: BTreeMap<_, _> =
            generations.iter().map(|(key, generation)| ((key.kind.as_str(), &key.name), *generation)).collect();
        let state = self.model.read();
        let problems = state.not_enforced().into_iter().map(|problem| {
            let (kind, name) = (problem.policy.kind.to_string(), &problem.policy.name);
            NotEnforced {
                generation: generations.get(&(kind.as_str(), name)).copied(),
                kind,
                namespace: name.namespace.to_string(),
                name: name.name.to_string(),
                field: problem.field.chars().take(MOST_FIELD).collect(),
                message: cut(&problem.cause),
            }
        });
        let mut problems: Vec<_> = problems.collect();
        problems.sort();
        problems.truncate(MOST_PROBLEMS);
        problems
    }

    async fn write(&self, status: &MeshNodeStatus) -> Result<(), kube::Error> {
        let nodes: Api<PartialObjectMeta<Node>> = Api::all(self.client.clone());
        let node = nodes.get(&self.node).await?;
        let object = json!({
            "apiVersion": format!("{GROUP}/{VERSION}"),
            "kind": MeshNode::KIND,
            "metadata": {
                "name": self.node,
                // It goes with its node.
                "ownerReferences": [{
                    "apiVersion": "v1", "kind": "Node", "name": self.node,
                    "uid": node.metadata.uid.unwrap_or_default(),
                }],
            },
            "status": status,
        });
        let mesh_nodes: Api<PartialObjectMeta<MeshNode>> = Api::all(self.client.clone());
        let parameters = PatchParams::apply(MANAGER).force();
        mesh_nodes.patch(&self.node, &parameters, &Patch::Apply(&object)).await.map(drop)
    }
}

/// Tells the exporter what this metric means.
pub fn describe_metrics() {
    metrics::describe_counter!(
        FAILURES,
        metrics::Unit::Count,
        "Writes of this node's MeshNode that failed; each is tried again."
    );
}

/// A pod that was captured has its rules still, though its listeners have not been taken over yet: peers that took it for
/// one that is not captured would go on in plaintext. Each is carried until this agent knows better.
fn carry_over(
    before: &mut BTreeSet<PodUid>,
    captured: &mut BTreeSet<PodUid>,
    state: impl Fn(&PodUid) -> Option<PodState>,
) {
    before.retain(|uid| !captured.contains(uid) && matches!(state(uid), Some(PodState::Pending | PodState::Captured)));
    captured.extend(before.iter().cloned());
}

fn lists(listed: Option<&BTreeSet<PodUid>>, told: &MeshNodeStatus) -> bool {
    let told: BTreeSet<&str> = told.captured.iter().map(String::as_str).collect();
    listed.is_some_and(|listed| listed.iter().map(PodUid::as_str).eq(told.iter().copied()))
}

fn cut(text: &str) -> String {
    text.chars().take(MOST_WORDS).collect()
}

const MANAGER: &str = "selvedge-agent";
const FAILURES: &str = "selvedge_mesh_node_write_failures_total";
/// The shortest time between two writes: every agent of the cluster hears each of them.
const WRITE_INTERVAL: Duration = Duration::from_secs(1);
const MODEL_BREATH: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// As the schema has it.
const MOST_PODS: usize = 4096;
const MOST_PROBLEMS: usize = 1024;
const MOST_FIELD: usize = 1024;
const MOST_WORDS: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    fn uids<const N: usize>(uids: [&str; N]) -> BTreeSet<PodUid> {
        uids.map(PodUid::new).into_iter().collect()
    }

    #[test]
    fn what_was_listed_before_stays_listed_until_this_agent_knows_better() {
        let mut before = uids(["waits", "told", "taken", "failed", "leaves", "gone"]);
        let state = |uid: &PodUid| match uid.as_str() {
            "waits" => Some(PodState::Pending),
            "told" | "taken" => Some(PodState::Captured),
            "failed" => Some(PodState::Failed),
            "leaves" => Some(PodState::Leaving),
            _ => None,
        };
        let mut captured = uids(["taken", "new"]);
        carry_over(&mut before, &mut captured, state);
        assert_eq!(captured, uids(["new", "taken", "told", "waits"]));
        // One that this agent captured itself and that leaves is not listed by what was before.
        let mut captured = uids(["told"]);
        carry_over(&mut before, &mut captured, state);
        assert_eq!((before, captured), (uids(["waits"]), uids(["told", "waits"])));
    }
}
