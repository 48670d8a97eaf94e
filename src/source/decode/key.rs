//! The kinds that are read, and the name of one object.

use std::fmt;
use std::path::Path;

use super::{CniKind, group_of};
use crate::authorizer;
use crate::mesh::{self, NamespacedName, ObjectKind, ObjectRef};
use crate::model::Delta;
use crate::route::traffic::{self, PolicyRef, TrafficKind};
use crate::route::{self, RouteKind, RouteRef};

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
    RequestAuthentication,
    ExternalAuthorizer,
    /// Read from a folder; of a cluster's, the controller reads those that it is asked for.
    ConfigMap,
    /// Of `networking.k8s.io`.
    NetworkPolicy,
    MeshNode,
    /// Of the Gateway API.
    HttpRoute,
    GrpcRoute,
    /// Ours, and the Gateway API's, about traffic.
    TrafficPolicy,
    BackendTrafficPolicy,
    Gateway,
    /// A CNI's own.
    Cni(&'static CniKind),
}

impl Kind {
    /// All that are watched, but those of CNIs.
    pub const ALL: [Self; 17] = [
        Self::Namespace,
        Self::Node,
        Self::ServiceCidr,
        Self::Service,
        Self::EndpointSlice,
        Self::Pod,
        Self::PeerAuthentication,
        Self::AuthorizationPolicy,
        Self::RequestAuthentication,
        Self::ExternalAuthorizer,
        Self::NetworkPolicy,
        Self::MeshNode,
        Self::HttpRoute,
        Self::GrpcRoute,
        Self::TrafficPolicy,
        Self::BackendTrafficPolicy,
        Self::Gateway,
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
            Self::RequestAuthentication => "RequestAuthentication",
            Self::ExternalAuthorizer => "ExternalAuthorizer",
            Self::ConfigMap => "ConfigMap",
            Self::NetworkPolicy => "NetworkPolicy",
            Self::MeshNode => "MeshNode",
            Self::HttpRoute => "HTTPRoute",
            Self::GrpcRoute => "GRPCRoute",
            Self::TrafficPolicy => "TrafficPolicy",
            Self::BackendTrafficPolicy => "XBackendTrafficPolicy",
            Self::Gateway => "Gateway",
            Self::Cni(kind) => kind.kind,
        }
    }

    pub fn is_policy(self) -> bool {
        matches!(self, Self::PeerAuthentication | Self::AuthorizationPolicy | Self::RequestAuthentication)
    }

    /// `None`: any version, for of this kind nothing is read that versions may differ in.
    pub(in crate::source) fn api_version(self) -> Option<&'static str> {
        match self {
            Self::Namespace | Self::Node | Self::Service | Self::Pod | Self::ConfigMap => Some("v1"),
            Self::ServiceCidr | Self::NetworkPolicy => Some("networking.k8s.io/v1"),
            Self::EndpointSlice => Some("discovery.k8s.io/v1"),
            Self::PeerAuthentication
            | Self::AuthorizationPolicy
            | Self::RequestAuthentication
            | Self::ExternalAuthorizer
            | Self::TrafficPolicy
            | Self::MeshNode => Some("selvedge.dev/v1alpha1"),
            Self::BackendTrafficPolicy => Some("gateway.networking.x-k8s.io/v1alpha1"),
            Self::HttpRoute | Self::GrpcRoute | Self::Gateway => Some("gateway.networking.k8s.io/v1"),
            Self::Cni(_) => None,
        }
    }

    pub(in crate::source) fn is_cluster_wide(self) -> bool {
        match self {
            Self::Namespace | Self::Node | Self::ServiceCidr | Self::MeshNode => true,
            Self::Cni(kind) => kind.is_cluster_wide,
            _ => false,
        }
    }

    pub(super) fn named(name: &str) -> Option<Self> {
        let known = Self::ALL.into_iter().chain([Self::ConfigMap]).find(|kind| kind.as_str() == name);
        known.or_else(|| CniKind::find(None, name).map(Self::Cni))
    }

    pub(in crate::source) fn of(group: &str, name: &str) -> Option<Self> {
        let in_group = |kind: &Self| kind.api_version().is_some_and(|version| group_of(version) == group);
        let known = Self::ALL.into_iter().chain([Self::ConfigMap]).find(|kind| kind.as_str() == name && in_group(kind));
        known.or_else(|| CniKind::find(Some(group), name).map(Self::Cni))
    }
}

/// Names one object of the source; the namespace is empty for cluster-wide kinds.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Key {
    pub kind: Kind,
    pub name: NamespacedName,
}

impl Key {
    pub(in crate::source) fn new(kind: Kind, namespace: Option<&str>, name: &str) -> Self {
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

    /// The step of the model that takes it away; `None` for policies, which say it themselves, and for what is none.
    pub(in crate::source) fn delete(&self) -> Option<Delta> {
        let route = |kind| Delta::Route(route::Delta::Delete(RouteRef { kind, name: self.name.clone() }));
        let traffic = |kind| Delta::Traffic(traffic::Delta::Delete(PolicyRef { kind, name: self.name.clone() }));
        let kind = match self.kind {
            Kind::Namespace => ObjectKind::Namespace,
            Kind::Node => ObjectKind::Node,
            Kind::ServiceCidr => ObjectKind::ServiceCidr,
            Kind::Service => ObjectKind::Service,
            Kind::EndpointSlice => ObjectKind::EndpointSlice,
            Kind::Pod => ObjectKind::Pod,
            Kind::NetworkPolicy | Kind::Cni(_) => ObjectKind::NetworkPolicy,
            Kind::MeshNode => ObjectKind::MeshNode,
            Kind::Gateway => ObjectKind::Gateway,
            Kind::HttpRoute => return Some(route(RouteKind::Http)),
            Kind::GrpcRoute => return Some(route(RouteKind::Grpc)),
            Kind::TrafficPolicy => return Some(traffic(TrafficKind::Traffic)),
            Kind::BackendTrafficPolicy => return Some(traffic(TrafficKind::Backend)),
            Kind::ExternalAuthorizer => {
                return Some(Delta::Authorizer(authorizer::Delta::Delete(self.name.clone())));
            }
            // What is read of it is in what names it.
            Kind::ConfigMap => return None,
            Kind::PeerAuthentication | Kind::AuthorizationPolicy | Kind::RequestAuthentication => return None,
        };
        Some(Delta::Mesh(mesh::Delta::Delete(ObjectRef { kind, name: self.model_name() })))
    }

    /// Of a CNI's kind no object of another kind has the same: a slash is not allowed in a name.
    pub(super) fn model_name(&self) -> NamespacedName {
        match self.kind {
            Kind::Cni(CniKind { group, kind, .. }) => {
                let name = format!("{kind}.{group}/{}", self.name.name);
                NamespacedName { namespace: self.name.namespace.clone(), name: name.into() }
            }
            _ => self.name.clone(),
        }
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
