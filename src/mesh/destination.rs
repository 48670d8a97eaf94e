use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;

use super::balance::stable_hash;
use super::{Endpoint, NamespacedName, Service, ServicePort, Workload};

/// What the model makes of an address that somebody dialled.
#[derive(Clone, Debug)]
pub enum Destination {
    /// A Service's own address, on one of its ports.
    Service(ServiceDestination),
    /// A Service's own address, on a port that it does not have.
    NoSuchPort(Arc<Service>),
    /// A pod's address.
    Workload(Arc<Workload>),
    /// An address of a node: its host network, its kubelet, a NodePort.
    Node,
    /// Inside the cluster's pod or Service ranges, but no object has it: a stale model, or nobody.
    Unknown,
    /// Not the cluster's.
    Outside,
}

#[derive(Clone, Debug)]
pub struct ServiceDestination {
    pub service: Arc<Service>,
    pub port: ServicePort,
    /// Every endpoint of that port, ready or not; shared, so that a look-up copies nothing.
    pub candidates: Candidates,
}

/// The endpoints of one Service port, as its slices list them. A clone shares them.
#[derive(Clone, Debug)]
pub struct Candidates(Arc<[Arc<[Candidate]>]>);

impl Candidates {
    /// Each address once: two slices may list one endpoint while the controller moves it.
    pub fn iter(&self) -> impl Iterator<Item = &Candidate> {
        let mut seen: HashSet<SocketAddr> = HashSet::new();
        let several = self.0.len() > 1;
        self.0.iter().flat_map(|list| list.iter()).filter(move |candidate| !several || seen.insert(candidate.addr))
    }

    pub fn len(&self) -> usize {
        self.iter().count()
    }

    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|list| list.is_empty())
    }

    /// Whether both are one and the same list, not equal ones.
    pub(super) fn are(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Default for Candidates {
    fn default() -> Self {
        Self(Arc::from([]))
    }
}

impl From<Vec<Candidate>> for Candidates {
    fn from(candidates: Vec<Candidate>) -> Self {
        Self(Arc::from([candidates.into()]))
    }
}

/// From the lists of the slices, in order.
impl FromIterator<Arc<[Candidate]>> for Candidates {
    fn from_iter<I: IntoIterator<Item = Arc<[Candidate]>>>(lists: I) -> Self {
        Self(lists.into_iter().filter(|list| !list.is_empty()).collect())
    }
}

/// One endpoint address of one Service port.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Candidate {
    pub addr: SocketAddr,
    pub ready: bool,
    pub serving: bool,
    pub terminating: bool,
    pub node: Option<Arc<str>>,
    pub zone: Option<Arc<str>>,
    pub zone_hints: Vec<Arc<str>>,
    pub node_hints: Vec<Arc<str>>,
    pub pod: Option<NamespacedName>,
    /// Tells it from all other endpoints, on every machine alike: from the UID of its pod, or from its address where it
    /// has none.
    pub key: u64,
}

impl Candidate {
    pub(super) fn of(endpoint: &Endpoint, addr: SocketAddr) -> Self {
        #[cfg(test)]
        super::work::step();
        Self {
            addr,
            ready: endpoint.ready,
            serving: endpoint.serving,
            terminating: endpoint.terminating,
            node: endpoint.node.clone(),
            zone: endpoint.zone.clone(),
            zone_hints: endpoint.zone_hints.clone(),
            node_hints: endpoint.node_hints.clone(),
            pod: endpoint.pod.clone(),
            key: match &endpoint.pod_uid {
                Some(uid) => stable_hash(uid.as_str().as_bytes()),
                None => stable_hash(addr.ip().to_string().as_bytes()),
            },
        }
    }
}
