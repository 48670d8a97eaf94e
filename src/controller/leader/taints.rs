//! Takes the start-up taint off nodes whose agent is ready.

use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, NodeAddress, Taint};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Api, Patch, PatchParams};
use kube::{Client, Resource};
use serde::Deserialize;
use serde_json::json;
use tracing::info;

use super::record;
use crate::controller::pods::Pods;

/// Nodes may register with the taint, so that no pod starts there before the agent does.
pub struct Taints {
    nodes: Api<TaintedNode>,
    namespace: String,
    daemon_set: String,
}

/// A Node with its taints and addresses, and nothing else.
#[derive(Resource, Clone, Debug, Deserialize)]
#[resource(inherit = Node)]
pub struct TaintedNode {
    metadata: ObjectMeta,
    #[serde(default)]
    spec: Spec,
    #[serde(default)]
    status: Status,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct Spec {
    #[serde(default)]
    taints: Vec<Taint>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct Status {
    #[serde(default)]
    addresses: Vec<NodeAddress>,
}

impl TaintedNode {
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.status.addresses.iter().filter_map(|one| one.address.parse::<IpAddr>().ok()).map(|ip| ip.to_canonical())
    }
}

impl Taints {
    pub fn new(client: Client, namespace: &str, daemon_set: &str) -> Self {
        Self { nodes: Api::all(client), namespace: namespace.to_owned(), daemon_set: daemon_set.to_owned() }
    }

    pub async fn take_off(&self, nodes: &[Arc<TaintedNode>], pods: &Pods) {
        for node in nodes {
            if !node.spec.taints.iter().any(|taint| taint.key == TAINT) {
                continue;
            }
            let Some(name) = node.metadata.name.as_deref() else { continue };
            if !pods.has_ready_agent(name, &self.namespace, &self.daemon_set) {
                continue;
            }
            let rest: Vec<&Taint> = node.spec.taints.iter().filter(|taint| taint.key != TAINT).collect();
            // With the version that was read: a taint that somebody adds at this moment is not lost.
            let patch = json!({
                "metadata": {"resourceVersion": node.metadata.resource_version},
                "spec": {"taints": rest},
            });
            let written = self.nodes.patch(name, &PatchParams::default(), &Patch::Merge(&patch)).await;
            if written.is_ok() {
                info!(node = name, "The agent is ready: took off the taint {TAINT}.");
            }
            record("taint", name, written.as_ref().map(drop));
        }
    }
}

const TAINT: &str = "selvedge.dev/agent-not-ready";
