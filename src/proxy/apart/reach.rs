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
        let waypoint = waypoint.map_err(|problem| Failure::new(Reason::Waypoint, problem.to_string()))?;
        let door = self.proxy.model.read().mesh.door_of(&waypoint);
        let door = door.ok_or_else(|| {
            let text = format!(
                "there is no Service {} with port 15008, which would lead to the waypoint {}; is it being deployed?",
                waypoint.service, waypoint.gateway
            );
            Failure::new(Reason::Waypoint, text)
        })?;
        let reached = self.any_of(&door, |endpoint| self.waypoint_pod(&waypoint, endpoint)).await;
        reached.map_err(|failure| match failure.reason {
            Reason::NoEndpoint => {
                Failure::new(Reason::Waypoint, format!("no pod of the waypoint {} is ready", waypoint.gateway))
            }
            _ => failure,
        })
    }

    async fn waypoint_pod(&self, waypoint: &OwnWaypoint, endpoint: SocketAddr) -> Result<Way, Failure> {
        let workload = {
            let state = self.proxy.model.read();
            let workload = state.mesh.workload_by_ip(endpoint.ip());
            let is_one = |pod: &_| state.mesh.gateway_of(pod).as_ref() == Some(&waypoint.gateway);
            workload.filter(|workload| is_one(&workload.pod)).cloned()
        };
        let Some(workload) = workload else {
            let text = format!("endpoint {endpoint} is no pod of the waypoint {}", waypoint.gateway);
            return Err(Failure { retry: true, ..Failure::new(Reason::Waypoint, text) });
        };
        let source = &self.pod.captured.workload;
        let Some(own) = &source.identity else {
            let text = format!("pod {} has no service account, so it has no identity", source.name());
            return Err(Failure::new(Reason::Identity, text));
        };
        self.connection.telemetry.amend(|info| info.destination = Party::of(endpoint, &workload));
        self.tunnel(&workload, own, &waypoint.identity, endpoint, self.dialled).await
    }
}
