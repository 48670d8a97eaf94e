//! Chooses the endpoint of one connection to a Service.
//!
//! Sans-io: time and randomness come in as arguments. What may be chosen follows kube-proxy
//! ([virtual IPs](https://kubernetes.io/docs/reference/networking/virtual-ips/)); among that, the less loaded of two
//! random ones, leaving out those that keep failing.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::RngExt;

use super::{Candidate, InternalTrafficPolicy, NamespacedName, Service, ServiceDestination, TrafficDistribution};

/// Who connects. Its address also tells the family that it dialled.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Client {
    pub ip: IpAddr,
    pub node: Option<Arc<str>>,
    pub zone: Option<Arc<str>>,
}

/// What is remembered from one connection to the next. It holds endpoints that are busy or failing, clients that
/// stick to one, and the choices worked out lately; [`Balancer::expire`] forgets the rest.
#[derive(Debug, Default)]
pub struct Balancer {
    endpoints: HashMap<SocketAddr, Health>,
    affinity: HashMap<AffinityKey, Sticking>,
    choices: HashMap<ChoiceKey, Choice>,
}

impl Balancer {
    pub fn new() -> Self {
        Self::default()
    }

    /// The endpoint for a connection, other than those of `exclude`, which it tried already. `None`: there is none.
    ///
    /// Endpoints that keep failing are left out while another one is left; once their time is up, one connection
    /// tries them. Costs the same for ten endpoints as for ten thousand, as long as the endpoints do not change.
    pub fn pick(
        &mut self,
        destination: &ServiceDestination,
        client: &Client,
        exclude: &[SocketAddr],
        now: Instant,
        random: &mut impl rand::Rng,
    ) -> Option<SocketAddr> {
        let Self { endpoints, affinity, choices } = self;
        let choice = choice(choices, destination, client, now);
        let usable = |addr: &SocketAddr| {
            !exclude.contains(addr) && endpoints.get(addr).is_none_or(|health| health.is_usable(now))
        };
        let untried = |addr: &SocketAddr| !exclude.contains(addr);
        let load = |addr: &SocketAddr| endpoints.get(addr).map_or(0, |health| health.in_flight);

        let sticky = destination.service.session_affinity.map(|timeout| {
            let key = AffinityKey {
                service: destination.service.name.clone(),
                port: destination.port.name.clone(),
                client: client.ip,
            };
            (key, timeout)
        });
        let stuck = sticky.as_ref().and_then(|(key, _)| affinity.get(key)).filter(|stuck| now < stuck.until);
        let stuck = stuck.map(|stuck| stuck.addr).filter(|addr| choice.has(addr) && usable(addr));
        let picked = stuck
            .or_else(|| less_loaded(&choice.preferred, usable, load, random))
            .or_else(|| less_loaded(&choice.all, usable, load, random))
            // All of them keep failing: then trying one is better than trying none.
            .or_else(|| less_loaded(&choice.preferred, untried, load, random))
            .or_else(|| less_loaded(&choice.all, untried, load, random))?;
        if let Some((key, timeout)) = sticky {
            let room = affinity.len() < MAX_STICKING || affinity.contains_key(&key);
            if !room {
                affinity.retain(|_, stuck| now < stuck.until);
            }
            if affinity.len() < MAX_STICKING || affinity.contains_key(&key) {
                affinity.insert(key, Sticking { addr: picked, until: now + timeout });
            }
        }
        if let Some(health) = endpoints.get_mut(&picked) {
            health.begin_trial(now);
        }
        Some(picked)
    }

    /// A connection to this endpoint begins; it counts as its load until [`Balancer::closed`].
    pub fn opened(&mut self, addr: SocketAddr) {
        self.endpoints.entry(addr).or_default().in_flight += 1;
    }

    /// A connection to this endpoint ended.
    pub fn closed(&mut self, addr: SocketAddr) {
        if let Some(health) = self.endpoints.get_mut(&addr) {
            health.in_flight = health.in_flight.saturating_sub(1);
            self.forget_if_plain(addr);
        }
    }

