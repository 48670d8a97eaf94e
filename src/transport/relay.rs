//! Carries the bytes of one connection between two ends, as faithfully as a wire would.
//!
//! Half-close, reset and abrupt end on one side become the same on the other. There is no idle time-out: a connection
//! that is silent for an hour lives, and holds no buffer meanwhile.

mod buffer;
mod pipe;
mod splice;
mod tcp;
#[cfg(test)]
mod tests;

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Sleep, sleep};

use crate::mesh::Reason;

pub(super) use self::buffer::give_back as give_back_buffers;
pub use self::splice::join;
pub use self::tcp::TcpEnd;
pub(super) use self::tcp::Watch;

/// One end of a relay: an application's socket, or a flow in a tunnel.
pub trait End {
    /// Ready when a read may find something; no buffer is held while it is not.
    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;
    /// At most `limit` bytes where the end can choose; `None` once the other side has closed in order.
    fn poll_read(&mut self, cx: &mut Context<'_>, limit: usize) -> Poll<io::Result<Option<Bytes>>>;
    /// Tells that bytes which were read have been delivered: the peer may send as many more.
    fn delivered(&mut self, bytes: usize) -> io::Result<()>;
    /// How many bytes can be written now; may hold them for this end until [`End::release`].
    fn poll_capacity(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>>;
    /// Gives back what `poll_capacity` held: there was nothing to write.
    fn release(&mut self);
    /// Takes bytes from the front of `data`; how many.
    fn poll_write(&mut self, cx: &mut Context<'_>, data: &mut Bytes) -> Poll<io::Result<usize>>;
    /// Closes the writing direction in order.
    fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;
    /// Ready once what was written is on its way, or cannot be: a reset then overtakes nothing.
    fn poll_sent(&mut self, cx: &mut Context<'_>) -> Poll<()>;
    /// Ready when the other side has reset the connection, while nobody reads.
    fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<io::Error>;
    /// Both directions have closed in order: what is left to do at the end must not look like a reset.
    fn finish(&mut self);
    /// Ends both directions abruptly, as the other side will see.
    fn reset(&mut self);
}

/// What others may know of a running relay, and how they end it.
#[derive(Default)]
pub struct RelayControl {
    pub(super) sent: AtomicU64,
    pub(super) received: AtomicU64,
    /// Whether `ending` has a reason: what is looked at each time that a relay is woken.
    asked: AtomicBool,
    ending: Mutex<Ending>,
}

#[derive(Default)]
struct Ending {
    reason: Option<Reason>,
    waker: Option<Waker>,
}

impl std::fmt::Debug for RelayControl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RelayControl").field("sent", &self.sent()).field("received", &self.received()).finish()
    }
}

impl RelayControl {
    /// Bytes delivered upstream so far.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Bytes delivered downstream so far.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Resets both ends at once. The first reason given stays.
    pub fn reset(&self, reason: Reason) {
        let mut ending = self.ending.lock().unwrap_or_else(PoisonError::into_inner);
        ending.reason.get_or_insert(reason);
        self.asked.store(true, Ordering::Release);
        if let Some(waker) = ending.waker.take() {
            waker.wake();
        }
    }

    /// Whether a reset was asked for.
    pub fn is_reset(&self) -> bool {
        self.asked.load(Ordering::Acquire)
    }

    /// Counts bytes that went upstream without a relay.
    pub fn add_sent(&self, bytes: usize) {
        self.sent.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Counts bytes that came downstream without a relay.
    pub fn add_received(&self, bytes: usize) {
        self.received.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Completes when a reset is asked for. One waits at a time: before the relay runs, which then waits itself.
    pub async fn reset_requested(&self) -> Reason {
        let mut asking = Asking::default();
        poll_fn(|cx| asking.poll(cx, self)).await
    }
}

/// The one who waits for a reset to be asked for.
#[derive(Default)]
pub struct Asking {
    /// Whom the control knows, so that it is told once and not each time.
    told: Option<Waker>,
}

impl Asking {
    /// Ready once a reset was asked for; else this task is woken when it is.
    pub fn poll(&mut self, cx: &mut Context<'_>, control: &RelayControl) -> Poll<Reason> {
        let is_told = self.told.as_ref().is_some_and(|told| told.will_wake(cx.waker()));
        if is_told && !control.asked.load(Ordering::Acquire) {
            return Poll::Pending;
        }
        let mut ending = control.ending.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(reason) = &ending.reason {
            return Poll::Ready(reason.clone());
        }
        ending.waker = Some(cx.waker().clone());
        self.told = Some(cx.waker().clone());
        Poll::Pending
    }
}

/// How a relay ended.
#[derive(Debug)]
pub struct Ended {
    /// Bytes delivered upstream.
    pub sent: u64,
    /// Bytes delivered downstream.
    pub received: u64,
    pub outcome: Outcome,
    /// What the end that broke said.
    pub error: Option<io::Error>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// Both directions closed in order.
    Orderly,
    /// That side reset, or broke.
    ResetByDownstream,
    ResetByUpstream,
    /// [`RelayControl::reset`].
    ResetByUs(Reason),
}

/// Carries bytes until both directions have closed in order, or one end has broken; then the other is reset too.
pub fn relay(downstream: impl End, upstream: impl End, control: &RelayControl) -> impl Future<Output = Ended> {
    carry(downstream, upstream, [Direction::default(), Direction::default()], [control])
}

/// Carries by two lanes of one kind, up and down. Every control sees the bytes, and each may end it.
fn carry<'a, D: End, U: End, L: Lane<D, U> + Lane<U, D>>(
    downstream: D,
    upstream: U,
    lanes: [L; 2],
    controls: impl AsRef<[&'a RelayControl]>,
) -> impl Future<Output = Ended> {
    // Put together before the future, which would hold room for each end twice: as it was given, and where it lies then.
    let mut ends = Guard { downstream, upstream, finished: false };
    let [mut up, mut down] = lanes;
    let mut asking: Vec<Asking> = controls.as_ref().iter().map(|_| Asking::default()).collect();
    async move {
        let controls = controls.as_ref();
        let sent = Count { controls, counter: |control| &control.sent };
        let received = Count { controls, counter: |control| &control.received };
        let mut poll_reset = |cx: &mut Context<'_>| {
            // Each is asked, so that each wakes this task.
            let asked = asking.iter_mut().zip(controls).map(|(asking, control)| asking.poll(cx, control));
            asked.fold(Poll::Pending, |first, next| if first.is_ready() { first } else { next })
        };
        let end = poll_fn(|cx| {
            if let Poll::Ready(reason) = poll_reset(cx) {
                return Poll::Ready(Some((Outcome::ResetByUs(reason), None)));
            }
            let Guard { downstream, upstream, .. } = &mut ends;
            let upwards = up.poll(cx, downstream, upstream, &sent);
            let downwards = match upwards {
                Err(Broken::From(_)) => Ok(false),
                // What a broken upstream said last may still be here.
                Ok(_) | Err(Broken::To(_)) => down.poll(cx, upstream, downstream, &received),
            };
            match (upwards, downwards) {
                (Err(Broken::From(error)), _) | (_, Err(Broken::To(error))) => {
                    Poll::Ready(Some((Outcome::ResetByDownstream, Some(error))))
                }
                (Err(Broken::To(error)), _) | (_, Err(Broken::From(error))) => {
                    Poll::Ready(Some((Outcome::ResetByUpstream, Some(error))))
                }
                (Ok(true), Ok(true)) => Poll::Ready(None),
                (Ok(_), Ok(_)) => Poll::Pending,
            }
        })
        .await;
        if let Some((outcome, _)) = &end {
            // As on a wire, the reset comes behind what was sent before it.
            poll_fn(|cx| match outcome {
                _ if poll_reset(cx).is_ready() => Poll::Ready(()),
                Outcome::ResetByDownstream => ends.upstream.poll_sent(cx),
                Outcome::ResetByUpstream => ends.downstream.poll_sent(cx),
                Outcome::Orderly | Outcome::ResetByUs(_) => Poll::Ready(()),
            })
            .await;
        }
        ends.finished = end.is_none();
        drop(ends);
        let (outcome, error) = end.unwrap_or((Outcome::Orderly, None));
        Ended { sent: sent.total(), received: received.total(), outcome, error }
    }
}

/// How one direction is carried between ends of two kinds.
trait Lane<F, T> {
    /// Moves what can be moved; true once this direction has closed in order.
    fn poll(&mut self, cx: &mut Context<'_>, from: &mut F, to: &mut T, count: &Count<'_>) -> Result<bool, Broken>;
}

/// Who is told of the bytes of one direction.
struct Count<'a> {
    controls: &'a [&'a RelayControl],
    counter: fn(&RelayControl) -> &AtomicU64,
}

impl Count<'_> {
    fn add(&self, bytes: usize) {
        for control in self.controls {
            (self.counter)(control).fetch_add(bytes as u64, Ordering::Relaxed);
        }
    }

