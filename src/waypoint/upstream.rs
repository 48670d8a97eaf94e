//! Connections to applications that speak HTTP.

mod lease;

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::TokioIo;
use tokio::io::AsyncWriteExt;
use tokio::sync::oneshot;

pub use self::lease::Lease;
use self::lease::StreamPlace;
use super::body::RequestBody;
use super::client::Version;
use super::executor::OnThread;
use super::guard::{Admission, Guard, Leave, Opened};
use super::place::{Place, Receiver};
use super::plan::Plan;
use super::pool::Moment;
use super::room::Windows;
use super::{Bond, Failure, Line};
use crate::mesh::Reason;
use crate::telemetry::RequestConnection;
use crate::transport::tls::PeerInfo;

/// One connection to an application, of which any number of requests is sent one by one (HTTP/1) or at once (HTTP/2).
pub struct Upstream {
    sender: Sender,
    info: Arc<RequestConnection>,
    /// None: it serves this one request.
    bond: Option<Bond>,
    /// What it rests on that its other end is who it should be; none where no certificate says so.
    peer: Option<Rc<PeerInfo>>,
    born: Instant,
    /// How long it may wait for its next request.
    rest: Duration,
    /// Who takes the connection over once it speaks another protocol.
    heir: Heir,
    /// Requests under way on it.
    streams: Rc<Cell<usize>>,
    /// Its place among the connections that its backend may be given.
    opened: Option<Rc<Opened>>,
}

enum Sender {
    Http1(http1::SendRequest<RequestBody>),
    Http2(http2::SendRequest<RequestBody>),
}

/// A connection that speaks another protocol from here on, and what came of it already.
pub type Handed = (Line, Bytes);

type Heir = Rc<RefCell<Option<oneshot::Sender<Handed>>>>;

impl Upstream {
    pub fn bond(&self) -> Option<&Bond> {
        self.bond.as_ref()
    }

    /// Whether it may take another request. It was made under certificates and a trust bundle, which may not be those of now.
    pub fn is_fit(&self, now: Moment) -> bool {
        now.instant.saturating_duration_since(self.born) < MOST_AGE
            && self.peer.as_ref().is_none_or(|peer| peer.is_current(now.wall))
            && match &self.sender {
                Sender::Http1(sender) => !sender.is_closed(),
                Sender::Http2(sender) => !sender.is_closed(),
            }
    }

    /// How long it may wait for its next request.
    pub fn rest(&self) -> Duration {
        self.rest
    }

    /// Whether it can take one at once.
    pub fn is_free(&self) -> bool {
        match &self.sender {
            Sender::Http1(sender) => sender.is_ready(),
            Sender::Http2(_) => self.streams.get() < MOST_STREAMS,
        }
    }

    /// What it counts for, if a policy bounds its backend's connections.
    pub fn guard(&self) -> Option<&Arc<Guard>> {
        self.opened.as_ref().map(|opened| opened.guard())
    }

    pub fn is_unused(&self) -> bool {
        self.streams.get() == 0
    }

    /// The same connection once more, where it can be shared.
    pub fn share(&self) -> Option<Self> {
        let Sender::Http2(sender) = &self.sender else { return None };
        Some(Self {
            sender: Sender::Http2(sender.clone()),
            info: self.info.clone(),
            bond: self.bond.clone(),
            peer: self.peer.clone(),
            born: self.born,
            rest: self.rest,
            heir: self.heir.clone(),
            streams: self.streams.clone(),
            opened: self.opened.clone(),
        })
    }
}

/// A connection to the endpoint for one request: one that waits, or a new one.
pub async fn acquire(
    place: &Rc<dyn Place>,
    to: &Receiver,
    endpoint: SocketAddr,
    version: Version,
    plan: &Plan,
) -> Result<Lease, Failure> {
    let admission = plan.admission();
    let begun = admission.as_ref().map(Admission::begin).transpose()?;
    let counted = place.counted(endpoint);
    let bond = place.bond(endpoint);
    let kept = bond.as_ref().and_then(|bond| kept(place, bond, version));
    let (upstream, reused) = match kept {
        Some(upstream) => (upstream, true),
        // On the heap: most requests find one that waits, and do not carry what making one takes.
        None => Box::pin(open(place, to, endpoint, version, plan, admission.as_ref(), bond)).await?,
    };
    let stream = StreamPlace::take(&upstream.streams);
    Ok(Lease {
        upstream,
        place: place.clone(),
        reused,
        inheritance: None,
        _stream: stream,
        _counted: counted,
        _begun: begun,
    })
}

/// One that waits, or that others share.
fn kept(place: &Rc<dyn Place>, bond: &Bond, version: Version) -> Option<Upstream> {
    match version {
        Version::Http1 => place.pool().take(bond),
        Version::Http2 => place.pool().shared(bond),
    }
}

