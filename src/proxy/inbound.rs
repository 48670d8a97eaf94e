use std::net::SocketAddr;
use std::sync::Arc;

use super::Proxy;
use super::failure::Failure;
use super::pods::ServedPod;
use crate::mesh::{Identity, Mesh, Reason, Workload, believable_source, is_reserved_port};
use crate::policy::{Decision, Query, Verdict};

/// What both ways into a pod check before they dial its application.
pub struct Arrival<'a> {
    pub proxy: &'a Proxy,
    pub pod: &'a ServedPod,
    /// The TCP peer's address; or what the destination's own waypoint says, whom alone it is believed.
    pub client: SocketAddr,
    pub identity: Option<&'a Identity>,
    /// The waypoint that says so.
    pub via: Option<&'a Identity>,
    pub to: SocketAddr,
}

impl Arrival<'_> {
    pub fn check_source(&self) -> Result<(), Failure> {
        if believable_source(self.client.ip(), &self.pod.captured.workload.pod.ips) {
            return Ok(());
        }
        let text = format!("{} cannot have come from outside the pod", self.client.ip());
        Err(Failure::new(Reason::Source, text))
    }

    /// Who is dialled, and what policy says of it.
    pub fn decide(&self) -> Result<(Arc<Workload>, Decision), Failure> {
        if !self.proxy.limits.admits(self.pod.uid()) {
            return Err(Failure::new(Reason::Limit, "too many connections; raise the descriptor limit of the agent"));
        }
        if is_reserved_port(self.to.port()) {
            let text = format!("port {} belongs to the mesh and is no destination", self.to.port());
            return Err(Failure::new(Reason::Protocol, text));
        }
        decide(self.proxy, self.pod, (self.client, self.identity, self.via), self.to)
    }
}

/// Where a connection comes from, who that proved to be, and which waypoint says so.
pub type Who<'a> = (SocketAddr, Option<&'a Identity>, Option<&'a Identity>);

/// Whether somebody is believed at a pod's address about whom it speaks for.
pub fn is_own_waypoint(mesh: &Mesh, identity: &Identity, to: SocketAddr) -> bool {
    mesh.own_waypoints_at(to).any(|waypoint| waypoint.identity == *identity)
}

/// Asks policy about one arrival. The pod must still be in the model, and hold the address.
pub fn decide(
    proxy: &Proxy,
    pod: &ServedPod,
    (client, identity, via): Who<'_>,
    to: SocketAddr,
) -> Result<(Arc<Workload>, Decision), Failure> {
    let state = proxy.model.read();
    let Some(workload) = state.mesh.workload(pod.uid()) else {
        return Err(Failure::new(Reason::Drain, "the pod is gone"));
    };
    if !workload.pod.ips.contains(&to.ip()) {
        let text = format!("{} is not an address of pod {}", to.ip(), workload.name());
        return Err(Failure::new(Reason::Protocol, text));
    }
    if let Some(via) = via
        && !is_own_waypoint(&state.mesh, via, to)
    {
        let text = format!("{via} spoke for its client, and is the waypoint of no Service that leads to {to} any more");
        return Err(Failure::new(Reason::Waypoint, text));
    }
    let services: Vec<_> = state.mesh.services_at(to).cloned().collect();
    let decision = state.policies.decide(&Query {
        source_ip: client.ip(),
        source_identity: identity,
        destination: workload,
        destination_addr: to,
        services: &services,
    });
    Ok((workload.clone(), decision))
}

/// Turns a denial into the failure that the connection ends with.
pub fn allowed(decision: &Decision) -> Result<(), Failure> {
    match decision.verdict {
        Verdict::Allow => Ok(()),
        Verdict::Deny => {
            let reason = decision.reason.clone().unwrap_or(Reason::Denied);
            let words = decision
                .clause
                .as_ref()
                .map_or_else(|| reason.to_string(), |clause| format!("{}: {}", clause.policy, clause.words));
            Err(Failure::new(reason, words))
        }
    }
}
