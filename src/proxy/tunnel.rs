use std::fmt::Display;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;

use bytes::BytesMut;
use futures_util::future::LocalBoxFuture;
use tokio::net::TcpStream;
use tracing::debug;

use super::baggage::baggage;
use super::connections::{Connection, Opening, Registered};
use super::failure::{Failure, Finding};
use super::inbound::{Arrival, allowed, is_own_waypoint};
use super::inward::{Dialled, Inward};
use super::limits::{TunnelKind, TunnelPlace};
use super::pods::ServedPod;
use super::workers::{LoadGuard, Thread};
use super::{Proxy, carry, dial};
use crate::capture::socket::{self, ConnectOptions};
use crate::mesh::{Identity, Reason, believable_source};
use crate::policy::Reads;
use crate::telemetry::{ConnectionInfo, Direction, Party, Transport};
use crate::transport::fast::{self, Link};
use crate::transport::hbone::{self, Refusal, Request, ServerSettings};
use crate::transport::relay::TcpEnd;
use crate::transport::tls::{PeerInfo, Session, Spoken};
use crate::transport::{Behalf, Stream};

/// The life of one tunnel connection from a peer, which may carry many flows: at once (HBONE), or one by one (fast).
pub fn serve(
    proxy: Arc<Proxy>,
    thread: Rc<Thread>,
    pod: Arc<ServedPod>,
    stream: std::net::TcpStream,
    client: SocketAddr,
    load: LoadGuard,
) -> impl Future<Output = ()> {
    let client = SocketAddr::new(client.ip().to_canonical(), client.port());
    // Each part on the heap and of its own size: a tunnel that is silent for long needs nothing of what made it.
    let opening = Box::pin(open(proxy, thread, pod, stream, client));
    async move {
        if let Some(opened) = opening.await {
            opened.await;
        }
        drop(load);
    }
}

async fn open(
    proxy: Arc<Proxy>,
    thread: Rc<Thread>,
    pod: Arc<ServedPod>,
    stream: std::net::TcpStream,
    client: SocketAddr,
) -> Option<LocalBoxFuture<'static, ()>> {
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
            let tunnel = Tunnel { proxy, thread, pod, peer, client, local, _place: place };
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
    thread: Rc<Thread>,
    pod: Arc<ServedPod>,
    peer: Arc<PeerInfo>,
    client: SocketAddr,
    local: SocketAddr,
    _place: TunnelPlace,
}

impl Tunnel {
    async fn hbone(self, session: Session) {
        let arriving = self.arriving(Transport::Hbone);
        let relays = self.proxy.settings.gateway.is_some();
        let flows = move |request: Request| match relays {
            true => drop(tokio::task::spawn_local(arriving.clone().relay(request))),
            false => drop(tokio::task::spawn_local(arriving.clone().serve(request))),
        };
        let settings = ServerSettings { idle: self.proxy.settings.tunnel_idle, ..ServerSettings::default() };
        let outcome = hbone::serve(session, settings, flows, self.drained()).await;
        self.ended(outcome.err());
    }

