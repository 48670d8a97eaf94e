use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream};
use http::header::HeaderValue;
use http::{Response, StatusCode};
use metrics::counter;
use tokio::time::Instant;

use super::connection::{Event, MAX_FRAME, MAX_HEADERS, PingSettings, SEND_BUFFER, Shared, StreamGuard, Upkeep};
use super::head::{BAGGAGE, ConnectHead};
use super::window::WindowBudget;
use super::{Flow, HboneError, Refusal};
use crate::transport::Behalf;
use crate::transport::metrics::REFUSED;
use crate::transport::tls::Session;

#[derive(Clone)]
pub struct ServerSettings {
    /// From the end of the TLS handshake to the first request: preface and first header.
    pub first_request: Duration,
    /// RFC 9113, section 6.5.2, SETTINGS_MAX_CONCURRENT_STREAMS.
    pub max_streams: u32,
    /// A connection without streams is asked to end after so long. Longer than clients wait, so that it is they who
    /// choose the moment: a stream that crosses the GOAWAY must be opened again elsewhere.
    pub idle: Duration,
    pub ping_every: Duration,
    pub dead_after: Duration,
    /// Streams that the peer may reset unanswered between two PINGs before the connection is ended.
    pub max_abandoned: usize,
    pub windows: WindowBudget,
}

impl Default for ServerSettings {
    fn default() -> Self {
        let ping = PingSettings::default();
        Self {
            first_request: Duration::from_secs(10),
            max_streams: 200,
            idle: Duration::from_secs(600),
            ping_every: ping.every,
            dead_after: ping.dead_after,
            max_abandoned: 200,
            windows: WindowBudget::default(),
        }
    }
}

/// Serves one tunnel connection until it ends. `on_request` is handed each CONNECT and must not block; malformed ones
/// it never sees. Once `drain` resolves no new stream is taken, and the call returns when the last one has ended.
///
/// # Errors
/// How the connection ended, if not in order. Its flows then have been reset.
pub async fn serve(
    session: Session,
    settings: ServerSettings,
    mut on_request: impl FnMut(Request),
    drain: impl Future<Output = ()>,
) -> Result<(), HboneError> {
    let Session { stream, peer, mut permit } = session;
    let shared = Shared::new("server");
    let ping = PingSettings { every: settings.ping_every, dead_after: settings.dead_after };
    let mut upkeep = Upkeep::new(shared.clone(), settings.windows, ping);
    let (stream_window, connection_window) = upkeep.windows();
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(stream_window)
        .initial_connection_window_size(connection_window)
        .max_frame_size(MAX_FRAME)
        .max_header_list_size(MAX_HEADERS)
        .max_concurrent_streams(settings.max_streams)
        .max_send_buffer_size(SEND_BUFFER)
        .max_concurrent_reset_streams(20)
        .max_pending_accept_reset_streams(20)
        .max_local_error_reset_streams(Some(100));

    let late = || HboneError::FirstRequest(settings.first_request);
    let mut first = pin!(tokio::time::sleep(settings.first_request));
    let mut connection = tokio::select! {
        connection = builder.handshake(stream) => connection?,
        () = &mut first => return Err(late()),
    };
    let mut idle = pin!(tokio::time::sleep(settings.idle));
    let abandoned = Arc::new(AtomicUsize::new(0));
    let mut drain = pin!(drain);
    let (mut waiting, mut draining) = (true, false);
    loop {
        let next = poll_fn(|cx| {
            if waiting && first.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Next::Late);
            }
            if !draining && drain.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Next::Drain);
            }
            if !draining && idle.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Next::Idle);
            }
            if let Poll::Ready(event) = upkeep.poll(cx, &mut connection) {
                return Poll::Ready(Next::Upkeep(event));
            }
            connection.poll_accept(cx).map(|accepted| Next::Accept(accepted.map(|result| result.map(Box::new))))
        })
        .await;
        match next {
            Next::Late => return Err(late()),
            Next::Drain => {
                draining = true;
                waiting = false;
                connection.graceful_shutdown();
            }
            Next::Idle => match shared.idle_since() {
                Some(since) if since.elapsed() >= settings.idle => {
                    draining = true;
                    connection.graceful_shutdown();
                }
                since => idle.as_mut().reset(since.unwrap_or_else(Instant::now) + settings.idle),
            },
            Next::Upkeep(Event::Dead) => return Err(HboneError::Dead),
            Next::Upkeep(Event::Tick) => {
                abandoned.store(0, Ordering::Relaxed);
                if !draining && !peer.is_current(SystemTime::now()) {
                    draining = true;
                    connection.graceful_shutdown();
                }
            }
            Next::Accept(None) => return Ok(()),
            Next::Accept(Some(Err(error))) => return Err(error.into()),
            Next::Accept(Some(Ok(accepted))) => {
                let (request, mut responder) = *accepted;
                waiting = false;
                drop(permit.take());
                if abandoned.load(Ordering::Relaxed) > settings.max_abandoned {
                    // RFC 9113, section 10.5: cheap for the peer, dear for us.
                    connection.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM);
                    let _ = tokio::time::timeout(FAREWELL, poll_fn(|cx| connection.poll_closed(cx))).await;
                    return Err(HboneError::RapidReset);
                }
                if !peer.is_trusted(SystemTime::now()) {
                    responder.send_reset(Reason::REFUSED_STREAM);
                    draining = true;
                    connection.graceful_shutdown();
                    continue;
                }
                let head = ConnectHead::of(&request);
                let answer = Answer { responder, abandoned: abandoned.clone(), answered: false };
                match head {
                    Some(head) => {
                        let guard = shared.enter();
                        on_request(Request::new(head, answer, request.into_body(), guard));
                    }
                    None => answer.refuse(Refusal::Malformed),
                }
            }
        }
    }
}

