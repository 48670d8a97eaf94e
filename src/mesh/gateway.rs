use std::net::SocketAddr;
use std::sync::Arc;

use super::{Identity, LabelSelector, Labels, NamespacedName, Pod, TrustDomain};

/// A `Gateway` of the Gateway API. Of class [`WAYPOINT_CLASS`] it is a waypoint in a process of its own.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Gateway {
    pub name: NamespacedName,
    /// `spec.gatewayClassName`.
    pub class: Arc<str>,
    pub listeners: Vec<Listener>,
}

/// One entry of `spec.listeners`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Listener {
    pub name: Arc<str>,
    pub port: u16,
    pub protocol: Arc<str>,
    /// `allowedRoutes.namespaces`.
    pub from: AllowedNamespaces,
}

/// Of which namespaces Services may have the waypoint.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum AllowedNamespaces {
    All,
    /// The Gateway's own.
    Same,
    Labelled(LabelSelector),
    None,
}

impl Gateway {
    pub fn is_waypoint(&self) -> bool {
        *self.class == *WAYPOINT_CLASS
    }

    /// Whether Services of a namespace, which has these labels, may have it as their waypoint.
    ///
    /// # Errors
    /// Why not.
    pub fn admits(&self, namespace: &str, labels: &Labels) -> Result<(), WaypointProblem> {
        let name = || self.name.clone();
        if !self.is_waypoint() {
            return Err(WaypointProblem::Class { gateway: name(), class: self.class.clone() });
        }
        if self.name.name.len() > LONGEST_NAME {
            return Err(WaypointProblem::Name(name()));
        }
        let mut listeners = self.listeners.iter().filter(|listener| listener.is_tunnel()).peekable();
        if listeners.peek().is_none() {
            return Err(WaypointProblem::NoListener(name()));
        }
        match listeners.any(|listener| listener.from.admits(&self.name.namespace, namespace, labels)) {
            true => Ok(()),
            false => Err(WaypointProblem::NotAllowed { gateway: name(), namespace: namespace.into() }),
        }
    }
}

impl Listener {
    /// Whether it is where clients' agents come in.
    pub fn is_tunnel(&self) -> bool {
        *self.protocol == *TUNNEL_PROTOCOL && self.port == super::TUNNEL_PORT
    }
}

impl AllowedNamespaces {
    fn admits(&self, own: &str, namespace: &str, labels: &Labels) -> bool {
        match self {
            Self::All => true,
            Self::Same => own == namespace,
            Self::Labelled(selector) => selector.matches(labels),
            Self::None => false,
        }
    }
}

/// A waypoint in a process of its own that stands before a Service.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct OwnWaypoint {
    pub gateway: NamespacedName,
    /// The Service that leads to its pods.
    pub service: NamespacedName,
    /// Whom its pods run as.
    pub identity: Identity,
}

impl OwnWaypoint {
    /// `None` where the Gateway has a name that no identity can have.
    pub fn of(gateway: &NamespacedName, trust_domain: &TrustDomain) -> Option<Self> {
        let name = own_name(gateway);
        let identity = Identity::new(trust_domain, &gateway.namespace, &name)?;
        let service = NamespacedName { namespace: gateway.namespace.clone(), name };
        Some(Self { gateway: gateway.clone(), service, identity })
    }

    /// The Gateway that a pod says it is a waypoint of: by its label, and by its service account, which is to have the
    /// name that the waypoint's has.
    pub fn claimed(pod: &Pod) -> Option<NamespacedName> {
        let gateway = NamespacedName::new(pod.name.namespace.clone(), pod.labels.get(GATEWAY_LABEL)?);
        (own_name(&gateway) == pod.service_account).then_some(gateway)
    }
}

/// What a waypoint's ServiceAccount, Deployment and Service are called: `<gateway>-<class>`, as
/// [GEP-1762](https://gateway-api.sigs.k8s.io/geps/gep-1762/#automated-deployments) has it.
pub fn own_name(gateway: &NamespacedName) -> Arc<str> {
    format!("{}-{WAYPOINT_CLASS}", gateway.name).into()
}

/// Why a Service that names a waypoint has none.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum WaypointProblem {
    #[error("{0:?} names no Gateway: write its name, or namespace/name")]
    Malformed(Arc<str>),
    #[error("there is no Gateway {0}; create it with gatewayClassName {WAYPOINT_CLASS}, or correct the name")]
    Missing(NamespacedName),
    #[error("Gateway {gateway} is of class {class:?}; its gatewayClassName must be {WAYPOINT_CLASS}")]
    Class { gateway: NamespacedName, class: Arc<str> },
    #[error("the name of Gateway {0} is too long: {LONGEST_NAME} characters are the most for a waypoint's")]
    Name(NamespacedName),
    #[error("Gateway {0} has no listener of protocol {TUNNEL_PROTOCOL} on port 15008; add one")]
    NoListener(NamespacedName),
    #[error(
        "no listener of Gateway {gateway} admits Services of namespace {namespace}: see its allowedRoutes.namespaces"
    )]
    NotAllowed { gateway: NamespacedName, namespace: Arc<str> },
    #[error(
        "there is no Service {service} with port 15008, which would lead to the waypoint {gateway}; is it being deployed?"
    )]
    NoDoor { gateway: NamespacedName, service: NamespacedName },
    #[error("no pod of the waypoint {0} is ready")]
    NotReady(NamespacedName),
}

/// Why a connection to a pod's address is not let in beside the waypoint that decides its requests.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "a policy over {0} speaks of requests, which the waypoint of its Service decides: it takes connections from that \
     waypoint alone; dial the Service"
)]
pub struct Beside(pub SocketAddr);

/// The GatewayClass of waypoints.
pub const WAYPOINT_CLASS: &str = "selvedge-waypoint";
/// Of a waypoint's listener, as Istio's have it.
pub const TUNNEL_PROTOCOL: &str = "HBONE";
/// On what was made for a Gateway: its name (GEP-1762).
pub const GATEWAY_LABEL: &str = "gateway.networking.k8s.io/gateway-name";
/// What is left of the 63 characters that a Service's name may have.
const LONGEST_NAME: usize = 63 - 1 - WAYPOINT_CLASS.len();
