//! The ways of choosing one of some endpoints.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// How an endpoint is chosen.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Strategy {
    /// The one with fewer connections or requests under way, of two random ones.
    #[default]
    LeastRequest,
    /// Likewise, by what is under way and how long it takes: see [`Latency`].
    PeakEwma,
    RoundRobin,
    Random,
    /// What has this number in common goes to one endpoint, as long as that is there.
    Hash(u64),
}

/// An endpoint that comes takes its share of all requests little by little.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Warmup {
    pub length: Duration,
    /// The percentage of its share that it begins with.
    pub least: u32,
}

impl Warmup {
    /// Whether an endpoint that came so long ago is taken when it is drawn. `chance` is drawn from 0 to 1.
    pub(super) fn admits(&self, age: Duration, chance: f64) -> bool {
        if age >= self.length {
            return true;
        }
        let least = f64::from(self.least.min(100)) / 100.0;
        chance < least + (1.0 - least) * age.as_secs_f64() / self.length.as_secs_f64()
    }
}

/// How long an endpoint takes to answer: rises at once and falls slowly, so that one that stalls is felt before the
/// average knows (Finagle's "peak EWMA").
#[derive(Clone, Copy, Debug)]
pub(super) struct Latency {
    nanos: f64,
    told: Instant,
}

impl Latency {
    pub(super) fn new(took: Duration, now: Instant) -> Self {
        Self { nanos: took.as_nanos() as f64, told: now }
    }

    pub(super) fn tell(&mut self, took: Duration, now: Instant) {
        let took = took.as_nanos() as f64;
        let faded = fading(now.saturating_duration_since(self.told));
        let average = self.nanos * faded + took * (1.0 - faded);
        *self = Self { nanos: took.max(average), told: now };
    }

    /// What one more request costs an endpoint with so many under way. What was long ago fades: a slow one is tried again.
    pub(super) fn cost(&self, in_flight: u32, now: Instant) -> u64 {
        let nanos = self.nanos * fading(now.saturating_duration_since(self.told));
        (nanos * (f64::from(in_flight) + 1.0)) as u64
    }

    pub(super) fn is_kept(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.told) < DECAY * 10
    }
}

fn fading(after: Duration) -> f64 {
    (-after.as_secs_f64() / DECAY.as_secs_f64()).exp()
}

/// The one of lower cost of two random usable ones: [Mitzenmacher, "The Power of Two Choices in Randomized Load
/// Balancing"](https://www.eecs.harvard.edu/~michaelm/postscripts/mythesis.pdf).
///
/// `cost` tells the cost of an address, and nothing of one that is not to be used; `admits` may pass one over that was
/// drawn.
pub(super) fn cheaper<R: rand::Rng>(
    addresses: &[SocketAddr],
    cost: impl Fn(SocketAddr) -> Option<u64>,
    admits: impl Fn(SocketAddr, &mut R) -> bool,
    random: &mut R,
) -> Option<SocketAddr> {
    use rand::RngExt;
    if addresses.is_empty() {
        return None;
    }
    let mut first: Option<(SocketAddr, u64)> = None;
    for _ in 0..DRAWS {
        let addr = addresses[random.random_range(0..addresses.len())];
        if first.is_some_and(|(first, _)| first == addr) {
            continue;
        }
        let Some(cost) = cost(addr).filter(|_| admits(addr, random)) else { continue };
        match first {
            Some((first, least)) => return Some(if cost < least { addr } else { first }),
            None => first = Some((addr, cost)),
        }
    }
    // Few are usable: then look at all of them, from a random one on.
    let start = random.random_range(0..addresses.len());
    let usable = addresses[start..].iter().chain(&addresses[..start]).filter_map(|addr| Some((*addr, cost(*addr)?)));
    usable.min_by_key(|(_, cost)| *cost).map(|(addr, _)| addr)
}

/// The first usable one from a place on, round and round.
pub(super) fn next<R: rand::Rng>(
    addresses: &[SocketAddr],
    start: usize,
    is_usable: impl Fn(SocketAddr) -> bool,
    admits: impl Fn(SocketAddr, &mut R) -> bool,
    random: &mut R,
) -> Option<SocketAddr> {
    if addresses.is_empty() {
        return None;
    }
    let start = start % addresses.len();
    let round = || addresses[start..].iter().chain(&addresses[..start]).copied().filter(|addr| is_usable(*addr));
    round().find(|addr| admits(*addr, random)).or_else(|| round().next())
}

/// Endpoints on a ring, by numbers that derive from their pods alone: whoever knows the same pods has the same ring,
/// and one that comes or goes moves only what is next to it ([Karger et al., "Consistent Hashing and Random
/// Trees"](https://doi.org/10.1145/258533.258660)).
#[derive(Debug)]
pub(super) struct Ring(Vec<(u64, u32)>);

impl Ring {
    pub(super) fn new(keys: &[u64]) -> Self {
        let of_one = |(index, key): (u32, &u64)| (0..POINTS).map(|n| (mix(*key, n + 1), index)).collect::<Vec<_>>();
        let mut points: Vec<(u64, u32)> = (0..).zip(keys).flat_map(of_one).collect();
        points.sort_unstable();
        Self(points)
    }

    /// The places of endpoints in the order in which they are asked, some of them several times.
    pub(super) fn from(&self, hash: u64) -> impl Iterator<Item = usize> {
        let start = self.0.partition_point(|(point, _)| *point < hash);
        self.0[start..].iter().chain(&self.0[..start]).map(|(_, index)| *index as usize)
    }
}

/// The same on every machine and in every version: FNV-1a, spread by splitmix64.
pub fn stable_hash(bytes: &[u8]) -> u64 {
    let fnv = bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
    mix(fnv, 1)
}

fn mix(from: u64, index: u64) -> u64 {
    let mut z = from.wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Draws before all endpoints are looked at: with half of them usable, one in a hundred connections looks.
const DRAWS: usize = 10;
/// Of one endpoint on a ring: with these the shares of endpoints differ by some tenth.
const POINTS: u64 = 100;
/// In which a latency fades to a third.
const DECAY: Duration = Duration::from_secs(10);
