//! Connections to applications that speak HTTP.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::HeaderMap;
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::io::AsyncWriteExt;
use tokio::sync::oneshot;

use super::body::RequestBody;
use super::client::Version;
use super::executor::OnThread;
use super::guard::{Admission, Begun, Guard, Leave, Opened};
use super::place::{Place, Receiver};
use super::plan::Plan;
use super::{Bond, Failure, Line};
use crate::mesh::Reason;
use crate::proxy::Counted;
use crate::telemetry::ConnectionInfo;

/// One connection to an application, of which any number of requests is sent one by one (HTTP/1) or at once (HTTP/2).
pub struct Upstream {
    sender: Sender,
    info: Rc<ConnectionInfo>,
    /// None: it serves this one request.
    bond: Option<Bond>,
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

/// The use of a connection for one request.
pub struct Lease {
    upstream: Upstream,
    place: Rc<dyn Place>,
    /// Whether the connection has carried a request before.
    pub reused: bool,
    /// Where the connection comes to once it speaks another protocol.
    inheritance: Option<oneshot::Receiver<Handed>>,
    _stream: StreamPlace,
    _counted: Option<Counted>,
    _begun: Option<Begun>,
}

/// A request that came to nothing on its connection.
pub struct Unsent {
    pub error: String,
    /// The request itself, where nothing of it was written.
    pub request: Option<Request<RequestBody>>,
    /// The application says that it has not looked at it.
    pub is_refused: bool,
    /// The client broke its body off.
    pub is_body: bool,
}

impl Upstream {
    pub fn bond(&self) -> Option<&Bond> {
        self.bond.as_ref()
    }

