use std::sync::Arc;

use super::object::PolicyRef;
use super::store::Entry;
use super::{Scope, Selection};
use crate::mesh::{Labels, SharedMap, Vacant};

/// The policies of one namespace, and by which label of a pod each is found.
#[derive(Clone, Debug, Default)]
pub(super) struct Around {
    /// Another one after each change.
    pub(super) version: u64,
    by_name: Entries,
    /// Those without a selector.
    over_all: Entries,
    /// Those with a selector, each under one label that it asks for: the one that fewest others were under.
    by_label: SharedMap<Arc<str>, SharedMap<Arc<str>, Entries>>,
}

type Entries = SharedMap<PolicyRef, Arc<Entry>>;

impl Around {
    pub(super) fn get(&self, reference: &PolicyRef) -> Option<&Arc<Entry>> {
        self.by_name.get(reference)
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Arc<Entry>> {
        self.by_name.values()
    }

    /// All that may stand over a pod with these labels: those found under one of them.
    pub(super) fn over<'a>(&'a self, labels: &'a Labels) -> impl Iterator<Item = &'a Arc<Entry>> {
        let found = labels.iter().filter_map(|(key, value)| self.under(key, value));
        self.over_all.values().chain(found.flat_map(SharedMap::values))
    }

    pub(super) fn insert(&mut self, reference: PolicyRef, entry: Arc<Entry>) {
        match &entry.object.scope().selection {
            Selection::All => drop(self.over_all.insert(reference.clone(), entry.clone())),
            Selection::Labels(labels) => {
                let crowd = |(key, value): &(&String, &String)| self.under(key, value).map_or(0, SharedMap::len);
                match labels.iter().min_by_key(crowd) {
                    Some((key, value)) => self.change_under(key, value, |entries| {
                        entries.insert(reference.clone(), entry.clone());
                    }),
                    None => drop(self.over_all.insert(reference.clone(), entry.clone())),
                }
            }
            Selection::Services(_) => {}
        }
        self.by_name.insert(reference, entry);
    }

    pub(super) fn remove(&mut self, reference: &PolicyRef) {
        let Some(entry) = self.by_name.remove(reference) else { return };
        self.over_all.remove(reference);
        let Scope { selection: Selection::Labels(labels), .. } = entry.object.scope() else { return };
        for (key, value) in labels {
            self.change_under(key, value, |entries| drop(entries.remove(reference)));
        }
    }

    fn under(&self, key: &str, value: &str) -> Option<&Entries> {
        self.by_label.get(key)?.get(value)
    }

    fn change_under(&mut self, key: &str, value: &str, change: impl FnOnce(&mut Entries)) {
        self.by_label.change(&key.into(), |values| values.change(&value.into(), change));
    }
}

impl Vacant for Around {
    fn is_vacant(&self) -> bool {
        self.by_name.is_empty()
    }
}