/// A new one, or one that has come free meanwhile: true.
async fn open(
    place: &Rc<dyn Place>,
    to: &Receiver,
    endpoint: SocketAddr,
    version: Version,
    plan: &Plan,
    admission: Option<&Admission>,
    bond: Option<Bond>,
) -> Result<(Upstream, bool), Failure> {
    let free = || bond.as_ref().and_then(|bond| kept(place, bond, version));
    let is_shared = version == Version::Http2 && bond.is_some();
    // Requests that come together wait for one connection rather than open one each.
    let turn = bond.as_ref().filter(|_| is_shared).map(|bond| place.pool().turn(bond));
    let _turn = match &turn {
        Some(turn) => {
            let turn = tokio::time::timeout(SHARED_WAIT, turn.lock()).await;
            if let Some(upstream) = free() {
                return Ok((upstream, true));
            }
            turn.ok()
        }
        None => None,
    };
    let opened = match admission {
        Some(admission) => match admission.open(free, || plan.free()).await? {
            Leave::Open(opened) => Some(opened),
            Leave::Kept(upstream) => return Ok((upstream, true)),
        },
        None => None,
    };
    let upstream = connect(place, to, endpoint, version, bond, opened).await?;
    if is_shared && place.keeps() {
        upstream.share().into_iter().for_each(|upstream| place.pool().put_shared(upstream));
    }
    Ok((upstream, false))
}

async fn connect(
    place: &Rc<dyn Place>,
    to: &Receiver,
    endpoint: SocketAddr,
    version: Version,
    bond: Option<Bond>,
    opened: Option<Opened>,
) -> Result<Upstream, Failure> {
    let line = place.connect(to, endpoint).await?;
    let (info, peer) = (RequestConnection::new(line.info()), line.peer());
    let heir = Heir::default();
    let io = TokioIo::new(line);
    let broken = |error: hyper::Error| Failure {
        retry: true,
        ..Failure::new(Reason::Connect, format!("HTTP with {endpoint}: {error}"))
    };
    let sender = match version {
        Version::Http1 => {
            let mut builder = http1::Builder::new();
            builder.max_buf_size(MOST_BUFFERED);
            let (mut sender, connection) = builder.handshake(io).await.map_err(broken)?;
            tokio::task::spawn_local(drive(connection, heir.clone()));
            sender.ready().await.map_err(broken)?;
            Sender::Http1(sender)
        }
        Version::Http2 => {
            let windows = Windows::of(place.room());
            let mut builder = http2::Builder::new(OnThread);
            builder
                .initial_stream_window_size(windows.stream)
                .initial_connection_window_size(windows.connection)
                .max_header_list_size(MOST_HEAD)
                .max_send_buf_size(MOST_UNSENT);
            let (mut sender, connection) = builder.handshake(io).await.map_err(broken)?;
            tokio::task::spawn_local(async move {
                // How it ends is told by its requests, and by the connection's own line.
                let _ = connection.await;
                drop(windows);
            });
            sender.ready().await.map_err(broken)?;
            Sender::Http2(sender)
        }
    };
    Ok(Upstream {
        sender,
        info,
        bond,
        peer,
        born: Instant::now(),
        rest: MOST_REST,
        heir,
        streams: Rc::default(),
        opened: opened.map(Rc::new),
    })
}

/// Speaks HTTP/1 over a connection until it ends, or goes on as something else.
async fn drive(connection: http1::Connection<TokioIo<Line>, RequestBody>, heir: Heir) {
    // Broken: it is reset as it is dropped.
    let Ok(parts) = connection.without_shutdown().await else { return };
    let mut line = parts.io.into_inner();
    if let Some(heir) = heir.take() {
        // Who asked for it may have gone.
        return drop(heir.send((line, parts.read_buf)));
    }
    let _ = tokio::time::timeout(FAREWELL, line.shutdown()).await;
}

/// Of a connection.
const MOST_AGE: Duration = Duration::from_secs(600);
/// How long a connection is kept unused.
const MOST_REST: Duration = Duration::from_secs(60);
/// At once on one connection; then another is made.
const MOST_STREAMS: usize = 100;
/// How long a request waits for a connection that another one makes; then it makes its own.
const SHARED_WAIT: Duration = Duration::from_secs(1);
const FAREWELL: Duration = Duration::from_secs(1);
/// Of one stream of HTTP/2.
pub const MOST_UNSENT: usize = 256 * 1024;
pub const MOST_HEAD: u32 = 64 * 1024;
/// What is read ahead of an HTTP/1 peer: a head, and a little more.
pub const MOST_BUFFERED: usize = 80 * 1024;
