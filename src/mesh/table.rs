mod gateways;
mod object;
mod outside;
mod pods;
mod services;
mod slices;

use std::collections::{BTreeSet, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;

use super::claims::Claims;
use super::network_policy::NetworkPolicies;
use super::ranges::Ranges;
use super::shared_map::SharedMap;
use super::{
    AddressScope, Destination, Gateway, Namespace, NamespacedName, Node, PodUid, Service, ServiceDestination,
    TrustDomain, Workload,
};
pub use object::{Change, Delta, Object, ObjectKind, ObjectRef};
use slices::{Endpoints, Slice};

/// The tables. One object applied costs in proportion to that object and to what refers to it, not to the model; a
/// clone costs nothing and shares what neither side changes.
#[derive(Clone, Debug)]
pub struct Mesh {
    settings: Arc<MeshSettings>,
    namespaces: SharedMap<Arc<str>, Arc<Namespace>>,
    nodes: SharedMap<Arc<str>, Arc<Node>>,
    node_addresses: SharedMap<IpAddr, usize>,
    /// Every range of the cluster: given by flag, by nodes, by ServiceCIDRs.
    ranges: Ranges,
    pods: SharedMap<PodUid, Arc<Workload>>,
    pods_by_name: SharedMap<NamespacedName, PodUid>,
    pods_by_namespace: SharedMap<Arc<str>, SharedMap<PodUid, ()>>,
    pods_by_node: SharedMap<Arc<str>, SharedMap<PodUid, ()>>,
    /// Who claims an address, in the order of the claims: the first live holder has it.
    claims: SharedMap<IpAddr, Claims<PodUid>>,
    services: SharedMap<NamespacedName, Arc<Service>>,
    /// Which Services claim an address as their ClusterIP, in the order of the claims: the first has it.
    services_by_ip: SharedMap<IpAddr, Claims<NamespacedName>>,
    /// Which Services claim an address of the outside on one of their ports, in the order of the claims: the first has
    /// it. By port, because load balancers give one address to a whole cluster's Services.
    services_by_external: SharedMap<SocketAddr, Claims<NamespacedName>>,
    slices: SharedMap<NamespacedName, Arc<Slice>>,
    /// Endpoints of each Service by port name, joined over its slices.
    endpoints: SharedMap<NamespacedName, Arc<Endpoints>>,
    /// Sorted; the endpoints of one Service alone share one list.
    services_by_endpoint: SharedMap<SocketAddr, Arc<[NamespacedName]>>,
    /// How many slices of a Service list an endpoint, where it is more than one: a controller is moving it.
    repeated: SharedMap<(SocketAddr, NamespacedName), usize>,
    service_cidrs: SharedMap<Arc<str>, Vec<IpNet>>,
    gateways: SharedMap<NamespacedName, Arc<Gateway>>,
    local_addresses: Arc<HashSet<IpAddr>>,
    network_policies: NetworkPolicies,
    /// The pods that each node's agent says it has captured. None: joined counts as captured, for nobody says it.
    captured: Option<SharedMap<Arc<str>, Arc<BTreeSet<PodUid>>>>,
    /// Addresses of pods that start, from the container runtime, until their objects say them.
    handed: SharedMap<PodUid, pods::Handed>,
}

/// What holds for the whole mesh and does not change while the agent runs.
#[derive(Clone, Debug)]
pub struct MeshSettings {
    pub trust_domain: TrustDomain,
    /// Pod and Service ranges given by flag, beside those that Node and ServiceCIDR objects name.
    pub cluster_cidrs: Vec<IpNet>,
}

impl Mesh {
    pub fn new(settings: MeshSettings) -> Self {
        let mut ranges = Ranges::default();
        settings.cluster_cidrs.iter().for_each(|range| ranges.insert(*range));
        Self {
            ranges,
            settings: Arc::new(settings),
            namespaces: SharedMap::default(),
            nodes: SharedMap::default(),
            node_addresses: SharedMap::default(),
            pods: SharedMap::default(),
            pods_by_name: SharedMap::default(),
            pods_by_namespace: SharedMap::default(),
            pods_by_node: SharedMap::default(),
            claims: SharedMap::default(),
            services: SharedMap::default(),
            services_by_ip: SharedMap::default(),
            services_by_external: SharedMap::default(),
            slices: SharedMap::default(),
            endpoints: SharedMap::default(),
            services_by_endpoint: SharedMap::default(),
            repeated: SharedMap::default(),
            service_cidrs: SharedMap::default(),
            gateways: SharedMap::default(),
            local_addresses: Arc::default(),
            network_policies: NetworkPolicies::default(),
            captured: None,
            handed: SharedMap::default(),
        }
    }

    /// From now on a joined pod counts as captured only where the MeshNode of its node lists it.
    pub fn believe_mesh_nodes(&mut self) {
        self.captured.get_or_insert_default();
        let all = self.pods.keys().cloned().collect();
        self.rebuild(all);
    }

    pub fn trust_domain(&self) -> &TrustDomain {
        &self.settings.trust_domain
    }

    pub fn apply(&mut self, delta: Delta) -> Change {
        match delta {
            Delta::Apply(Object::Namespace(namespace)) => self.set_namespace(&namespace.name.clone(), Some(namespace)),
            Delta::Apply(Object::Node(node)) => self.set_node(&node.name.clone(), Some(node)),
            Delta::Apply(Object::Pod(pod)) => self.apply_pod(pod),
            Delta::Apply(Object::Service(service)) => self.apply_service(service),
            Delta::Apply(Object::EndpointSlice(slice)) => self.apply_slice(&slice),
            Delta::Apply(Object::ServiceCidr { name, cidrs }) => self.set_service_cidrs(&name, cidrs),
            Delta::Apply(Object::Gateway(gateway)) => self.set_gateway(&gateway.name.clone(), Some(gateway)),
            Delta::Apply(Object::NetworkPolicy(policy)) => self.set_network_policy(&policy.name, Some(policy.selects)),
            Delta::Apply(Object::MeshNode { node, captured }) => self.set_captured(&node, captured),
            Delta::Delete(object) => self.delete(&object),
        }
    }

    /// What an address is. Costs the same in a mesh of ten pods and of a hundred thousand.
    pub fn destination(&self, addr: SocketAddr) -> Destination {
        let ip = addr.ip().to_canonical();
        if let Some(service) = self.services_by_ip.get(&ip).and_then(|claims| self.services.get(claims.first()?)) {
            return match self.service_destination(service, addr.port()) {
                Some(found) => Destination::Service(found),
                None => Destination::NoSuchPort(service.clone()),
            };
        }
        if let Some(workload) = self.workload_by_ip(ip) {
            return Destination::Workload(workload.clone());
        }
        let external = self.services_by_external.get(&SocketAddr::new(ip, addr.port()));
        let external = external.and_then(|claims| self.services.get(claims.first()?));
        if let Some(found) = external.and_then(|service| self.service_destination(service, addr.port())) {
            return Destination::Service(found);
        }
        if self.is_node_address(ip) {
            return Destination::Node;
        }
        match self.scope(ip) {
            AddressScope::Cluster => Destination::Unknown,
            AddressScope::Outside => Destination::Outside,
        }
    }

    /// The Service's port with its endpoints, by the port's number.
    pub fn service_destination(&self, service: &Arc<Service>, port: u16) -> Option<ServiceDestination> {
        let port = service.ports.iter().find(|p| p.port == port)?;
        let candidates = self.endpoints.get(&service.name).and_then(|endpoints| endpoints.of_port(&port.name));
        Some(ServiceDestination {
            service: service.clone(),
            port: port.clone(),
            candidates: candidates.cloned().unwrap_or_default(),
        })
    }

    /// The live pod that holds an address: the first that claimed it.
    pub fn workload_by_ip(&self, ip: IpAddr) -> Option<&Arc<Workload>> {
        let claims = self.claims.get(&ip.to_canonical())?;
        claims.iter().filter_map(|uid| self.pods.get(uid)).find(|workload| workload.pod.is_live())
    }

    /// The pods that claim an address, whoever of them holds it.
    pub fn claimants(&self, ip: IpAddr) -> impl Iterator<Item = &PodUid> {
        self.claims.get(&ip.to_canonical()).into_iter().flat_map(Claims::iter)
    }

    pub fn workload(&self, uid: &PodUid) -> Option<&Arc<Workload>> {
        self.pods.get(uid)
    }

    pub fn workload_by_name(&self, name: &NamespacedName) -> Option<&Arc<Workload>> {
        self.pods.get(self.pods_by_name.get(name)?)
    }

    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.pods.values()
    }

    /// Every namespace by its name.
    pub fn namespaces(&self) -> impl Iterator<Item = (&Arc<str>, &Arc<Namespace>)> {
        self.namespaces.iter()
    }

    /// The pods of one node.
    pub fn workloads_on(&self, node: &str) -> impl Iterator<Item = &Arc<Workload>> {
        let uids = self.pods_by_node.get(node).into_iter().flat_map(SharedMap::keys);
        uids.filter_map(|uid| self.pods.get(uid))
    }

    pub fn service(&self, name: &NamespacedName) -> Option<&Arc<Service>> {
        self.services.get(name)
    }

    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }

    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.get(name).map(|node| &**node)
    }

    pub fn namespace(&self, name: &str) -> Option<&Namespace> {
        self.namespaces.get(name).map(|namespace| &**namespace)
    }

    /// The Services that have this address and port among their endpoints, sorted.
    pub fn services_at(&self, endpoint: SocketAddr) -> std::slice::Iter<'_, NamespacedName> {
        let endpoint = SocketAddr::new(endpoint.ip().to_canonical(), endpoint.port());
        self.services_by_endpoint.get(&endpoint).map_or(&[][..], |services| services).iter()
    }

    /// Addresses of this agent's own node, as its network namespace has them.
    pub fn set_local_addresses(&mut self, addresses: HashSet<IpAddr>) {
        self.local_addresses = Arc::new(addresses);
    }

    pub fn is_node_address(&self, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        self.node_addresses.contains_key(&ip) || self.local_addresses.contains(&ip)
    }

    pub fn scope(&self, ip: IpAddr) -> AddressScope {
        if self.ranges.contains(ip.to_canonical()) { AddressScope::Cluster } else { AddressScope::Outside }
    }

    fn delete(&mut self, object: &ObjectRef) -> Change {
        match object.kind {
            ObjectKind::Namespace => self.set_namespace(&object.name.name, None),
            ObjectKind::Node => self.set_node(&object.name.name, None),
            ObjectKind::Pod => match self.pods_by_name.get(&object.name).cloned() {
                Some(uid) => self.remove_pod(&uid),
                None => Change::default(),
            },
            ObjectKind::Service => self.remove_service(&object.name),
            ObjectKind::EndpointSlice => self.remove_slice(&object.name),
            ObjectKind::ServiceCidr => self.set_service_cidrs(&object.name.name, Vec::new()),
            ObjectKind::NetworkPolicy => self.set_network_policy(&object.name, None),
            ObjectKind::Gateway => self.set_gateway(&object.name, None),
            ObjectKind::MeshNode => self.set_captured(&object.name.name, BTreeSet::new()),
        }
    }

    fn set_service_cidrs(&mut self, name: &Arc<str>, cidrs: Vec<IpNet>) -> Change {
        cidrs.iter().for_each(|range| self.ranges.insert(*range));
        let old = if cidrs.is_empty() {
            self.service_cidrs.remove(name)
        } else {
            self.service_cidrs.insert(name.clone(), cidrs)
        };
        old.iter().flatten().for_each(|range| self.ranges.remove(*range));
        Change::default()
    }
}

#[cfg(test)]
mod cost;
#[cfg(test)]
pub(crate) mod tests;
