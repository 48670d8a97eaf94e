//! Chooses the endpoint of one connection to a Service.
//!
//! Sans-io: time and randomness come in as arguments. What may be chosen follows kube-proxy
//! ([virtual IPs](https://kubernetes.io/docs/reference/networking/virtual-ips/)); among that, the less loaded of two
//! random ones, leaving out those that keep failing.

mod choice;
mod draw;
mod health;
mod sharded;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rand::RngExt;

use super::{NamespacedName, ServiceDestination, TrafficDistribution};
pub use choice::endpoints;
use choice::{Choice, ChoiceKey};
use draw::{Latency, Ring};
pub use draw::{Strategy, Warmup, stable_hash};
use health::Health;
use sharded::{SHARDS, Sharded};

/// Who connects. Its address also tells the family that it dialled.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Client {
    pub ip: IpAddr,
    pub node: Option<Arc<str>>,
    pub zone: Option<Arc<str>>,
}

/// What a connection or request wants of its endpoint; without a word, the less loaded of two.
#[derive(Clone, Copy, Default)]
pub struct Wish<'a> {
    pub strategy: Strategy,
    /// In place of what the Service says; within, none: anywhere.
    pub distribution: Option<Option<TrafficDistribution>>,
    pub warmup: Option<Warmup>,
    /// This one before all others, as long as it is ready.
    pub stuck: Option<SocketAddr>,
    /// Endpoints to be passed over as long as there is another.
    pub avoid: Option<&'a dyn Fn(SocketAddr) -> bool>,
}

/// What is remembered from one connection to the next, by all threads together. It holds endpoints that are busy or
/// failing, clients that stick to one, and the choices worked out lately; [`Balancer::expire`] forgets the rest.
///
/// Each of these lies in parts under locks of their own, held for one look-up and never two at a time.
#[derive(Debug, Default)]
pub struct Balancer {
    endpoints: Sharded<SocketAddr, Health>,
    affinity: Sharded<AffinityKey, Sticking>,
    choices: Sharded<ChoiceKey, Choice>,
    /// Of endpoints that are chosen by it.
    latencies: Sharded<SocketAddr, Latency>,
}

impl Balancer {
    pub fn new() -> Self {
        Self::default()
    }

    /// The endpoint for a connection, other than those of `exclude`, which it tried already. `None`: there is none.
    ///
    /// Endpoints that keep failing are left out while another one is left; once their time is up, one connection
    /// tries them. Costs the same for ten endpoints as for ten thousand, as long as the endpoints do not change.
    pub fn pick<R: rand::Rng>(
        &self,
        destination: &ServiceDestination,
        client: &Client,
        exclude: &[SocketAddr],
        now: Instant,
        random: &mut R,
    ) -> Option<SocketAddr> {
        self.pick_as(destination, client, &Wish::default(), exclude, now, random)
    }

    /// As [`Balancer::pick`], in another way.
    pub fn pick_as<R: rand::Rng>(
        &self,
        destination: &ServiceDestination,
        client: &Client,
        wish: &Wish<'_>,
        exclude: &[SocketAddr],
        now: Instant,
        random: &mut R,
    ) -> Option<SocketAddr> {
        let choice = self.choice(destination, client, wish.distribution, now);
        let sticky = destination.service.session_affinity.map(|timeout| {
            let key = AffinityKey {
                service: destination.service.name.clone(),
                port: destination.port.name.clone(),
                client: client.ip,
            };
            (key, timeout)
        });
        let health = |addr: SocketAddr| self.endpoints.of(&addr).get(&addr).copied().unwrap_or_default();
        let untried = |addr: SocketAddr| (!exclude.contains(&addr)).then(|| health(addr));
        let usable = |addr: SocketAddr| untried(addr).filter(|health| health.is_usable(now));
        let is_avoided = |addr: SocketAddr| wish.avoid.is_some_and(|avoid| avoid(addr));
        let wanted = |addr: SocketAddr| usable(addr).filter(|_| !is_avoided(addr));

        let affine = sticky.as_ref().and_then(|(key, _)| self.affinity.of(key).get(key).copied());
        let affine = affine.filter(|affine| now < affine.until).map(|affine| affine.addr);
        let stuck = wish.stuck.or(affine).filter(|addr| choice.has(addr));
        let picked = std::iter::repeat_with(|| {
            let stuck = stuck.filter(|addr| wanted(*addr).is_some());
            stuck
                .or_else(|| self.draw(&choice, wish, wanted, now, random))
                .or_else(|| wish.avoid.and_then(|_| self.draw(&choice, wish, usable, now, random)))
        })
        .take(RACES)
        .map_while(|addr| addr)
        // Another thread may have begun to try that one in the meantime: then it is none for us.
        .find(|addr| self.take(*addr, now));
        let picked = match picked {
            Some(picked) => picked,
            // All of them keep failing: then trying one is better than trying none.
            None => {
                let picked = self.draw(&choice, wish, untried, now, random)?;
                if let Some(health) = self.endpoints.of(&picked).get_mut(&picked) {
                    health.begin_trial(now);
                }
                picked
            }
        };
        if let Some((key, timeout)) = sticky {
            self.stick(key, Sticking { addr: picked, until: now + timeout }, now);
        }
        Some(picked)
    }

