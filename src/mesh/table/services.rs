//! Services, and who of them has which address.

use std::collections::BTreeSet;
use std::hash::Hash;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::super::claims::Claims;
use super::super::shared_map::SharedMap;
use super::super::{NamespacedName, Service, ServiceKind};
use super::{Change, Mesh};

impl Mesh {
    pub(super) fn apply_service(&mut self, service: Service) -> Change {
        if self.services.get(&service.name).is_some_and(|old| **old == service) {
            return Change::default();
        }
        let new = Arc::new(service);
        let old = self.services.insert(new.name.clone(), new.clone());
        self.pass_claims(&new.name, old.as_deref(), Some(&new));
        self.changed(&new.name, old.as_deref(), Some(&new))
    }

    pub(super) fn remove_service(&mut self, name: &NamespacedName) -> Change {
        let Some(service) = self.services.remove(name) else { return Change::default() };
        self.pass_claims(name, Some(&service), None);
        self.changed(name, Some(&service), None)
    }

    /// The endpoints are touched too where another waypoint stands before them now, or none, or ports say that they speak
    /// something else.
    fn changed(&self, name: &NamespacedName, before: Option<&Service>, now: Option<&Service>) -> Change {
        let waypoint = |service: Option<&Service>| service.and_then(|service| service.settings.waypoint.clone());
        let ports = |service: Option<&Service>| service.map(|service| service.ports.clone());
        let same = waypoint(before) == waypoint(now) && ports(before) == ports(now);
        let endpoints = if same { BTreeSet::new() } else { self.endpoint_addresses(name) };
        Change { services: BTreeSet::from([name.clone()]), endpoints, ..Change::default() }
    }

    fn pass_claims(&mut self, name: &NamespacedName, before: Option<&Service>, now: Option<&Service>) {
        let ips = |service: Option<&Service>| service.map(cluster_ips).unwrap_or_default();
        claim(&mut self.services_by_ip, name, &ips(before), &ips(now));
        let external = |service: Option<&Service>| service.map(external_addresses).unwrap_or_default();
        claim(&mut self.services_by_external, name, &external(before), &external(now));
    }
}

fn cluster_ips(service: &Service) -> BTreeSet<IpAddr> {
    match &service.kind {
        ServiceKind::ClusterIp(ips) => ips.iter().map(IpAddr::to_canonical).collect(),
        ServiceKind::Headless | ServiceKind::ExternalName => BTreeSet::new(),
    }
}

fn external_addresses(service: &Service) -> BTreeSet<SocketAddr> {
    let ips = service.external_ips.iter().map(IpAddr::to_canonical);
    ips.flat_map(|ip| service.ports.iter().map(move |port| SocketAddr::new(ip, port.port))).collect()
}

/// Moves a Service's claims from some addresses to others; a claim that stays keeps its place.
fn claim<A: Hash + Ord + Copy>(
    claims: &mut SharedMap<A, Claims<NamespacedName>>,
    name: &NamespacedName,
    before: &BTreeSet<A>,
    now: &BTreeSet<A>,
) {
    for address in before.difference(now) {
        claims.change(address, |claims| claims.remove(name));
    }
    for address in now.difference(before) {
        claims.change(address, |claims| claims.add(name.clone()));
    }
}
