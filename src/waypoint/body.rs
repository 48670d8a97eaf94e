//! Bodies on their way: streamed, counted, and bounded in time.

use std::cell::Cell;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::time::{Sleep, sleep_until};

use super::gate::{Gate, Held};
use super::plan::Telling;
use super::room::{Room, Share, Want};
use super::tee::{Kept, Tee};
use super::tries::is_grpc_failure;
use super::upstream::Lease;
use crate::mesh::Reason;
use crate::proxy::RequestPlace;
use crate::telemetry::RequestTelemetry;
use crate::transport::unsent::Unsent;

pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The body of a request, on its way to an application.
pub struct RequestBody {
    from: From,
    /// Bytes that went so far.
    sent: Rc<Cell<u64>>,
    tee: Option<Rc<Tee>>,
    /// Where somebody may hold it back.
    gate: Option<Gate>,
    /// What was read of it ahead.
    ahead: VecDeque<Frame<Bytes>>,
    /// Of that.
    share: Option<Share>,
}

enum From {
    Client(Incoming),
    Kept { data: VecDeque<Bytes>, trailers: Option<HeaderMap> },
}

impl RequestBody {
    pub fn of_client(body: Incoming, sent: Rc<Cell<u64>>) -> Self {
        Self { from: From::Client(body), sent, tee: None, gate: None, ahead: VecDeque::new(), share: None }
    }

    /// Keeps it as it passes, what was read ahead too; and it is sent as the gate lets it, which stands open if some of it
    /// was read.
    pub fn attach(&mut self, tee: Option<Rc<Tee>>, gate: Option<Gate>) {
        if let Some(tee) = &tee {
            for frame in &self.ahead {
                frame.data_ref().into_iter().for_each(|data| tee.data(data));
                frame.trailers_ref().into_iter().for_each(|trailers| tee.trailers(trailers));
            }
            if self.is_read() {
                tee.end(true);
            }
        }
        self.tee = tee;
        if !self.ahead.is_empty() {
            gate.iter().for_each(|gate| gate.leave().give());
        }
        self.gate = gate;
    }

    /// One that was kept, once more.
    pub fn kept(kept: Kept) -> Self {
        let from = From::Kept { data: kept.data.into(), trailers: kept.trailers };
        Self { from, sent: Rc::default(), tee: None, gate: None, ahead: VecDeque::new(), share: None }
    }

    /// The first bytes of it, so many at most, and whether there are more. All of it is still to be sent.
    ///
    /// # Errors
    /// It broke off, or there is no room for it.
    pub async fn peek(&mut self, most: usize, room: &Arc<Room>) -> Result<(Bytes, bool), Unread> {
        // Who waits for leave to send it has somebody who wants to read it.
        self.gate.iter().for_each(|gate| gate.leave().give());
        let mut data = BytesMut::new();
        while data.len() <= most {
            let Some(frame) = poll_fn(|cx| self.poll_next(cx)).await.transpose().map_err(Unread::Broken)? else {
                break;
            };
            if let Some(chunk) = frame.data_ref() {
                // It is held twice: as it is shown, and as it goes on.
                let more = 2 * chunk.len();
                if !room.widen(&mut self.share, Want::Checked, more) {
                    return Err(Unread::Crowded);
                }
                data.extend_from_slice(chunk);
            }
            self.ahead.push_back(frame);
        }
        let is_partial = data.len() > most;
        data.truncate(most);
        Ok((data.freeze(), is_partial))
    }

    /// The next of it that nobody has read.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let frame = match &mut self.from {
            From::Client(body) => ready!(Pin::new(body).poll_frame(cx)),
            From::Kept { data, trailers } => {
                let data = data.pop_front().map(Frame::data);
                return Poll::Ready(data.or_else(|| trailers.take().map(Frame::trailers)).map(Ok));
            }
        };
        match &frame {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    self.sent.set(self.sent.get() + data.len() as u64);
                }
                if let Some(tee) = &self.tee {
                    frame.data_ref().into_iter().for_each(|data| tee.data(data));
                    frame.trailers_ref().into_iter().for_each(|trailers| tee.trailers(trailers));
                    if self.is_read() {
                        tee.end(true);
                    }
                }
            }
            Some(Err(_)) => self.tee.iter().for_each(|tee| tee.end(false)),
            None => self.tee.iter().for_each(|tee| tee.end(true)),
        }
        Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
    }

    /// Whether nothing of it is left to be read.
    fn is_read(&self) -> bool {
        match &self.from {
            From::Client(body) => body.is_end_stream(),
            From::Kept { data, trailers } => data.is_empty() && trailers.is_none(),
        }
    }
}

/// Why a body could not be read ahead.
#[derive(Debug, thiserror::Error)]
pub enum Unread {
    #[error("the body broke off: {0}")]
    Broken(BoxError),
    #[error("the pod's requests hold as many bytes as they may")]
    Crowded,
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if let Some(gate) = &mut self.gate {
            ready!(gate.poll_open(cx))?;
        }
        match self.ahead.pop_front() {
            Some(frame) => Poll::Ready(Some(Ok(frame))),
            None => self.poll_next(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.ahead.is_empty() && self.is_read()
    }

    fn size_hint(&self) -> SizeHint {
        let rest = match &self.from {
            From::Client(body) => body.size_hint(),
            From::Kept { trailers: Some(_), .. } => SizeHint::default(),
            From::Kept { data, .. } => SizeHint::with_exact(data.iter().map(|data| data.len() as u64).sum()),
        };
        let ahead: u64 = self.ahead.iter().filter_map(Frame::data_ref).map(|data| data.len() as u64).sum();
        let mut hint = SizeHint::new();
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper + ahead);
        }
        hint.set_lower(rest.lower() + ahead);
        hint
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        // Nobody reads the rest.
        let whole = self.is_read();
        self.tee.iter().for_each(|tee| tee.end(whole));
    }
}

