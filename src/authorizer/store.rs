use std::sync::Arc;

use super::Authorizer;
use crate::mesh::{NamespacedName, SharedMap};

/// Every authorizer that policies may name. A clone costs nothing.
#[derive(Clone, Debug, Default)]
pub struct Authorizers(SharedMap<NamespacedName, Arc<Authorizer>>);

/// One step of the model.
#[derive(Clone, Debug)]
pub enum Delta {
    Apply(Arc<Authorizer>),
    Delete(NamespacedName),
}

impl Authorizers {
    pub fn apply(&mut self, delta: Delta) {
        match delta {
            Delta::Apply(authorizer) => drop(self.0.insert(authorizer.name.clone(), authorizer)),
            Delta::Delete(name) => drop(self.0.remove(&name)),
        }
    }

    /// The one that a policy of a namespace means by a name: its namespace's own, else the mesh's.
    pub fn find(&self, namespace: &str, name: &str, root: &str) -> Option<&Arc<Authorizer>> {
        let of = |namespace: &str| self.0.get(&NamespacedName::new(namespace, name));
        of(namespace).or_else(|| of(root))
    }

    pub fn iter(&self) -> impl Iterator<Item = &Arc<Authorizer>> {
        self.0.values()
    }
}
