use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

/// How many handshakes may be under way at once: per pod and in all.
///
/// A handshake counts from its TCP connection to its first request, so that peers who stall anywhere before that take
/// from their own share and leave the others theirs.
#[derive(Clone)]
pub struct Admission {
    inner: Arc<Inner>,
}

#[derive(Clone, Copy, Debug)]
pub struct AdmissionSettings {
    pub per_pod: usize,
    pub total: usize,
}

impl Default for AdmissionSettings {
    fn default() -> Self {
        Self { per_pod: 256, total: 2048 }
    }
}

impl Admission {
    pub fn new(settings: AdmissionSettings) -> Self {
        Self { inner: Arc::new(Inner { settings, waiting: Mutex::default() }) }
    }

    /// A place for one handshake with the pod at `address`; `None` when its share, or the whole, is taken.
    pub fn enter(&self, address: IpAddr) -> Option<Permit> {
        let mut waiting = self.inner.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let AdmissionSettings { per_pod, total } = self.inner.settings;
        if waiting.total >= total || waiting.per_pod.get(&address).is_some_and(|count| *count >= per_pod) {
            return None;
        }
        waiting.total += 1;
        *waiting.per_pod.entry(address).or_default() += 1;
        Some(Permit { inner: self.inner.clone(), address })
    }
}

/// One place, given back when dropped.
pub struct Permit {
    inner: Arc<Inner>,
    address: IpAddr,
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut waiting = self.inner.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.total -= 1;
        if let Some(count) = waiting.per_pod.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                waiting.per_pod.remove(&self.address);
            }
        }
    }
}

struct Inner {
    settings: AdmissionSettings,
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    total: usize,
    per_pod: HashMap<IpAddr, usize>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_pod_cannot_take_the_places_of_another() {
        let admission = Admission::new(AdmissionSettings { per_pod: 2, total: 3 });
        let (a, b): (IpAddr, IpAddr) = ([10, 0, 0, 1].into(), [10, 0, 0, 2].into());
        let first = admission.enter(a).unwrap();
        let _second = admission.enter(a).unwrap();
        assert!(admission.enter(a).is_none(), "a third place was given to one pod");
        let _other = admission.enter(b).unwrap();
        assert!(admission.enter(b).is_none(), "more places were given than there are");
        drop(first);
        assert!(admission.enter(b).is_some(), "a place that was given back stayed taken");
    }
}
