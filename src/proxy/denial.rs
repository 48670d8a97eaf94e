//! What policy would say of a connection, as its destination's agent decides it.

use std::net::{IpAddr, SocketAddr};

use super::Proxy;
use super::pods::ServedPod;
use crate::mesh::{NamespacedName, Reason, Workload};
use crate::policy::{Query, Verdict};

/// The address of a pod's that peers at the other address see: the one that its client used, where families agree.
pub fn own_address(pod: &ServedPod, client: IpAddr, to: SocketAddr) -> Option<IpAddr> {
    let own = &pod.captured.workload.pod.ips;
    let same_family = |ip: &&IpAddr| ip.is_ipv4() == to.is_ipv4();
    own.iter().find(|ip| **ip == client).filter(same_family).or_else(|| own.iter().find(same_family)).copied()
}

/// What policy holds against a pod's connection to another, and which policy.
pub fn denial(
    proxy: &Proxy,
    pod: &ServedPod,
    client: IpAddr,
    workload: &Workload,
    to: SocketAddr,
) -> Option<(Reason, Option<NamespacedName>)> {
    let state = proxy.model.read();
    let services: Vec<_> = state.mesh.services_at(to).cloned().collect();
    let decision = state.policies.decide(&Query {
        source_ip: own_address(pod, client, to).unwrap_or(client),
        source_identity: pod.captured.workload.identity.as_ref(),
        destination: workload,
        destination_addr: to,
        services: &services,
    });
    let reason = decision.reason.filter(|_| decision.verdict == Verdict::Deny)?;
    Some((reason, decision.clause.map(|clause| clause.policy.name)))
}
