use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;

use super::network_policy::NetworkPolicies;
use super::ranges::Ranges;
use super::{
    AddressScope, Candidate, Destination, EndpointSlice, Identity, Membership, Namespace, NamespacedName,
    NetworkPolicy, Node, Pod, PodSelection, PodUid, Service, ServiceDestination, ServiceKind, TrustDomain, Waypoint,
    Workload,
};

/// The tables. One object applied costs in proportion to that object and to what refers to it, not to the model.
#[derive(Debug)]
pub struct Mesh {
    settings: MeshSettings,
    namespaces: HashMap<Arc<str>, Namespace>,
    nodes: HashMap<Arc<str>, Node>,
    node_addresses: HashMap<IpAddr, usize>,
    /// Every range of the cluster: given by flag, by nodes, by ServiceCIDRs.
    ranges: Ranges,
    pods: HashMap<PodUid, Arc<Workload>>,
    pods_by_name: HashMap<NamespacedName, PodUid>,
    pods_by_namespace: HashMap<Arc<str>, BTreeSet<PodUid>>,
    pods_by_node: HashMap<Arc<str>, BTreeSet<PodUid>>,
    /// Who claims an address, in the order of the claims: the first live holder has it.
    claims: HashMap<IpAddr, Vec<PodUid>>,
    services: HashMap<NamespacedName, Arc<Service>>,
    /// Which Services claim an address as their ClusterIP, in the order of the claims: the first has it.
    services_by_ip: HashMap<IpAddr, Vec<NamespacedName>>,
    /// Which Services claim an address of the outside, in the order of the claims: the first that has the port has it.
    services_by_external_ip: HashMap<IpAddr, Vec<NamespacedName>>,
    slices: HashMap<NamespacedName, EndpointSlice>,
    slices_by_service: HashMap<NamespacedName, BTreeSet<NamespacedName>>,
    /// Endpoints of each Service by port name, joined over its slices.
    candidates: HashMap<NamespacedName, HashMap<Arc<str>, Arc<[Candidate]>>>,
    services_by_endpoint: HashMap<SocketAddr, BTreeSet<NamespacedName>>,
    service_cidrs: BTreeMap<Arc<str>, Vec<IpNet>>,
    local_addresses: HashSet<IpAddr>,
    network_policies: NetworkPolicies,
}

/// What holds for the whole mesh and does not change while the agent runs.
#[derive(Clone, Debug)]
pub struct MeshSettings {
    pub trust_domain: TrustDomain,
    /// Pod and Service ranges given by flag, beside those that Node and ServiceCIDR objects name.
    pub cluster_cidrs: Vec<IpNet>,
}

/// One object of the model.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Object {
    Namespace(Namespace),
    Node(Node),
    Pod(Pod),
    Service(Service),
    EndpointSlice(EndpointSlice),
    /// A ServiceCIDR object (`networking.k8s.io/v1`): a range that ClusterIPs come from.
    ServiceCidr {
        name: Arc<str>,
        cidrs: Vec<IpNet>,
    },
    NetworkPolicy(NetworkPolicy),
}

impl Object {
    pub fn reference(&self) -> ObjectRef {
        match self {
            Self::Namespace(n) => ObjectRef::cluster(ObjectKind::Namespace, n.name.clone()),
            Self::Node(n) => ObjectRef::cluster(ObjectKind::Node, n.name.clone()),
            Self::Pod(p) => ObjectRef { kind: ObjectKind::Pod, name: p.name.clone() },
            Self::Service(s) => ObjectRef { kind: ObjectKind::Service, name: s.name.clone() },
            Self::EndpointSlice(s) => ObjectRef { kind: ObjectKind::EndpointSlice, name: s.name.clone() },
            Self::ServiceCidr { name, .. } => ObjectRef::cluster(ObjectKind::ServiceCidr, name.clone()),
            Self::NetworkPolicy(p) => ObjectRef { kind: ObjectKind::NetworkPolicy, name: p.name.clone() },
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum ObjectKind {
    Namespace,
    Node,
    Pod,
    Service,
    EndpointSlice,
    ServiceCidr,
    NetworkPolicy,
}

/// Names one object; the namespace is empty for cluster-wide kinds.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ObjectRef {
    pub kind: ObjectKind,
    pub name: NamespacedName,
}

impl ObjectRef {
    fn cluster(kind: ObjectKind, name: Arc<str>) -> Self {
        Self { kind, name: NamespacedName { namespace: "".into(), name } }
    }
}

/// One step of the model.
#[derive(Clone, PartialEq, Eq, Debug)]
#[expect(clippy::large_enum_variant, reason = "most steps apply an object, and none is kept")]
pub enum Delta {
    Apply(Object),
    Delete(ObjectRef),
}

/// What a step changed, for those who keep something that follows the model.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Change {
    /// Pods that came, changed or went, also those whose namespace or node changed.
    pub pods: BTreeSet<PodUid>,
    /// Services whose ports, addresses or endpoints changed.
    pub services: BTreeSet<NamespacedName>,
}

impl Change {
    pub fn is_empty(&self) -> bool {
        self.pods.is_empty() && self.services.is_empty()
    }

