use std::net::SocketAddr;
use std::sync::Arc;

use bytes::BytesMut;

use super::connections::{Connection, Opening, Registered};
use super::downstream::Downstream;
use super::failure::Failure;
use super::inbound::{Arrival, allowed};
use super::inward::{Dialled, Inward};
use super::pods::ServedPod;
use super::source_ports::Held;
use super::{Proxy, carry, dial};
use crate::capture::sock_diag;
use crate::policy::Reads;
use crate::telemetry::{ConnectionInfo, Direction, Party, Transport};
use crate::transport::relay::TcpEnd;
use crate::transport::{Socket, Stream};

/// The life of one plaintext connection to a joined pod.
pub fn serve(proxy: Arc<Proxy>, pod: Arc<ServedPod>, downstream: Downstream) -> impl Future<Output = ()> {
    // Each part on the heap and of its own size: a connection that is silent for long needs nothing of what made it.
    let connecting = Box::pin(connect(proxy, pod, downstream));
    async move {
        if let Some(joined) = connecting.await {
            Box::pin(joined.carry()).await;
        }
    }
}

/// Finds out whether policy lets the client in and the application listens, and tells the client.
async fn connect(proxy: Arc<Proxy>, pod: Arc<ServedPod>, downstream: Downstream) -> Option<Joined> {
    let (client, to) = downstream.ends();
    let application = downstream.take_up(&pod).ok()?;
    let client = SocketAddr::new(client.ip().to_canonical(), client.port());
    // The client's own 4-tuple is taken: a socket of ours towards the application must not share it.
    let accepted = proxy.source_ports.note(client, to);
    let (source, service) = {
        let state = proxy.model.read();
        let service = state.mesh.services_at(to).next().cloned();
        (state.mesh.workload_by_ip(client.ip()).cloned(), service)
    };
    let source = source.map_or_else(
        || Party::stranger(client),
        |workload| Party {
            // Nothing proved it.
            identity: None,
            ..Party::of(client, &workload)
        },
    );
    let info = ConnectionInfo {
        direction: Direction::Inbound,
        transport: Transport::Plaintext,
        source,
        destination: Party::of(to, &pod.captured.workload),
        service,
        requested: None,
        key_exchange: None,
    };
    let opening = Opening { pod: pod.uid(), source: client, dialled: to, peer: None, via: None, info };
    let connection = proxy.connections.register(&proxy.telemetry, opening);
    let arrival = Arrival { proxy: &proxy, pod: &pod, client, identity: None, via: None, to };
    let upstream = tokio::select! {
        upstream = admit(&arrival, &connection) => upstream,
        reason = connection.control.reset_requested() => Err(Failure::new(reason, "ended while connecting")),
    };
    let failure = match upstream {
        // The client is elsewhere: it takes a while until its socket is there.
        Ok(((upstream, held), reads)) => match application.connected(&pod, || false).await {
            Ok(application) => {
                let dialled = (upstream, held);
                return Some(Joined { application, dialled, accepted, connection, proxy, pod, reads });
            }
            Err(failure) => failure,
        },
        Err(failure) => {
            application.refuse(&failure);
            failure
        }
    };
    connection.failed(&failure);
    // Before it goes off the list of connections: what is not listed holds no port.
    drop(accepted);
    None
}

/// A client and the application that it reached.
struct Joined {
    application: TcpEnd,
    dialled: Dialled,
    accepted: Held,
    connection: Registered,
    proxy: Arc<Proxy>,
    pod: Arc<ServedPod>,
    reads: Reads,
}

impl Joined {
    async fn carry(self) {
        let Self { application, dialled, accepted, connection, proxy, pod, reads } = self;
        // Given back before the connection goes off the list.
        let _accepted = accepted;
        if reads == Reads::Nothing {
            let (upstream, _held) = dialled;
            return carry::plain(&connection, application, upstream).await;
        }
        let (stream, said, broken) = application.into_parts();
        if let Some(cause) = broken {
            return connection.failed(&carry::broken(&cause));
        }
        let seen = connection.source.ip();
        let inward = Inward {
            proxy,
            pod,
            client: connection.source,
            identity: None,
            via: None,
            peer: None,
            seen,
            to: connection.dialled,
        };
        let stream = Stream::Tcp(Socket::new(stream));
        inward.serve(stream, BytesMut::from(&said[..]), dialled, &connection).await;
    }
}

async fn admit(arrival: &Arrival<'_>, connection: &Connection) -> Result<(Dialled, Reads), Failure> {
    arrival.check_source()?;
    arrival.proxy.model.synced().await;
    let reads = if is_probe(arrival) {
        connection.exempt();
        Reads::Nothing
    } else {
        let decided = arrival.decide(connection)?;
        allowed(&decided.decision)?;
        decided.reads
    };
    let dialled = dial::application(arrival.proxy, arrival.pod, arrival.client.ip(), arrival.to).await;
    let dialled = dialled.map_err(|cause| Failure::connect(&format!("application at {}", arrival.to), &cause))?;
    Ok((dialled, reads))
}

/// Where the kernel cannot queue SYNs, a probe arrives here: it is one only if its exact 4-tuple is a socket of the
/// node, and the pod's spec probes that port.
fn is_probe(arrival: &Arrival<'_>) -> bool {
    let plausible = {
        let state = arrival.proxy.model.read();
        let workload = state.mesh.workload(arrival.pod.uid());
        let probed = workload.is_some_and(|w| w.pod.probes.iter().any(|probe| probe.port == arrival.to.port()));
        probed && state.mesh.is_node_address(arrival.client.ip())
    };
    // A kernel that cannot answer leaves it to policy.
    plausible
        && sock_diag::is_local_socket(&arrival.proxy.settings.node_netns, arrival.client, arrival.to).unwrap_or(false)
}
