//! What the watches tell, as a state machine: objects come in as they are read, steps of the model come out.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::path::PathBuf;
use std::sync::Arc;

use serde_json::Value;

use crate::mesh::{self, NamespacedName, PodUid};
use crate::model::Delta;
use crate::source::Problem;
use crate::source::decode::{self, Fault, Item, Key, Kind, PolicyItem};

/// The objects of the cluster that are in force, as far as they must be remembered to tell what a change means.
#[derive(Debug)]
pub(super) struct Objects {
    /// This agent tells of its own node itself: what the API server says of it is what it wrote.
    own_node: Option<Arc<str>>,
    /// By kind, with a hash of what each said last: most updates of a pod change nothing that is read of it.
    known: HashMap<Kind, HashMap<NamespacedName, Known>>,
    policies: BTreeMap<Key, Policy>,
    faults: BTreeMap<Key, Vec<Fault>>,
    /// Whether problems may have come or gone since they were last taken.
    stale: bool,
    /// What the API server says of this agent's own node, since that was last taken.
    own_listed: Option<Option<BTreeSet<PodUid>>>,
    hasher: RandomState,
}

#[derive(Clone, Copy, Debug)]
struct Known {
    hash: u64,
    /// Of an object that never could be read, only a stand-in is in force, or nothing.
    is_good: bool,
    /// In which listing of its kind it was last seen.
    listing: u32,
}

#[derive(Debug)]
struct Policy {
    item: PolicyItem,
    generation: Option<i64>,
    /// Targets that are not there.
    missing: Vec<Fault>,
}

impl Objects {
    pub fn new(own_node: Option<Arc<str>>) -> Self {
        Self {
            own_node,
            known: HashMap::new(),
            policies: BTreeMap::new(),
            faults: BTreeMap::new(),
            stale: true,
            own_listed: None,
            hasher: RandomState::new(),
        }
    }

    /// Takes an object as it is now.
    pub fn apply(&mut self, kind: Kind, value: Value, listing: u32) -> Vec<Delta> {
        let Ok(key) = decode::identify(kind, &value) else { return Vec::new() };
        let hash = self.hasher.hash_one(&value);
        let of_kind = self.known.entry(kind).or_default();
        let before = of_kind.get(&key.name).copied();
        if let Some(before) = of_kind.get_mut(&key.name).filter(|before| before.hash == hash) {
            before.listing = listing;
            return Vec::new();
        }
        let generation = value.pointer("/metadata/generation").and_then(Value::as_i64);
        let (read, mut faults) = decode::named(&key, value, |_| 0);
        let had_good = before.is_some_and(|before| before.is_good);
        let is_good = read.is_ok() || had_good;
        of_kind.insert(key.name.clone(), Known { hash, is_good, listing });
        let item = match read {
            Ok(item) => Some(Arc::new(item)),
            Err(broken) => {
                let (item, outcome) = broken.outcome(had_good);
                faults.iter_mut().for_each(|fault| fault.cause.push_str(outcome));
                item.cloned()
            }
        };
        let before = match faults.is_empty() {
            true => self.faults.remove(&key),
            false => self.faults.insert(key.clone(), faults),
        };
        self.stale |= before.as_ref() != self.faults.get(&key);
        let Some(item) = item else { return Vec::new() };
        match &*item {
            Item::Policy(policy) => {
                self.policies.insert(key.clone(), Policy { item: policy.clone(), generation, missing: Vec::new() });
                self.weigh_policy(&key).into_iter().collect()
            }
            Item::Other(mesh::Object::MeshNode { node, captured }) if Some(node) == self.own_node.as_ref() => {
                self.own_listed = Some(Some(captured.clone()));
                Vec::new()
            }
            Item::Service(..) if !had_good => {
                let mut deltas: Vec<Delta> = item.apply().into_iter().collect();
                deltas.extend(self.weigh_policies());
                deltas
            }
            _ => item.apply().into_iter().collect(),
        }
    }

