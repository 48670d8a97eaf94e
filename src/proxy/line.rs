//! One connection from a pod to an endpoint, for who speaks a protocol over it rather than relaying bytes.

use std::cell::Cell;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::Proxy;
use super::connections::{Connection, Opening, Registered};
use super::denial::Source;
use super::failure::Failure;
use super::outbound::{Attempt, Way};
use super::pods::ServedPod;
use super::same_node::Arriving;
use super::source_ports::Held;
use super::workers::Thread;
use crate::mesh::Reason;
use crate::telemetry::ConnectionInfo;
use crate::transport::fast::Early;
use crate::transport::relay::{Asking, Ended, Outcome};
use crate::transport::tls::PeerInfo;
use crate::transport::{Behalf, Socket, Stream};

impl Attempt<'_> {
    /// One endpoint, within the limits of the pod.
    async fn reach(&self, endpoint: SocketAddr) -> Result<Way, Failure> {
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
    /// Connects to an endpoint: on the list of connections, counted and logged as any other.
    pub(super) async fn line(
        self,
        thread: &Rc<Thread>,
        opening: Opening<'_>,
        endpoint: SocketAddr,
    ) -> Result<Line, Failure> {
        let dialled = opening.dialled;
        let connection = self.proxy.connections.register(&self.proxy.telemetry, opening);
        let attempt = Attempt {
            proxy: &self.proxy,
            thread,
            pod: &self.pod,
            client: self.ip,
            dialled,
            connection: &connection,
            behalf: self.behalf.as_ref(),
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
                Ok(Line::new(self, connection, way, peer))
            }
            Err(failure) => {
                connection.failed(&failure);
                Err(failure)
            }
        }
    }

    fn denied_now(&self, connection: &Connection) -> Option<Reason> {
        let Self { proxy, pod, ip, behalf } = self;
        Source { proxy, pod, ip: *ip, behalf: behalf.as_ref() }.denied_now(connection)
    }
}

impl Line {
    fn new(pod: LinePod, connection: Registered, way: Way, peer: Option<Rc<PeerInfo>>) -> Self {
        let (stream, inbound) = match way {
            Way::Fast(flow) => (Stream::fast(flow), None),
            Way::Hbone(flow) => (Stream::hbone(*flow), None),
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
