//! The way from a pod to one endpoint of a Service, for who speaks a protocol over it rather than relaying bytes.

use std::cell::Cell;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use http::request::Parts;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::Proxy;
use super::choosing::Choosing;
use super::connections::{Connection, Opening, Registered};
use super::counted::Counted;
use super::denial::Source;
use super::failure::Failure;
use super::outbound::{Attempt, Way};
use super::pods::{RequestsOf, ServedPod};
use super::same_node::Arriving;
use super::source_ports::Held;
use super::workers::{Thread, with_random};
use crate::mesh::{
    AppProtocol, Destination, Identity, Path, PodUid, Reason, ServiceDestination, ServiceKind, Waypoint, Workload,
};
use crate::model::Model;
use crate::policy::RequestHead;
use crate::telemetry::{ConnectionInfo, Direction, Party, Telemetry, Transport};
use crate::transport::fast::Early;
use crate::transport::relay::{Asking, Ended, Outcome};
use crate::transport::tls::PeerInfo;
use crate::transport::{Behalf, Socket, Stream};
use crate::waypoint::{self, Look, Permit, Place, Receiver, Refusal, Room, View};

/// A pod of this node that sends requests on, from one of its addresses, to a Service whose routes decide where to. The
/// server's agent judges them.
#[derive(Clone)]
pub struct Onward {
    proxy: Arc<Proxy>,
    thread: Rc<Thread>,
    pod: Arc<ServedPod>,
    /// Where the client's own connection comes from, and where it went to.
    client: SocketAddr,
    dialled: SocketAddr,
}

/// What connections of one pod to one endpoint have in common: whoever may use the one may use the other.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Bond {
    pub source: PodUid,
    pub source_ip: IpAddr,
    /// Whom a waypoint speaks for on it.
    pub behalf: Option<Identity>,
    pub endpoint: SocketAddr,
    /// The pod at the endpoint, and how it is reached; none where the mesh has no say.
    pub destination: Option<(PodUid, Path)>,
}

impl Onward {
    pub(super) fn new(
        proxy: &Arc<Proxy>,
        thread: &Rc<Thread>,
        pod: &Arc<ServedPod>,
        client: SocketAddr,
        dialled: SocketAddr,
    ) -> Self {
        Self { proxy: proxy.clone(), thread: thread.clone(), pod: pod.clone(), client, dialled }
    }

    fn workload(&self) -> &Arc<Workload> {
        &self.pod.captured.workload
    }

    /// On the list of connections, counted and logged as any other.
    async fn line(&self, to: &Receiver, endpoint: SocketAddr) -> Result<Line, Failure> {
        let info = ConnectionInfo {
            direction: Direction::Outbound,
            transport: Transport::Plaintext,
            source: Party::of(self.client, self.workload()),
            destination: Party::stranger(endpoint),
            service: to.service().cloned(),
            requested: Some(self.dialled),
            key_exchange: None,
        };
        let opening =
            Opening { pod: self.pod.uid(), source: self.client, dialled: self.dialled, peer: None, via: None, info };
        let connection = self.proxy.connections.register(&self.proxy.telemetry, opening);
        let attempt = Attempt {
            proxy: &self.proxy,
            thread: &self.thread,
            pod: &self.pod,
            client: self.client.ip(),
            dialled: self.dialled,
            connection: &connection,
            behalf: None,
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
                let pod =
                    LinePod { proxy: self.proxy.clone(), pod: self.pod.clone(), ip: self.client.ip(), behalf: None };
                Ok(Line::new(pod, connection, way, peer))
            }
            Err(failure) => {
                connection.failed(&failure);
                Err(failure)
            }
        }
    }
}

impl Place for Onward {
    fn model(&self) -> &Model {
        &self.proxy.model
    }

    fn telemetry(&self) -> &Telemetry {
        &self.proxy.telemetry
    }

