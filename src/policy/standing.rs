use std::collections::BTreeMap;
use std::sync::Arc;

use super::compile::Compiled;
use super::object::{Mode, PeerAuthentication, PolicyObject};
use super::{RequestAuthentication, Scope, Selection};
use crate::mesh::{NamespacedName, Pod};

/// What stands over one pod, whatever address it is reached at.
#[derive(Debug, Default)]
pub(super) struct Standing {
    /// By name, so that the same policies always give the same reason.
    pub(super) policies: Vec<Arc<Compiled>>,
    /// Whose tokens are taken.
    pub(super) authentications: Vec<RequestAuthentication>,
    peer: PeerPolicy,
}

/// Whether a pod accepts plaintext on a port.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PeerMode {
    /// Mutual TLS only, and the policy that says so.
    Strict(Option<NamespacedName>),
    Permissive,
}

impl Standing {
    pub(super) fn over<'a>(
        pod: &Pod,
        policies: impl Iterator<Item = (&'a PolicyObject, Option<&'a Arc<Compiled>>)>,
    ) -> Self {
        let mut standing = Self::default();
        let mut peers: BTreeMap<Level, Vec<&PeerAuthentication>> = BTreeMap::new();
        let selecting = policies.filter(|(object, _)| {
            #[cfg(test)]
            crate::mesh::work::step();
            object.scope().selects(pod)
        });
        for (object, compiled) in selecting {
            standing.policies.extend(compiled.cloned());
            match object {
                PolicyObject::Authorization(_) => {}
                PolicyObject::RequestAuthentication(policy) => {
                    standing.authentications.push(RequestAuthentication::clone(policy))
                }
                PolicyObject::PeerAuthentication(peer) if peer.unenforced.is_empty() => {
                    peers.entry(Level::of(&peer.scope)).or_default().push(peer);
                }
                PolicyObject::PeerAuthentication(_) => standing.peer.force(&object.reference().name),
                PolicyObject::Malformed(malformed) => {
                    if malformed.reference.kind == super::PolicyKind::PeerAuthentication {
                        standing.peer.force(&malformed.reference.name);
                    }
                }
            }
        }
        standing.policies.sort_by(|a, b| a.reference.cmp(&b.reference));
        for equals in peers.into_values() {
            let oldest = equals.into_iter().min_by(|a, b| (a.created, &a.name).cmp(&(b.created, &b.name)));
            standing.peer.chain.extend(oldest.cloned());
        }
        standing
    }

    pub(super) fn peer_mode(&self, port: u16) -> PeerMode {
        self.peer.mode(port)
    }
}

#[derive(Debug, Default)]
struct PeerPolicy {
    /// A policy that may have meant STRICT anywhere.
    forced: Option<NamespacedName>,
    /// The oldest of each level, the narrowest first.
    chain: Vec<PeerAuthentication>,
}

impl PeerPolicy {
    fn force(&mut self, name: &NamespacedName) {
        let first = self.forced.take().map_or_else(|| name.clone(), |other| other.min(name.clone()));
        self.forced = Some(first);
    }

    fn mode(&self, port: u16) -> PeerMode {
        if let Some(name) = &self.forced {
            return PeerMode::Strict(Some(name.clone()));
        }
        let said = self.chain.iter().find_map(|peer| Some((peer.ports.get(&port).copied().or(peer.mode)?, &peer.name)));
        match said {
            Some((Mode::Strict, name)) => PeerMode::Strict(Some(name.clone())),
            Some((Mode::Permissive, _)) | None => PeerMode::Permissive,
        }
    }
}

/// How narrow a policy is; the least decides. What the root namespace says yields to every namespace's own.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    Workload,
    Namespace,
    RootWorkload,
    Mesh,
}

impl Level {
    fn of(scope: &Scope) -> Self {
        match (&scope.selection, scope.is_root()) {
            (Selection::All, false) => Self::Namespace,
            (Selection::All, true) => Self::Mesh,
            (_, false) => Self::Workload,
            (_, true) => Self::RootWorkload,
        }
    }
}