    fn total(&self) -> u64 {
        self.controls.first().map_or(0, |control| (self.counter)(control).load(Ordering::Relaxed))
    }
}

/// Resets both ends unless they finished: also when the relay itself is dropped halfway.
struct Guard<D: End, U: End> {
    downstream: D,
    upstream: U,
    finished: bool,
}

impl<D: End, U: End> Drop for Guard<D, U> {
    fn drop(&mut self) {
        if self.finished {
            self.downstream.finish();
            self.upstream.finish();
        } else {
            self.downstream.reset();
            self.upstream.reset();
        }
    }
}

enum Broken {
    From(io::Error),
    To(io::Error),
}

#[derive(Default)]
struct Direction {
    pending: Bytes,
    ended: bool,
    closed: bool,
    lost: Lost,
}

impl<F: End, T: End> Lane<F, T> for Direction {
    fn poll(&mut self, cx: &mut Context<'_>, from: &mut F, to: &mut T, count: &Count<'_>) -> Result<bool, Broken> {
        for _ in 0..CHUNKS_A_TURN {
            if !self.pending.is_empty() {
                match to.poll_write(cx, &mut self.pending) {
                    Poll::Ready(Ok(written)) => {
                        count.add(written);
                        from.delivered(written).map_err(Broken::From)?;
                        continue;
                    }
                    Poll::Ready(Err(error)) => return Err(Broken::To(error)),
                    Poll::Pending => return self.lost.watch(cx, from, to),
                }
            }
            if self.ended {
                if !self.closed {
                    match to.poll_shutdown(cx) {
                        Poll::Ready(Ok(())) => self.closed = true,
                        Poll::Ready(Err(error)) => return Err(Broken::To(error)),
                        Poll::Pending => return watch(self.closed, cx, from, to),
                    }
                }
                return watch(self.closed, cx, from, to);
            }
            match from.poll_readable(cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => return Err(Broken::From(error)),
                Poll::Pending => {
                    to.release();
                    return Ok(false);
                }
            }
            let limit = match to.poll_capacity(cx) {
                Poll::Ready(Ok(limit)) => limit,
                Poll::Ready(Err(error)) => return Err(Broken::To(error)),
                Poll::Pending => return self.lost.watch(cx, from, to),
            };
            match from.poll_read(cx, limit) {
                Poll::Ready(Ok(Some(data))) => self.pending = data,
                Poll::Ready(Ok(None)) => {
                    to.release();
                    self.lost.end()?;
                    self.ended = true;
                }
                Poll::Ready(Err(error)) => return Err(Broken::From(error)),
                Poll::Pending => {
                    to.release();
                    return Ok(false);
                }
            }
        }
        // Others on this thread have a turn.
        cx.waker().wake_by_ref();
        Ok(false)
    }
}