    fn pool(&self) -> &waypoint::Pool {
        &self.thread.http
    }

    fn describe(&self) -> ConnectionInfo {
        ConnectionInfo {
            direction: Direction::Outbound,
            transport: Transport::None,
            source: Party::of(self.client, self.workload()),
            destination: Party::default(),
            service: None,
            requested: Some(self.dialled),
            key_exchange: None,
        }
    }

    fn dialled(&self) -> SocketAddr {
        self.dialled
    }

    fn look(&self) -> Look {
        let state = self.proxy.model.read();
        let Destination::Service(service) = state.mesh.destination(self.dialled) else {
            return Look { view: None, stays: false };
        };
        let stays = *state.mesh.waypoint_of(&service.service) == Waypoint::Node
            && service.port.protocol().is_none_or(AppProtocol::is_http);
        let client = &self.workload().name().namespace;
        let routes = state.routes.routes(&service.service.name, &service.port, client).filter(|_| stays);
        Look { view: Some(View { to: Receiver::Service(service), routes }), stays }
    }

    fn count_request(&self) -> RequestPlace {
        RequestPlace::take(&self.pod, RequestsOf::Own)
    }

    fn room(&self) -> &Arc<Room> {
        self.pod.room(RequestsOf::Own)
    }

    fn leaving(&self) -> LocalBoxFuture<'static, ()> {
        self.proxy.leaving(&self.pod).boxed_local()
    }

    fn left(&self) -> LocalBoxFuture<'static, ()> {
        let (pod, client, dialled) = (self.pod.clone(), self.client, self.dialled);
        async move { pod.socket_closed(client, dialled).await }.boxed_local()
    }

    fn keeps(&self) -> bool {
        !*self.proxy.draining.borrow() && !self.pod.is_leaving()
    }

    fn pick(&self, to: &Receiver, tried: &[SocketAddr]) -> Option<SocketAddr> {
        let service = match to {
            Receiver::Service(service) => service,
            Receiver::Endpoint(endpoint) => return Some(*endpoint).filter(|endpoint| !tried.contains(endpoint)),
        };
        let client = self.proxy.client(self.client.ip());
        with_random(|random| self.proxy.balancer().pick(service, &client, tried, Instant::now(), random))
    }

    fn choosing(&self) -> Option<Choosing> {
        Some(Choosing::new(&self.proxy, self.client.ip(), &self.workload().name().namespace))
    }

    fn settle(&self, _: &Receiver, _: &mut Parts) -> Result<(), Refusal> {
        Ok(())
    }

    fn judge(&self, _: SocketAddr, _: &RequestHead<'_>) -> Result<Option<Permit>, Refusal> {
        Ok(None)
    }

    fn counted(&self, endpoint: SocketAddr) -> Option<Counted> {
        Some(Counted::begin(&self.proxy, endpoint))
    }

    fn reached(&self, endpoint: SocketAddr, well: bool) {
        let balancer = self.proxy.balancer();
        if well { balancer.succeeded(endpoint, Instant::now()) } else { balancer.failed(endpoint, Instant::now()) }
    }

    fn bond(&self, endpoint: SocketAddr) -> Option<Bond> {
        let state = self.proxy.model.read();
        let destination = match state.mesh.destination(endpoint) {
            Destination::Workload(workload) => {
                let path = Path::between(self.workload(), &workload, endpoint.port());
                // What holds of it may be another thing in a moment.
                if matches!(path, Path::Uncaptured | Path::Refused(..)) {
                    return None;
                }
                Some((workload.uid().clone(), path))
            }
            _ => None,
        };
        let (source, source_ip) = (self.pod.uid().clone(), self.client.ip());
        Some(Bond { source, source_ip, behalf: None, endpoint, destination })
    }

    fn asker(&self, to: &ServiceDestination) -> Option<Rc<dyn Place>> {
        let dialled = match &to.service.kind {
            ServiceKind::ClusterIp(addresses) => addresses.iter().find(|ip| ip.is_ipv4() == self.client.is_ipv4()),
            ServiceKind::Headless | ServiceKind::ExternalName => None,
        };
        let dialled = dialled.map_or(self.dialled, |ip| SocketAddr::new(*ip, to.port.port));
        Some(Rc::new(Self { dialled, ..self.clone() }))
    }

    fn connect<'a>(&'a self, to: &'a Receiver, endpoint: SocketAddr) -> LocalBoxFuture<'a, Result<Line, Failure>> {
        self.line(to, endpoint).boxed_local()
    }
}

