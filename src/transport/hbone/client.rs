use std::collections::HashMap;
use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Poll, ready};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use h2::client::SendRequest;
use metrics::counter;
use tokio::sync::watch;
use tokio::time::Instant;

use super::connection::{Event, MAX_FRAME, MAX_HEADERS, PingSettings, SEND_BUFFER, Shared, StreamGuard, Upkeep};
use super::head::{BAGGAGE, ConnectHead, text};
use super::window::WindowBudget;
use super::{Flow, Refusal};
use crate::mesh::{Identity, PodUid};
use crate::transport::metrics::POOLED;
use crate::transport::tls::{PeerInfo, Session, TlsError};

/// The tunnel connections of one worker thread. No lock is held across a handshake.
#[derive(Clone)]
pub struct Pool {
    inner: Arc<Inner>,
}

#[derive(Clone)]
pub struct PoolSettings {
    /// Streams that one connection carries at most; the peer may allow fewer.
    pub max_streams: usize,
    /// A connection without streams is released after so long.
    pub idle: Duration,
    /// From the request to its answer, which comes once the far application has accepted.
    pub answer: Duration,
    pub ping_every: Duration,
    pub dead_after: Duration,
    pub windows: WindowBudget,
}

impl Default for PoolSettings {
    fn default() -> Self {
        let ping = PingSettings::default();
        Self {
            max_streams: 100,
            idle: Duration::from_secs(300),
            answer: Duration::from_secs(15),
            ping_every: ping.every,
            dead_after: ping.dead_after,
            windows: WindowBudget::default(),
        }
    }
}

/// Whose connection to whom: nothing else may share it.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct PoolKey {
    pub source_pod: PodUid,
    pub source_ip: IpAddr,
    pub source_identity: Identity,
    pub destination_pod: PodUid,
    /// The tunnel's port at the destination pod's own address.
    pub destination_addr: SocketAddr,
    pub destination_identity: Identity,
}

/// Why no stream or flow was opened. Nothing of the application's has been delivered, but for [`OpenError::Lost`],
/// where nobody knows.
#[derive(Clone, Debug, thiserror::Error)]
pub enum OpenError {
    #[error("the destination's side refused the connection with status {status}: {}", words(*status))]
    Refused { status: u16 },
    #[error("the destination's tunnel cannot be reached: {0}; maybe a NetworkPolicy is blocking HBONE port 15008")]
    Connect(Arc<io::Error>),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("the tunnel broke before an answer came: {0}")]
    Broken(Arc<str>),
    #[error("the destination's side did not answer within {0:?}")]
    Timeout(Duration),
    #[error("the tunnel broke before an answer came, with the first bytes of the application under way: {0}")]
    Lost(Arc<str>),
}

impl OpenError {
    pub fn refusal(&self) -> Option<Refusal> {
        if let Self::Refused { status } = self { Refusal::from_status(*status) } else { None }
    }

    /// Whether another attempt, or another endpoint, can help. What policy or protocol refused stays refused.
    pub fn retry(&self) -> bool {
        match self {
            Self::Refused { status } => *status >= 500,
            Self::Tls(TlsError::Own(_)) | Self::Lost(_) => false,
            Self::Connect(_) | Self::Tls(_) | Self::Broken(_) | Self::Timeout(_) => true,
        }
    }

    /// Whether the way there broke, rather than being too long or leading to the wrong place: the same tunnel may work
    /// a moment later.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Broken(_) => true,
            Self::Connect(cause) | Self::Tls(TlsError::Io(cause)) => cause.kind() != io::ErrorKind::TimedOut,
            Self::Refused { .. } | Self::Tls(_) | Self::Timeout(_) | Self::Lost(_) => false,
        }
    }
}

impl From<io::Error> for OpenError {
    fn from(error: io::Error) -> Self {
        Self::Connect(Arc::new(error))
    }
}

/// One pooled connection, for people.
#[derive(Clone, Debug, serde::Serialize)]
pub struct PoolStatus {
    pub tunnel: &'static str,
    pub source_pod: String,
    pub source: String,
    pub destination_pod: String,
    pub destination: String,
    pub address: SocketAddr,
    pub streams: usize,
    pub key_exchange: &'static str,
    pub certificate_serial: String,
    pub trust_generation: u64,
}

