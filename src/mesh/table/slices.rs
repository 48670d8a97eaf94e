//! EndpointSlices, joined into the endpoints of each Service.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;

use super::super::{Candidate, Candidates, EndpointSlice, NamespacedName};
use super::{Change, Mesh};

/// What one EndpointSlice brings its Service.
#[derive(PartialEq, Eq, Debug)]
pub(super) struct Slice {
    service: NamespacedName,
    /// By port name.
    ports: BTreeMap<Arc<str>, Arc<[Candidate]>>,
}

/// The endpoints of one Service. A slice that changes costs one pointer for each other slice.
#[derive(Clone, Debug)]
pub(super) struct Endpoints {
    by_slice: BTreeMap<NamespacedName, Arc<Slice>>,
    by_port: BTreeMap<Arc<str>, Candidates>,
    /// The Service alone, as most of its endpoints refer to it.
    alone: Arc<[NamespacedName]>,
}

impl Mesh {
    pub(super) fn apply_slice(&mut self, slice: &EndpointSlice) -> Change {
        let name = &slice.name;
        let new = Arc::new(self.build_slice(slice));
        let old = self.slices.get(name).cloned();
        if old.as_ref() == Some(&new) {
            return Change::default();
        }
        let mut change = match &old {
            Some(old) if old.service != new.service => self.remove_slice(name),
            _ => Change::default(),
        };
        self.slices.insert(name.clone(), new.clone());
        change.merge(self.replace_slice(name, old.filter(|old| old.service == new.service).as_deref(), Some(&new)));
        change
    }

    pub(super) fn remove_slice(&mut self, name: &NamespacedName) -> Change {
        let Some(slice) = self.slices.remove(name) else { return Change::default() };
        self.replace_slice(name, Some(&slice), None)
    }

    /// Where a Service leads to, on every port.
    pub(super) fn endpoint_addresses(&self, service: &NamespacedName) -> BTreeSet<SocketAddr> {
        let slices = self.endpoints.get(service).into_iter().flat_map(|endpoints| endpoints.by_slice.values());
        slices.flat_map(|slice| slice.addresses()).collect()
    }

    fn build_slice(&self, slice: &EndpointSlice) -> Slice {
        let mut ports: BTreeMap<Arc<str>, Vec<Candidate>> = BTreeMap::new();
        let mut seen: HashSet<(&str, SocketAddr)> = HashSet::new();
        for (port, number) in &slice.ports {
            let candidates = ports.entry(port.clone()).or_default();
            for endpoint in &slice.endpoints {
                // One copy of the name, the pod's own, where the pod is known already.
                let named = endpoint.pod.as_ref().map(|pod| match self.workload_by_name(pod) {
                    Some(workload) => workload.name().clone(),
                    None => pod.clone(),
                });
                for ip in &endpoint.addresses {
                    let addr = SocketAddr::new(ip.to_canonical(), *number);
                    if seen.insert((port, addr)) {
                        candidates.push(Candidate { pod: named.clone(), ..Candidate::of(endpoint, addr) });
                    }
                }
            }
        }
        let ports = ports.into_iter().map(|(port, candidates)| (port, candidates.into())).collect();
        Slice { service: slice.service.clone(), ports }
    }

    /// Both versions of the slice, if there are two, are of one Service.
    fn replace_slice(&mut self, name: &NamespacedName, old: Option<&Slice>, new: Option<&Arc<Slice>>) -> Change {
        let Some(service) = old.or(new.map(|new| &**new)).map(|slice| slice.service.clone()) else {
            return Change::default();
        };
        let known = self.endpoints.get(&service).map(|endpoints| Endpoints::clone(endpoints));
        let mut endpoints = known.unwrap_or_else(|| Endpoints::none(&service));
        match new {
            Some(new) => endpoints.by_slice.insert(name.clone(), new.clone()),
            None => endpoints.by_slice.remove(name),
        };
        let ports = [old, new.map(|new| &**new)].into_iter().flatten().flat_map(|slice| slice.ports.keys());
        ports.collect::<BTreeSet<_>>().into_iter().for_each(|port| endpoints.join(port));

        let before = old.map(Slice::addresses).unwrap_or_default();
        let now = new.map(|new| new.addresses()).unwrap_or_default();
        let mut change = Change { services: BTreeSet::from([service.clone()]), ..Change::default() };
        change.endpoints.extend(before.difference(&now).copied().filter(|addr| self.leave(*addr, &service)));
        change.endpoints.extend(now.difference(&before).copied().filter(|addr| self.enter(*addr, &endpoints.alone)));
        if endpoints.by_slice.is_empty() {
            self.endpoints.remove(&service);
        } else {
            self.endpoints.insert(service, Arc::new(endpoints));
        }
        change
    }

    /// One more slice of a Service lists an address; whether it is the first.
    fn enter(&mut self, addr: SocketAddr, service: &Arc<[NamespacedName]>) -> bool {
        let name = &service[0];
        let Some(services) = self.services_by_endpoint.get(&addr) else {
            self.services_by_endpoint.insert(addr, service.clone());
            return true;
        };
        match services.binary_search(name) {
            Ok(_) => {
                let key = (addr, name.clone());
                let count = self.repeated.get(&key).copied().unwrap_or(1);
                self.repeated.insert(key, count + 1);
                false
            }
            Err(at) => {
                let mut services = services.to_vec();
                services.insert(at, name.clone());
                self.services_by_endpoint.insert(addr, services.into());
                true
            }
        }
    }

    /// One slice less of a Service lists an address; whether it was the last.
    fn leave(&mut self, addr: SocketAddr, service: &NamespacedName) -> bool {
        let key = (addr, service.clone());
        if let Some(count) = self.repeated.remove(&key) {
            if count > 2 {
                self.repeated.insert(key, count - 1);
            }
            return false;
        }
        let left = self.services_by_endpoint.get(&addr).into_iter().flat_map(|services| services.iter());
        let left: Arc<[NamespacedName]> = left.filter(|other| *other != service).cloned().collect();
        if left.is_empty() {
            self.services_by_endpoint.remove(&addr);
        } else {
            self.services_by_endpoint.insert(addr, left);
        }
        true
    }
}

impl Slice {
    fn addresses(&self) -> BTreeSet<SocketAddr> {
        self.ports.values().flat_map(|candidates| candidates.iter()).map(|candidate| candidate.addr).collect()
    }
}

impl Endpoints {
    fn none(service: &NamespacedName) -> Self {
        Self { by_slice: BTreeMap::new(), by_port: BTreeMap::new(), alone: Arc::from([service.clone()]) }
    }

    pub(super) fn of_port(&self, name: &str) -> Option<&Candidates> {
        self.by_port.get(name)
    }

    /// Whether a port, by its name, leads to an address.
    pub(super) fn leads(&self, port: &str, addr: SocketAddr) -> bool {
        let of_port = self.by_slice.values().filter_map(|slice| slice.ports.get(port));
        // All candidates of one slice have one port.
        let near =
            of_port.filter(|candidates| candidates.first().is_some_and(|first| first.addr.port() == addr.port()));
        near.flat_map(|candidates| candidates.iter()).any(|candidate| candidate.addr == addr)
    }

    fn join(&mut self, port: &Arc<str>) {
        let joined: Candidates = self.by_slice.values().filter_map(|slice| slice.ports.get(port).cloned()).collect();
        if joined.is_empty() {
            self.by_port.remove(port);
        } else {
            self.by_port.insert(port.clone(), joined);
        }
    }
}
