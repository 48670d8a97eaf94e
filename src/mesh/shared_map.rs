use std::borrow::Borrow;
use std::fmt;
use std::hash::{BuildHasher, Hash, RandomState};
use std::mem;
use std::sync::Arc;

/// A map that is cheap to clone: the clone shares everything, and a change copies no more than the way to it.
///
/// It is what lets readers keep a consistent view of the model while the next one is made. A hash array mapped trie
/// ([Bagwell, "Ideal Hash Trees"](https://infoscience.epfl.ch/record/64398)) of 64 ways: three nodes deep for a
/// hundred thousand entries, and no entry has more room than it needs.
#[derive(Clone)]
pub struct SharedMap<K, V> {
    root: Arc<Node<K, V>>,
    len: usize,
    hasher: RandomState,
}

impl<K, V> SharedMap<K, V> {
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Every entry, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        Iter { stack: vec![self.root.slots.iter()] }
    }

    pub fn keys(&self) -> impl Iterator<Item = &K> {
        self.iter().map(|(key, _)| key)
    }

    pub fn values(&self) -> impl Iterator<Item = &V> {
        self.iter().map(|(_, value)| value)
    }
}

impl<K: Hash + Eq, V> SharedMap<K, V> {
    pub fn get<Q: Hash + Eq + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        let hash = self.hasher.hash_one(key);
        let (mut node, mut shift) = (&self.root, 0);
        loop {
            match &node.slots[node.find(hash, shift, key).ok()?] {
                Slot::More(child) => (node, shift) = (child, shift + WAYS),
                Slot::One(found, value) => return (found.borrow() == key).then_some(value),
            }
        }
    }

    pub fn contains_key<Q: Hash + Eq + ?Sized>(&self, key: &Q) -> bool
    where
        K: Borrow<Q>,
    {
        self.get(key).is_some()
    }
}

impl<K: Hash + Eq + Clone, V: Clone> SharedMap<K, V> {
    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        let hash = self.hasher.hash_one(&key);
        let old = insert(&mut self.root, &self.hasher, hash, 0, key, value);
        self.len += usize::from(old.is_none());
        old
    }

    pub fn remove<Q: Hash + Eq + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        // What is not there is not worth a copy of the way to it.
        if !self.contains_key(key) {
            return None;
        }
        let removed = remove(&mut self.root, self.hasher.hash_one(key), 0, key)?;
        self.len -= 1;
        Some(removed)
    }

    /// Changes one value, made from nothing where there is none, and drops it where nothing is left of it.
    pub fn change(&mut self, key: &K, change: impl FnOnce(&mut V))
    where
        V: Default + Vacant,
    {
        let mut value = self.remove(key).unwrap_or_default();
        change(&mut value);
        if !value.is_vacant() {
            self.insert(key.clone(), value);
        }
    }
}

impl<K, V> Default for SharedMap<K, V> {
    fn default() -> Self {
        Self { root: Arc::new(Node::empty()), len: 0, hasher: RandomState::new() }
    }
}

impl<K: fmt::Debug, V: fmt::Debug> fmt::Debug for SharedMap<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

/// What may stand for nothing: a collection without an entry.
pub trait Vacant {
    fn is_vacant(&self) -> bool;
}

impl<K, V> Vacant for SharedMap<K, V> {
    fn is_vacant(&self) -> bool {
        self.is_empty()
    }
}

#[derive(Clone)]
struct Node<K, V> {
    /// Which of the 64 ways are taken; their slots lie side by side.
    taken: u64,
    slots: Vec<Slot<K, V>>,
}

#[derive(Clone)]
enum Slot<K, V> {
    One(K, V),
    More(Arc<Node<K, V>>),
}

impl<K, V> Node<K, V> {
    fn empty() -> Self {
        Self { taken: 0, slots: Vec::new() }
    }

    /// The slot in question, or where it would have to be.
    fn find<Q: Eq + ?Sized>(&self, hash: u64, shift: u32, key: &Q) -> Result<usize, usize>
    where
        K: Borrow<Q>,
    {
        #[cfg(test)]
        super::work::step();
        let Some(way) = way(hash, shift) else {
            // Keys of one and the same hash.
            let same = |slot: &Slot<K, V>| matches!(slot, Slot::One(found, _) if found.borrow() == key);
            return self.slots.iter().position(same).ok_or(self.slots.len());
        };
        let at = (self.taken & (way - 1)).count_ones() as usize;
        if self.taken & way == 0 { Err(at) } else { Ok(at) }
    }
}

