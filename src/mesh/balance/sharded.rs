use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A map in parts, each under a lock of its own, so that threads meet only where they want the same thing.
#[derive(Debug)]
pub(super) struct Sharded<K, V> {
    shards: [Shard<K, V>; SHARDS],
    hasher: RandomState,
}

/// On a cache line of its own.
#[derive(Debug)]
#[repr(align(64))]
struct Shard<K, V>(Mutex<HashMap<K, V>>);

impl<K: Hash + Eq, V> Sharded<K, V> {
    /// The part that a key belongs to.
    pub(super) fn of(&self, key: &K) -> MutexGuard<'_, HashMap<K, V>> {
        self.shards[self.hasher.hash_one(key) as usize % SHARDS].lock()
    }

    /// One part after the other.
    pub(super) fn parts(&self) -> impl Iterator<Item = MutexGuard<'_, HashMap<K, V>>> {
        self.shards.iter().map(Shard::lock)
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.parts().map(|part| part.len()).sum()
    }
}

impl<K, V> Default for Sharded<K, V> {
    fn default() -> Self {
        Self { shards: std::array::from_fn(|_| Shard(Mutex::default())), hasher: RandomState::new() }
    }
}

impl<K, V> Shard<K, V> {
    // Nothing panics while it holds one, and each part is whole after every step.
    fn lock(&self) -> MutexGuard<'_, HashMap<K, V>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) const SHARDS: usize = 64;