    pub fn merge(&mut self, other: Self) {
        self.pods.extend(other.pods);
        self.services.extend(other.services);
    }
}

impl Mesh {
    pub fn new(settings: MeshSettings) -> Self {
        let mut ranges = Ranges::default();
        settings.cluster_cidrs.iter().for_each(|range| ranges.insert(*range));
        Self {
            ranges,
            settings,
            namespaces: HashMap::new(),
            nodes: HashMap::new(),
            node_addresses: HashMap::new(),
            pods: HashMap::new(),
            pods_by_name: HashMap::new(),
            pods_by_namespace: HashMap::new(),
            pods_by_node: HashMap::new(),
            claims: HashMap::new(),
            services: HashMap::new(),
            services_by_ip: HashMap::new(),
            services_by_external_ip: HashMap::new(),
            slices: HashMap::new(),
            slices_by_service: HashMap::new(),
            candidates: HashMap::new(),
            services_by_endpoint: HashMap::new(),
            service_cidrs: BTreeMap::new(),
            local_addresses: HashSet::new(),
            network_policies: NetworkPolicies::default(),
        }
    }

    pub fn trust_domain(&self) -> &TrustDomain {
        &self.settings.trust_domain
    }

    pub fn apply(&mut self, delta: Delta) -> Change {
        match delta {
            Delta::Apply(Object::Namespace(namespace)) => {
                let name = namespace.name.clone();
                self.namespaces.insert(name.clone(), namespace);
                self.rebuild_pods_of_namespace(&name)
            }
            Delta::Apply(Object::Node(node)) => self.set_node(&node.name.clone(), Some(node)),
            Delta::Apply(Object::Pod(pod)) => self.apply_pod(pod),
            Delta::Apply(Object::Service(service)) => self.apply_service(service),
            Delta::Apply(Object::EndpointSlice(slice)) => self.apply_slice(slice),
            Delta::Apply(Object::ServiceCidr { name, cidrs }) => self.set_service_cidrs(name, cidrs),
            Delta::Apply(Object::NetworkPolicy(policy)) => self.set_network_policy(&policy.name, Some(policy.selects)),
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
        let external = self.services_by_external_ip.get(&ip).into_iter().flatten();
        let mut external = external.filter_map(|name| self.service_destination(self.services.get(name)?, addr.port()));
        if let Some(found) = external.next() {
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
        let candidates = self.candidates.get(&service.name).and_then(|by_port| by_port.get(&port.name));
        Some(ServiceDestination {
            service: service.clone(),
            port: port.clone(),
            candidates: candidates.cloned().unwrap_or_else(|| Arc::from([])),
        })
    }

    /// The live pod that holds an address: the first that claimed it.
    pub fn workload_by_ip(&self, ip: IpAddr) -> Option<&Arc<Workload>> {
        let claims = self.claims.get(&ip.to_canonical())?;
        claims.iter().filter_map(|uid| self.pods.get(uid)).find(|workload| workload.pod.is_live())
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

    /// The pods of one node.
    pub fn workloads_on(&self, node: &str) -> impl Iterator<Item = &Arc<Workload>> {
        self.pods_by_node.get(node).into_iter().flatten().filter_map(|uid| self.pods.get(uid))
    }

    pub fn service(&self, name: &NamespacedName) -> Option<&Arc<Service>> {
        self.services.get(name)
    }

    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }

    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.get(name)
    }

    pub fn namespace(&self, name: &str) -> Option<&Namespace> {
        self.namespaces.get(name)
    }

    /// The Services that have this address and port among their endpoints.
    pub fn services_at(&self, endpoint: SocketAddr) -> impl Iterator<Item = &NamespacedName> {
        let endpoint = SocketAddr::new(endpoint.ip().to_canonical(), endpoint.port());
        self.services_by_endpoint.get(&endpoint).into_iter().flatten()
    }

    /// Addresses of this agent's own node, as its network namespace has them.
    pub fn set_local_addresses(&mut self, addresses: HashSet<IpAddr>) {
        self.local_addresses = addresses;
    }

    pub fn is_node_address(&self, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        self.node_addresses.contains_key(&ip) || self.local_addresses.contains(&ip)
    }

    /// Whether somebody else's policy stands at the pod's interface, so that its traffic must cross it.
    pub fn is_under_network_policy(&self, pod: &PodUid) -> bool {
        self.network_policies.selects(pod)
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

    pub fn scope(&self, ip: IpAddr) -> AddressScope {
        if self.ranges.contains(ip.to_canonical()) { AddressScope::Cluster } else { AddressScope::Outside }
    }

    fn delete(&mut self, object: &ObjectRef) -> Change {
        match object.kind {
            ObjectKind::Namespace => {
                self.namespaces.remove(&object.name.name);
                self.rebuild_pods_of_namespace(&object.name.name)
            }
            ObjectKind::Node => self.set_node(&object.name.name, None),
            ObjectKind::Pod => match self.pods_by_name.get(&object.name).cloned() {
                Some(uid) => self.remove_pod(&uid),
                None => Change::default(),
            },
            ObjectKind::Service => self.remove_service(&object.name),
            ObjectKind::EndpointSlice => self.remove_slice(&object.name),
            ObjectKind::ServiceCidr => self.set_service_cidrs(object.name.name.clone(), Vec::new()),
            ObjectKind::NetworkPolicy => self.set_network_policy(&object.name, None),
        }
    }

    fn apply_pod(&mut self, pod: Pod) -> Change {
        let mut change = Change::default();
        let replaced = self.pods_by_name.get(&pod.name).filter(|uid| **uid != pod.uid).cloned();
        if let Some(old) = replaced {
            change.merge(self.remove_pod(&old));
        }
        if self.pods.get(&pod.uid).is_some_and(|old| *old.name() != pod.name) {
            change.merge(self.remove_pod(&pod.uid));
        }
        let previous = self.pods.get(&pod.uid).cloned();
        let workload = Arc::new(self.build(Arc::new(pod)));
        if previous.as_ref() == Some(&workload) {
            return change;
        }
        let uid = workload.uid().clone();
        let pod = &workload.pod;
        let held = held_addresses(pod);
        if let Some(previous) = &previous {
            for ip in held_addresses(&previous.pod).difference(&held) {
                self.release(*ip, &uid);
            }
            if previous.pod.node != pod.node {
                self.leave_node(previous);
            }
        }
        for ip in held {
            let claims = self.claims.entry(ip).or_default();
            if !claims.contains(&uid) {
                claims.push(uid.clone());
            }
        }
        if let Some(node) = &pod.node {
            self.pods_by_node.entry(node.clone()).or_default().insert(uid.clone());
        }
        self.pods_by_name.insert(pod.name.clone(), uid.clone());
        self.pods_by_namespace.entry(pod.name.namespace.clone()).or_default().insert(uid.clone());
        self.network_policies.set_pod(pod);
        self.pods.insert(uid.clone(), workload);
        change.pods.insert(uid);
        change
    }

    fn remove_pod(&mut self, uid: &PodUid) -> Change {
        let Some(workload) = self.pods.remove(uid) else { return Change::default() };
        for ip in held_addresses(&workload.pod) {
            self.release(ip, uid);
        }
        self.leave_node(&workload);
        self.network_policies.remove_pod(uid);
        self.pods_by_name.remove(workload.name());
        remove_from(&mut self.pods_by_namespace, &workload.name().namespace, uid);
        Change { pods: BTreeSet::from([uid.clone()]), ..Change::default() }
    }

    fn release(&mut self, ip: IpAddr, uid: &PodUid) {
        if let Some(claims) = self.claims.get_mut(&ip) {
            claims.retain(|other| other != uid);
            if claims.is_empty() {
                self.claims.remove(&ip);
            }
        }
    }

    fn leave_node(&mut self, workload: &Workload) {
        if let Some(node) = &workload.pod.node {
            remove_from(&mut self.pods_by_node, node, workload.uid());
        }
    }

    fn build(&self, pod: Arc<Pod>) -> Workload {
        let namespace = self.namespaces.get(&pod.name.namespace).map(|n| &n.settings);
        let membership = Membership::of(&pod.name, pod.host_network, namespace, &pod.settings);
        Workload {
            identity: Identity::new(&self.settings.trust_domain, &pod.name.namespace, &pod.service_account),
            captured: membership.is_joined(),
            membership,
            zone: pod.node.as_ref().and_then(|node| self.nodes.get(node)).and_then(|node| node.zone.clone()),
            pod,
        }
    }

    fn rebuild_pods_of_namespace(&mut self, namespace: &str) -> Change {
        let uids: Vec<PodUid> = self.pods_by_namespace.get(namespace).into_iter().flatten().cloned().collect();
        self.rebuild(uids)
    }

    fn set_node(&mut self, name: &Arc<str>, node: Option<Node>) -> Change {
        if let Some(old) = self.nodes.remove(name) {
            old.pod_cidrs.iter().for_each(|range| self.ranges.remove(*range));
            for address in &old.addresses {
                if let Entry::Occupied(mut count) = self.node_addresses.entry(*address) {
                    *count.get_mut() -= 1;
                    if *count.get() == 0 {
                        count.remove();
                    }
                }
            }
        }
        if let Some(node) = node {
            node.pod_cidrs.iter().for_each(|range| self.ranges.insert(*range));
            node.addresses.iter().for_each(|address| *self.node_addresses.entry(*address).or_default() += 1);
            self.nodes.insert(name.clone(), node);
        }
        let uids: Vec<PodUid> = self.pods_by_node.get(name).into_iter().flatten().cloned().collect();
        self.rebuild(uids)
    }

    fn set_service_cidrs(&mut self, name: Arc<str>, cidrs: Vec<IpNet>) -> Change {
        cidrs.iter().for_each(|range| self.ranges.insert(*range));
        let old =
            if cidrs.is_empty() { self.service_cidrs.remove(&name) } else { self.service_cidrs.insert(name, cidrs) };
        old.iter().flatten().for_each(|range| self.ranges.remove(*range));
        Change::default()
    }

    fn set_network_policy(&mut self, name: &NamespacedName, selects: Option<PodSelection>) -> Change {
        if name.namespace.is_empty() {
            let before = self.network_policies.stands_over_cluster();
            self.network_policies.set_of_cluster(&name.name, selects.is_some());
            let changed = self.network_policies.stands_over_cluster() != before;
            let pods = if changed { self.pods.keys().cloned().collect() } else { BTreeSet::new() };
            return Change { pods, ..Change::default() };
        }
        let of_namespace = self.pods_by_namespace.get(&name.namespace).into_iter().flatten();
        let pods = of_namespace.filter_map(|uid| self.pods.get(uid)).map(|workload| &*workload.pod);
        Change { pods: self.network_policies.set(name, selects, pods), ..Change::default() }
    }

    fn rebuild(&mut self, uids: Vec<PodUid>) -> Change {
        let mut change = Change::default();
        for uid in uids {
            let Some(pod) = self.pods.get(&uid).map(|workload| workload.pod.clone()) else { continue };
            let workload = Arc::new(self.build(pod));
            if self.pods.insert(uid.clone(), workload.clone()).as_ref() != Some(&workload) {
                change.pods.insert(uid);
            }
        }
        change
    }

    fn apply_service(&mut self, service: Service) -> Change {
        let name = service.name.clone();
        if self.services.get(&name).is_some_and(|old| **old == service) {
            return Change::default();
        }
        let old = self.services.insert(name.clone(), Arc::new(service));
        let new = &self.services[&name];
        let (before, now) = (old.as_deref().map(cluster_ips).unwrap_or_default(), cluster_ips(new));
        claim(&mut self.services_by_ip, &name, &before, &now);
        let (before, now) = (old.as_deref().map(external_ips).unwrap_or_default(), external_ips(new));
        claim(&mut self.services_by_external_ip, &name, &before, &now);
        Change { services: BTreeSet::from([name]), ..Change::default() }
    }

    fn remove_service(&mut self, name: &NamespacedName) -> Change {
        let Some(service) = self.services.remove(name) else { return Change::default() };
        claim(&mut self.services_by_ip, name, &cluster_ips(&service), &BTreeSet::new());
        claim(&mut self.services_by_external_ip, name, &external_ips(&service), &BTreeSet::new());
        Change { services: BTreeSet::from([name.clone()]), ..Change::default() }
    }

    fn apply_slice(&mut self, slice: EndpointSlice) -> Change {
        if self.slices.get(&slice.name) == Some(&slice) {
            return Change::default();
        }
        let mut change = match self.slices.get(&slice.name) {
            Some(old) if old.service != slice.service => self.remove_slice(&slice.name.clone()),
            _ => Change::default(),
        };
        let service = slice.service.clone();
        self.slices_by_service.entry(service.clone()).or_default().insert(slice.name.clone());
        self.slices.insert(slice.name.clone(), slice);
        self.rebuild_candidates(&service);
        change.services.insert(service);
        change
    }

    fn remove_slice(&mut self, name: &NamespacedName) -> Change {
        let Some(slice) = self.slices.remove(name) else { return Change::default() };
        remove_from(&mut self.slices_by_service, &slice.service, name);
        self.rebuild_candidates(&slice.service);
        Change { services: BTreeSet::from([slice.service]), ..Change::default() }
    }

    fn rebuild_candidates(&mut self, service: &NamespacedName) {
        for candidate in
            self.candidates.remove(service).into_iter().flat_map(HashMap::into_values).flat_map(|c| c.to_vec())
        {
            remove_from(&mut self.services_by_endpoint, &candidate.addr, service);
        }
        let mut by_port: HashMap<Arc<str>, Vec<Candidate>> = HashMap::new();
        let mut seen: HashSet<(Arc<str>, SocketAddr)> = HashSet::new();
        let slices = self.slices_by_service.get(service).into_iter().flatten().filter_map(|name| self.slices.get(name));
        for slice in slices {
            for (port, number) in &slice.ports {
                let candidates = by_port.entry(port.clone()).or_default();
                for endpoint in &slice.endpoints {
                    for ip in &endpoint.addresses {
                        let addr = SocketAddr::new(ip.to_canonical(), *number);
                        // Two slices may list one endpoint while the controller moves it: it counts once.
                        if seen.insert((port.clone(), addr)) {
                            candidates.push(Candidate::of(endpoint, addr));
                        }
                        self.services_by_endpoint.entry(addr).or_default().insert(service.clone());
                    }
                }
            }
        }
        if !by_port.is_empty() {
            let shared = by_port.into_iter().map(|(port, candidates)| (port, candidates.into())).collect();
            self.candidates.insert(service.clone(), shared);
        }
    }
}

/// The addresses that a pod holds: none of its own on the host's network, none any more once it has finished.
fn held_addresses(pod: &Pod) -> BTreeSet<IpAddr> {
    if pod.host_network || !pod.is_live() {
        return BTreeSet::new();
    }
    pod.ips.iter().map(IpAddr::to_canonical).collect()
}

fn cluster_ips(service: &Service) -> BTreeSet<IpAddr> {
    match &service.kind {
        ServiceKind::ClusterIp(ips) => ips.iter().map(IpAddr::to_canonical).collect(),
        ServiceKind::Headless | ServiceKind::ExternalName => BTreeSet::new(),
    }
}

fn external_ips(service: &Service) -> BTreeSet<IpAddr> {
    service.external_ips.iter().map(IpAddr::to_canonical).collect()
}

/// Moves a Service's claims from some addresses to others; a claim that stays keeps its place.
fn claim(
    claims: &mut HashMap<IpAddr, Vec<NamespacedName>>,
    name: &NamespacedName,
    before: &BTreeSet<IpAddr>,
    now: &BTreeSet<IpAddr>,
) {
    for ip in before.difference(now) {
        if let Some(names) = claims.get_mut(ip) {
            names.retain(|other| other != name);
            if names.is_empty() {
                claims.remove(ip);
            }
        }
    }
    for ip in now.difference(before) {
        claims.entry(*ip).or_default().push(name.clone());
    }
}

fn remove_from<K: std::hash::Hash + Eq, V: Ord>(map: &mut HashMap<K, BTreeSet<V>>, key: &K, value: &V) {
    if let Some(set) = map.get_mut(key) {
        set.remove(value);
        if set.is_empty() {
            map.remove(key);
        }
    }
}

#[cfg(test)]
mod tests;