impl Attempt<'_> {
    /// One endpoint, within the limits of the pod.
    pub(super) async fn reach(&self, endpoint: SocketAddr) -> Result<Way, Failure> {
        self.check_limits()?;
        self.endpoint(endpoint).await
    }
}

/// One connection to an endpoint, as a stream of bytes. How it ended is recorded when it is dropped.
pub struct Line {
    stream: Stream,
    entry: Entry,
    /// Of the tunnel that it goes through.
    peer: Option<Rc<PeerInfo>>,
    asking: [Asking; 2],
    ended: Option<(Outcome, Option<io::Error>)>,
}

/// The entries on the list of connections that a line counts for.
enum Entry {
    /// Its own, and that of the other side of a connection to a pod of this node.
    Own { pod: LinePod, connection: Registered, inbound: Option<(Arriving, Held)> },
    /// That of the client whose requests it carries into a pod of this node.
    OfClient { connection: Arc<Connection>, _held: Held },
}

/// The pod that a connection is of, with the address that it used, and whom it speaks for.
pub(super) struct LinePod {
    pub proxy: Arc<Proxy>,
    pub pod: Arc<ServedPod>,
    pub ip: IpAddr,
    pub behalf: Option<Behalf>,
}

impl LinePod {
    fn denied_now(&self, connection: &Connection) -> Option<Reason> {
        let Self { proxy, pod, ip, behalf } = self;
        Source { proxy, pod, ip: *ip, behalf: behalf.as_ref() }.denied_now(connection)
    }
}

impl Line {
    pub(super) fn new(pod: LinePod, connection: Registered, way: Way, peer: Option<Rc<PeerInfo>>) -> Self {
        let (stream, inbound) = match way {
            Way::Fast(flow) => (Stream::fast(flow), None),
            Way::Hbone(flow) => (Stream::hbone(flow), None),
            Way::Plain(stream) => (Stream::Tcp(Socket::new(stream)), None),
            Way::SameNode(reached) => {
                let (stream, inbound, held) = reached.into_parts();
                inbound.connected();
                (Stream::Tcp(Socket::new(stream)), Some((inbound, held)))
            }
        };
        Self::over(stream, Entry::Own { pod, connection, inbound }, peer)
    }

    /// A connection to an application of this node, for a client that is on the list already.
    pub(super) fn to_application(stream: TcpStream, held: Held, connection: Arc<Connection>) -> Self {
        Self::over(Stream::Tcp(Socket::new(stream)), Entry::OfClient { connection, _held: held }, None)
    }

    fn over(stream: Stream, entry: Entry, peer: Option<Rc<PeerInfo>>) -> Self {
        Self { stream, entry, peer, asking: <[Asking; 2]>::default(), ended: None }
    }

    fn sides(&self) -> (&Connection, Option<&Connection>) {
        match &self.entry {
            Entry::Own { connection, inbound, .. } => (connection, inbound.as_ref().map(|(inbound, _)| &**inbound)),
            Entry::OfClient { connection, .. } => (connection, None),
        }
    }

    /// What is known of it.
    pub fn info(&self) -> ConnectionInfo {
        self.sides().0.telemetry.info()
    }

    /// What it rests on that its other end is who it should be; none where no certificate says so.
    pub fn peer(&self) -> Option<Rc<PeerInfo>> {
        self.peer.clone()
    }

