use std::fmt::Display;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;

use bytes::BytesMut;
use tokio::net::TcpStream;
use tracing::debug;

use super::baggage::baggage;
use super::connections::{Connection, Opening, Registered};
use super::failure::{Failure, Finding};
use super::inbound::{Arrival, allowed};
use super::inward::{Dialled, Inward};
use super::limits::{TunnelKind, TunnelPlace};
use super::pods::ServedPod;
use super::workers::LoadGuard;
use super::{Proxy, carry, dial};
use crate::capture::socket::{self, ConnectOptions};
use crate::mesh::{Identity, Reason, Workload};
use crate::policy::Reads;
use crate::telemetry::{ConnectionInfo, Direction, Party, Transport};
use crate::transport::Stream;
use crate::transport::fast::{self, Link};
use crate::transport::hbone::{self, Refusal, Request, ServerSettings};
use crate::transport::tls::{PeerInfo, Session, Spoken};

/// The life of one tunnel connection from a peer, which may carry many flows: at once (HBONE), or one by one (fast).
pub fn serve(
    proxy: Arc<Proxy>,
    pod: Arc<ServedPod>,
    stream: std::net::TcpStream,
    client: SocketAddr,
    load: LoadGuard,
) -> impl Future<Output = ()> {
    let client = SocketAddr::new(client.ip().to_canonical(), client.port());
    // Each part on the heap and of its own size: a tunnel that is silent for long needs nothing of what made it.
    let opening = Box::pin(open(proxy, pod, stream, client));
    async move {
        if let Some(opened) = opening.await {
            opened.await;
        }
        drop(load);
    }
}

async fn open(
    proxy: Arc<Proxy>,
    pod: Arc<ServedPod>,
    stream: std::net::TcpStream,
    client: SocketAddr,
) -> Option<Pin<Box<dyn Future<Output = ()>>>> {
    let (stream, local) = prepare(&pod, stream).ok()?;
    let opened = handshake(&proxy, &pod, stream, client, local).await.and_then(|spoken| {
        let kind = match &spoken {
            Spoken::Hbone(_) => TunnelKind::Hbone,
            Spoken::Fast(_) => TunnelKind::Fast,
        };
        let place = proxy.limits.admit_tunnel(kind, client.ip(), pod.uid());
        let text = "too many tunnels of this peer with this pod, or in all; raise the descriptor limit of the agent";
        Ok((spoken, place.ok_or_else(|| Failure::new(Reason::Limit, text))?))
    });
    match opened {
        Ok((spoken, place)) => {
            let peer = Arc::new(spoken.peer().clone());
            let tunnel = Tunnel { proxy, pod, peer, client, local, _place: place };
            Some(match spoken {
                Spoken::Hbone(session) => Box::pin(tunnel.hbone(session)),
                Spoken::Fast(session) => Box::pin(tunnel.fast(session)),
            })
        }
        Err(failure) => {
            let telemetry = proxy.telemetry.open(ConnectionInfo {
                direction: Direction::Inbound,
                transport: Transport::Hbone,
                source: Party::stranger(client),
                destination: Party::of(local, &pod.captured.workload),
                service: None,
                requested: None,
                key_exchange: None,
            });
            telemetry.closed(0, 0, Some(failure.reason), &failure.detail);
            None
        }
    }
}

/// A tunnel from a peer that has proved who it is.
struct Tunnel {
    proxy: Arc<Proxy>,
    pod: Arc<ServedPod>,
    peer: Arc<PeerInfo>,
    client: SocketAddr,
    local: SocketAddr,
    _place: TunnelPlace,
}

impl Tunnel {
    async fn hbone(self, session: Session) {
        let arriving = self.arriving(Transport::Hbone);
        let flows = move |request: Request| drop(tokio::task::spawn_local(arriving.clone().serve(request)));
        let settings = ServerSettings { idle: self.proxy.settings.tunnel_idle, ..ServerSettings::default() };
        let outcome = hbone::serve(session, settings, flows, self.drained()).await;
        self.ended(outcome.err());
    }

