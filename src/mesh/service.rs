use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;

use super::{AppProtocol, Labels, NamespacedName, PodUid, Settings};

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Namespace {
    pub name: Arc<str>,
    pub settings: Settings,
    pub labels: Labels,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Node {
    pub name: Arc<str>,
    /// `status.addresses` of type InternalIP and ExternalIP.
    pub addresses: Vec<IpAddr>,
    /// `spec.podCIDRs`.
    pub pod_cidrs: Vec<IpNet>,
    /// Label `topology.kubernetes.io/zone`.
    pub zone: Option<Arc<str>>,
}

/// One Service, its TCP ports alone.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Service {
    pub name: NamespacedName,
    pub kind: ServiceKind,
    /// External IPs and load balancer addresses. Whoever may write a Service may claim any address here, so each holds
    /// on the Service's own ports, and only where neither a ClusterIP nor a pod has it.
    pub external_ips: Vec<IpAddr>,
    pub ports: Vec<ServicePort>,
    /// `sessionAffinity: ClientIP`, with its time-out.
    pub session_affinity: Option<Duration>,
    pub internal_traffic_policy: InternalTrafficPolicy,
    pub traffic_distribution: Option<TrafficDistribution>,
    pub publish_not_ready_addresses: bool,
    pub settings: Settings,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ServiceKind {
    /// Reached at these addresses, one of a family.
    ClusterIp(Vec<IpAddr>),
    /// `clusterIP: None`: clients dial pods.
    Headless,
    /// `type: ExternalName`: a DNS alias, no addresses of its own.
    ExternalName,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServicePort {
    /// Empty where the Service has one unnamed port. Endpoint slices refer to ports by this name.
    pub name: Arc<str>,
    pub port: u16,
    pub target: TargetPort,
    pub app_protocol: Option<Arc<str>>,
}

impl ServicePort {
    /// What the Service says that this port speaks; `None` where it does not say.
    pub fn protocol(&self) -> Option<AppProtocol> {
        AppProtocol::declared(self.app_protocol.as_deref(), &self.name)
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TargetPort {
    Number(u16),
    Name(Arc<str>),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum InternalTrafficPolicy {
    Cluster,
    Local,
}

/// `spec.trafficDistribution`: a preference, never a rule.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum TrafficDistribution {
    /// `PreferClose` and `PreferSameZone`.
    PreferSameZone,
    PreferSameNode,
}

/// Whether requests to an address are told apart on the node of the pod that has it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Requests {
    /// Nobody asks for it, or the port is said to speak something else.
    Unread,
    /// The port does not say what it speaks.
    Guessed,
    /// The port is said to speak HTTP.
    Declared,
}

/// One EndpointSlice: some of the endpoints of one Service, of one address family.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EndpointSlice {
    pub name: NamespacedName,
    /// Label `kubernetes.io/service-name`.
    pub service: NamespacedName,
    /// (port name, number) of each TCP port; every endpoint serves all of them.
    pub ports: Vec<(Arc<str>, u16)>,
    pub endpoints: Vec<Endpoint>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Endpoint {
    pub addresses: Vec<IpAddr>,
    /// Conditions, nil read as the API documents: ready true, serving as ready, terminating false.
    pub ready: bool,
    pub serving: bool,
    pub terminating: bool,
    pub node: Option<Arc<str>>,
    pub zone: Option<Arc<str>>,
    /// `hints.forZones`; empty where there are none.
    pub zone_hints: Vec<Arc<str>>,
    /// `hints.forNodes`; empty where there are none.
    pub node_hints: Vec<Arc<str>>,
    /// `targetRef` where it is a Pod.
    pub pod: Option<NamespacedName>,
    /// Likewise.
    pub pod_uid: Option<PodUid>,
}

/// Where an address belongs, when no object claims it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AddressScope {
    /// Inside a pod or Service range: the cluster must know it.
    Cluster,
    Outside,
}
