//! Whether an application wants the body of a request of HTTP/1: RFC 9110, section 10.1.1, and RFC 9112, section 9.5.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::task::AtomicWaker;
use http::StatusCode;
use tokio::time::{Sleep, sleep};

/// Holds a body back: of a client that expects `100-continue`, until the application says so, or has said nothing for a
/// while; and what is left of it once the application has answered that it takes none.
pub struct Gate {
    leave: Leave,
    patience: Option<Pin<Box<Sleep>>>,
}

/// Says what becomes of the body behind a [`Gate`].
#[derive(Clone)]
pub struct Leave(Arc<(AtomicU8, AtomicWaker)>);

impl Gate {
    /// `waits`: the client sends the body once it is told to.
    pub fn new(waits: bool) -> Self {
        let state = if waits { WAITING } else { OPEN };
        Self { leave: Leave(Arc::new((AtomicU8::new(state), AtomicWaker::new()))), patience: None }
    }

    pub fn leave(&self) -> Leave {
        self.leave.clone()
    }

    /// Ready while the body may go on.
    ///
    /// # Errors
    /// It is cut short: the answer has gone to its end without it.
    pub fn poll_open(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let (state, waker) = &*self.leave.0;
        waker.register(cx.waker());
        match state.load(Ordering::Acquire) {
            WAITING => {
                let patience = self.patience.get_or_insert_with(|| Box::pin(sleep(PATIENCE)));
                if patience.as_mut().poll(cx).is_pending() {
                    return Poll::Pending;
                }
                self.leave.give();
                Poll::Ready(Ok(()))
            }
            HELD => Poll::Pending,
            CUT => Poll::Ready(Err(io::Error::other("the application answered without the rest of the body"))),
            _ => Poll::Ready(Ok(())),
        }
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.leave.0.0.store(OVER, Ordering::Release);
    }
}

impl Leave {
    /// The body is to be sent.
    pub fn give(&self) {
        self.turn(WAITING, OPEN);
    }

    /// The application has answered. A body that it was never asked about stays where it is, and so does the rest of one
    /// behind an answer that takes none; then something is returned, which belongs to the answer.
    pub fn answered(self, status: StatusCode) -> Option<Held> {
        let is_unwanted = status.is_client_error() || status.is_server_error();
        let held = self.turn(WAITING, HELD) || is_unwanted && self.turn(OPEN, HELD);
        held.then_some(Held(self))
    }

    fn turn(&self, from: u8, to: u8) -> bool {
        let (state, waker) = &*self.0;
        let turned = state.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).is_ok();
        if turned {
            waker.wake();
        }
        turned
    }
}

/// A body that is held back for good. Once the answer has ended, neither connection can take another request: what would come
/// next on it is the rest of this one.
pub struct Held(Leave);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.turn(HELD, CUT);
    }
}

const WAITING: u8 = 0;
const OPEN: u8 = 1;
const HELD: u8 = 2;
const CUT: u8 = 3;
/// It has been sent, or nobody sends it.
const OVER: u8 = 4;
/// RFC 9110, section 10.1.1: nobody waits for an indefinite time.
const PATIENCE: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;

    fn stands(gate: &mut Gate) -> Poll<bool> {
        gate.poll_open(&mut Context::from_waker(Waker::noop())).map(|outcome| outcome.is_ok())
    }

    #[tokio::test]
    async fn a_body_waits_for_leave_or_for_a_while() {
        let mut gate = Gate::new(true);
        assert_eq!(stands(&mut gate), Poll::Pending);
        gate.leave().give();
        assert_eq!(stands(&mut gate), Poll::Ready(true));
        let mut gate = Gate::new(true);
        assert_eq!(stands(&mut gate), Poll::Pending);
        assert!(std::future::poll_fn(|cx| gate.poll_open(cx)).await.is_ok(), "it waits without end");
    }

    #[tokio::test]
    async fn what_nobody_wants_is_not_sent() {
        for (waits, status, is_held) in [
            (true, StatusCode::EXPECTATION_FAILED, true),
            // It has answered without having asked for the body.
            (true, StatusCode::OK, true),
            (false, StatusCode::PAYLOAD_TOO_LARGE, true),
            // It may go on to read, and to answer.
            (false, StatusCode::OK, false),
        ] {
            let mut gate = Gate::new(waits);
            let held = gate.leave().answered(status);
            assert_eq!(held.is_some(), is_held, "{waits} {status}");
            assert_eq!(stands(&mut gate).is_pending(), is_held, "{waits} {status}");
            drop(held);
            assert_eq!(stands(&mut gate), Poll::Ready(!is_held), "{waits} {status}");
        }
    }

    #[test]
    fn a_body_that_was_sent_is_not_held() {
        let gate = Gate::new(false);
        let leave = gate.leave();
        drop(gate);
        assert!(leave.answered(StatusCode::BAD_REQUEST).is_none());
    }
}
