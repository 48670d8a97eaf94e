use std::net::SocketAddr;
use std::sync::Arc;

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
    pub candidates: Arc<[Candidate]>,
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
}

impl Candidate {
    pub(super) fn of(endpoint: &Endpoint, addr: SocketAddr) -> Self {
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
        }
    }
}