    /// How an endpoint is told from all others, on every machine alike; none where it is not one of the Service's.
    pub fn key_of(
        &self,
        destination: &ServiceDestination,
        client: &Client,
        addr: SocketAddr,
        now: Instant,
    ) -> Option<u64> {
        let choice = self.choice(destination, client, None, now);
        let index = choice.all.binary_search(&addr).ok()?;
        choice.keys.get(index).copied()
    }

    /// The endpoint that has this key; none where none has it that may be chosen.
    pub fn of_key(
        &self,
        destination: &ServiceDestination,
        client: &Client,
        key: u64,
        now: Instant,
    ) -> Option<SocketAddr> {
        let choice = self.choice(destination, client, None, now);
        let index = choice.keys.iter().position(|known| *known == key)?;
        choice.all.get(index).copied()
    }

    /// How many endpoints there are to choose from.
    pub fn count(&self, destination: &ServiceDestination, client: &Client, now: Instant) -> usize {
        self.choice(destination, client, None, now).all.len()
    }

    /// How long an endpoint took to answer; told of those alone that are chosen by that.
    pub fn took(&self, addr: SocketAddr, latency: Duration, now: Instant) {
        let mut latencies = self.latencies.of(&addr);
        if latencies.len() >= MAX_ENDPOINTS / SHARDS && !latencies.contains_key(&addr) {
            return;
        }
        latencies
            .entry(addr)
            .and_modify(|known| known.tell(latency, now))
            .or_insert_with(|| Latency::new(latency, now));
    }

    /// A connection to this endpoint begins; it counts as its load until [`Balancer::closed`].
    pub fn opened(&self, addr: SocketAddr) {
        self.endpoints.of(&addr).entry(addr).or_default().in_flight += 1;
    }

    /// A connection to this endpoint ended.
    pub fn closed(&self, addr: SocketAddr) {
        let mut endpoints = self.endpoints.of(&addr);
        let Some(health) = endpoints.get_mut(&addr) else { return };
        health.in_flight = health.in_flight.saturating_sub(1);
        if *health == Health::default() {
            endpoints.remove(&addr);
        }
    }

    /// A connection to this endpoint was established.
    pub fn succeeded(&self, addr: SocketAddr, _now: Instant) {
        let mut endpoints = self.endpoints.of(&addr);
        let Some(health) = endpoints.get_mut(&addr) else { return };
        *health = Health::of_load(health.in_flight);
        if health.in_flight == 0 {
            endpoints.remove(&addr);
        }
    }

    /// A connection to this endpoint could not be established.
    pub fn failed(&self, addr: SocketAddr, now: Instant) {
        let mut endpoints = self.endpoints.of(&addr);
        if endpoints.len() >= MAX_ENDPOINTS / SHARDS && !endpoints.contains_key(&addr) {
            endpoints.retain(|_, health| health.is_kept(now));
            if endpoints.len() >= MAX_ENDPOINTS / SHARDS {
                return;
            }
        }
        endpoints.entry(addr).or_default().fail(now);
    }

    /// Whether an endpoint is left out now because it keeps failing.
    pub fn is_ejected(&self, addr: SocketAddr, now: Instant) -> bool {
        self.endpoints.of(&addr).get(&addr).is_some_and(|health| !health.is_usable(now))
    }