/// While nobody reads from an end, only this notices that it was reset.
fn watch(closed: bool, cx: &mut Context<'_>, from: &mut impl End, to: &mut impl End) -> Result<bool, Broken> {
    if let Poll::Ready(error) = from.poll_reset(cx) {
        return Err(Broken::From(error));
    }
    if !closed && let Poll::Ready(error) = to.poll_reset(cx) {
        return Err(Broken::To(error));
    }
    Ok(closed)
}

/// An end that has reset while the other side could take nothing: what it said last may still be here, and is delivered
/// if the other side takes it soon. A reader that has stalled learns of the reset all the same.
#[derive(Default)]
struct Lost(Option<(io::Error, Pin<Box<Sleep>>)>);

impl Lost {
    /// While `to` takes nothing: notices that either end was reset.
    fn watch(&mut self, cx: &mut Context<'_>, from: &mut impl End, to: &mut impl End) -> Result<bool, Broken> {
        if self.0.is_none()
            && let Poll::Ready(error) = from.poll_reset(cx)
        {
            self.0 = Some((error, Box::pin(sleep(PATIENCE))));
        }
        if let Poll::Ready(error) = to.poll_reset(cx) {
            return Err(Broken::To(error));
        }
        match self.0.as_mut().map(|(_, patience)| patience.as_mut().poll(cx)) {
            Some(Poll::Ready(())) => self.end().map(|()| false),
            _ => Ok(false),
        }
    }

    /// Nothing more is to be read: in order, unless a reset was seen, which a socket tells once only.
    fn end(&mut self) -> Result<(), Broken> {
        self.0.take().map_or(Ok(()), |(error, _)| Err(Broken::From(error)))
    }
}

const PATIENCE: Duration = Duration::from_millis(500);
const CHUNKS_A_TURN: usize = 16;
