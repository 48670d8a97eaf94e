//! A waypoint's connections to endpoints.

use std::cell::Cell;
use std::net::{IpAddr, SocketAddr};

use super::super::connections::Opening;
use super::super::counted::Counted;
use super::super::failure::Failure;
use super::super::onward::{Line, LinePod};
use super::super::outbound::Attempt;
use super::Relayed;
use crate::mesh::{Reason, ServiceDestination};
use crate::telemetry::{ConnectionInfo, Party};
use crate::transport::fast::Early;
use crate::waypoint::{Place, Receiver};

impl Relayed {
    /// Some endpoint of a Service, for bytes that are no requests.
    pub(super) async fn any_line(&self, service: &ServiceDestination) -> Result<(Line, Option<Counted>), Failure> {
        let to = Receiver::Service(service.clone());
        let (mut tried, mut last) = (Vec::new(), None);
        while tried.len() < ENDPOINT_TRIES {
            let Some(endpoint) = self.pick(&to, &tried) else { break };
            let counted = self.counted(endpoint);
            self.admits_bytes(endpoint)?;
            match self.line(&to, endpoint).await {
                Ok(line) => {
                    self.reached(endpoint, true);
                    return Ok((line, counted));
                }
                Err(failure) if failure.retry => {
                    self.reached(endpoint, false);
                    tried.push(endpoint);
                    last = Some(failure);
                }
                Err(failure) => return Err(failure),
            }
        }
        Err(last.unwrap_or_else(|| Failure::new(Reason::NoEndpoint, format!("{to}: no endpoint is ready"))))
    }

    /// On the list of connections, counted and logged as any other.
    pub(super) async fn line(&self, to: &Receiver, endpoint: SocketAddr) -> Result<Line, Failure> {
        let own = self.own_address(endpoint)?;
        let info =
            ConnectionInfo { destination: Party::stranger(endpoint), service: to.service().cloned(), ..self.info() };
        let opening = Opening {
            pod: self.pod.uid(),
            source: self.behalf.address,
            dialled: self.dialled,
            peer: None,
            via: None,
            info,
        };
        let connection = self.proxy.connections.register(&self.proxy.telemetry, opening);
        let attempt = Attempt {
            proxy: &self.proxy,
            thread: &self.thread,
            pod: &self.pod,
            client: own,
            dialled: self.dialled,
            connection: &connection,
            behalf: Some(&self.behalf),
            early: Cell::new(Some(Early::none())),
            passing: Cell::default(),
            proven: Cell::default(),
        };
        let reached = tokio::select! {
            // On the heap: what connecting needs is gone once there is a connection.
            way = Box::pin(attempt.reach(endpoint)) => way,
            reason = connection.control.reset_requested() => Err(Failure::new(reason, "ended while connecting")),
        };
        let peer = attempt.proven.take();
        match reached {
            Ok(way) => {
                connection.connected();
                let (proxy, pod, behalf) = (self.proxy.clone(), self.pod.clone(), (*self.behalf).clone());
                let pod = LinePod { proxy, pod, ip: own, behalf: Some(behalf) };
                Ok(Line::new(pod, connection, way, peer))
            }
            Err(failure) => {
                connection.failed(&failure);
                Err(failure)
            }
        }
    }

    fn own_address(&self, endpoint: SocketAddr) -> Result<IpAddr, Failure> {
        let own = &self.workload().pod.ips;
        let found = own.iter().find(|ip| ip.is_ipv4() == endpoint.is_ipv4()).copied();
        found.ok_or_else(|| {
            let text = format!("the waypoint has no address of the family of {endpoint}");
            Failure { retry: true, ..Failure::new(Reason::Connect, text) }
        })
    }
}

const ENDPOINT_TRIES: usize = 5;
