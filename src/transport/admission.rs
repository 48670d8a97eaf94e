use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

/// How many handshakes may be under way at once: per pod and client, per pod, and in all.
///
/// A handshake counts from its TCP connection to its first request, so that peers who stall anywhere before that take
/// from their own share and leave the others theirs: one client the other clients of a pod, and one pod the other pods.
#[derive(Clone)]
pub struct Admission {
    inner: Arc<Inner>,
}

#[derive(Clone, Copy, Debug)]
pub struct AdmissionSettings {
    /// From one client address to one pod.
    pub per_client: usize,
    pub per_pod: usize,
    pub total: usize,
}

impl Default for AdmissionSettings {
    fn default() -> Self {
        Self { per_client: 64, per_pod: 256, total: 2048 }
    }
}

impl Admission {
    pub fn new(settings: AdmissionSettings) -> Self {
        Self { inner: Arc::new(Inner { settings, waiting: Mutex::default() }) }
    }

    /// A place for one handshake of a client with the pod at `address`; `None` when a share, or the whole, is taken.
    pub fn enter(&self, address: IpAddr, client: IpAddr) -> Option<Permit> {
        let mut waiting = self.inner.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let AdmissionSettings { per_client, per_pod, total } = self.inner.settings;
        let with = |key| waiting.shares.get(&key).copied().unwrap_or(0);
        let shares = [(address, None), (address, Some(client))];
        if waiting.total >= total || with(shares[0]) >= per_pod || with(shares[1]) >= per_client {
            return None;
        }
        waiting.total += 1;
        for share in shares {
            *waiting.shares.entry(share).or_default() += 1;
        }
        Some(Permit { inner: self.inner.clone(), shares })
    }
}

/// One place, given back when dropped.
pub struct Permit {
    inner: Arc<Inner>,
    shares: [Share; 2],
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut waiting = self.inner.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.total -= 1;
        for share in self.shares {
            if let Some(count) = waiting.shares.get_mut(&share) {
                *count -= 1;
                if *count == 0 {
                    waiting.shares.remove(&share);
                }
            }
        }
    }
}

/// A pod's, or what one client has of it.
type Share = (IpAddr, Option<IpAddr>);

struct Inner {
    settings: AdmissionSettings,
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    total: usize,
    shares: HashMap<Share, usize>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(last: u8) -> IpAddr {
        [10, 0, 0, last].into()
    }

    #[test]
    fn one_pod_cannot_take_the_places_of_another() {
        let admission = Admission::new(AdmissionSettings { per_client: 2, per_pod: 2, total: 3 });
        let (a, b) = (ip(1), ip(2));
        let first = admission.enter(a, ip(9)).unwrap();
        let _second = admission.enter(a, ip(8)).unwrap();
        assert!(admission.enter(a, ip(7)).is_none(), "a third place was given to one pod");
        let _other = admission.enter(b, ip(9)).unwrap();
        assert!(admission.enter(b, ip(9)).is_none(), "more places were given than there are");
        drop(first);
        assert!(admission.enter(b, ip(9)).is_some(), "a place that was given back stayed taken");
    }

    #[test]
    fn one_client_cannot_take_the_places_of_another() {
        let admission = Admission::new(AdmissionSettings { per_client: 1, per_pod: 9, total: 9 });
        let stalled = admission.enter(ip(1), ip(9)).unwrap();
        assert!(admission.enter(ip(1), ip(9)).is_none(), "one client was given two places of a pod");
        assert!(admission.enter(ip(1), ip(8)).is_some(), "another client was kept out");
        assert!(admission.enter(ip(2), ip(9)).is_some(), "another pod was kept from it");
        drop(stalled);
        assert!(admission.enter(ip(1), ip(9)).is_some(), "a place that was given back stayed taken");
        let left = admission.inner.waiting.lock().unwrap();
        assert!(left.shares.is_empty() && left.total == 0);
    }
}
