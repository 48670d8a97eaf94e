use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::connections::Connections;
use crate::mesh::PodUid;

/// How many connections the agent carries, and how they are shared between pods.
///
/// Up to four fifths of the whole, first come, first served. Beyond, a pod gets a new connection only while it has
/// less than its even share: one pod cannot take the room of the others.
#[derive(Debug)]
pub struct Limits {
    total: usize,
    pods: AtomicUsize,
    connections: Arc<Connections>,
    tunnels: Arc<Mutex<Tunnels>>,
}

/// The tunnels that peers hold with pods of this node: each costs a descriptor and memory, also while it carries nothing.
#[derive(Debug, Default)]
struct Tunnels {
    total: usize,
    pods: HashMap<PodUid, usize>,
    pairs: HashMap<(TunnelKind, IpAddr, PodUid), usize>,
}

/// What a tunnel speaks: how many a peer needs depends on it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum TunnelKind {
    /// One for a hundred connections, and one more for each of the peer's threads.
    Hbone,
    /// One for each connection.
    Fast,
}

impl TunnelKind {
    fn most_of_pair(self) -> usize {
        match self {
            Self::Hbone => 256,
            Self::Fast => 4096,
        }
    }
}

/// One tunnel's place, given back on drop.
#[derive(Debug)]
pub struct TunnelPlace {
    tunnels: Arc<Mutex<Tunnels>>,
    pair: (TunnelKind, IpAddr, PodUid),
}

impl Limits {
    pub fn new(total: usize, connections: Arc<Connections>) -> Self {
        Self { total, pods: AtomicUsize::new(1), connections, tunnels: Arc::default() }
    }

    /// What the descriptor limit allows: each connection holds two, and some are kept for everything else.
    pub fn from_descriptors(soft_limit: u64) -> usize {
        let usable = soft_limit.saturating_sub(RESERVED_DESCRIPTORS) / DESCRIPTORS_PER_CONNECTION;
        usize::try_from(usable).unwrap_or(usize::MAX).clamp(64, MOST_CONNECTIONS)
    }

    pub fn set_pods(&self, pods: usize) {
        self.pods.store(pods.max(1), Ordering::Relaxed);
    }

    pub fn total(&self) -> usize {
        self.total
    }

    /// Whether a connection of this pod, which is registered already, may go on.
    pub fn admits(&self, pod: &PodUid) -> bool {
        let others = |count: usize| count.saturating_sub(1);
        share_admits(
            self.total,
            others(self.connections.total()),
            others(self.connections.live(pod)),
            self.pods.load(Ordering::Relaxed),
        )
    }
}

impl Limits {
    /// A place for one more tunnel of `peer` with a pod of ours; `None` when the pair has its fill, or when there are
    /// as many as connections may be and the pod has its share of them.
    pub fn admit_tunnel(&self, kind: TunnelKind, peer: IpAddr, pod: &PodUid) -> Option<TunnelPlace> {
        let mut tunnels = self.tunnels.lock().unwrap_or_else(PoisonError::into_inner);
        let pair = (kind, peer, pod.clone());
        let held_by_pair = tunnels.pairs.get(&pair).copied().unwrap_or_default();
        let held_by_pod = tunnels.pods.get(pod).copied().unwrap_or_default();
        let pods = self.pods.load(Ordering::Relaxed);
        if held_by_pair >= kind.most_of_pair() || !share_admits(self.total, tunnels.total, held_by_pod, pods) {
            return None;
        }
        tunnels.total += 1;
        *tunnels.pods.entry(pod.clone()).or_default() += 1;
        *tunnels.pairs.entry(pair.clone()).or_default() += 1;
        Some(TunnelPlace { tunnels: self.tunnels.clone(), pair })
    }
}

impl Drop for TunnelPlace {
    fn drop(&mut self) {
        let mut tunnels = self.tunnels.lock().unwrap_or_else(PoisonError::into_inner);
        tunnels.total -= 1;
        give_back(&mut tunnels.pods, &self.pair.2);
        give_back(&mut tunnels.pairs, &self.pair);
    }
}

fn give_back<K: Eq + std::hash::Hash>(counts: &mut HashMap<K, usize>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}

fn share_admits(total: usize, held: usize, held_by_pod: usize, pods: usize) -> bool {
    if held >= total {
        return false;
    }
    held < total - total / 5 || held_by_pod < total / pods.max(1)
}

const DESCRIPTORS_PER_CONNECTION: u64 = 2;
const RESERVED_DESCRIPTORS: u64 = 512;
const MOST_CONNECTIONS: usize = 1_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_pod_cannot_take_the_room_of_the_others() {
        assert!(share_admits(100, 79, 79, 4), "below four fifths all are welcome");
        assert!(!share_admits(100, 80, 79, 4), "beyond, the greedy one is refused");
        assert!(share_admits(100, 80, 1, 4), "and the modest one is not");
        assert!(!share_admits(100, 100, 0, 4), "the whole is the whole");
    }

    #[test]
    fn tunnels_are_bounded_by_pair_by_pod_and_in_all_and_their_places_come_back() {
        use TunnelKind::{Fast, Hbone};
        let [near, far]: [IpAddr; 2] = [[10, 0, 0, 1].into(), [10, 0, 0, 2].into()];
        let [web, cart] = ["web", "cart"].map(PodUid::new);
        let limits = Limits::new(10_000, Arc::default());
        let held: Vec<_> = std::iter::from_fn(|| limits.admit_tunnel(Hbone, near, &web)).collect();
        assert_eq!(held.len(), Hbone.most_of_pair(), "one peer with one pod");
        assert!(limits.admit_tunnel(Hbone, near, &cart).is_some(), "the same peer with another pod");
        assert!(limits.admit_tunnel(Hbone, far, &web).is_some(), "another peer with the same pod");
        assert!(limits.admit_tunnel(Fast, near, &web).is_some(), "tunnels of the other kind");
        drop(held);
        assert!(limits.admit_tunnel(Hbone, near, &web).is_some(), "a place that was given back stayed taken");

        let limits = Limits::new(100, Arc::default());
        limits.set_pods(2);
        let held: Vec<_> = std::iter::from_fn(|| limits.admit_tunnel(Hbone, near, &web)).collect();
        assert_eq!(held.len(), 80, "one pod leaves a fifth to the others");
        let others: Vec<_> = std::iter::from_fn(|| limits.admit_tunnel(Hbone, far, &cart)).collect();
        assert_eq!(others.len(), 20, "the whole is the whole");
    }

    #[test]
    fn the_descriptor_limit_bounds_connections() {
        assert_eq!(Limits::from_descriptors(20_000), 9_744);
        assert_eq!(Limits::from_descriptors(100), 64);
        assert_eq!(Limits::from_descriptors(u64::MAX), MOST_CONNECTIONS);
    }
}