    async fn fast(self, session: Session<Link>) {
        let arriving = self.arriving(Transport::Fast);
        let mut drained = pin!(self.drained());
        let settings = fast::ServerSettings { idle: self.proxy.settings.tunnel_idle };
        let mut tunnel = fast::Server::new(session, settings);
        loop {
            match tunnel.next(drained.as_mut()).await {
                Ok(Some(request)) => {
                    let after = arriving.serve_fast(request).await;
                    if !tunnel.settled(after).await {
                        return;
                    }
                }
                Ok(None) => {
                    tunnel.close().await;
                    return;
                }
                Err(error) => return self.ended(Some(error)),
            }
        }
    }

    fn ended(&self, error: Option<impl Display>) {
        if let Some(error) = error {
            let pod = self.pod.captured.workload.name();
            debug!(peer = %self.client, %pod, %error, "A tunnel ended with an error.");
        }
    }

    fn arriving(&self, transport: Transport) -> Arriving {
        let (proxy, pod, peer) = (self.proxy.clone(), self.pod.clone(), self.peer.clone());
        Arriving { proxy, pod, peer, client: self.client, local: self.local, transport }
    }

    /// Completes when no new flow is to begin.
    fn drained(&self) -> impl Future<Output = ()> + 'static {
        let (mut draining, pod) = (self.proxy.draining.subscribe(), self.pod.clone());
        async move {
            tokio::select! {
                _ = draining.wait_for(|draining| *draining) => {}
                () = pod.stopped() => {}
            }
        }
    }
}

fn prepare(pod: &ServedPod, stream: std::net::TcpStream) -> std::io::Result<(TcpStream, SocketAddr)> {
    let options = ConnectOptions { reset_on_close: false, ..dial::application_options(pod) };
    socket::prepare_accepted(&stream, &options)?;
    let local = stream.local_addr()?;
    Ok((TcpStream::from_std(stream)?, SocketAddr::new(local.ip().to_canonical(), local.port())))
}

async fn handshake(
    proxy: &Proxy,
    pod: &ServedPod,
    stream: TcpStream,
    client: SocketAddr,
    local: SocketAddr,
) -> Result<Spoken, Failure> {
    let arrival = Arrival { proxy, pod, client, identity: None, to: local };
    arrival.check_source()?;
    let own = pod.captured.workload.identity.as_ref();
    let own = own.ok_or_else(|| Failure::new(Reason::Identity, "the pod has no service account, so no identity"))?;
    proxy.tls.accept(stream, own, proxy.settings.tunnel).await.map_err(|error| Failure::tls(&error))
}

/// One flow on its way in.
#[derive(Clone)]
struct Arriving {
    proxy: Arc<Proxy>,
    pod: Arc<ServedPod>,
    peer: Arc<PeerInfo>,
    client: SocketAddr,
    local: SocketAddr,
    transport: Transport,
}

impl Arriving {
    async fn serve(self, mut request: Request) {
        let to = SocketAddr::new(request.authority.ip().to_canonical(), request.authority.port());
        let connection = self.register(to);
        let admitted = tokio::select! {
            admitted = Box::pin(self.admit(to, &connection)) => admitted,
            reason = connection.control.reset_requested() => Err(Failure::new(reason, "ended while connecting")),
            () = request.abandoned() => Err(Failure::new(Reason::Reset, "the client gave it up while connecting")),
        };
        let (dialled, reads) = match admitted {
            Ok(admitted) => admitted,
            Err(failure) => {
                request.refuse(refusal(&failure));
                return connection.failed(&failure);
            }
        };
        let own = baggage(&self.proxy.settings.cluster, &self.pod.captured.workload);
        match request.accept(&own) {
            Ok(flow) if reads == Reads::Nothing => {
                let (application, _held) = dialled;
                carry::out_of_tunnel(&connection, flow, application).await;
            }
            Ok(flow) => self.inward(to).serve(Stream::hbone(flow), BytesMut::new(), dialled, &connection).await,
            Err(error) => connection.failed(&Failure::new(Reason::Reset, error.to_string())),
        }
    }