impl PoolStatus {
    pub(in crate::transport) fn new(tunnel: &'static str, key: &PoolKey, peer: &PeerInfo, streams: usize) -> Self {
        Self {
            tunnel,
            source_pod: key.source_pod.to_string(),
            source: key.source_identity.to_string(),
            destination_pod: key.destination_pod.to_string(),
            destination: key.destination_identity.to_string(),
            address: key.destination_addr,
            streams,
            key_exchange: peer.key_exchange,
            certificate_serial: peer.generation().0.to_owned(),
            trust_generation: peer.generation().1,
        }
    }
}

impl Pool {
    pub fn new(settings: PoolSettings) -> Self {
        let open = watch::Sender::new(0);
        let inner = Inner { settings, keys: Mutex::default(), numbers: AtomicU64::new(0), open };
        Self { inner: Arc::new(inner) }
    }

    /// Opens a stream: on a connection of this key that has room, else on a new one that `dial` makes. Those who ask
    /// while a connection is being made wait for it; when it fails, so do they, and may try again.
    ///
    /// A stream that the peer refused unprocessed (REFUSED_STREAM, GOAWAY) is opened again elsewhere, as long as
    /// `dial` is unused.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub async fn open(
        &self,
        key: &PoolKey,
        head: &ConnectHead,
        dial: impl Future<Output = Result<Session, OpenError>>,
    ) -> Result<(Flow, PeerInfo), OpenError> {
        let mut dial = Some(dial);
        loop {
            let (connection, reused) = match self.inner.claim(key) {
                Claim::Connection(connection) => (connection, true),
                Claim::Wait(mut pending) => {
                    if let Ok(answer) = pending.0.wait_for(Option::is_some).await
                        && let Some(Err(error)) = &*answer
                    {
                        return Err(error.clone());
                    }
                    continue;
                }
                Claim::Dial(promise) => {
                    let Some(dial) = dial.take() else {
                        return Err(OpenError::Broken("every connection went away before it took the stream".into()));
                    };
                    let made = match dial.await {
                        Ok(session) => self.inner.connect(key, session).await,
                        Err(error) => Err(error),
                    };
                    promise.keep(made.as_ref().map(|_| ()).map_err(Clone::clone));
                    (made?, false)
                }
            };
            let Claimed { mut send, guard, entry } = connection;
            let outcome = match tokio::time::timeout(self.inner.settings.answer, request(&mut send, head)).await {
                Ok(outcome) => outcome,
                Err(_) => return Err(OpenError::Timeout(self.inner.settings.answer)),
            };
            match outcome {
                Ok((sender, receiver, baggage)) => {
                    counter!(POOLED, "result" => if reused { "hit" } else { "miss" }).increment(1);
                    return Ok((Flow::new(sender, receiver, guard, baggage), entry.peer.clone()));
                }
                Err(Failure::Open(error)) => return Err(error),
                Err(Failure::Unprocessed(cause)) => {
                    entry.closing.store(true, Ordering::Relaxed);
                    self.inner.remove(key, entry.number);
                    if dial.is_none() {
                        return Err(OpenError::Broken(cause));
                    }
                }
            }
        }
    }

    /// A pod left: its connections take no new stream, and end with their last one.
    pub fn evict(&self, pod: &PodUid) {
        self.inner.keys().retain(|key, entries| {
            let leaves = key.source_pod == *pod || key.destination_pod == *pod;
            if leaves {
                entries.connections.iter().for_each(|(_, entry)| entry.closing.store(true, Ordering::Relaxed));
            }
            !leaves
        });
    }

    /// Every connection takes no new stream and ends with its last one; completes once all have been closed in order,
    /// with whatever was still to be sent.
    pub async fn close(&self) {
        for entries in std::mem::take(&mut *self.inner.keys()).into_values() {
            entries.connections.iter().for_each(|(_, entry)| entry.closing.store(true, Ordering::Relaxed));
        }
        // The sender is ours and lives.
        let _ = self.inner.open.subscribe().wait_for(|open| *open == 0).await;
    }

    pub fn snapshot(&self) -> Vec<PoolStatus> {
        let status = |key: &PoolKey, entry: &Entry| PoolStatus::new("hbone", key, &entry.peer, entry.shared.streams());
        let keys = self.inner.keys();
        keys.iter()
            .flat_map(|(key, entries)| entries.connections.iter().map(move |(_, entry)| status(key, entry)))
            .collect()
    }
}

struct Inner {
    settings: PoolSettings,
    keys: Mutex<HashMap<PoolKey, Entries>>,
    numbers: AtomicU64,
    /// How many connections are driven.
    open: watch::Sender<usize>,
}