    /// A connection to this endpoint was established.
    pub fn succeeded(&mut self, addr: SocketAddr, _now: Instant) {
        if let Some(health) = self.endpoints.get_mut(&addr) {
            *health = Health { in_flight: health.in_flight, ..Health::default() };
            self.forget_if_plain(addr);
        }
    }

    /// A connection to this endpoint could not be established.
    pub fn failed(&mut self, addr: SocketAddr, now: Instant) {
        if self.endpoints.len() >= MAX_ENDPOINTS && !self.endpoints.contains_key(&addr) {
            self.expire(now);
            if self.endpoints.len() >= MAX_ENDPOINTS {
                return;
            }
        }
        self.endpoints.entry(addr).or_default().fail(now);
    }

    /// Whether an endpoint is left out now because it keeps failing.
    pub fn is_ejected(&self, addr: SocketAddr, now: Instant) -> bool {
        self.endpoints.get(&addr).is_some_and(|health| !health.is_usable(now))
    }

    /// Forgets what no longer matters; called now and then.
    pub fn expire(&mut self, now: Instant) {
        self.affinity.retain(|_, stuck| now < stuck.until);
        self.choices.retain(|_, choice| now.saturating_duration_since(choice.used) < CHOICE_IDLE);
        self.endpoints.retain(|_, health| health.in_flight > 0 || health.is_remembered(now));
    }

    fn forget_if_plain(&mut self, addr: SocketAddr) {
        if self.endpoints.get(&addr).is_some_and(|health| *health == Health::default()) {
            self.endpoints.remove(&addr);
        }
    }
}

/// The endpoints that a connection may go to, sorted: the near ones, and all of them, which serve where no near one
/// does.
pub fn endpoints(destination: &ServiceDestination, client: &Client) -> (Vec<SocketAddr>, Vec<SocketAddr>) {
    let all = eligible(destination, client);
    (addresses(&near(&all, &destination.service, client)).to_vec(), addresses(&all).to_vec())
}

/// What is known of one endpoint.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Health {
    in_flight: u32,
    failures: u32,
    ejections: u32,
    last_failure: Option<Instant>,
    ejected_until: Option<Instant>,
    /// Since when one connection tries whether it is back.
    trial: Option<Instant>,
}

impl Health {
    fn is_usable(&self, now: Instant) -> bool {
        let Some(until) = self.ejected_until else { return true };
        let being_tried = self.trial.is_some_and(|since| now.saturating_duration_since(since) < TRIAL);
        until <= now && !being_tried
    }

    fn begin_trial(&mut self, now: Instant) {
        if self.ejected_until.is_some_and(|until| until <= now) {
            self.trial = Some(now);
        }
    }

    fn fail(&mut self, now: Instant) {
        self.last_failure = Some(now);
        self.failures = self.failures.saturating_add(1);
        // Connections that began before the ejection fail during it: they tell nothing new.
        let ejected = self.ejected_until.is_some_and(|until| now < until);
        if self.failures >= FAILURES && !ejected {
            let time = EJECTION.saturating_mul(1 << self.ejections.min(16)).min(MAX_EJECTION);
            self.ejections = self.ejections.saturating_add(1);
            self.ejected_until = Some(now + time);
            self.trial = None;
        }
    }

    fn is_remembered(&self, now: Instant) -> bool {
        let recent = |since: Instant| now.saturating_duration_since(since) < FAILURE_MEMORY;
        self.last_failure.is_some_and(recent) || self.ejected_until.is_some_and(recent)
    }
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct AffinityKey {
    service: NamespacedName,
    port: Arc<str>,
    client: IpAddr,
}

#[derive(Clone, Copy, Debug)]
struct Sticking {
    addr: SocketAddr,
    until: Instant,
}

/// A list of candidates, by where it lies: [`Choice`] keeps it, so that no other list can lie there.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct ChoiceKey {
    candidates: usize,
    v6: bool,
}

/// Which endpoints of a list may be chosen, worked out once per list.
#[derive(Debug)]
struct Choice {
    candidates: Arc<[Candidate]>,
    service: Arc<Service>,
    node: Option<Arc<str>>,
    zone: Option<Arc<str>>,
    used: Instant,
    /// The near ones, sorted; some of `all`.
    preferred: Arc<[SocketAddr]>,
    /// All that may be chosen, sorted.
    all: Arc<[SocketAddr]>,
}