    /// Whether it may take another request.
    pub fn is_fit(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.born) < MOST_AGE
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
    let pool = place.pool();
    let lease = |upstream: Upstream, reused| {
        let stream = StreamPlace::take(&upstream.streams);
        Lease {
            upstream,
            place: place.clone(),
            reused,
            inheritance: None,
            _stream: stream,
            _counted: counted,
            _begun: begun,
        }
    };
    let Some(bond) = bond else {
        let opened = match &admission {
            Some(admission) => match admission.open(|| None::<Upstream>, || plan.free()).await? {
                Leave::Open(opened) => Some(opened),
                Leave::Kept(upstream) => return Ok(lease(upstream, true)),
            },
            None => None,
        };
        return Ok(lease(connect(place, to, endpoint, version, None, opened).await?, false));
    };
    match version {
        Version::Http1 => {
            if let Some(upstream) = pool.take(&bond) {
                return Ok(lease(upstream, true));
            }
            let opened = match &admission {
                Some(admission) => match admission.open(|| pool.take(&bond), || plan.free()).await? {
                    Leave::Open(opened) => Some(opened),
                    Leave::Kept(upstream) => return Ok(lease(upstream, true)),
                },
                None => None,
            };
            Ok(lease(connect(place, to, endpoint, version, Some(bond), opened).await?, false))
        }
        Version::Http2 => {
            if let Some(upstream) = pool.shared(&bond) {
                return Ok(lease(upstream, true));
            }
            // Requests that come together wait for one connection rather than open one each.
            let turn = pool.turn(&bond);
            let _turn = tokio::time::timeout(SHARED_WAIT, turn.lock()).await;
            if let Some(upstream) = pool.shared(&bond) {
                return Ok(lease(upstream, true));
            }
            let opened = match &admission {
                Some(admission) => match admission.open(|| pool.shared(&bond), || plan.free()).await? {
                    Leave::Open(opened) => Some(opened),
                    Leave::Kept(upstream) => return Ok(lease(upstream, true)),
                },
                None => None,
            };
            let upstream = connect(place, to, endpoint, version, Some(bond), opened).await?;
            if place.keeps() {
                upstream.share().into_iter().for_each(|upstream| pool.put_shared(upstream));
            }
            Ok(lease(upstream, false))
        }
    }
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
    let info = Rc::new(line.info());
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
            let mut builder = http2::Builder::new(OnThread);
            builder
                .initial_stream_window_size(STREAM_WINDOW)
                .initial_connection_window_size(CONNECTION_WINDOW)
                .max_header_list_size(MOST_HEAD)
                .max_send_buf_size(STREAM_WINDOW as usize);
            let (mut sender, connection) = builder.handshake(io).await.map_err(broken)?;
            tokio::task::spawn_local(async move {
                // How it ends is told by its requests, and by the connection's own line.
                let _ = connection.await;
            });
            sender.ready().await.map_err(broken)?;
            Sender::Http2(sender)
        }
    };
    Ok(Upstream {
        sender,
        info,
        bond,
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

impl Lease {
    pub fn info(&self) -> &ConnectionInfo {
        &self.upstream.info
    }

    /// Sends the request, and waits for the head of its answer.
    pub async fn send(&mut self, request: Request<RequestBody>) -> Result<Response<Incoming>, Unsent> {
        let answer = match &mut self.upstream.sender {
            Sender::Http1(sender) => sender.try_send_request(request).await,
            Sender::Http2(sender) => sender.try_send_request(request).await,
        };
        answer.map_err(|mut error| {
            let request = error.take_message();
            let error = error.into_error();
            Unsent { error: describe(&error), request, is_refused: is_refused(&error), is_body: error.is_user() }
        })
    }

    /// Heeds what the application says of how long it keeps a connection: one that is closed a little before is never used as
    /// it goes.
    pub fn heed(&mut self, answer: &HeaderMap) {
        if let Some(kept) = kept_for(answer) {
            self.upstream.rest = MOST_REST.min(kept.saturating_sub(MARGIN));
        }
    }

    /// Takes the connection over once it speaks another protocol, as the answer to the next request may say.
    pub fn inherit(&mut self) {
        let (heir, inheritance) = oneshot::channel();
        self.upstream.heir.replace(Some(heir));
        self.inheritance = Some(inheritance);
    }

    /// It goes on with HTTP.
    pub fn disinherit(&mut self) {
        self.upstream.heir.replace(None);
        self.inheritance = None;
    }

    /// Where the connection comes to, if it was to be taken over.
    pub fn handed(&mut self) -> Option<oneshot::Receiver<Handed>> {
        self.inheritance.take()
    }

    /// Its request is over, and the connection may take the next.
    pub fn give_back(self) {
        let Self { upstream, place, .. } = self;
        let guard = upstream.guard().cloned();
        // Somebody else waits for a connection, and cannot have this one.
        if guard.as_ref().is_some_and(|guard| guard.is_wanted_elsewhere()) {
            return;
        }
        if matches!(upstream.sender, Sender::Http1(_))
            && upstream.bond.is_some()
            && place.keeps()
            && upstream.is_fit(Instant::now())
        {
            place.pool().put(upstream);
            guard.into_iter().for_each(|guard| guard.freed());
        }
    }
}

/// One request under way on a connection.
struct StreamPlace(Rc<Cell<usize>>);

impl StreamPlace {
    fn take(streams: &Rc<Cell<usize>>) -> Self {
        streams.set(streams.get() + 1);
        Self(streams.clone())
    }
}

impl Drop for StreamPlace {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// RFC 2068, section 19.7.1.1: `Keep-Alive: timeout=5`, which servers still send.
fn kept_for(answer: &HeaderMap) -> Option<Duration> {
    let words = answer.get("keep-alive")?.to_str().ok()?.split(',');
    let seconds = words.filter_map(|word| word.trim().strip_prefix("timeout=")).find_map(|word| word.parse().ok())?;
    Some(Duration::from_secs(seconds))
}

/// With its causes: hyper's own words are few.
fn describe(error: &hyper::Error) -> String {
    causes(error).fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// RFC 9113, section 8.7: a stream that was refused, or that lies beyond a GOAWAY, was not processed.
fn is_refused(error: &hyper::Error) -> bool {
    let of_http2 = causes(error).filter_map(|cause| cause.downcast_ref::<h2::Error>());
    of_http2.filter(|error| error.is_remote()).any(|error| {
        error.reason() == Some(h2::Reason::REFUSED_STREAM)
            || (error.is_go_away() && error.reason() == Some(h2::Reason::NO_ERROR))
    })
}

fn causes(error: &hyper::Error) -> impl Iterator<Item = &(dyn std::error::Error + 'static)> {
    std::iter::successors(std::error::Error::source(error), |cause| cause.source())
}

/// Of a connection: what it was made under holds for no longer.
const MOST_AGE: Duration = Duration::from_secs(600);
/// How long a connection is kept unused.
const MOST_REST: Duration = Duration::from_secs(60);
const MARGIN: Duration = Duration::from_secs(1);
/// At once on one connection; then another is made.
const MOST_STREAMS: usize = 100;
/// How long a request waits for a connection that another one makes; then it makes its own.
const SHARED_WAIT: Duration = Duration::from_secs(1);
const FAREWELL: Duration = Duration::from_secs(1);
pub const STREAM_WINDOW: u32 = 256 * 1024;
pub const CONNECTION_WINDOW: u32 = 1024 * 1024;
pub const MOST_HEAD: u32 = 64 * 1024;
/// What is read ahead of an HTTP/1 peer: a head, and a little more.
pub const MOST_BUFFERED: usize = 80 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_application_says_how_long_it_keeps_a_connection() {
        for (value, wanted) in [("timeout=5, max=1000", Some(5)), ("max=3", None), ("timeout=soon", None)] {
            let mut answer = HeaderMap::new();
            answer.insert("keep-alive", http::HeaderValue::from_static(value));
            assert_eq!(kept_for(&answer), wanted.map(Duration::from_secs), "{value}");
        }
        assert_eq!(kept_for(&HeaderMap::new()), None);
    }
}