    /// Forgets what no longer matters; called now and then.
    pub fn expire(&self, now: Instant) {
        self.affinity.parts().for_each(|mut part| part.retain(|_, stuck| now < stuck.until));
        let recent = |choice: &Choice| now.saturating_duration_since(choice.used) < CHOICE_IDLE;
        self.choices.parts().for_each(|mut part| part.retain(|_, choice| recent(choice)));
        self.endpoints.parts().for_each(|mut part| part.retain(|_, health| health.is_kept(now)));
        self.latencies.parts().for_each(|mut part| part.retain(|_, latency| latency.is_kept(now)));
    }

    /// One of the near endpoints that may be used, else one of all.
    fn draw<R: rand::Rng>(
        &self,
        choice: &Choice,
        wish: &Wish<'_>,
        usable: impl Fn(SocketAddr) -> Option<Health>,
        now: Instant,
        random: &mut R,
    ) -> Option<SocketAddr> {
        let admits = |addr: SocketAddr, random: &mut R| {
            let Some((warmup, since)) = wish.warmup.zip(choice.new.get(&addr)) else { return true };
            warmup.admits(now.saturating_duration_since(*since), random.random())
        };
        let cost = |addr: SocketAddr| {
            let in_flight = usable(addr)?.in_flight;
            Some(match wish.strategy {
                Strategy::PeakEwma => {
                    self.latencies.of(&addr).get(&addr).map_or(0, |latency| latency.cost(in_flight, now))
                }
                Strategy::Random => 0,
                _ => in_flight.into(),
            })
        };
        match wish.strategy {
            Strategy::LeastRequest | Strategy::PeakEwma | Strategy::Random => {
                let one_of = |of, random: &mut R| draw::cheaper(of, cost, admits, random);
                one_of(&choice.preferred, random).or_else(|| one_of(&choice.all, random))
            }
            Strategy::RoundRobin => {
                let turn = choice.turn.fetch_add(1, Ordering::Relaxed);
                let one_of = |of, random: &mut R| draw::next(of, turn, |addr| usable(addr).is_some(), admits, random);
                one_of(&choice.preferred, random).or_else(|| one_of(&choice.all, random))
            }
            // Near or far: whoever asks is to come to the same one.
            Strategy::Hash(hash) => {
                let ring = choice.ring.get_or_init(|| Ring::new(&choice.keys));
                let mut addresses = ring.from(hash).filter_map(|index| choice.all.get(index).copied());
                addresses.find(|addr| usable(*addr).is_some())
            }
        }
    }

    fn choice(
        &self,
        destination: &ServiceDestination,
        client: &Client,
        distribution: Option<Option<TrafficDistribution>>,
        now: Instant,
    ) -> Choice {
        let key = ChoiceKey::of(destination, client, distribution);
        let mut former = None;
        if let Some(choice) = self.choices.of(&key).get_mut(&key) {
            if choice.is_for(destination, client) {
                choice.used = now;
                return choice.clone();
            }
            former = Some(choice.clone());
        }
        // Not under the lock: threads that meet here work out the same.
        let choice = Choice::work_out(destination, client, distribution, former.as_ref(), now);
        let mut choices = self.choices.of(&key);
        if choices.len() >= MAX_CHOICES / SHARDS && !choices.contains_key(&key) {
            choices.clear();
        }
        choices.insert(key, choice.clone());
        choice
    }

    /// Takes a usable endpoint for a connection. One that failed, and whose time is up, is no longer usable by it.
    fn take(&self, addr: SocketAddr, now: Instant) -> bool {
        let mut endpoints = self.endpoints.of(&addr);
        let Some(health) = endpoints.get_mut(&addr) else { return true };
        let usable = health.is_usable(now);
        if usable {
            health.begin_trial(now);
        }
        usable
    }

    fn stick(&self, key: AffinityKey, sticking: Sticking, now: Instant) {
        let mut affinity = self.affinity.of(&key);
        let full = |len: usize| len >= MAX_STICKING / SHARDS;
        if full(affinity.len()) && !affinity.contains_key(&key) {
            affinity.retain(|_, stuck| now < stuck.until);
            if full(affinity.len()) {
                return;
            }
        }
        affinity.insert(key, sticking);
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

const CHOICE_IDLE: Duration = Duration::from_secs(60);
/// How often another thread may be faster to try an endpoint that failed.
const RACES: usize = 16;
const MAX_CHOICES: usize = 4_096;
const MAX_STICKING: usize = 65_536;
const MAX_ENDPOINTS: usize = 65_536;

#[cfg(test)]
mod tests;
