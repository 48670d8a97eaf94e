use std::net::IpAddr;
use std::sync::Arc;

use super::{Connect, Identity, Labels, Membership, NamespacedName, PodUid, Settings};

/// One pod, as its object says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pod {
    pub uid: PodUid,
    pub name: NamespacedName,
    /// `spec.nodeName`; none before it is scheduled.
    pub node: Option<Arc<str>>,
    /// `status.podIPs`.
    pub ips: Vec<IpAddr>,
    pub labels: Labels,
    /// `spec.serviceAccountName`; may be empty, and then the pod has no identity.
    pub service_account: Arc<str>,
    pub phase: Phase,
    pub host_network: bool,
    /// `spec.hostUsers`, true unless said otherwise.
    pub host_users: bool,
    pub deleting: bool,
    pub settings: Settings,
    pub container_ports: Vec<ContainerPort>,
    /// Ports that the kubelet connects to: probes and lifecycle `httpGet`.
    pub probes: Vec<Probe>,
    /// The controller behind the pod, for metric labels.
    pub owner: Owner,
}

impl Pod {
    /// Whether the pod holds its addresses: a finished one has given them back.
    pub fn is_live(&self) -> bool {
        !matches!(self.phase, Phase::Succeeded | Phase::Failed)
    }

    /// The number behind a named container port.
    pub fn named_port(&self, name: &str) -> Option<u16> {
        self.container_ports.iter().find(|port| port.name.as_deref() == Some(name)).map(|port| port.port)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    Pending,
    Running,
    Succeeded,
    Failed,
    Unknown,
}

/// One TCP `containerPort`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ContainerPort {
    pub name: Option<Arc<str>>,
    pub port: u16,
}

/// One port that the kubelet probes, its number resolved.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Probe {
    pub port: u16,
}

/// The controller behind a pod: a Deployment rather than its ReplicaSet, the pod itself where there is none.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Owner {
    pub kind: Arc<str>,
    pub name: Arc<str>,
}

/// A pod with what the mesh makes of it. Rebuilt whenever the pod, its namespace or its node changes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Workload {
    pub pod: Arc<Pod>,
    /// `None`: an empty service account, or one that no certificate can name.
    pub identity: Option<Identity>,
    pub membership: Membership,
    /// Whether peers may tunnel to it: joined, and its node says it is captured.
    pub captured: bool,
    pub zone: Option<Arc<str>>,
    /// Where the pod or its namespace says it: when `connect()` is answered.
    pub connect: Option<Connect>,
}

impl Workload {
    pub fn uid(&self) -> &PodUid {
        &self.pod.uid
    }

    pub fn name(&self) -> &NamespacedName {
        &self.pod.name
    }

    /// As whom it speaks to others.
    ///
    /// # Errors
    /// As nobody.
    pub fn own_identity(&self) -> Result<&Identity, String> {
        let own = self.identity.as_ref();
        own.ok_or_else(|| format!("pod {} has no service account, so it has no identity", self.name()))
    }
}