    /// Takes away an object that is no more.
    pub fn delete(&mut self, kind: Kind, name: &NamespacedName) -> Vec<Delta> {
        if self.known.get_mut(&kind).and_then(|of_kind| of_kind.remove(name)).is_none() {
            return Vec::new();
        }
        let key = Key { kind, name: name.clone() };
        self.stale |= self.faults.remove(&key).is_some();
        if let Some(policy) = self.policies.remove(&key) {
            self.stale |= !policy.missing.is_empty();
            return vec![Delta::Policy(policy.item.delete())];
        }
        if kind == Kind::MeshNode && Some(&name.name) == self.own_node.as_ref() {
            self.own_listed = Some(None);
            return Vec::new();
        }
        let mut deltas: Vec<Delta> = key.delete().into_iter().collect();
        if kind == Kind::Service {
            deltas.extend(self.weigh_policies());
        }
        deltas
    }

    /// Takes away what a whole listing of a kind did not show.
    pub fn listed(&mut self, kind: Kind, listing: u32) -> Vec<Delta> {
        let of_kind = self.known.get(&kind).into_iter().flatten();
        let gone: Vec<_> =
            of_kind.filter(|(_, known)| known.listing != listing).map(|(name, _)| name.clone()).collect();
        gone.iter().flat_map(|name| self.delete(kind, name)).collect()
    }

    /// How many objects are known of each kind.
    pub fn count(&self) -> usize {
        self.known.values().map(HashMap::len).sum()
    }

    /// What is not in force as written, where that may have changed.
    pub fn take_problems(&mut self) -> Option<Vec<Problem>> {
        std::mem::take(&mut self.stale).then(|| self.problems())
    }

    /// What the API server says of this agent's own node, where it said something new; within, none: nothing any more.
    pub fn take_own_node(&mut self) -> Option<Option<BTreeSet<PodUid>>> {
        self.own_listed.take()
    }

    fn problems(&self) -> Vec<Problem> {
        let missing = self.policies.iter().map(|(key, policy)| (key, &policy.missing));
        let all = self.faults.iter().chain(missing).flat_map(|(key, faults)| faults.iter().map(move |f| (key, f)));
        let mut problems: Vec<Problem> = all
            .map(|(key, fault)| Problem {
                file: PathBuf::new(),
                line: 0,
                object: key.to_string(),
                field: fault.field.clone(),
                cause: fault.cause.clone(),
            })
            .collect();
        problems.sort();
        problems
    }

    /// The generation of each policy that is known.
    pub fn generations(&self) -> BTreeMap<Key, i64> {
        self.policies.iter().filter_map(|(key, policy)| Some((key.clone(), policy.generation?))).collect()
    }

    fn weigh_policies(&mut self) -> Vec<Delta> {
        let targeted = self.policies.iter().filter(|(_, policy)| policy.item.has_targets());
        let keys: Vec<Key> = targeted.map(|(key, _)| key.clone()).collect();
        keys.iter().filter_map(|key| self.weigh_policy(key)).collect()
    }

    /// A policy over a Service that is not there may mean any of them: until there is one it fails closed.
    fn weigh_policy(&mut self, key: &Key) -> Option<Delta> {
        let services = self.known.get(&Kind::Service);
        let is_there = |name: &NamespacedName| {
            services.and_then(|services| services.get(name)).is_some_and(|service| service.is_good)
        };
        let policy = self.policies.get_mut(key)?;
        let (beside, mut missing) = policy.item.beside(is_there);
        missing.extend(policy.item.lacking());
        self.stale |= !policy.missing.is_empty() || !missing.is_empty();
        policy.missing = missing.into_iter().map(|target| Fault::new(target.field, target.cause)).collect();
        policy.item = beside;
        Some(Delta::Policy(policy.item.apply()))
    }
}

/// The kinds that have not been listed whole yet.
#[derive(Debug)]
pub(super) struct Unsynced(BTreeSet<Kind>);

impl Unsynced {
    pub fn all() -> Self {
        Self(Kind::ALL.into_iter().collect())
    }

    pub fn add(&mut self, kind: Kind) {
        self.0.insert(kind);
    }

    /// Says whether it was among them.
    pub fn remove(&mut self, kind: Kind) -> bool {
        self.0.remove(&kind)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = Kind> {
        self.0.iter().copied()
    }
}

#[cfg(test)]
mod tests;
