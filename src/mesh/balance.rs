//! Chooses the endpoint of one connection to a Service.
//!
//! Sans-io: time and randomness come in as arguments. What may be chosen follows kube-proxy
//! ([virtual IPs](https://kubernetes.io/docs/reference/networking/virtual-ips/)); among that, the less loaded of two
//! random ones, leaving out those that keep failing.

mod choice;
mod health;
mod sharded;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::RngExt;

use super::{NamespacedName, ServiceDestination};
pub use choice::endpoints;
use choice::{Choice, ChoiceKey};
use health::Health;
use sharded::{SHARDS, Sharded};

/// Who connects. Its address also tells the family that it dialled.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Client {
    pub ip: IpAddr,
    pub node: Option<Arc<str>>,
    pub zone: Option<Arc<str>>,
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
        &self,
        destination: &ServiceDestination,
        client: &Client,
        exclude: &[SocketAddr],
        now: Instant,
        random: &mut impl rand::Rng,
    ) -> Option<SocketAddr> {
        let choice = self.choice(destination, client, now);
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
        let load_if_usable = |addr| usable(addr).map(|health| health.in_flight);
        let load = |addr| untried(addr).map(|health| health.in_flight);

        let stuck = sticky.as_ref().and_then(|(key, _)| self.affinity.of(key).get(key).copied());
        let stuck = stuck.filter(|stuck| now < stuck.until && choice.has(&stuck.addr)).map(|stuck| stuck.addr);
        let picked = std::iter::repeat_with(|| {
            let stuck = stuck.filter(|addr| usable(*addr).is_some());
            stuck
                .or_else(|| less_loaded(&choice.preferred, load_if_usable, random))
                .or_else(|| less_loaded(&choice.all, load_if_usable, random))
        })
        .take(RACES)
        .map_while(|addr| addr)
        // Another thread may have begun to try that one in the meantime: then it is none for us.
        .find(|addr| self.take(*addr, now));
        let picked = match picked {
            Some(picked) => picked,
            // All of them keep failing: then trying one is better than trying none.
            None => {
                let picked = less_loaded(&choice.preferred, load, random);
                let picked = picked.or_else(|| less_loaded(&choice.all, load, random))?;
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
    }

    fn choice(&self, destination: &ServiceDestination, client: &Client, now: Instant) -> Choice {
        let key = ChoiceKey::of(destination, client);
        if let Some(choice) = self.choices.of(&key).get_mut(&key).filter(|choice| choice.is_for(destination, client)) {
            choice.used = now;
            return choice.clone();
        }
        // Not under the lock: threads that meet here work out the same.
        let choice = Choice::work_out(destination, client, now);
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

/// The less loaded of two random usable ones: [Mitzenmacher, "The Power of Two Choices in Randomized Load
/// Balancing"](https://www.eecs.harvard.edu/~michaelm/postscripts/mythesis.pdf).
///
/// `load` tells the load of an address, and nothing of one that is not to be used.
fn less_loaded(
    addresses: &[SocketAddr],
    load: impl Fn(SocketAddr) -> Option<u32>,
    random: &mut impl rand::Rng,
) -> Option<SocketAddr> {
    if addresses.is_empty() {
        return None;
    }
    let mut first: Option<(SocketAddr, u32)> = None;
    for _ in 0..DRAWS {
        let addr = addresses[random.random_range(0..addresses.len())];
        if first.is_some_and(|(first, _)| first == addr) {
            continue;
        }
        let Some(load) = load(addr) else { continue };
        match first {
            Some((first, least)) => return Some(if load < least { addr } else { first }),
            None => first = Some((addr, load)),
        }
    }
    // Few are usable: then look at all of them, from a random one on.
    let start = random.random_range(0..addresses.len());
    let usable = addresses[start..].iter().chain(&addresses[..start]).filter_map(|addr| Some((*addr, load(*addr)?)));
    usable.min_by_key(|(_, load)| *load).map(|(addr, _)| addr)
}

const CHOICE_IDLE: Duration = Duration::from_secs(60);
/// Draws before all endpoints are looked at: with half of them usable, one in a hundred connections looks.
const DRAWS: usize = 10;
/// How often another thread may be faster to try an endpoint that failed.
const RACES: usize = 16;
const MAX_CHOICES: usize = 4_096;
const MAX_STICKING: usize = 65_536;
const MAX_ENDPOINTS: usize = 65_536;

#[cfg(test)]
mod tests;
