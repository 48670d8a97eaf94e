//! The kinds that are read, and the name of one object.

use std::fmt;
use std::path::Path;

use crate::mesh::{NamespacedName, ObjectKind, ObjectRef};

/// The kinds that are read.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Kind {
    Namespace,
    Node,
    ServiceCidr,
    Service,
    EndpointSlice,
    Pod,
    PeerAuthentication,
    AuthorizationPolicy,
}

impl Kind {
    const ALL: [Self; 8] = [
        Self::Namespace,
        Self::Node,
        Self::ServiceCidr,
        Self::Service,
        Self::EndpointSlice,
        Self::Pod,
        Self::PeerAuthentication,
        Self::AuthorizationPolicy,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Namespace => "Namespace",
            Self::Node => "Node",
            Self::ServiceCidr => "ServiceCIDR",
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Pod => "Pod",
            Self::PeerAuthentication => "PeerAuthentication",
            Self::AuthorizationPolicy => "AuthorizationPolicy",
        }
    }

    pub fn is_policy(self) -> bool {
        matches!(self, Self::PeerAuthentication | Self::AuthorizationPolicy)
    }

    pub(super) fn api_version(self) -> &'static str {
        match self {
            Self::Namespace | Self::Node | Self::Service | Self::Pod => "v1",
            Self::ServiceCidr => "networking.k8s.io/v1",
            Self::EndpointSlice => "discovery.k8s.io/v1",
            Self::PeerAuthentication | Self::AuthorizationPolicy => "selvedge.dev/v1alpha1",
        }
    }

    fn is_cluster_wide(self) -> bool {
        matches!(self, Self::Namespace | Self::Node | Self::ServiceCidr)
    }

    pub(super) fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == name)
    }
}

/// Names one object of the folder; the namespace is empty for cluster-wide kinds.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Key {
    pub kind: Kind,
    pub name: NamespacedName,
}

impl Key {
    pub(super) fn new(kind: Kind, namespace: Option<&str>, name: &str) -> Self {
        let namespace = if kind.is_cluster_wide() { "" } else { namespace.unwrap_or(DEFAULT_NAMESPACE) };
        Self { kind, name: NamespacedName::new(namespace, name) }
    }

    /// Stands for a policy that has no name: it may be any, and denies until it has one. No object of the folder can
    /// have such a name: a parenthesis is not allowed in one.
    pub(super) fn unnamed(kind: Kind, namespace: Option<&str>, path: &Path, line: usize) -> Option<Self> {
        let name = || format!("(unnamed in {}:{line})", path.display());
        kind.is_policy().then(|| Self::new(kind, namespace, &name()))
    }

    pub fn is_unnamed(&self) -> bool {
        self.name.name.starts_with('(')
    }

    /// The model's name of it; `None` for policies, which the mesh does not hold.
    pub(in crate::source) fn object_ref(&self) -> Option<ObjectRef> {
        let kind = match self.kind {
            Kind::Namespace => ObjectKind::Namespace,
            Kind::Node => ObjectKind::Node,
            Kind::ServiceCidr => ObjectKind::ServiceCidr,
            Kind::Service => ObjectKind::Service,
            Kind::EndpointSlice => ObjectKind::EndpointSlice,
            Kind::Pod => ObjectKind::Pod,
            Kind::PeerAuthentication | Kind::AuthorizationPolicy => return None,
        };
        Some(ObjectRef { kind, name: self.name.clone() })
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.name.namespace {
            "" => write!(f, "{} {}", self.kind.as_str(), self.name.name),
            _ => write!(f, "{} {}", self.kind.as_str(), self.name),
        }
    }
}

const DEFAULT_NAMESPACE: &str = "default";
