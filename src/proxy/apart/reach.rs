//! The way from a captured pod to a waypoint.

use std::net::SocketAddr;

use super::super::Proxy;
use super::super::failure::Failure;
use super::super::outbound::{Attempt, Upstream, Way};
use crate::mesh::{OwnWaypoint, Reason, ServiceDestination, WaypointProblem};
use crate::telemetry::Party;

/// Whether connections to a Service port go through a waypoint in a process of its own, and which.
pub fn decide(proxy: &Proxy, service: &ServiceDestination) -> Option<Result<OwnWaypoint, WaypointProblem>> {
    proxy.model.read().mesh.own_waypoint_of(&service.service, &service.port)
}

impl Attempt<'_> {
    /// A pod of the waypoint that stands before the dialled Service. Without one there is no way: what the waypoint
    /// decides, nobody else does.
    pub async fn waypoint(&self, waypoint: Result<OwnWaypoint, WaypointProblem>) -> Result<Upstream, Failure> {
        let failure = |problem: WaypointProblem| Failure::new(Reason::Waypoint, problem.to_string());
        let waypoint = waypoint.map_err(failure)?;
        let door = self.proxy.model.read().mesh.door_of(&waypoint).map_err(failure)?;
        let reached = self.any_of(&door, |endpoint| self.waypoint_pod(&waypoint, endpoint)).await;
        reached.map_err(|reached| match reached.reason {
            Reason::NoEndpoint => failure(WaypointProblem::NotReady(waypoint.gateway.clone())),
            _ => reached,
        })
    }

    async fn waypoint_pod(&self, waypoint: &OwnWaypoint, endpoint: SocketAddr) -> Result<Way, Failure> {
        let workload = self.proxy.model.read().mesh.pod_of(waypoint, endpoint.ip()).cloned();
        let Some(workload) = workload else {
            let text = format!("endpoint {endpoint} is no pod of the waypoint {}", waypoint.gateway);
            return Err(Failure { retry: true, ..Failure::new(Reason::Waypoint, text) });
        };
        let source = &self.pod.captured.workload;
        let own = source.own_identity().map_err(|text| Failure::new(Reason::Identity, text))?;
        self.connection.telemetry.amend(|info| info.destination = Party::of(endpoint, &workload));
        self.tunnel(&workload, own, &waypoint.identity, endpoint, self.dialled).await
    }
}
