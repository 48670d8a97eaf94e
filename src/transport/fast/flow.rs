use std::future::poll_fn;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use super::ProtocolError;
use super::frame::Kind;
use super::link::{Behind, Link};
use crate::mesh::Reason;
use crate::transport::relay::{Asking, End, Ended, Outcome, RelayControl, TcpEnd};

/// On which side of the tunnel the application is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    Client,
    Server,
}

/// What may become of a connection whose flow has ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum After {
    /// It can take the next flow.
    Reusable,
    /// Once [`settle`] says so.
    Unsettled(Awaited),
    /// It is broken, or may not be trusted with another.
    Spent,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Awaited {
    /// The peer's RESET-ACK.
    Acknowledgement,
    /// That our own last words are on their way.
    Nothing,
}

/// How far a flow has come. Each end of a direction is told once.
#[derive(Clone, Copy, Default, Debug)]
pub struct Progress {
    /// The application has closed its direction: END was sent.
    pub end_sent: bool,
    pub end_received: bool,
    pub done_sent: bool,
    pub done_received: bool,
}

impl Progress {
    /// Both directions are finished, on both sides.
    pub fn is_complete(self) -> bool {
        self.end_sent && self.end_received && self.done_sent && self.done_received
    }

    /// This side has said and delivered everything: there is nothing left that it could abort.
    fn is_finished_here(self) -> bool {
        self.end_sent && self.done_sent
    }
}

/// Carries the bytes of one accepted flow between its application and its connection, as
/// [`relay`](crate::transport::relay::relay) does between two ends. `broken` is how the application has ended already.
pub fn carry<'a>(
    application: TcpEnd,
    link: &'a mut Link,
    progress: Progress,
    broken: Option<io::Error>,
    side: Side,
    control: &'a RelayControl,
) -> impl Future<Output = (Ended, After)> {
    let (outwards, inwards) = match side {
        Side::Client => (&control.sent, &control.received),
        Side::Server => (&control.received, &control.sent),
    };
    // Put together before the future, which would hold room for each part twice: as it was given, and where it lies then.
    let mut carrier = Carrier { application, link, progress, outwards, inwards, finished: false };
    let mut asking = Asking::default();
    async move {
        let carrying = poll_fn(|cx| match asking.poll(cx, control) {
            Poll::Ready(reason) => Poll::Ready(Err(Broken::Asked(reason))),
            Poll::Pending => carrier.poll(cx),
        });
        let end = match broken {
            Some(error) => Err(Broken::Application(error)),
            None => carrying.await,
        };
        let after = carrier.conclude(&end);
        let (outcome, error) = match end {
            Ok(()) => (Outcome::Orderly, None),
            Err(Broken::Asked(reason)) => (Outcome::ResetByUs(reason), None),
            Err(Broken::Application(error)) if side == Side::Client => (Outcome::ResetByDownstream, Some(error)),
            Err(Broken::Link(error)) if side == Side::Server => (Outcome::ResetByDownstream, Some(error)),
            Err(Broken::Reset) if side == Side::Server => (Outcome::ResetByDownstream, Some(reset_by_peer())),
            Err(Broken::Reset) => (Outcome::ResetByUpstream, Some(reset_by_peer())),
            Err(Broken::Application(error) | Broken::Link(error)) => (Outcome::ResetByUpstream, Some(error)),
        };
        (Ended { sent: control.sent(), received: control.received(), outcome, error }, after)
    }
}

