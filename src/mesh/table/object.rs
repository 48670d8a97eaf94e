use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::super::{EndpointSlice, Gateway, Namespace, NamespacedName, NetworkPolicy, Node, Pod, PodUid, Service};

/// One object of the model.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Object {
    Namespace(Namespace),
    Node(Node),
    Pod(Pod),
    Service(Service),
    EndpointSlice(EndpointSlice),
    /// A ServiceCIDR object (`networking.k8s.io/v1`): a range that ClusterIPs come from.
    ServiceCidr {
        name: Arc<str>,
        cidrs: Vec<IpNet>,
    },
    NetworkPolicy(NetworkPolicy),
    Gateway(Gateway),
    /// The pods that a node's agent says it has captured.
    MeshNode {
        node: Arc<str>,
        captured: BTreeSet<PodUid>,
    },
}

impl Object {
    pub fn reference(&self) -> ObjectRef {
        match self {
            Self::Namespace(n) => ObjectRef::cluster(ObjectKind::Namespace, n.name.clone()),
            Self::Node(n) => ObjectRef::cluster(ObjectKind::Node, n.name.clone()),
            Self::Pod(p) => ObjectRef { kind: ObjectKind::Pod, name: p.name.clone() },
            Self::Service(s) => ObjectRef { kind: ObjectKind::Service, name: s.name.clone() },
            Self::EndpointSlice(s) => ObjectRef { kind: ObjectKind::EndpointSlice, name: s.name.clone() },
            Self::ServiceCidr { name, .. } => ObjectRef::cluster(ObjectKind::ServiceCidr, name.clone()),
            Self::MeshNode { node, .. } => ObjectRef::cluster(ObjectKind::MeshNode, node.clone()),
            Self::Gateway(g) => ObjectRef { kind: ObjectKind::Gateway, name: g.name.clone() },
            Self::NetworkPolicy(p) => ObjectRef { kind: ObjectKind::NetworkPolicy, name: p.name.clone() },
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum ObjectKind {
    Namespace,
    Node,
    Pod,
    Service,
    EndpointSlice,
    ServiceCidr,
    NetworkPolicy,
    Gateway,
    MeshNode,
}

/// Names one object; the namespace is empty for cluster-wide kinds.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ObjectRef {
    pub kind: ObjectKind,
    pub name: NamespacedName,
}

impl ObjectRef {
    fn cluster(kind: ObjectKind, name: Arc<str>) -> Self {
        Self { kind, name: NamespacedName { namespace: "".into(), name } }
    }
}

/// One step of the model.
#[derive(Clone, PartialEq, Eq, Debug)]
#[expect(clippy::large_enum_variant, reason = "most steps apply an object, and none is kept")]
pub enum Delta {
    Apply(Object),
    Delete(ObjectRef),
}

/// What a step changed, for those who keep something that follows the model.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Change {
    /// Pods that came, changed or went, also those whose namespace or node changed.
    pub pods: BTreeSet<PodUid>,
    /// Services whose ports, addresses or endpoints changed.
    pub services: BTreeSet<NamespacedName>,
    /// Addresses that became an endpoint of a Service, or are one no more.
    pub endpoints: BTreeSet<SocketAddr>,
}

impl Change {
    pub fn is_empty(&self) -> bool {
        self.pods.is_empty() && self.services.is_empty() && self.endpoints.is_empty()
    }

    pub fn merge(&mut self, other: Self) {
        self.pods.extend(other.pods);
        self.services.extend(other.services);
        self.endpoints.extend(other.endpoints);
    }
}
