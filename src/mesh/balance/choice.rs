use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use super::Client;
use crate::mesh::{Candidate, Candidates, InternalTrafficPolicy, Service, ServiceDestination, TrafficDistribution};

/// A Service's port, by where the Service lies: [`Choice`] keeps it, so that no other can lie there.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct ChoiceKey {
    service: usize,
    port: u16,
    v6: bool,
}

impl ChoiceKey {
    pub(super) fn of(destination: &ServiceDestination, client: &Client) -> Self {
        Self { service: Arc::as_ptr(&destination.service).addr(), port: destination.port.port, v6: client.ip.is_ipv6() }
    }
}

/// Which endpoints of a Service's port may be chosen, worked out once for each list of endpoints.
#[derive(Clone, Debug)]
pub(super) struct Choice {
    pub(super) used: Instant,
    /// The near ones, sorted; some of `all`.
    pub(super) preferred: Arc<[SocketAddr]>,
    /// All that may be chosen, sorted.
    pub(super) all: Arc<[SocketAddr]>,
    candidates: Candidates,
    service: Arc<Service>,
    node: Option<Arc<str>>,
    zone: Option<Arc<str>>,
}

impl Choice {
    pub(super) fn work_out(destination: &ServiceDestination, client: &Client, now: Instant) -> Self {
        let all = eligible(destination, client);
        Self {
            used: now,
            preferred: addresses(&near(&all, &destination.service, client)),
            all: addresses(&all),
            candidates: destination.candidates.clone(),
            service: destination.service.clone(),
            node: client.node.clone(),
            zone: client.zone.clone(),
        }
    }

    pub(super) fn is_for(&self, destination: &ServiceDestination, client: &Client) -> bool {
        self.candidates.are(&destination.candidates)
            && Arc::ptr_eq(&self.service, &destination.service)
            && self.node == client.node
            && self.zone == client.zone
    }

    pub(super) fn has(&self, addr: &SocketAddr) -> bool {
        self.all.binary_search(addr).is_ok()
    }
}

/// The endpoints that a connection may go to, sorted: the near ones, and all of them, which serve where no near one
/// does.
pub fn endpoints(destination: &ServiceDestination, client: &Client) -> (Vec<SocketAddr>, Vec<SocketAddr>) {
    let all = eligible(destination, client);
    (addresses(&near(&all, &destination.service, client)).to_vec(), addresses(&all).to_vec())
}

/// The candidates that may be chosen, near and far.
fn eligible<'a>(destination: &'a ServiceDestination, client: &Client) -> Vec<&'a Candidate> {
    let service = &destination.service;
    let mut pool: Vec<&Candidate> = destination.candidates.iter().collect();
    #[cfg(test)]
    pool.iter().for_each(|_| crate::mesh::work::step());
    if pool.iter().any(|c| c.addr.is_ipv6() == client.ip.is_ipv6()) {
        pool.retain(|c| c.addr.is_ipv6() == client.ip.is_ipv6());
    }
    if service.internal_traffic_policy == InternalTrafficPolicy::Local {
        pool.retain(|c| c.node.is_some() && c.node == client.node);
    }
    // Terminating endpoints serve while there is no other (KEP-1669).
    let ready = |c: &Candidate| c.ready || service.publish_not_ready_addresses;
    if pool.iter().any(|c| ready(c)) {
        pool.retain(|c| ready(c));
    } else {
        pool.retain(|c| c.serving && c.terminating);
    }
    pool
}

fn addresses(candidates: &[&Candidate]) -> Arc<[SocketAddr]> {
    let mut addresses: Vec<SocketAddr> = candidates.iter().map(|candidate| candidate.addr).collect();
    addresses.sort_unstable();
    addresses.dedup();
    addresses.into()
}

/// The candidates that lie near: by hints where every one of them has hints and some name us (the safeguards of
/// kube-proxy), else by what the Service prefers; all of them where none lies near, or where all are the node's own.
fn near<'a>(pool: &[&'a Candidate], service: &Service, client: &Client) -> Vec<&'a Candidate> {
    if service.internal_traffic_policy == InternalTrafficPolicy::Local {
        return pool.to_vec();
    }
    let some = |near: Vec<&'a Candidate>| Some(near).filter(|near| !near.is_empty());
    let hinted = |hints: fn(&Candidate) -> &[Arc<str>], own: &Option<Arc<str>>| {
        let own = own.as_ref().filter(|_| pool.iter().all(|c| !hints(c).is_empty()))?;
        some(pool.iter().copied().filter(|c| hints(c).contains(own)).collect())
    };
    let same = |of: fn(&Candidate) -> &Option<Arc<str>>, own: &Option<Arc<str>>| {
        own.as_ref()?;
        some(pool.iter().copied().filter(|c| of(c) == own).collect())
    };
    let distribution = service.traffic_distribution;
    let by_hints = || hinted(|c| &c.node_hints, &client.node).or_else(|| hinted(|c| &c.zone_hints, &client.zone));
    let by_node = || {
        distribution.filter(|d| *d == TrafficDistribution::PreferSameNode)?;
        same(|c| &c.node, &client.node)
    };
    let by_zone = || {
        distribution?;
        same(|c| &c.zone, &client.zone)
    };
    by_hints().or_else(by_node).or_else(by_zone).unwrap_or_else(|| pool.to_vec())
}
