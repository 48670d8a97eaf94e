use std::collections::BTreeMap;
use std::sync::Arc;

/// The labels of an object, sorted by key. Pods of one ReplicaSet share theirs.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Labels(Arc<[(Arc<str>, Arc<str>)]>);

impl Labels {
    pub fn get(&self, key: &str) -> Option<&str> {
        let at = self.0.binary_search_by(|(found, _)| (**found).cmp(key)).ok()?;
        Some(&self.0[at].1)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&Arc<str>, &Arc<str>)> {
        self.0.iter().map(|(key, value)| (key, value))
    }

    /// How many hold these very labels, not equal ones.
    pub(crate) fn holders(&self) -> usize {
        Arc::strong_count(&self.0)
    }
}

impl From<BTreeMap<String, String>> for Labels {
    fn from(labels: BTreeMap<String, String>) -> Self {
        labels.into_iter().map(|(key, value)| (key.into(), value.into())).collect()
    }
}

/// Of two values under one key the later holds.
impl FromIterator<(Arc<str>, Arc<str>)> for Labels {
    fn from_iter<I: IntoIterator<Item = (Arc<str>, Arc<str>)>>(labels: I) -> Self {
        let sorted: BTreeMap<Arc<str>, Arc<str>> = labels.into_iter().collect();
        Self(sorted.into_iter().collect())
    }
}