enum Next {
    Late,
    Drain,
    Idle,
    Upkeep(Event),
    Accept(Option<Result<Box<Accepted>, h2::Error>>),
}

type Accepted = (http::Request<RecvStream>, SendResponse<Bytes>);

/// One well-formed CONNECT, to be accepted once the application has, or refused. Dropping it resets the stream.
pub struct Request {
    /// Where to. Whether that is an address of the pod connected to is for the caller to check.
    pub authority: SocketAddr,
    /// A claim: nothing proves it.
    pub forwarded: Option<SocketAddr>,
    pub baggage: Option<String>,
    pub traceparent: Option<String>,
    /// Whose it is, as a waypoint says: a claim too.
    pub behalf: Option<Behalf>,
    answer: Answer,
    body: RecvStream,
    guard: StreamGuard,
}

impl Request {
    fn new(head: ConnectHead, answer: Answer, body: RecvStream, guard: StreamGuard) -> Self {
        Self {
            authority: head.authority,
            forwarded: head.forwarded,
            baggage: Some(head.baggage).filter(|baggage| !baggage.is_empty()),
            traceparent: head.traceparent,
            behalf: head.behalf,
            answer,
            body,
            guard,
        }
    }

    /// Answers 200 with the server's baggage: the application has accepted.
    ///
    /// # Errors
    /// The client has gone in the meantime.
    pub fn accept(mut self, baggage: &str) -> Result<Flow, HboneError> {
        let mut response = Response::new(());
        if !baggage.is_empty()
            && let Ok(baggage) = HeaderValue::from_str(baggage)
        {
            response.headers_mut().insert(BAGGAGE, baggage);
        }
        let send = self.answer.responder.send_response(response, false)?;
        self.answer.answered = true;
        Ok(Flow::new(send, self.body, self.guard, self.baggage))
    }

    pub fn refuse(self, refusal: Refusal) {
        self.answer.refuse(refusal);
    }

    /// Resolves when the client has given the request up: nobody waits for the application any more.
    pub async fn abandoned(&mut self) {
        let _ = poll_fn(|cx| self.answer.responder.poll_reset(cx)).await;
    }
}

struct Answer {
    responder: SendResponse<Bytes>,
    abandoned: Arc<AtomicUsize>,
    answered: bool,
}

impl Answer {
    fn refuse(mut self, refusal: Refusal) {
        counter!(REFUSED, "status" => refusal.status().to_string()).increment(1);
        let mut response = Response::new(());
        *response.status_mut() = StatusCode::from_u16(refusal.status()).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
        self.answered = self.responder.send_response(response, true).is_ok();
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if self.answered {
            return;
        }
        let mut cx = Context::from_waker(Waker::noop());
        match self.responder.poll_reset(&mut cx) {
            Poll::Ready(_) => {
                self.abandoned.fetch_add(1, Ordering::Relaxed);
            }
            Poll::Pending => self.responder.send_reset(Reason::CANCEL),
        }
    }
}

/// How long a peer that is thrown out may take to hear why.
const FAREWELL: Duration = Duration::from_secs(1);