impl Choice {
    fn has(&self, addr: &SocketAddr) -> bool {
        self.all.binary_search(addr).is_ok()
    }

    fn is_for(&self, service: &Arc<Service>, client: &Client) -> bool {
        self.node == client.node
            && self.zone == client.zone
            && (Arc::ptr_eq(&self.service, service) || self.service == *service)
    }

    fn work_out(destination: &ServiceDestination, client: &Client, now: Instant) -> Self {
        let all = eligible(destination, client);
        Self {
            candidates: destination.candidates.clone(),
            service: destination.service.clone(),
            node: client.node.clone(),
            zone: client.zone.clone(),
            used: now,
            preferred: addresses(&near(&all, &destination.service, client)),
            all: addresses(&all),
        }
    }
}

/// The candidates that may be chosen, near and far.
fn eligible<'a>(destination: &'a ServiceDestination, client: &Client) -> Vec<&'a Candidate> {
    let service = &destination.service;
    let mut pool: Vec<&Candidate> = destination.candidates.iter().collect();
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

fn choice<'a>(
    choices: &'a mut HashMap<ChoiceKey, Choice>,
    destination: &ServiceDestination,
    client: &Client,
    now: Instant,
) -> &'a Choice {
    let key = ChoiceKey { candidates: destination.candidates.as_ptr().addr(), v6: client.ip.is_ipv6() };
    if choices.len() >= MAX_CHOICES && !choices.contains_key(&key) {
        choices.clear();
    }
    let choice = choices.entry(key).or_insert_with(|| Choice::work_out(destination, client, now));
    // Empty lists may share their place in memory, and one list serves clients of several nodes in a test.
    let same = choice.candidates.len() == destination.candidates.len() && choice.is_for(&destination.service, client);
    if !same {
        *choice = Choice::work_out(destination, client, now);
    }
    choice.used = now;
    choice
}

/// The less loaded of two random usable ones: [Mitzenmacher, "The Power of Two Choices in Randomized Load
/// Balancing"](https://www.eecs.harvard.edu/~michaelm/postscripts/mythesis.pdf).
fn less_loaded(
    addresses: &[SocketAddr],
    usable: impl Fn(&SocketAddr) -> bool,
    load: impl Fn(&SocketAddr) -> u32,
    random: &mut impl rand::Rng,
) -> Option<SocketAddr> {
    if addresses.is_empty() {
        return None;
    }
    let mut first: Option<SocketAddr> = None;
    for _ in 0..DRAWS {
        let addr = addresses[random.random_range(0..addresses.len())];
        if first == Some(addr) || !usable(&addr) {
            continue;
        }
        match first {
            Some(first) => return Some(if load(&addr) < load(&first) { addr } else { first }),
            None => first = Some(addr),
        }
    }
    // Few are usable: then look at all of them, from a random one on.
    let start = random.random_range(0..addresses.len());
    let usable = addresses[start..].iter().chain(&addresses[..start]).filter(|addr| usable(addr));
    usable.chain(&first).min_by_key(|addr| load(addr)).copied()
}

/// How many failures in a row eject an endpoint.
const FAILURES: u32 = 3;
/// How long the first ejection lasts; each further one twice as long, up to [`MAX_EJECTION`].
const EJECTION: Duration = Duration::from_secs(5);
const MAX_EJECTION: Duration = Duration::from_secs(300);
/// How long one connection has to show that an endpoint is back, before another one tries.
const TRIAL: Duration = Duration::from_secs(10);
/// How long a failure is remembered.
const FAILURE_MEMORY: Duration = Duration::from_secs(600);
const CHOICE_IDLE: Duration = Duration::from_secs(60);
/// Draws before all endpoints are looked at: with half of them usable, one in a hundred connections looks.
const DRAWS: usize = 10;
const MAX_CHOICES: usize = 4_096;
const MAX_STICKING: usize = 65_536;
const MAX_ENDPOINTS: usize = 65_536;

#[cfg(test)]
mod tests;