    /// As [`Arriving::serve`]; what is left of the tunnel is returned.
    async fn serve_fast(&self, mut request: fast::Request<'_>) -> fast::After {
        let to = match request.header() {
            Ok(header) => SocketAddr::new(header.destination.ip().to_canonical(), header.destination.port()),
            Err(error) => {
                debug!(peer = %self.client, %error, "A flow was refused.");
                return request.refuse(Refusal::Malformed);
            }
        };
        let connection = self.register(to);
        let admitted = tokio::select! {
            admitted = Box::pin(self.admit(to, &connection)) => admitted,
            reason = connection.control.reset_requested() => Err(Failure::new(reason, "ended while connecting")),
            () = request.abandoned() => {
                connection.failed(&Failure::new(Reason::Reset, "the client gave it up while connecting"));
                return fast::After::Spent;
            }
        };
        match admitted {
            Ok(((application, _held), Reads::Nothing)) => {
                carry::out_of_fast_tunnel(&connection, request, application).await
            }
            Ok((dialled, _)) => match request.into_stream() {
                Ok(stream) => {
                    let serving = self.inward(to).serve(Stream::Fast(stream), BytesMut::new(), dialled, &connection);
                    Box::pin(serving).await;
                    fast::After::Lent
                }
                Err(cause) => {
                    connection.failed(&carry::broken(&cause));
                    fast::After::Spent
                }
            },
            Err(failure) => {
                connection.failed(&failure);
                request.refuse(refusal(&failure))
            }
        }
    }

    /// The way in for requests.
    fn inward(&self, to: SocketAddr) -> Inward {
        let (proxy, pod) = (self.proxy.clone(), self.pod.clone());
        Inward { proxy, pod, client: self.client, identity: Some(self.peer.identity.clone()), to }
    }

    fn register(&self, to: SocketAddr) -> Registered {
        let opening = Opening {
            pod: self.pod.uid(),
            source: self.client,
            dialled: to,
            peer: Some(self.peer.identity.clone()),
            info: self.info(to),
        };
        self.proxy.connections.register(&self.proxy.telemetry, opening)
    }

    fn info(&self, to: SocketAddr) -> ConnectionInfo {
        let identity = Some(self.peer.identity.clone());
        let source = self.source(&self.peer.identity);
        let source = source.map_or_else(|| Party::stranger(self.client), |pod| Party::of(self.client, &pod));
        ConnectionInfo {
            direction: Direction::Inbound,
            transport: self.transport,
            source: Party { identity, ..source },
            destination: Party::of(to, &self.pod.captured.workload),
            service: self.proxy.model.read().mesh.services_at(to).next().cloned(),
            requested: None,
            key_exchange: Some(self.peer.key_exchange),
        }
    }

    /// The pod behind the peer's address, where the identity that it proved agrees.
    fn source(&self, identity: &Identity) -> Option<Arc<Workload>> {
        let state = self.proxy.model.read();
        let workload = state.mesh.workload_by_ip(self.client.ip())?;
        (workload.identity.as_ref() == Some(identity)).then(|| workload.clone())
    }

    async fn admit(&self, to: SocketAddr, connection: &Connection) -> Result<(Dialled, Reads), Failure> {
        if to.ip() != self.local.ip() {
            let text = format!("the authority's address {} is not the one connected to, {}", to.ip(), self.local.ip());
            return Err(Failure::new(Reason::Protocol, text));
        }
        self.proxy.model.synced().await;
        let identity = Some(&self.peer.identity);
        let arrival = Arrival { proxy: &self.proxy, pod: &self.pod, client: self.client, identity, to };
        let decided = arrival.decide(connection)?;
        allowed(&decided.decision)?;
        let dialled = dial::application(&self.proxy, &self.pod, self.client.ip(), to).await;
        let dialled = dialled.map_err(|cause| Failure::connect(&format!("application at {to}"), &cause))?;
        Ok((dialled, decided.reads))
    }
}

// facts of the field's protocol: 400 malformed, 401 denied by policy, 503 next hop unreachable. 500 and 504 are ours: to a
// peer of the field they are a 503.
fn refusal(failure: &Failure) -> Refusal {
    match (&failure.reason, failure.finding) {
        (Reason::Protocol, _) => Refusal::Malformed,
        (Reason::Policy(_) | Reason::Plaintext(_) | Reason::Denied, _) => Refusal::Denied,
        (_, Finding::Silence) => Refusal::Silent,
        (_, Finding::Passing) => Refusal::NotNow,
        (_, Finding::Definite(_)) => Refusal::Unreachable,
    }
}
