use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use super::Client;
use super::draw::Ring;
use crate::mesh::{Candidate, Candidates, InternalTrafficPolicy, Service, ServiceDestination, TrafficDistribution};

/// A Service's port, by where the Service lies: [`Choice`] keeps it, so that no other can lie there.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct ChoiceKey {
    service: usize,
    port: u16,
    v6: bool,
    /// In place of what the Service says.
    distribution: Option<Option<TrafficDistribution>>,
}

impl ChoiceKey {
    pub(super) fn of(
        destination: &ServiceDestination,
        client: &Client,
        distribution: Option<Option<TrafficDistribution>>,
    ) -> Self {
        let (service, port) = (Arc::as_ptr(&destination.service).addr(), destination.port.port);
        Self { service, port, v6: client.ip.is_ipv6(), distribution }
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
    /// The key of each of them, in their order.
    pub(super) keys: Arc<[u64]>,
    /// Those that came since the Service was first asked for, and when.
    pub(super) new: Arc<HashMap<SocketAddr, Instant>>,
    /// Whose turn it is.
    pub(super) turn: Arc<AtomicUsize>,
    /// Made when it is first wanted.
    pub(super) ring: Arc<OnceLock<Ring>>,
    candidates: Candidates,
    service: Arc<Service>,
    node: Option<Arc<str>>,
    zone: Option<Arc<str>>,
}

impl Choice {
    /// `former` is the same choice as it was before its endpoints changed.
    pub(super) fn work_out(
        destination: &ServiceDestination,
        client: &Client,
        distribution: Option<Option<TrafficDistribution>>,
        former: Option<&Self>,
        now: Instant,
    ) -> Self {
        let eligible = eligible(destination, client);
        let all = addresses(&eligible);
        let keys: HashMap<SocketAddr, u64> = eligible.iter().map(|one| (one.addr, one.key)).collect();
        let distribution = distribution.unwrap_or(destination.service.traffic_distribution);
        Self {
            used: now,
            preferred: addresses(&near(&eligible, &destination.service, distribution, client)),
            keys: all.iter().map(|addr| keys.get(addr).copied().unwrap_or_default()).collect(),
            new: Arc::new(former.map(|former| former.newer(&all, now)).unwrap_or_default()),
            turn: former.map(|former| former.turn.clone()).unwrap_or_default(),
            ring: Arc::default(),
            all,
            candidates: destination.candidates.clone(),
            service: destination.service.clone(),
            node: client.node.clone(),
            zone: client.zone.clone(),
        }
    }

    /// Which of these came lately.
    fn newer(&self, all: &[SocketAddr], now: Instant) -> HashMap<SocketAddr, Instant> {
        let since = |addr: &SocketAddr| match self.new.get(addr) {
            Some(since) => Some(*since).filter(|since| now.saturating_duration_since(*since) < NEW),
            None => (!self.has(addr)).then_some(now),
        };
        all.iter().filter_map(|addr| Some((*addr, since(addr)?))).collect()
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
    let near = near(&all, &destination.service, destination.service.traffic_distribution, client);
    (addresses(&near).to_vec(), addresses(&all).to_vec())
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
fn near<'a>(
    pool: &[&'a Candidate],
    service: &Service,
    distribution: Option<TrafficDistribution>,
    client: &Client,
) -> Vec<&'a Candidate> {
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

/// For how long it is remembered that an endpoint came: no warm-up is longer.
const NEW: Duration = Duration::from_secs(3600);
