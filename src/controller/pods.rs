//! Which pods run on which node, as far as signing needs to know.

use std::collections::HashMap;
use std::collections::hash_map::Values;
use std::sync::{Arc, PoisonError, RwLock};

use futures_util::TryStreamExt;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Api, ListParams};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Client, Resource};
use serde::Deserialize;
use tokio::sync::watch;
use tracing::{debug, warn};

use crate::mesh::{GATEWAY_LABEL, Identity};

/// What of a pod signing depends on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PodFacts {
    pub uid: Arc<str>,
    pub namespace: Arc<str>,
    pub name: Arc<str>,
    pub node: Option<Arc<str>>,
    /// Empty where the pod has none.
    pub service_account: Arc<str>,
    /// A static pod's picture in the API server: the kubelet vouches for nothing that its manifest says.
    pub is_mirror: bool,
    /// Succeeded or Failed.
    pub is_finished: bool,
    /// The DaemonSet that made it.
    pub daemon_set: Option<Arc<str>>,
    /// The Gateway that its label says it was made for.
    pub gateway: Option<Arc<str>>,
    /// Its condition Ready holds.
    pub is_ready: bool,
}

impl PodFacts {
    /// Whether the pod proves that its node needs this identity. One that is being deleted still runs, and does.
    pub fn runs_as(&self, identity: &Identity) -> bool {
        !self.is_mirror
            && !self.is_finished
            && !self.service_account.is_empty()
            && self.namespace == identity.namespace
            && self.service_account == identity.service_account
    }
}

/// All pods of the cluster, kept by a watch.
pub struct Pods {
    client: Client,
    known: RwLock<Known>,
    synced: watch::Sender<bool>,
}

#[derive(Default)]
struct Known {
    by_name: HashMap<Name, PodFacts>,
    /// The next `by_name`, while all are read anew.
    filling: HashMap<Name, PodFacts>,
}

/// Namespace and name.
type Name = (Arc<str>, Arc<str>);

impl Pods {
    pub fn new(client: Client) -> Arc<Self> {
        Arc::new(Self { client, known: RwLock::default(), synced: watch::Sender::new(false) })
    }

    /// Whether all pods have been read once.
    pub fn is_synced(&self) -> bool {
        *self.synced.borrow()
    }

    /// Follows the API server for as long as it is polled.
    pub async fn run(self: Arc<Self>) {
        let api: Api<LeanPod> = Api::all(self.client.clone());
        let mut events = Box::pin(watcher(api, watcher::Config::default()).default_backoff());
        loop {
            match events.try_next().await {
                Ok(Some(event)) => self.take(event),
                Ok(None) => return,
                Err(error) => warn!(%error, "Pods cannot be watched; it is tried again, and asked where needed."),
            }
        }
    }

    /// A pod by its name, as the watch knows it.
    pub fn get(&self, namespace: &str, name: &str) -> Option<PodFacts> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known.by_name.get(&(namespace.into(), name.into())).cloned()
    }

    /// Looks at all pods that the watch knows.
    pub fn find<T>(&self, look: impl FnOnce(Values<'_, Name, PodFacts>) -> T) -> T {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        look(known.by_name.values())
    }

    /// Whether an agent serves a node.
    pub fn has_ready_agent(&self, node: &str, namespace: &str, daemon_set: &str) -> bool {
        let serves = |pod: &PodFacts| {
            pod.is_ready
                && pod.node.as_deref() == Some(node)
                && &*pod.namespace == namespace
                && pod.daemon_set.as_deref() == Some(daemon_set)
        };
        self.find(|mut pods| pods.any(serves))
    }

    /// A pod by its name, asked of the API server.
    pub async fn ask(&self, namespace: &str, name: &str) -> Result<Option<PodFacts>, kube::Error> {
        let api: Api<LeanPod> = Api::namespaced(self.client.clone(), namespace);
        Ok(api.get_opt(name).await?.and_then(LeanPod::facts))
    }

    /// The pods of a namespace on a node, asked of the API server.
    pub async fn ask_on_node(&self, namespace: &str, node: &str) -> Result<Vec<PodFacts>, kube::Error> {
        let api: Api<LeanPod> = Api::namespaced(self.client.clone(), namespace);
        let on_node = ListParams::default().fields(&format!("spec.nodeName={node}"));
        Ok(api.list(&on_node).await?.items.into_iter().filter_map(LeanPod::facts).collect())
    }

    fn take(&self, event: Event<LeanPod>) {
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::Init => known.filling.clear(),
            Event::InitApply(pod) => {
                if let Some(facts) = pod.facts() {
                    known.filling.insert(facts.key(), facts);
                }
            }
            Event::InitDone => {
                known.by_name = std::mem::take(&mut known.filling);
                debug!(pods = known.by_name.len(), "All pods are known.");
                self.synced.send_replace(true);
            }
            Event::Apply(pod) => {
                if let Some(facts) = pod.facts() {
                    known.by_name.insert(facts.key(), facts);
                }
            }
            Event::Delete(pod) => {
                if let Some(facts) = pod.facts() {
                    known.by_name.remove(&facts.key());
                }
            }
        }
    }
}

impl PodFacts {
    fn key(&self) -> Name {
        (self.namespace.clone(), self.name.clone())
    }
}

/// A Pod without what signing does not need: the rest is dropped while it is read.
#[derive(Resource, Clone, Debug, Deserialize)]
#[resource(inherit = Pod)]
struct LeanPod {
    metadata: ObjectMeta,
    #[serde(default)]
    spec: LeanSpec,
    #[serde(default)]
    status: LeanStatus,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct LeanSpec {
    node_name: Option<String>,
    service_account_name: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct LeanStatus {
    phase: Option<String>,
    #[serde(default)]
    conditions: Vec<LeanCondition>,
}

#[derive(Clone, Debug, Deserialize)]
struct LeanCondition {
    #[serde(rename = "type")]
    kind: String,
    status: String,
}

impl LeanPod {
    /// `None` for what is no pod of an API server: each has a name and a UID.
    fn facts(self) -> Option<PodFacts> {
        let metadata = self.metadata;
        let owners = metadata.owner_references.iter().flatten();
        let mut daemon_sets = owners.filter(|owner| {
            owner.controller == Some(true) && owner.kind == "DaemonSet" && owner.api_version == "apps/v1"
        });
        let daemon_set = daemon_sets.next().map(|owner| owner.name.as_str().into());
        let annotations = metadata.annotations.as_ref();
        let gateway =
            metadata.labels.as_ref().and_then(|labels| labels.get(GATEWAY_LABEL)).map(|name| name.as_str().into());
        Some(PodFacts {
            uid: metadata.uid?.into(),
            namespace: metadata.namespace?.into(),
            name: metadata.name?.into(),
            node: self.spec.node_name.filter(|node| !node.is_empty()).map(Into::into),
            service_account: self.spec.service_account_name.unwrap_or_default().into(),
            is_mirror: annotations.is_some_and(|annotations| annotations.contains_key(MIRROR)),
            is_finished: matches!(self.status.phase.as_deref(), Some("Succeeded" | "Failed")),
            daemon_set,
            gateway,
            is_ready: self.status.conditions.iter().any(|one| one.kind == "Ready" && one.status == "True"),
        })
    }
}

/// [Well-known annotations](https://kubernetes.io/docs/reference/labels-annotations-taints/#kubernetes-io-config-mirror).
const MIRROR: &str = "kubernetes.io/config.mirror";
