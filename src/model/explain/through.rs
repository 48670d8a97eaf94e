//! What goes through a waypoint in a process of its own.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use super::decided::{asked, decided};
use super::request::Sent;
use super::{EndpointExplanation, From, reach};
use crate::mesh::{
    Destination, Identity, NamespacedName, OwnWaypoint, Path, Reason, WaypointProblem, Workload, is_reserved_port,
};
use crate::model::State;
use crate::policy::Verdict;

/// A waypoint on the way of a connection, and one of its pods.
#[derive(Clone)]
pub(super) struct Between {
    waypoint: OwnWaypoint,
    pod: Arc<Workload>,
}

/// The waypoint that a client's connection goes through, or why there is no way; none where it goes through none.
pub(super) fn between(
    state: &State,
    from: &From,
    dialled: Option<SocketAddr>,
) -> Option<Result<Between, (Reason, String)>> {
    let dialled = dialled.filter(|dialled| from.is_captured_towards(*dialled))?;
    let Destination::Service(service) = state.mesh.destination(dialled) else { return None };
    let waypoint = state.mesh.own_waypoint_of(&service.service, &service.port)?;
    let refused = |problem: WaypointProblem| (Reason::Waypoint, problem.to_string());
    Some(waypoint.map_err(refused).and_then(|waypoint| {
        let door = state.mesh.door_of(&waypoint).map_err(refused)?;
        let pod = state.mesh.ready_pod_of(&waypoint, &door).cloned();
        let pod = pod.ok_or_else(|| refused(WaypointProblem::NotReady(waypoint.gateway.clone())))?;
        let own = from.workload.as_ref().map(|source| source.own_identity());
        own.transpose().map_err(|text| (Reason::Identity, text))?;
        Ok(Between { waypoint, pod })
    }))
}

/// Whether somebody comes to an endpoint beside the waypoint that reads its requests.
pub(super) fn is_beside(state: &State, identity: Option<&Identity>, address: SocketAddr) -> bool {
    state.mesh.is_behind_waypoint(address)
        && !identity.is_some_and(|identity| state.mesh.is_own_waypoint(identity, address))
}

impl Between {
    pub(super) fn gateway(&self) -> &NamespacedName {
        &self.waypoint.gateway
    }

    /// What becomes of it at one endpoint. The waypoint asks policy about its client; and the endpoint's agent takes its word
    /// for whom it is, or judges the waypoint itself.
    pub(super) fn one_endpoint(
        &self,
        state: &State,
        client: &From,
        address: SocketAddr,
        sent: Option<Sent<'_>>,
    ) -> EndpointExplanation {
        let own = self.itself().towards(address.ip());
        let Destination::Workload(destination) = state.mesh.destination(address) else {
            return reach(state, &own, true, address, sent);
        };
        let identity = client.workload.as_ref().and_then(|workload| workload.identity.as_ref());
        let judged = decided(state, client, &destination, address, identity, sent);
        if judged.verdict == Verdict::Deny {
            return judged;
        }
        let is_tunnel = matches!(Path::between(&self.pod, &destination, address.port()), Path::Tunnel { .. });
        let is_believed = state.mesh.own_waypoints_at(address).any(|waypoint| waypoint == self.waypoint);
        if is_tunnel && is_believed && !is_reserved_port(address.port()) {
            return asked(state, judged);
        }
        let itself = reach(state, &own, true, address, sent);
        let note = format!("the waypoint {} comes there as itself, and is judged too", self.gateway());
        EndpointExplanation { note: itself.note.clone().or(is_tunnel.then_some(note)), ..itself }
    }

    fn itself(&self) -> From {
        let ip = self.pod.pod.ips.first().copied().unwrap_or(Ipv4Addr::UNSPECIFIED.into());
        From { words: format!("waypoint {}", self.gateway()), ip, workload: Some(self.pod.clone()) }
    }
}