/// Brings a connection whose flow was reset to where the next can begin; whether that is reached. What the peer sent
/// before it knew is drained, up to a bound and for a while.
pub async fn settle(link: &mut Link, awaited: Awaited) -> bool {
    let mut awaited = awaited;
    let mut drained = 0;
    let settling = poll_fn(|cx| {
        loop {
            if let Poll::Ready(Err(_)) = link.poll_flush(cx) {
                return Poll::Ready(false);
            }
            if awaited == Awaited::Nothing {
                return if link.has_unsent() { Poll::Pending } else { Poll::Ready(true) };
            }
            match link.poll_fill(cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(_)) => return Poll::Ready(false),
                Poll::Pending => return Poll::Pending,
            }
            let Some(frame) = link.front() else { return Poll::Ready(false) };
            link.pop();
            match frame.kind {
                Kind::Data if drained + frame.length <= MOST_DRAINED => drained += frame.length,
                Kind::End | Kind::Done => {}
                // Both sides had enough at once.
                Kind::Reset => {
                    if link.push(Kind::ResetAck, &[]).is_err() {
                        return Poll::Ready(false);
                    }
                }
                Kind::ResetAck => awaited = Awaited::Nothing,
                _ => return Poll::Ready(false),
            }
        }
    });
    let settled = tokio::time::timeout(SETTLING, settling).await.unwrap_or(false);
    link.rest();
    settled
}

/// One flow under way. Dropped halfway, it resets both ends: neither takes it for complete.
struct Carrier<'a> {
    application: TcpEnd,
    link: &'a mut Link,
    progress: Progress,
    /// Bytes taken from the application, and delivered to it.
    outwards: &'a AtomicU64,
    inwards: &'a AtomicU64,
    finished: bool,
}

enum Broken {
    Application(io::Error),
    Link(io::Error),
    /// The peer sent RESET.
    Reset,
    Asked(Reason),
}

