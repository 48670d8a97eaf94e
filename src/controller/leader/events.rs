//! Events on pods whose capture failed.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};

use super::record;
use crate::controller::mesh_node::{FailedPod, MeshNodeView};

/// Tells each failure once, and again before the API server forgets it.
pub struct Events {
    recorder: Recorder,
    told: HashMap<FailedPod, Instant>,
}

impl Events {
    pub fn new(client: Client, instance: &str) -> Self {
        let reporter = Reporter { controller: "selvedge-controller".to_owned(), instance: Some(instance.to_owned()) };
        Self { recorder: Recorder::new(client, reporter), told: HashMap::new() }
    }

    pub async fn tell(&mut self, nodes: &[Arc<MeshNodeView>]) {
        let mut failed = Vec::new();
        for node in nodes {
            failed
                .extend(node.status.failed.iter().map(|pod| (node.metadata.name.as_deref().unwrap_or_default(), pod)));
        }
        let known: HashSet<_> = failed.iter().map(|(_, pod)| *pod).collect();
        self.told.retain(|pod, _| known.contains(pod));
        for (node, pod) in failed {
            if self.told.get(pod).is_some_and(|told| told.elapsed() < AGAIN) {
                continue;
            }
            let event = Event {
                type_: EventType::Warning,
                reason: "CaptureFailed".to_owned(),
                note: Some(note(node, pod)),
                action: "Capture".to_owned(),
                secondary: None,
            };
            let about = ObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("Pod".to_owned()),
                namespace: Some(pod.namespace.clone()),
                name: Some(pod.name.clone()),
                uid: Some(pod.uid.clone()),
                ..ObjectReference::default()
            };
            let written = self.recorder.publish(&event, &about).await;
            record("event", &format!("Pod {}/{}", pod.namespace, pod.name), written.as_ref().copied());
            // A namespace that is on its way out takes no Events: it is not asked each second.
            self.told.insert(pod.clone(), Instant::now());
        }
    }
}

/// At most a kilobyte, as the API server wants it.
fn note(node: &str, pod: &FailedPod) -> String {
    let why = if pod.message.is_empty() { &pod.reason } else { &pod.message };
    let told = format!("The agent of {node} cannot capture this pod: {why}");
    let mut end = told.len().min(1000);
    while !told.is_char_boundary(end) {
        end -= 1;
    }
    told[..end].to_owned()
}

/// Events live for an hour by default.
const AGAIN: Duration = Duration::from_secs(30 * 60);