    fn fast(self, session: Session<Link>) -> impl Future<Output = ()> {
        let arriving = self.arriving(Transport::Fast);
        let mut drained = Box::pin(self.drained());
        let settings = fast::ServerSettings { idle: self.proxy.settings.tunnel_idle };
        let mut tunnel = fast::Server::new(session, settings);
        let relays = self.proxy.settings.gateway.is_some();
        // What a flow needs is on the heap and of its own size, also what letting it in needs and carrying it does not.
        async move {
            loop {
                match tunnel.next(drained.as_mut()).await {
                    Ok(Some(request)) if relays => {
                        let asked = Box::pin(arriving.admit_relayed(request)).await;
                        match Box::pin(arriving.relay_fast(tunnel, asked)).await {
                            Some(returned) => tunnel = returned,
                            None => return,
                        }
                    }
                    Ok(Some(request)) => {
                        let after = match Box::pin(arriving.let_in_fast(request)).await {
                            Flow::LetIn(carrying) => Ok(carrying.await),
                            Flow::Refused(after) => Ok(after),
                            Flow::Admitted(admitted) => Err(admitted),
                        };
                        let fit = match after {
                            Ok(after) => Box::pin(tunnel.settled(after)).await.then_some(tunnel),
                            Err(admitted) => Box::pin(admitted.serve_fast(tunnel)).await,
                        };
                        match fit {
                            Some(fit) => tunnel = fit,
                            None => return,
                        }
                    }
                    Ok(None) => return Box::pin(tunnel.close()).await,
                    Err(error) => return self.ended(Some(error)),
                }
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
        let (proxy, thread) = (self.proxy.clone(), self.thread.clone());
        let (pod, peer) = (self.pod.clone(), self.peer.clone());
        Arriving { proxy, thread, pod, peer, client: self.client, local: self.local, transport }
    }

    /// Completes when no new flow is to begin.
    fn drained(&self) -> impl Future<Output = ()> + use<> {
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
    let arrival = Arrival { proxy, pod, client, identity: None, via: None, to: local };
    arrival.check_source()?;
    let own = pod.captured.workload.identity.as_ref();
    let own = own.ok_or_else(|| Failure::new(Reason::Identity, "the pod has no service account, so no identity"))?;
    proxy.tls.accept(stream, own, proxy.settings.tunnel).await.map_err(|error| Failure::tls(&error))
}

/// One flow on its way in.
#[derive(Clone)]
pub struct Arriving {
    pub proxy: Arc<Proxy>,
    pub thread: Rc<Thread>,
    pub pod: Arc<ServedPod>,
    pub peer: Arc<PeerInfo>,
    pub client: SocketAddr,
    local: SocketAddr,
    pub transport: Transport,
}

impl Arriving {
    fn serve(self, request: Request) -> impl Future<Output = ()> {
        // Each part on the heap and of its own size, as in [`serve`].
        let letting_in = Box::pin(self.let_in(request));
        async move {
            if let Some(carrying) = letting_in.await {
                carrying.await;
            }
        }
    }

    /// Lets a flow in, or refuses it; what is returned carries it to its end.
    async fn let_in(self, mut request: Request) -> Option<LocalBoxFuture<'static, ()>> {
        let to = SocketAddr::new(request.authority.ip().to_canonical(), request.authority.port());
        self.proxy.model.synced().await;
        let who = self.who(to, request.behalf.take());
        let connection = self.register(to, &who);
        let admitted = tokio::select! {
            admitted = self.admit(to, &who, &connection) => admitted,
            reason = connection.control.reset_requested() => Err(Failure::new(reason, "ended while connecting")),
            () = request.abandoned() => Err(Failure::new(Reason::Reset, "the client gave it up while connecting")),
        };
        let (dialled, reads) = match admitted {
            Ok(admitted) => admitted,
            Err(failure) => {
                request.refuse(refusal(&failure));
                connection.failed(&failure);
                return None;
            }
        };
        let own = baggage(&self.proxy.settings.cluster, &self.pod.captured.workload);
        let flow = match request.accept(&own) {
            Ok(flow) => flow,
            Err(error) => {
                connection.failed(&Failure::new(Reason::Reset, error.to_string()));
                return None;
            }
        };
        if reads != Reads::Nothing {
            let inward = self.inward(to, &who);
            return Some(Box::pin(async move {
                inward.serve(Stream::hbone(flow), BytesMut::new(), dialled, &connection).await;
            }));
        }
        let (application, held) = dialled;
        match TcpEnd::new(application) {
            Ok(application) => Some(Box::pin(async move {
                let _held = held;
                carry::out_of_tunnel(&connection, flow, application).await;
            })),
            Err(cause) => {
                connection.failed(&carry::broken(&cause));
                None
            }
        }
    }

    /// As [`Arriving::let_in`].
    async fn let_in_fast<'a>(&self, mut request: fast::Request<'a>) -> Flow<'a> {
        let (to, behalf) = match request.header() {
            Ok(header) => {
                let to = SocketAddr::new(header.destination.ip().to_canonical(), header.destination.port());
                (to, header.behalf.clone())
            }
            Err(error) => {
                debug!(peer = %self.client, %error, "A flow was refused.");
                return Flow::Refused(request.refuse(Refusal::Malformed));
            }
        };
        self.proxy.model.synced().await;
        let who = self.who(to, behalf);
        let connection = self.register(to, &who);
        let admitted = tokio::select! {
            admitted = self.admit(to, &who, &connection) => admitted,
            reason = connection.control.reset_requested() => Err(Failure::new(reason, "ended while connecting")),
            () = request.abandoned() => {
                connection.failed(&Failure::new(Reason::Reset, "the client gave it up while connecting"));
                return Flow::Refused(fast::After::Spent);
            }
        };
        let (application, held) = match admitted {
            Ok((dialled, Reads::Nothing)) => dialled,
            Ok((dialled, _)) => {
                return Flow::Admitted(Box::new(Admitted { inward: self.inward(to, &who), dialled, connection }));
            }
            Err(failure) => {
                connection.failed(&failure);
                return Flow::Refused(request.refuse(refusal(&failure)));
            }
        };
        match TcpEnd::new(application) {
            Ok(application) => Flow::LetIn(Box::pin(async move {
                let _held = held;
                carry::out_of_fast_tunnel(&connection, request, application).await
            })),
            Err(cause) => {
                connection.failed(&carry::broken(&cause));
                Flow::Refused(request.refuse(Refusal::Unreachable))
            }
        }
    }

    /// The way in for requests.
    fn inward(&self, to: SocketAddr, who: &Source) -> Inward {
        Inward {
            proxy: self.proxy.clone(),
            pod: self.pod.clone(),
            client: who.address,
            identity: Some(who.identity.clone()),
            via: who.via.clone(),
            peer: Some(self.peer.clone()),
            seen: self.seen_by_application(who, to),
            to,
        }
    }

