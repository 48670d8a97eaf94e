use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::TcpStream;

use super::connections::{Connection, Opening, Registered};
use super::failure::Failure;
use super::inbound::{Arrival, Decided, READ_NOW, allowed, reads};
use super::pods::ServedPod;
use super::source_ports::Held;
use super::{Proxy, dial};
use crate::mesh::{Identity, Reason, Workload};
use crate::policy::Reads;
use crate::telemetry::{self, ConnectionInfo, Direction, Party, Transport};

/// What carries a connection between two pods of this node.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum SameNode {
    /// The two sockets are joined in the kernel, where the design allows it: the bytes never leave the node, and are not
    /// encrypted.
    Direct,
    /// The tunnel, over the pods' interfaces, as between nodes.
    Tunnel,
}

/// A pod of this node that a connection reaches without a tunnel. Capture proves who dials: only a process inside the
/// source pod's namespace comes to the listener there.
pub struct Neighbour<'a> {
    proxy: &'a Proxy,
    source: &'a ServedPod,
    pod: Arc<ServedPod>,
    client: SocketAddr,
    to: SocketAddr,
}

/// A neighbour's application, reached.
pub struct Reached {
    pub stream: TcpStream,
    pub inbound: Arriving,
    _held: Held,
}

impl Reached {
    /// The socket, the connection as the destination's side has it, and the port that is held while it lives.
    pub fn into_parts(self) -> (TcpStream, Arriving, Held) {
        (self.stream, self.inbound, self._held)
    }
}

/// The connection as the destination's side has it.
pub struct Arriving(Registered);

impl<'a> Neighbour<'a> {
    /// The neighbour that has this address, if it may be reached directly.
    pub fn find(
        proxy: &'a Proxy,
        source: &'a ServedPod,
        client: SocketAddr,
        destination: &Workload,
        to: SocketAddr,
    ) -> Option<Self> {
        if proxy.settings.same_node == SameNode::Tunnel {
            return None;
        }
        let pod = proxy.pods.get(destination.uid())?;
        let holds = pod.captured.workload.pod.ips.contains(&to.ip());
        let joins = || proxy.model.read().mesh.may_join(source.uid(), destination, to);
        // Requests are read where they come out of a tunnel.
        let relays = || reads(proxy, &pod, (client, None, None), to) == Reads::Nothing;
        (holds && joins() && relays()).then_some(Self { proxy, source, pod, client, to })
    }

    /// Does what the tunnel's two ends do: `outbound` hears what policy decides, and how a refusal looks from there.
    pub async fn reach(self, outbound: &Connection, identity: &Identity) -> Result<Reached, Failure> {
        let arriving = self.register(identity);
        outbound.leads_to(arriving.0.shared());
        outbound.telemetry.amend(|info| {
            info.transport = Transport::SameNode;
            info.direction = Direction::Outbound;
        });
        let connection = &arriving.0;
        let admitted = tokio::select! {
            admitted = self.admit(connection, outbound, identity) => admitted,
            reason = connection.control.reset_requested() => Err(Failure::new(reason, "ended while connecting")),
        };
        match admitted {
            Ok((stream, held)) => Ok(Reached { stream, inbound: arriving, _held: held }),
            Err(failure) => {
                connection.failed(&failure);
                Err(seen_by_client(&failure, self.to))
            }
        }
    }

    fn register(&self, identity: &Identity) -> Arriving {
        let (source, destination) = (&self.source.captured.workload, &self.pod.captured.workload);
        let info = ConnectionInfo {
            direction: Direction::Inbound,
            transport: Transport::SameNode,
            source: Party::of(self.client, source),
            destination: Party::of(self.to, destination),
            service: self.proxy.model.read().mesh.services_at(self.to).next().cloned(),
            requested: None,
            key_exchange: None,
        };
        let opening = Opening {
            pod: destination.uid(),
            source: self.client,
            dialled: self.to,
            peer: Some(identity.clone()),
            via: None,
            info,
        };
        let connection = self.proxy.connections.register(&self.proxy.telemetry, opening);
        connection.comes_from(source.uid());
        Arriving(connection)
    }

    async fn admit(
        &self,
        connection: &Connection,
        outbound: &Connection,
        identity: &Identity,
    ) -> Result<(TcpStream, Held), Failure> {
        let arrival = Arrival {
            proxy: self.proxy,
            pod: &self.pod,
            client: self.client,
            identity: Some(identity),
            via: None,
            to: self.to,
        };
        arrival.check_source()?;
        let Decided { workload, decision, reads } = arrival.decide(connection)?;
        // From here on `recheck` finds the connection; a change before that is seen now.
        if !self.proxy.model.read().mesh.may_join(self.source.uid(), &workload, self.to) {
            return Err(Failure::new(Reason::Drain, NO_LONGER));
        }
        if reads != Reads::Nothing {
            return Err(Failure::new(Reason::Drain, READ_NOW));
        }
        if let Err(failure) = allowed(&decision) {
            let policy = decision.clause.map(|clause| clause.policy.name);
            outbound.telemetry.decided_there(telemetry::Verdict::Deny, policy);
            return Err(failure);
        }
        let dialled = dial::application(self.proxy, &self.pod, self.client.ip(), self.to).await;
        let dialled = dialled.map_err(|cause| Failure::connect(&format!("application at {}", self.to), &cause))?;
        outbound.telemetry.decided_there(telemetry::Verdict::Allow, None);
        Ok(dialled)
    }
}

impl std::ops::Deref for Arriving {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.0
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        // Heard only where the connection has not ended otherwise: the client's side gave it up.
        self.0.failed(&Failure::new(Reason::Reset, "the client gave it up while connecting"));
    }
}

/// What the tunnel would have told the client's side: a denial with its policy, a protocol error, or that the
/// destination cannot be reached, so that another may be tried.
fn seen_by_client(failure: &Failure, to: SocketAddr) -> Failure {
    let detail = format!("pod of this node at {to}: {}", failure.detail);
    match &failure.reason {
        Reason::Policy(_) | Reason::Plaintext(_) | Reason::Denied | Reason::Protocol => {
            Failure::new(failure.reason.clone(), detail)
        }
        Reason::Timeout => Failure { retry: true, ..Failure::new(Reason::Timeout, detail) },
        _ => Failure { retry: true, finding: failure.finding, ..Failure::new(Reason::Connect, detail) },
    }
}

pub const NO_LONGER: &str = "a NetworkPolicy or a waypoint came: the next connection crosses the pods' interfaces";