#[derive(Default)]
struct Entries {
    connections: Vec<(SendRequest<Bytes>, Arc<Entry>)>,
    pending: Option<(Pending, usize)>,
}

struct Entry {
    number: u64,
    shared: Arc<Shared>,
    peer: PeerInfo,
    closing: AtomicBool,
}

struct Claimed {
    send: SendRequest<Bytes>,
    guard: StreamGuard,
    entry: Arc<Entry>,
}

enum Claim {
    Connection(Claimed),
    Wait(Pending),
    Dial(Promise),
}

#[derive(Clone)]
struct Pending(watch::Receiver<Option<Result<(), OpenError>>>);

/// The duty to say how a dial ended; dropping it says that it was given up, and the next one in line dials.
struct Promise {
    inner: Arc<Inner>,
    key: PoolKey,
    answer: watch::Sender<Option<Result<(), OpenError>>>,
}

impl Promise {
    fn keep(self, result: Result<(), OpenError>) {
        self.withdraw();
        self.answer.send_replace(Some(result));
    }

    fn withdraw(&self) {
        let mut keys = self.inner.keys();
        if let Some(entries) = keys.get_mut(&self.key) {
            entries.pending.take_if(|(pending, _)| pending.0.same_channel(&self.answer.subscribe()));
            if entries.connections.is_empty() && entries.pending.is_none() {
                keys.remove(&self.key);
            }
        }
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        self.withdraw();
    }
}

impl Inner {
    fn claim(self: &Arc<Self>, key: &PoolKey) -> Claim {
        let now = SystemTime::now();
        let mut keys = self.keys();
        let entries = keys.entry(key.clone()).or_default();
        entries.connections.retain(|(_, entry)| !entry.closing.load(Ordering::Relaxed) && entry.peer.is_current(now));
        for (send, entry) in &entries.connections {
            if entry.shared.streams() < self.settings.max_streams.min(send.current_max_send_streams()) {
                let guard = entry.shared.enter();
                return Claim::Connection(Claimed { send: send.clone(), guard, entry: entry.clone() });
            }
        }
        if let Some((pending, waiting)) = &mut entries.pending
            && *waiting < self.settings.max_streams
        {
            *waiting += 1;
            return Claim::Wait(pending.clone());
        }
        let (answer, receiver) = watch::channel(None);
        entries.pending = Some((Pending(receiver), 1));
        Claim::Dial(Promise { inner: self.clone(), key: key.clone(), answer })
    }

    async fn connect(self: &Arc<Self>, key: &PoolKey, session: Session) -> Result<Claimed, OpenError> {
        let shared = Shared::new("client");
        let ping = PingSettings { every: self.settings.ping_every, dead_after: self.settings.dead_after };
        let upkeep = Upkeep::new(shared.clone(), self.settings.windows.clone(), ping);
        let (stream_window, connection_window) = upkeep.windows();
        let mut builder = h2::client::Builder::new();
        builder
            .initial_window_size(stream_window)
            .initial_connection_window_size(connection_window)
            .max_frame_size(MAX_FRAME)
            .max_header_list_size(MAX_HEADERS)
            .initial_max_send_streams(self.settings.max_streams)
            .max_send_buffer_size(SEND_BUFFER)
            .max_local_error_reset_streams(Some(100))
            .enable_push(false);
        let Session { stream, peer, .. } = session;
        let (send, connection) = builder.handshake(stream).await.map_err(|error| broken(error).into_open())?;
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        let entry = Arc::new(Entry { number, shared: shared.clone(), peer, closing: AtomicBool::new(false) });
        let guard = shared.enter();
        match self.keys().get_mut(key) {
            Some(entries) => entries.connections.push((send.clone(), entry.clone())),
            // One of the pods left while this was dialled: it carries the stream that it was made for, and no other.
            None => entry.closing.store(true, Ordering::Relaxed),
        }
        let counted = Counted::begin(&self.open);
        let driving = drive(connection, upkeep, entry.clone(), Arc::downgrade(self), key.clone(), self.settings.idle);
        tokio::spawn(async move {
            driving.await;
            drop(counted);
        });
        Ok(Claimed { send, guard, entry })
    }

    fn remove(&self, key: &PoolKey, number: u64) {
        let mut keys = self.keys();
        if let Some(entries) = keys.get_mut(key) {
            entries.connections.retain(|(_, entry)| entry.number != number);
            if entries.connections.is_empty() && entries.pending.is_none() {
                keys.remove(key);
            }
        }
    }