fn insert<K: Hash + Eq + Clone, V: Clone>(
    node: &mut Arc<Node<K, V>>,
    hasher: &RandomState,
    hash: u64,
    shift: u32,
    key: K,
    value: V,
) -> Option<V> {
    let node = own(node);
    let at = match node.find(hash, shift, &key) {
        Ok(at) => at,
        Err(at) => {
            node.taken |= way(hash, shift).unwrap_or(0);
            node.slots.reserve_exact(1);
            node.slots.insert(at, Slot::One(key, value));
            return None;
        }
    };
    let slot = &mut node.slots[at];
    if let Slot::One(found, old) = slot {
        if *found == key {
            return Some(mem::replace(old, value));
        }
        let hash = hasher.hash_one(&*found);
        let Slot::One(found, old) = mem::replace(slot, Slot::More(Arc::new(Node::empty()))) else { return None };
        if let Slot::More(child) = slot {
            insert(child, hasher, hash, shift + WAYS, found, old);
        }
    }
    match slot {
        Slot::More(child) => insert(child, hasher, hash, shift + WAYS, key, value),
        Slot::One(..) => None,
    }
}

fn remove<K: Eq + Clone + Borrow<Q>, V: Clone, Q: Eq + ?Sized>(
    node: &mut Arc<Node<K, V>>,
    hash: u64,
    shift: u32,
    key: &Q,
) -> Option<V> {
    let node = own(node);
    let at = node.find(hash, shift, key).ok()?;
    if let Slot::More(child) = &mut node.slots[at] {
        let removed = remove(child, hash, shift + WAYS, key);
        // A node of one entry is that entry, so that the depth follows the number of entries down again.
        if let [Slot::One(..)] = child.slots[..]
            && let Some(only) = Arc::make_mut(child).slots.pop()
        {
            node.slots[at] = only;
        }
        return removed;
    }
    node.taken &= !way(hash, shift).unwrap_or(0);
    match node.slots.remove(at) {
        Slot::One(_, value) => Some(value),
        Slot::More(_) => None,
    }
}

/// The node, copied if somebody else has it too.
fn own<K: Clone, V: Clone>(node: &mut Arc<Node<K, V>>) -> &mut Node<K, V> {
    #[cfg(test)]
    if Arc::strong_count(node) > 1 {
        node.slots.iter().for_each(|_| super::work::step());
    }
    Arc::make_mut(node)
}

/// The bit of the way that a hash takes at a depth; none once all its bits are used.
fn way(hash: u64, shift: u32) -> Option<u64> {
    Some(1 << (hash.checked_shr(shift)? & 63))
}

struct Iter<'a, K, V> {
    stack: Vec<std::slice::Iter<'a, Slot<K, V>>>,
}

impl<'a, K, V> Iterator for Iter<'a, K, V> {
    type Item = (&'a K, &'a V);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.stack.last_mut()?.next() {
                Some(Slot::One(key, value)) => return Some((key, value)),
                Some(Slot::More(child)) => self.stack.push(child.slots.iter()),
                None => drop(self.stack.pop()),
            }
        }
    }
}

/// How many bits of the hash choose the way at each depth.
const WAYS: u32 = 6;

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    /// A key of which many have the same hash.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    struct Alike(u8);

    impl Hash for Alike {
        fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
            (self.0 % 3).hash(state);
        }
    }

    fn agrees<K: Hash + Eq + Copy>(steps: &[(bool, K, u32)]) -> bool {
        let (mut map, mut model) = (SharedMap::default(), HashMap::new());
        let mut earlier = Vec::new();
        for (index, (puts, key, value)) in steps.iter().enumerate() {
            if index % 7 == 0 {
                earlier.push((map.clone(), model.clone()));
            }
            let same = match puts {
                true => map.insert(*key, *value) == model.insert(*key, *value),
                false => map.remove(key) == model.remove(key),
            };
            if !same || map.get(key) != model.get(key) {
                return false;
            }
        }
        earlier.push((map, model));
        earlier.iter().all(|(map, model)| {
            let found: HashMap<_, _> = map.iter().map(|(key, value)| (*key, *value)).collect();
            found == *model && map.len() == model.len() && model.iter().all(|(key, value)| map.get(key) == Some(value))
        })
    }

    proptest! {
        #[test]
        fn it_is_a_map_and_a_clone_keeps_what_it_had(
            steps in prop::collection::vec((prop::bool::weighted(0.6), 0u16..500, any::<u32>()), 0..900),
        ) {
            prop_assert!(agrees(&steps));
        }

        #[test]
        fn keys_of_one_hash_are_told_apart(
            steps in prop::collection::vec((prop::bool::weighted(0.6), (0u8..20).prop_map(Alike), any::<u32>()), 0..200),
        ) {
            prop_assert!(agrees(&steps));
        }
    }

    #[test]
    fn a_change_copies_the_way_to_it_and_no_more() {
        let mut map: SharedMap<u32, u32> = SharedMap::default();
        (0..50_000).for_each(|n| _ = map.insert(n, n));
        let before = map.clone();
        map.insert(7, 0);
        let shared = |one: &Arc<Node<u32, u32>>, other: &Arc<Node<u32, u32>>| {
            let pairs = one.slots.iter().zip(&other.slots);
            pairs
                .filter(|(one, other)| matches!((one, other), (Slot::More(a), Slot::More(b)) if Arc::ptr_eq(a, b)))
                .count()
        };
        assert_eq!(shared(&map.root, &before.root), map.root.slots.len() - 1);
        assert_eq!((before.get(&7), map.get(&7)), (Some(&7), Some(&0)));
    }
}
