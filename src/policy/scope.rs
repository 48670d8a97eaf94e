use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use super::ROOT_NAMESPACE;
use crate::mesh::{NamespacedName, Pod};

/// What a policy stands over.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Scope {
    /// The policy's own namespace. In the root namespace it stands over pods of every namespace.
    pub namespace: Arc<str>,
    pub selection: Selection,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Selection {
    All,
    Labels(BTreeMap<String, String>),
    /// Endpoints of these Services, which are in the policy's own namespace.
    Services(BTreeSet<NamespacedName>),
}

impl Scope {
    pub fn is_root(&self) -> bool {
        &*self.namespace == ROOT_NAMESPACE
    }

    /// Whether it stands over a pod by its labels. One with targetRefs never does: that is up to the address.
    pub fn selects(&self, pod: &Pod) -> bool {
        if !self.is_root() && self.namespace != pod.name.namespace {
            return false;
        }
        match &self.selection {
            Selection::All => true,
            Selection::Labels(labels) => labels.iter().all(|(key, value)| pod.labels.get(key) == Some(value.as_str())),
            Selection::Services(_) => false,
        }
    }

    /// Whether it may stand over a pod, by its labels or by an address of it.
    pub fn may_select(&self, pod: &Pod) -> bool {
        match &self.selection {
            Selection::Services(_) => self.is_root() || self.namespace == pod.name.namespace,
            Selection::All | Selection::Labels(_) => self.selects(pod),
        }
    }

    pub(super) fn services(&self) -> impl Iterator<Item = &NamespacedName> {
        match &self.selection {
            Selection::Services(services) => Some(services),
            _ => None,
        }
        .into_iter()
        .flatten()
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.selection {
            Selection::All => f.write_str("all pods")?,
            Selection::Labels(labels) => {
                f.write_str("pods with ")?;
                for (index, (key, value)) in labels.iter().enumerate() {
                    write!(f, "{}{key}={value}", if index == 0 { "" } else { "," })?;
                }
            }
            Selection::Services(services) => {
                f.write_str("endpoints of ")?;
                for (index, service) in services.iter().enumerate() {
                    write!(f, "{}{service}", if index == 0 { "" } else { ", " })?;
                }
                return Ok(());
            }
        }
        if self.is_root() { f.write_str(" of the mesh") } else { write!(f, " of namespace {}", self.namespace) }
    }
}