impl Carrier<'_> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        let outwards = self.poll_outwards(cx);
        if let Err(Broken::Application(_)) = outwards {
            return Poll::Ready(outwards);
        }
        // What came before the connection broke is still to be delivered.
        let inwards = self.poll_inwards(cx);
        if let Err(Broken::Application(_)) = inwards {
            // And what the application said last is still to be sent.
            let _ = self.poll_outwards(cx);
        }
        if let Err(broken) = inwards.and(outwards) {
            return Poll::Ready(Err(broken));
        }
        if self.progress.is_complete() && !self.link.has_unsent() {
            return Poll::Ready(Ok(()));
        }
        Poll::Pending
    }

    /// From the application to the peer.
    fn poll_outwards(&mut self, cx: &mut Context<'_>) -> Result<(), Broken> {
        for _ in 0..CHUNKS_A_TURN {
            match self.link.poll_flush(cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => return Err(Broken::Link(error)),
                Poll::Pending => return self.watch_application(cx),
            }
            if self.progress.end_sent {
                return self.watch_application(cx);
            }
            match self.link.poll_take(cx, self.application.stream()) {
                Poll::Ready(Ok(0)) => self.say_end()?,
                Poll::Ready(Ok(taken)) => {
                    self.outwards.fetch_add(taken as u64, Ordering::Relaxed);
                    let behind = self.link.behind(cx, self.application.stream());
                    match behind.map_err(Broken::Application)? {
                        // The end goes with the last words, and not in a packet of its own.
                        Behind::End => self.say_end()?,
                        Behind::More => {}
                        Behind::Nothing => {
                            return match self.link.poll_flush(cx) {
                                Poll::Ready(outcome) => outcome.map_err(Broken::Link),
                                Poll::Pending => self.watch_application(cx),
                            };
                        }
                    }
                }
                Poll::Ready(Err(error)) => return Err(Broken::Application(error)),
                Poll::Pending => return Ok(()),
            }
        }
        // Others on this thread have a turn.
        cx.waker().wake_by_ref();
        Ok(())
    }

    /// From the peer to the application.
    fn poll_inwards(&mut self, cx: &mut Context<'_>) -> Result<(), Broken> {
        for _ in 0..CHUNKS_A_TURN {
            if self.progress.is_complete() {
                return Ok(());
            }
            let Some(frame) = self.link.front() else {
                if self.link.is_ended() {
                    let text = "the peer closed the tunnel with a flow under way";
                    return Err(Broken::Link(io::Error::new(io::ErrorKind::UnexpectedEof, text)));
                }
                match self.link.poll_fill(cx) {
                    Poll::Ready(Ok(())) => continue,
                    Poll::Ready(Err(error)) => return Err(Broken::Link(error)),
                    Poll::Pending => return Ok(()),
                }
            };
            match frame.kind {
                Kind::Data if !self.progress.end_received => {
                    match self.link.poll_deliver(cx, self.application.stream()) {
                        Poll::Ready(Ok(delivered)) => {
                            self.inwards.fetch_add(delivered as u64, Ordering::Relaxed);
                        }
                        Poll::Ready(Err(error)) => return Err(Broken::Application(error)),
                        Poll::Pending if self.link.is_reset_ahead() => return Err(Broken::Reset),
                        Poll::Pending => {
                            // Nobody reads from the peer meanwhile: only this notices that it has gone.
                            return match self.link.poll_failure(cx) {
                                Poll::Ready(error) => Err(Broken::Link(error)),
                                Poll::Pending => Ok(()),
                            };
                        }
                    }
                }
                Kind::End if !self.progress.end_received => {
                    self.link.pop();
                    self.progress.end_received = true;
                    if let Poll::Ready(Err(error)) = self.application.poll_shutdown(cx) {
                        return Err(Broken::Application(error));
                    }
                    // Else it goes with END: before that nobody waits for it.
                    if self.progress.end_sent {
                        self.say_done()?;
                        if let Poll::Ready(Err(error)) = self.link.poll_flush(cx) {
                            return Err(Broken::Link(error));
                        }
                    }
                }
                Kind::Done if self.progress.end_sent && !self.progress.done_received => {
                    self.link.pop();
                    self.progress.done_received = true;
                }
                Kind::Reset => {
                    self.link.pop();
                    return Err(Broken::Reset);
                }
                _ => return Err(Broken::Link(ProtocolError::Order.into())),
            }
        }
        cx.waker().wake_by_ref();
        Ok(())
    }

    /// The application has closed its direction.
    fn say_end(&mut self) -> Result<(), Broken> {
        self.link.push(Kind::End, &[]).map_err(Broken::Link)?;
        self.progress.end_sent = true;
        if self.progress.end_received { self.say_done() } else { Ok(()) }
    }

    /// The peer's direction was delivered, with its end.
    fn say_done(&mut self) -> Result<(), Broken> {
        self.link.push(Kind::Done, &[]).map_err(Broken::Link)?;
        self.progress.done_sent = true;
        Ok(())
    }

    /// While nobody reads from the application, only this notices that it has reset.
    fn watch_application(&mut self, cx: &mut Context<'_>) -> Result<(), Broken> {
        // All was said and delivered: whatever the socket does now changes nothing.
        if self.progress.is_finished_here() {
            return Ok(());
        }
        match self.application.poll_reset(cx) {
            Poll::Ready(error) => Err(Broken::Application(error)),
            Poll::Pending => Ok(()),
        }
    }

    fn conclude(&mut self, end: &Result<(), Broken>) -> After {
        let (last_word, awaited) = match end {
            Ok(()) => {
                self.finished = true;
                self.link.rest();
                return After::Reusable;
            }
            Err(Broken::Link(_)) => return After::Spent,
            Err(Broken::Reset) => (Kind::ResetAck, Awaited::Nothing),
            Err(Broken::Application(_) | Broken::Asked(_)) if self.progress.is_finished_here() => return After::Spent,
            Err(Broken::Application(_) | Broken::Asked(_)) => (Kind::Reset, Awaited::Acknowledgement),
        };
        // The reset comes behind what was sent before it.
        match self.link.push(last_word, &[]) {
            Ok(()) => After::Unsettled(awaited),
            Err(_) => After::Spent,
        }
    }
}

impl Drop for Carrier<'_> {
    fn drop(&mut self) {
        if self.finished {
            self.application.finish();
        } else {
            self.application.reset();
        }
    }
}

fn reset_by_peer() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, "the peer reset the flow")
}

const CHUNKS_A_TURN: usize = 8;
const MOST_DRAINED: usize = 4 << 20;
const SETTLING: Duration = Duration::from_secs(1);