    fn keys(&self) -> MutexGuard<'_, HashMap<PoolKey, Entries>> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts a connection for as long as it is driven.
struct Counted(watch::Sender<usize>);

impl Counted {
    fn begin(open: &watch::Sender<usize>) -> Self {
        open.send_modify(|open| *open += 1);
        Self(open.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.send_modify(|open| *open -= 1);
    }
}

/// Drives one connection to its end, and takes it out of the pool once it must carry nothing new.
async fn drive(
    mut connection: h2::client::Connection<crate::transport::tls::TlsStream, Bytes>,
    mut upkeep: Upkeep,
    entry: Arc<Entry>,
    pool: Weak<Inner>,
    key: PoolKey,
    idle: Duration,
) {
    let mut used = Instant::now();
    let retire = || {
        entry.closing.store(true, Ordering::Relaxed);
        if let Some(pool) = pool.upgrade() {
            pool.remove(&key, entry.number);
        }
    };
    loop {
        let event = poll_fn(|cx| {
            if let Poll::Ready(event) = upkeep.poll(cx, &mut connection) {
                return Poll::Ready(Some(event));
            }
            let ended = ready!(Pin::new(&mut connection).poll(cx));
            if let Err(error) = ended {
                tracing::debug!(peer = %entry.peer.identity, %error, "A tunnel's connection ended.");
            }
            Poll::Ready(None)
        })
        .await;
        match event {
            Some(Event::Tick) => {
                if entry.shared.streams() > 0 {
                    used = Instant::now();
                }
                if used.elapsed() >= idle || !entry.peer.is_current(SystemTime::now()) {
                    retire();
                }
            }
            Some(Event::Dead) => {
                tracing::debug!(peer = %entry.peer.identity, "A tunnel's peer answers no PING; its connection is dropped.");
                break;
            }
            None => break,
        }
    }
    retire();
}

/// How a request failed, as far as trying again goes.
enum Failure {
    /// The peer has not looked at it: it may be sent again on another connection.
    Unprocessed(Arc<str>),
    Open(OpenError),
}

impl Failure {
    fn into_open(self) -> OpenError {
        match self {
            Self::Unprocessed(cause) => OpenError::Broken(cause),
            Self::Open(error) => error,
        }
    }
}

type Opened = (h2::SendStream<Bytes>, h2::RecvStream, Option<String>);

async fn request(send: &mut SendRequest<Bytes>, head: &ConnectHead) -> Result<Opened, Failure> {
    let request = head.request().map_err(|error| Failure::Open(OpenError::Broken(error.to_string().into())))?;
    // RFC 9113, section 6.8: a connection that is going away takes no stream, so none was processed.
    poll_fn(|cx| send.poll_ready(cx)).await.map_err(unsent)?;
    let (answer, sender) = send.send_request(request, false).map_err(unsent)?;
    let response = answer.await.map_err(broken)?;
    if response.status().as_u16() != 200 {
        return Err(Failure::Open(OpenError::Refused { status: response.status().as_u16() }));
    }
    let baggage = text(response.headers(), &BAGGAGE);
    Ok((sender, response.into_body(), baggage))
}

/// The request never left: whatever the cause, another connection may take it.
fn unsent(error: h2::Error) -> Failure {
    match broken(error) {
        Failure::Open(OpenError::Broken(cause)) => Failure::Unprocessed(cause),
        other => other,
    }
}

fn broken(error: h2::Error) -> Failure {
    let unprocessed = error.reason() == Some(h2::Reason::REFUSED_STREAM)
        || (error.is_go_away() && error.reason() == Some(h2::Reason::NO_ERROR));
    let text: Arc<str> = error.to_string().into();
    if unprocessed {
        return Failure::Unprocessed(text);
    }
    match error.into_io().map(TlsError::from_io) {
        Some(TlsError::Io(_)) | None => Failure::Open(OpenError::Broken(text)),
        // TLS 1.3 lets the client go ahead before the server has judged its certificate: here comes the verdict.
        Some(tls) => Failure::Open(OpenError::Tls(tls)),
    }
}

fn words(status: u16) -> &'static str {
    match Refusal::from_status(status) {
        Some(Refusal::Malformed) => "it could not make sense of the request",
        Some(Refusal::Denied) => "policy denies it",
        Some(Refusal::NotNow) => "it cannot say now whether the application is there",
        Some(Refusal::Unreachable) => "the application cannot be reached there",
        Some(Refusal::Silent) => "the application does not answer there",
        None => "no status that HBONE knows",
    }
}
