use std::collections::HashSet;
use std::hash::Hash;
use std::sync::Arc;

use crate::mesh::{Delta, EndpointSlice, Labels, NamespacedName, Object, Pod};

/// Gives objects one copy of what they say alike: a hundred thousand pods name a few hundred nodes, namespaces, service
/// accounts and sets of labels.
#[derive(Debug, Default)]
pub(super) struct Interner {
    texts: Pool<Arc<str>>,
    labels: Pool<Labels>,
}

impl Interner {
    pub(super) fn intern(&mut self, mut delta: Delta) -> Delta {
        match &mut delta {
            Delta::Apply(Object::Pod(pod)) => self.pod(pod),
            Delta::Apply(Object::EndpointSlice(slice)) => self.slice(slice),
            _ => {}
        }
        delta
    }

    fn pod(&mut self, pod: &mut Pod) {
        let Self { texts, labels } = self;
        texts.share(&mut pod.name.namespace);
        texts.share(&mut pod.service_account);
        texts.share(&mut pod.owner.kind);
        texts.share(&mut pod.owner.name);
        pod.node.iter_mut().for_each(|node| texts.share(node));
        pod.container_ports.iter_mut().filter_map(|port| port.name.as_mut()).for_each(|name| texts.share(name));
        if !labels.has(&pod.labels) {
            pod.labels = pod.labels.iter().map(|(key, value)| (texts.one(key), texts.one(value))).collect();
        }
        labels.share(&mut pod.labels);
        pod.ips.shrink_to_fit();
        pod.container_ports.shrink_to_fit();
        pod.probes.shrink_to_fit();
    }

    fn slice(&mut self, slice: &mut EndpointSlice) {
        self.name(&mut slice.service);
        self.texts.share(&mut slice.name.namespace);
        slice.ports.iter_mut().for_each(|(port, _)| self.texts.share(port));
        for endpoint in &mut slice.endpoints {
            let places = endpoint.node.iter_mut().chain(&mut endpoint.zone);
            let hints = endpoint.zone_hints.iter_mut().chain(&mut endpoint.node_hints);
            places.chain(hints).for_each(|text| self.texts.share(text));
            endpoint.pod.iter_mut().for_each(|pod| self.texts.share(&mut pod.namespace));
        }
    }

    fn name(&mut self, name: &mut NamespacedName) {
        self.texts.share(&mut name.namespace);
        self.texts.share(&mut name.name);
    }
}

/// One copy of each value that somebody else holds too.
#[derive(Debug)]
struct Pool<T> {
    values: HashSet<T>,
    /// Values that nobody else holds any more are swept out once this many are held.
    sweep_at: usize,
}

impl<T: Shared + Hash + Eq> Pool<T> {
    fn has(&self, value: &T) -> bool {
        self.values.contains(value)
    }

    fn share(&mut self, value: &mut T) {
        *value = self.one(value);
    }

    fn one(&mut self, value: &T) -> T {
        if let Some(known) = self.values.get(value) {
            return known.clone();
        }
        if self.values.len() >= self.sweep_at {
            self.values.retain(|value| value.holders() > 1);
            self.sweep_at = (self.values.len() * 2).max(SWEEP_FROM);
        }
        self.values.insert(value.clone());
        value.clone()
    }
}

impl<T> Default for Pool<T> {
    fn default() -> Self {
        Self { values: HashSet::new(), sweep_at: SWEEP_FROM }
    }
}

/// A value of which a clone is the same copy.
trait Shared: Clone {
    fn holders(&self) -> usize;
}

impl Shared for Arc<str> {
    fn holders(&self) -> usize {
        Arc::strong_count(self)
    }
}

impl Shared for Labels {
    fn holders(&self) -> usize {
        Labels::holders(self)
    }
}

const SWEEP_FROM: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_texts_become_one_and_those_that_nobody_holds_are_forgotten() {
        let mut pool: Pool<Arc<str>> = Pool::default();
        let kept = pool.one(&"kept".into());
        assert!(Arc::ptr_eq(&kept, &pool.one(&Arc::from("kept".to_owned()))));
        (0..10_000).for_each(|n| drop(pool.one(&n.to_string().into())));
        assert!(pool.values.len() <= SWEEP_FROM && pool.has(&"kept".into()), "{} texts are held", pool.values.len());
    }
}
