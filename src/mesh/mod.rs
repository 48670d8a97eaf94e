//! The model: who is there, what answers where, and the tables that answer look-ups.
//!
//! Sans-io: no socket, no clock, no runtime. `source` decodes objects into these types once, at the edge;
//! [`Mesh`] keeps them indexed, and everything else asks it.

#![forbid(unsafe_code)]

pub mod balance;
mod claims;
mod destination;
mod gateway;
mod identity;
mod labels;
mod membership;
mod name;
mod network_policy;
mod path;
mod pod;
mod protocol;
mod ranges;
mod reason;
mod service;
mod shared_map;
mod table;
#[cfg(test)]
pub(crate) mod work;

pub use destination::{Candidate, Candidates, Destination, ServiceDestination};
pub use gateway::{
    AllowedNamespaces, Beside, GATEWAY_LABEL, Gateway, Listener, OwnWaypoint, TUNNEL_PROTOCOL, WAYPOINT_CLASS,
    WaypointProblem, own_name,
};
pub use identity::{Identity, IdentityError, TrustDomain};
pub use labels::Labels;
pub use membership::{Connect, Exclusions, Membership, MeshMode, Settings, SettingsProblem, Waypoint};
pub use name::{NamespacedName, PodUid};
pub use network_policy::{LabelExpression, LabelOperator, LabelSelector, NetworkPolicy, PodSelection};
pub use path::{Path, PlainBecause, RESERVED_PORTS, TUNNEL_PORT, believable_source, is_reserved_port};
pub use pod::{ContainerPort, Owner, Phase, Pod, Probe, Workload};
pub use protocol::AppProtocol;
pub use reason::Reason;
pub use service::{
    AddressScope, Endpoint, EndpointSlice, InternalTrafficPolicy, Namespace, Node, Requests, Service, ServiceKind,
    ServicePort, TargetPort, TrafficDistribution,
};
pub use shared_map::{SharedMap, Vacant};
#[cfg(test)]
pub(crate) use table::tests as fixture;
pub use table::{Change, Delta, Mesh, MeshSettings, Object, ObjectKind, ObjectRef};