    /// Whom a flow is from: the peer, or whom it speaks for where it is the waypoint of what it goes to.
    fn who(&self, to: SocketAddr, behalf: Option<Behalf>) -> Source {
        let peer = &self.peer.identity;
        let believed = behalf.filter(|_| is_own_waypoint(&self.proxy.model.read().mesh, peer, to));
        match believed {
            Some(Behalf { identity, address }) => Source { address, identity, via: Some(peer.clone()) },
            None => Source { address: self.client, identity: peer.clone(), via: None },
        }
    }

    fn register(&self, to: SocketAddr, who: &Source) -> Registered {
        let opening = Opening {
            pod: self.pod.uid(),
            source: who.address,
            dialled: to,
            peer: Some(who.identity.clone()),
            via: who.via.clone(),
            info: self.info(to, who),
        };
        self.proxy.connections.register(&self.proxy.telemetry, opening)
    }

    fn info(&self, to: SocketAddr, who: &Source) -> ConnectionInfo {
        ConnectionInfo {
            direction: Direction::Inbound,
            transport: self.transport,
            source: who.party(&self.proxy),
            destination: Party::of(to, &self.pod.captured.workload),
            service: self.proxy.model.read().mesh.services_at(to).next().cloned(),
            requested: None,
            key_exchange: Some(self.peer.key_exchange),
        }
    }

    async fn admit(&self, to: SocketAddr, who: &Source, connection: &Connection) -> Result<(Dialled, Reads), Failure> {
        if to.ip() != self.local.ip() {
            let text = format!("the authority's address {} is not the one connected to, {}", to.ip(), self.local.ip());
            return Err(Failure::new(Reason::Protocol, text));
        }
        let (identity, via) = (Some(&who.identity), who.via.as_ref());
        let arrival = Arrival { proxy: &self.proxy, pod: &self.pod, client: who.address, identity, via, to };
        let decided = arrival.decide(connection)?;
        allowed(&decided.decision)?;
        let dialled = dial::application(&self.proxy, &self.pod, self.seen_by_application(who, to), to).await;
        let dialled = dialled.map_err(|cause| Failure::connect(&format!("application at {to}"), &cause))?;
        Ok((dialled, decided.reads))
    }
}

impl Arriving {
    /// The address that the application sees. A client's that it could not have come from stays hidden behind its
    /// waypoint's: one of the other family, or the pod's own.
    fn seen_by_application(&self, who: &Source, to: SocketAddr) -> IpAddr {
        let address = who.address.ip();
        let fits = address.is_ipv4() == to.is_ipv4() && believable_source(address, &self.pod.captured.workload.pod.ips);
        if fits { address } else { self.client.ip() }
    }
}

/// What becomes of a flow of the fast tunnel.
enum Flow<'a> {
    /// This carries it to its end, and tells what is left of the tunnel.
    LetIn(LocalBoxFuture<'a, fast::After>),
    /// Nothing; and what is left of the tunnel.
    Refused(fast::After),
    /// It is let in, and its requests are to be read.
    Admitted(Box<Admitted>),
}

struct Admitted {
    inward: Inward,
    dialled: Dialled,
    connection: Registered,
}

impl Admitted {
    /// Says yes to the flow that was asked for last, and serves its requests. The tunnel is returned where it can take
    /// another.
    async fn serve_fast(self, tunnel: fast::Server) -> Option<fast::Server> {
        let Self { inward, dialled, connection } = self;
        match tunnel.into_stream() {
            Ok((stream, lent)) => {
                inward.serve(Stream::Fast(stream), BytesMut::new(), dialled, &connection).await;
                drop(connection);
                lent.returned().await
            }
            Err(cause) => {
                connection.failed(&carry::broken(&cause));
                None
            }
        }
    }
}

/// Whom a flow is from.
pub struct Source {
    pub address: SocketAddr,
    pub identity: Identity,
    /// The waypoint that says so.
    pub via: Option<Identity>,
}

impl Source {
    /// For metrics and logs: with the pod behind the address, where the identity agrees.
    pub fn party(&self, proxy: &Proxy) -> Party {
        let state = proxy.model.read();
        let pod = state.mesh.workload_by_ip(self.address.ip());
        let pod = pod.filter(|workload| workload.identity.as_ref() == Some(&self.identity));
        let party = pod.map_or_else(|| Party::stranger(self.address), |pod| Party::of(self.address, pod));
        Party { identity: Some(self.identity.clone()), ..party }
    }
}

// facts of the field's protocol: 400 malformed, 401 denied by policy, 503 next hop unreachable. 500 and 504 are ours: to a
// peer of the field they are a 503.
pub fn refusal(failure: &Failure) -> Refusal {
    match (&failure.reason, failure.finding) {
        (Reason::Protocol, _) => Refusal::Malformed,
        (Reason::Policy(_) | Reason::Plaintext(_) | Reason::Denied, _) => Refusal::Denied,
        (_, Finding::Silence) => Refusal::Silent,
        (_, Finding::Passing) => Refusal::NotNow,
        (_, Finding::Definite(_)) => Refusal::Unreachable,
    }
}
