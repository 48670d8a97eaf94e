use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

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
}

impl Limits {
    pub fn new(total: usize, connections: Arc<Connections>) -> Self {
        Self { total, pods: AtomicUsize::new(1), connections }
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
    fn the_descriptor_limit_bounds_connections() {
        assert_eq!(Limits::from_descriptors(20_000), 9_744);
        assert_eq!(Limits::from_descriptors(100), 64);
        assert_eq!(Limits::from_descriptors(u64::MAX), MOST_CONNECTIONS);
    }
}
