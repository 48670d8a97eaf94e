//! What others say of connections between pods: NetworkPolicies, and waypoints.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use super::super::{
    AppProtocol, NamespacedName, PodSelection, PodUid, Requests, Service, ServicePort, Waypoint, Workload,
};
use super::{Change, Mesh};

impl Mesh {
    /// Whether a NetworkPolicy, or a CNI's own kind, selects the pod: what enforces it sees the pod's interface alone.
    pub fn is_under_network_policy(&self, pod: &PodUid) -> bool {
        self.network_policies.selects(pod)
    }

    /// Whether traffic between two pods of one node may stay off their interfaces: nobody else's policy is enforced
    /// there, and no waypoint stands between.
    pub fn may_join(&self, source: &PodUid, destination: &Workload, to: SocketAddr) -> bool {
        !self.is_under_network_policy(source)
            && !self.is_under_network_policy(destination.uid())
            && !self.has_gateway(destination, to)
    }

    /// What stands before a Service: what it says itself, else what its namespace says.
    pub fn waypoint_of<'a>(&'a self, service: &'a Service) -> &'a Waypoint {
        let of_namespace = || self.namespaces.get(&service.name.namespace)?.settings.waypoint.as_ref();
        service.settings.waypoint.as_ref().or_else(of_namespace).unwrap_or(&Waypoint::None)
    }

    /// Whether connections to the pod's address go through a waypoint in a process of its own: the pod's, its
    /// namespace's, or that of a Service that leads there.
    pub fn has_gateway(&self, workload: &Workload, addr: SocketAddr) -> bool {
        let own = workload.pod.settings.waypoint.as_ref();
        let of_namespace = || self.namespaces.get(&workload.name().namespace)?.settings.waypoint.as_ref();
        let of_service = |name: &NamespacedName| self.services.get(name)?.settings.waypoint.as_ref();
        let mut all = own.or_else(of_namespace).into_iter().chain(self.services_at(addr).filter_map(of_service));
        all.any(|waypoint| matches!(waypoint, Waypoint::Gateway(_)))
    }

    /// Whether requests to a pod's address are told apart on the pod's node: a Service of its own namespace that leads there
    /// asks for it, and does not declare another protocol. A Service of somebody else's may list the pod, and has no say.
    pub fn requests_at(&self, workload: &Workload, addr: SocketAddr) -> Requests {
        let own = self.services_at(addr).filter(|name| name.namespace == workload.name().namespace);
        let asking = own.filter_map(|name| self.services.get(name)).filter(|s| self.waypoint_of(s).reads());
        asking.map(|service| self.requests_by(service, addr)).max().unwrap_or(Requests::Unread)
    }

    fn requests_by(&self, service: &Service, addr: SocketAddr) -> Requests {
        let leads = |port: &&ServicePort| self.endpoints.get(&service.name).is_some_and(|e| e.leads(&port.name, addr));
        let read = |port: &ServicePort| match port.protocol() {
            Some(protocol) if protocol.is_http() => Requests::Declared,
            None => Requests::Guessed,
            Some(_) => Requests::Unread,
        };
        service.ports.iter().filter(leads).map(read).max().unwrap_or(Requests::Unread)
    }

    /// Whether requests to any port of a Service are told apart, on the nodes of its pods or by a waypoint of its own.
    pub fn is_read(&self, service: &NamespacedName) -> bool {
        let Some(service) = self.services.get(service) else { return false };
        let is_http = |port: &ServicePort| port.protocol().is_none_or(AppProtocol::is_http);
        self.waypoint_of(service).reads() && service.ports.iter().any(is_http)
    }

    /// Addresses of pods at which [requests are told apart](Self::requests_at), by the Services that ask for it.
    pub fn read_addresses(&self) -> impl Iterator<Item = SocketAddr> {
        let asking = self.services.values().filter(|service| self.waypoint_of(service).reads());
        asking.flat_map(|service| {
            let addresses = self.endpoint_addresses(&service.name).into_iter();
            addresses.filter(|addr| self.requests_by(service, *addr) != Requests::Unread)
        })
    }

    pub(super) fn set_network_policy(&mut self, name: &NamespacedName, selects: Option<PodSelection>) -> Change {
        if name.namespace.is_empty() {
            let before = self.network_policies.stands_over_cluster();
            self.network_policies.set_of_cluster(&name.name, selects.is_some());
            let changed = self.network_policies.stands_over_cluster() != before;
            let pods = if changed { self.pods.keys().cloned().collect() } else { BTreeSet::new() };
            return Change { pods, ..Change::default() };
        }
        let of_namespace = self.pods_by_namespace.get(&name.namespace).into_iter().flat_map(|pods| pods.keys());
        let pods = of_namespace.filter_map(|uid| self.pods.get(uid)).map(|workload| &*workload.pod);
        Change { pods: self.network_policies.set(name, selects, pods), ..Change::default() }
    }
}
