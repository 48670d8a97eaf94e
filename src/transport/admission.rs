use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

/// How many handshakes may be under way at once: per peer, per pod and in all.
///
/// A handshake counts from its TCP connection to its first request, so that peers who stall anywhere before that take
/// from their own share and leave the others theirs, at the same pod too.
#[derive(Clone)]
pub struct Admission {
    inner: Arc<Inner>,
}

#[derive(Clone, Copy, Debug)]
pub struct AdmissionSettings {
    /// From one peer's address.
    pub per_peer: usize,
    /// With one pod of ours.
    pub per_pod: usize,
    pub total: usize,
}

impl Default for AdmissionSettings {
    fn default() -> Self {
        Self { per_peer: 256, per_pod: 1024, total: 2048 }
    }
}

impl Admission {
    pub fn new(settings: AdmissionSettings) -> Self {
        Self { inner: Arc::new(Inner { settings, waiting: Mutex::default() }) }
    }

    /// A place for one handshake of `peer` with the pod at `pod`; `None` when a share, or the whole, is taken.
    pub fn enter(&self, peer: IpAddr, pod: IpAddr) -> Option<Permit> {
        let mut waiting = self.inner.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let AdmissionSettings { per_peer, per_pod, total } = self.inner.settings;
        let held = |counts: &HashMap<IpAddr, usize>, address| counts.get(&address).copied().unwrap_or_default();
        if waiting.total >= total || held(&waiting.peers, peer) >= per_peer || held(&waiting.pods, pod) >= per_pod {
            return None;
        }
        waiting.total += 1;
        *waiting.peers.entry(peer).or_default() += 1;
        *waiting.pods.entry(pod).or_default() += 1;
        Some(Permit { inner: self.inner.clone(), peer, pod })
    }
}

/// One place, given back when dropped.
pub struct Permit {
    inner: Arc<Inner>,
    peer: IpAddr,
    pod: IpAddr,
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut waiting = self.inner.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.total -= 1;
        give_back(&mut waiting.peers, self.peer);
        give_back(&mut waiting.pods, self.pod);
    }
}

struct Inner {
    settings: AdmissionSettings,
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    total: usize,
    peers: HashMap<IpAddr, usize>,
    pods: HashMap<IpAddr, usize>,
}

fn give_back(counts: &mut HashMap<IpAddr, usize>, address: IpAddr) {
    if let Some(count) = counts.get_mut(&address) {
        *count -= 1;
        if *count == 0 {
            counts.remove(&address);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_peer_or_pod_cannot_take_the_places_of_another() {
        let admission = Admission::new(AdmissionSettings { per_peer: 2, per_pod: 3, total: 4 });
        let [a, b, c, x, y]: [IpAddr; 5] = [1, 2, 3, 4, 5].map(|last| [10, 0, 0, last].into());
        let first = admission.enter(a, x).unwrap();
        let _second = admission.enter(a, x).unwrap();
        assert!(admission.enter(a, x).is_none(), "a third place was given to one peer");
        assert!(admission.enter(a, y).is_none(), "a third place was given to one peer, at another pod");
        let _other = admission.enter(b, x).unwrap();
        assert!(admission.enter(c, x).is_none(), "a fourth place was given to one pod");
        let _elsewhere = admission.enter(c, y).unwrap();
        assert!(admission.enter(b, y).is_none(), "more places were given than there are");
        drop(first);
        assert!(admission.enter(b, y).is_some(), "a place that was given back stayed taken");
    }
}