    fn controls(&self) -> impl Iterator<Item = &Connection> {
        let (here, there) = self.sides();
        [here].into_iter().chain(there)
    }

    /// Whether somebody wants it reset, such as policy.
    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        if self.ended.is_none() {
            // Whoever serves the client hears it, and drops what belongs to it: one waits at a time.
            if let Entry::OfClient { connection, .. } = &self.entry {
                return match connection.control.is_reset() {
                    true => Err(io::ErrorKind::ConnectionReset.into()),
                    false => Ok(()),
                };
            }
            let [mut first, mut second] = std::mem::take(&mut self.asking);
            let (here, there) = self.sides();
            // Each is asked, so that each wakes this task.
            let here = first.poll(cx, &here.control);
            let there = there.map(|there| second.poll(cx, &there.control));
            self.asking = [first, second];
            let ((Poll::Ready(reason), _) | (_, Some(Poll::Ready(reason)))) = (here, there) else { return Ok(()) };
            self.ended = Some((Outcome::ResetByUs(reason), None));
        }
        match &self.ended {
            Some((Outcome::Orderly, _)) | None => Ok(()),
            Some(_) => Err(io::ErrorKind::ConnectionReset.into()),
        }
    }

    fn noted<T>(&mut self, outcome: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if let Poll::Ready(Err(error)) = &outcome
            && self.ended.is_none()
        {
            let copy = io::Error::new(error.kind(), error.to_string());
            self.ended = Some((Outcome::ResetByUpstream, Some(copy)));
        }
        outcome
    }
}

impl AsyncRead for Line {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        let before = buffer.filled().len();
        let outcome = Pin::new(&mut self.stream).poll_read(cx, buffer);
        let read = buffer.filled().len() - before;
        self.controls().for_each(|connection| connection.control.add_received(read));
        self.noted(outcome)
    }
}

impl AsyncWrite for Line {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        let outcome = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.sent(outcome)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        let outcome = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.sent(outcome)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let outcome = Pin::new(&mut self.stream).poll_flush(cx);
        self.noted(outcome)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        let outcome = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.noted(outcome)
    }
}

impl Line {
    fn sent(&mut self, outcome: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(sent)) = outcome {
            self.controls().for_each(|connection| connection.control.add_sent(sent));
        }
        self.noted(outcome)
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let (outcome, error) = match self.ended.take() {
            Some(ended) => ended,
            None if self.stream.is_shut_down() => (Outcome::Orderly, None),
            // Whoever spoke over it had enough, in the midst of it.
            None => (Outcome::ResetByDownstream, None),
        };
        // What the client's own connection is told of, is told as that ends.
        let Entry::Own { pod, connection, inbound } = &self.entry else { return };
        // Why policy allows it no more, if it does not: the far agent's reset carries no words.
        let denied = (outcome == Outcome::ResetByUpstream).then(|| pod.denied_now(connection)).flatten();
        let (sent, received) = (connection.control.sent(), connection.control.received());
        let ended = Ended { sent, received, outcome, error };
        match denied {
            Some(reason) => {
                let text = "the destination's agent ended it: policy allows it no more";
                connection.telemetry.closed(sent, received, Some(reason), text);
            }
            None => connection.ended(&ended),
        }
        if let Some((inbound, _)) = inbound {
            inbound.ended(&ended);
        }
    }
}

/// One request's place among those of its pod.
pub struct RequestPlace {
    pod: Arc<ServedPod>,
    of: RequestsOf,
    /// How many there are with it.
    pub count: usize,
}

impl RequestPlace {
    pub(super) fn take(pod: &Arc<ServedPod>, of: RequestsOf) -> Self {
        Self { count: pod.begin_request(of), pod: pod.clone(), of }
    }
}

impl Drop for RequestPlace {
    fn drop(&mut self) {
        self.pod.end_request(self.of);
    }
}
