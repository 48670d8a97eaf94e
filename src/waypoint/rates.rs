//! The rates that are kept, by whose requests are counted together.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use http::HeaderMap;

use crate::route::resilience::Bucket;
use crate::route::traffic::{RateBy, RateLimit};
use crate::telemetry::Party;

/// What is left of every rate; all threads share it.
#[derive(Default)]
pub struct Rates {
    /// By a hash of what a limit is on, its place, and whose requests it counts: what clients send is not kept.
    buckets: Mutex<HashMap<u64, Bucket>>,
    hasher: RandomState,
}

impl Rates {
    /// Lets one request through that all of the limits let through, or says when it is worth asking again. `scope` names
    /// what the limits are on.
    pub fn take(
        &self,
        scope: &str,
        limits: &[RateLimit],
        client: &Party,
        headers: &HeaderMap,
        now: Instant,
    ) -> Result<(), Duration> {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if buckets.len() >= MOST {
            buckets.retain(|_, bucket| !bucket.is_full(now));
        }
        let is_full = buckets.len() >= MOST;
        let mut taken = Vec::with_capacity(limits.len());
        for (place, limit) in limits.iter().enumerate() {
            let mut key = self.hasher.hash_one((scope, place, whose(&limit.by, client, headers)));
            if is_full && !buckets.contains_key(&key) {
                // Whoever is beyond what can be kept is counted with all the others who are.
                key = self.hasher.hash_one((scope, place));
            }
            let mut bucket = buckets.get(&key).copied().unwrap_or_default();
            bucket.take(&limit.rate, now)?;
            taken.push((key, bucket));
        }
        // Of a request that one limit holds back, no other is the poorer.
        buckets.extend(taken);
        Ok(())
    }

    /// Forgets what is as good as new; called now and then.
    pub fn expire(&self, now: Instant) {
        self.buckets.lock().unwrap_or_else(PoisonError::into_inner).retain(|_, bucket| !bucket.is_full(now));
    }
}

fn whose(by: &RateBy, client: &Party, headers: &HeaderMap) -> Option<Vec<u8>> {
    match by {
        RateBy::Target => None,
        RateBy::Identity => {
            let address = || client.addr.as_ref().map(SocketAddr::ip).map(|ip| ip.to_string());
            client.identity.as_ref().map(ToString::to_string).or_else(address).map(String::into_bytes)
        }
        RateBy::Header(name) => headers.get(name).map(|value| value.as_bytes().to_vec()),
    }
}

/// What is kept at once.
const MOST: usize = 65_536;

#[cfg(test)]
mod tests {
    use http::{HeaderName, HeaderValue};

    use super::*;
    use crate::route::resilience::Rate;

    fn limit(requests: u32, by: RateBy) -> RateLimit {
        RateLimit { rate: Rate { requests, interval: Duration::from_secs(1), burst: requests }, by }
    }

    fn tenant(name: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(HeaderName::from_static("x-tenant"), HeaderValue::from_static(name))])
    }

    #[test]
    fn each_is_counted_with_its_own_and_all_limits_must_let_it_through() {
        let limits = [limit(5, RateBy::Target), limit(2, RateBy::Header(HeaderName::from_static("x-tenant")))];
        let (rates, now, client) = (Rates::default(), Instant::now(), Party::default());
        let passed = |headers: &HeaderMap, scope: &str| {
            (0..10).filter(|_| rates.take(scope, &limits, &client, headers, now).is_ok()).count()
        };
        assert_eq!(passed(&tenant("a"), "x"), 2);
        assert_eq!(passed(&tenant("b"), "x"), 2);
        assert_eq!(passed(&HeaderMap::new(), "x"), 1, "the rest of the five, whatever was held back before");
        assert_eq!(passed(&tenant("a"), "y"), 2, "on something else");
    }
}