/// The body of an answer, on its way to the client. What belongs to the request ends with it.
pub struct AnswerBody {
    from: Option<Incoming>,
    /// Of a client of HTTP/2, whose connection takes what it likes.
    unsent: Option<Arc<Unsent<Arc<Room>>>>,
    /// What is said here.
    words: Bytes,
    trail: Option<Box<Trail>>,
}

/// What lives as long as an answer is under way.
pub struct Trail {
    pub record: RequestTelemetry,
    pub sent: Rc<Cell<u64>>,
    pub received: u64,
    /// When its time is up.
    pub deadline: Option<Pin<Box<Sleep>>>,
    pub lease: Option<Lease>,
    /// The rest of the request that nobody wants.
    pub held: Option<Held>,
    /// Who wants to know how an answer of gRPC ends.
    pub telling: Option<Box<Telling>>,
    _place: RequestPlace,
    /// Of its head.
    _share: Option<Share>,
}

impl AnswerBody {
    /// Of an answer that was given here.
    pub fn of_words(words: Bytes, trail: Trail) -> Self {
        Self { from: None, unsent: None, words, trail: Some(Box::new(trail)) }
    }

    pub fn of_application(body: Incoming, trail: Trail, unsent: Option<Arc<Unsent<Arc<Room>>>>) -> Self {
        Self { from: Some(body), unsent, words: Bytes::new(), trail: Some(Box::new(trail)) }
    }

    /// Of one that nobody is to be told of.
    pub fn silent() -> Self {
        Self { from: None, unsent: None, words: Bytes::new(), trail: None }
    }

    fn fail(&mut self, reason: Reason, detail: String) {
        let Some(mut trail) = self.trail.take() else { return };
        // What is left of the connection is of no use.
        trail.lease = None;
        trail.tell(false);
        trail.record.amend(|info| {
            info.reason = Some(reason);
            info.detail = detail;
        });
        trail.end();
    }

    fn finish(&mut self) {
        let Some(mut trail) = self.trail.take() else { return };
        // Without a word of how it went it went wrong.
        trail.tell(false);
        if let Some(lease) = trail.lease.take()
            && trail.held.is_none()
        {
            lease.give_back();
        }
        trail.end();
    }
}

impl Trail {
    pub fn new(record: RequestTelemetry, sent: Rc<Cell<u64>>, place: RequestPlace, share: Option<Share>) -> Self {
        Self {
            record,
            sent,
            received: 0,
            deadline: None,
            lease: None,
            held: None,
            telling: None,
            _place: place,
            _share: share,
        }
    }

    fn tell(&mut self, is_success: bool) {
        self.telling.take().into_iter().for_each(|telling| telling.tell(is_success));
    }

    /// Records how it went.
    pub fn end(&mut self) {
        let (sent, received) = (self.sent.get(), self.received);
        self.record.amend(|info| (info.sent, info.received) = (sent, received));
        self.record.ended();
    }
}

impl Drop for Trail {
    fn drop(&mut self) {
        let (sent, received) = (self.sent.get(), self.received);
        self.record.amend(|info| (info.sent, info.received) = (sent, received));
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        let Some(body) = &mut this.from else {
            let words = std::mem::take(&mut this.words);
            if let Some(trail) = &mut this.trail {
                trail.received += words.len() as u64;
            }
            this.finish();
            return Poll::Ready((!words.is_empty()).then(|| Ok(Frame::data(words))));
        };
        let deadline = this.trail.as_mut().and_then(|trail| trail.deadline.as_mut());
        if deadline.is_some_and(|deadline| deadline.as_mut().poll(cx).is_ready()) {
            let text = "the answer took longer than the time-out of its route";
            this.fail(Reason::Timeout, text.to_owned());
            return Poll::Ready(Some(Err(text.into())));
        }
        if let Some(unsent) = &this.unsent {
            ready!(unsent.poll_room(cx));
        }
        let frame = ready!(Pin::new(body).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => {
                if let Some(trail) = &mut this.trail {
                    trail.received += frame.data_ref().map_or(0, |data| data.len() as u64);
                    if let Some(code) = frame.trailers_ref().and_then(grpc_status) {
                        trail.record.amend(|info| info.grpc_status = info.grpc_status.or(Some(code)));
                        trail.tell(!is_grpc_failure(code));
                    }
                }
                if this.is_end_stream() {
                    this.finish();
                }
            }
            Some(Err(error)) => {
                let text = format!("the destination's side broke its answer off: {error}");
                this.fail(Reason::Reset, text);
            }
            None => this.finish(),
        }
        let frame = match (frame, &this.unsent) {
            (Some(Ok(frame)), Some(unsent)) => Some(Ok(frame.map_data(|data| unsent.track(data)))),
            (frame, _) => frame,
        };
        Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        self.words.is_empty() && self.from.as_ref().is_none_or(Incoming::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.from.as_ref().map_or_else(|| SizeHint::with_exact(self.words.len() as u64), Incoming::size_hint)
    }
}

impl Drop for AnswerBody {
    fn drop(&mut self) {
        // One without a body is not polled.
        if self.is_end_stream() {
            self.finish();
        }
    }
}

pub fn grpc_status(headers: &HeaderMap) -> Option<u16> {
    headers.get("grpc-status")?.to_str().ok()?.parse().ok()
}

pub fn sleep_to(deadline: Instant) -> Pin<Box<Sleep>> {
    Box::pin(sleep_until(deadline.into()))
}
