//! What a client of HTTP/1 is told ahead of its answer, such as 103 Early Hints: RFC 9110, section 15.2.
//!
//! hyper's server has no words for that. It writes one answer after the other, and asks for a flush whenever it has written
//! all it has; so what comes from an application between two of them is said by the connection itself, ahead of the answer.

use std::future::poll_fn;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use futures_util::task::AtomicWaker;
use http::header::CONTENT_LENGTH;
use http::{HeaderMap, StatusCode};

/// Of one connection: what is to be said now.
#[derive(Debug, Default)]
pub struct Interim {
    state: Mutex<State>,
    /// Whoever writes to the client.
    writer: AtomicWaker,
    /// Whoever holds an answer back until it is said.
    waiting: AtomicWaker,
}

#[derive(Debug, Default)]
struct State {
    /// Which request it is about: what comes for an earlier one is too late.
    turn: u64,
    words: BytesMut,
    /// Something is being written.
    going: bool,
}

/// One request's right to have something said.
#[derive(Clone, Copy, Debug)]
pub struct Turn(u64);

impl Interim {
    /// A request begins.
    pub fn begin(&self) -> Turn {
        let mut state = self.lock();
        state.turn += 1;
        Turn(state.turn)
    }

    /// An application has said something ahead of its answer, for its client. What nobody takes is bounded: it is advice, which a client must
    /// be able to do without.
    pub fn say(&self, turn: Turn, status: StatusCode, headers: &HeaderMap) {
        let mut state = self.lock();
        if state.turn != turn.0 {
            return;
        }
        let before = state.words.len();
        write(&mut state.words, status, headers);
        if state.words.len() > MOST_WAITING {
            return state.words.truncate(before);
        }
        drop(state);
        self.writer.wake();
    }

    /// The answer is about to be written: completes once all is said that came before it.
    pub async fn end(&self) {
        let turn = self.begin();
        poll_fn(|cx| {
            let is_over = |state: &State| state.turn != turn.0 || state.words.is_empty() && !state.going;
            if is_over(&self.lock()) {
                return Poll::Ready(());
            }
            self.waiting.register(cx.waker());
            if is_over(&self.lock()) { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    /// What is to be written now; who asks is woken when there is something.
    pub fn take(&self, cx: &mut Context<'_>) -> Option<Bytes> {
        self.writer.register(cx.waker());
        let mut state = self.lock();
        let words = state.words.split().freeze();
        state.going = !words.is_empty();
        state.going.then_some(words)
    }

    /// It has been.
    pub fn written(&self) {
        self.lock().going = false;
        self.waiting.wake();
    }

    // Nothing panics while it is held.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One answer of 1xx, which has no body whatever it says.
fn write(into: &mut BytesMut, status: StatusCode, headers: &HeaderMap) {
    into.extend_from_slice(b"HTTP/1.1 ");
    into.extend_from_slice(status.as_str().as_bytes());
    into.extend_from_slice(b" ");
    into.extend_from_slice(status.canonical_reason().unwrap_or_default().as_bytes());
    into.extend_from_slice(b"\r\n");
    for (name, value) in headers.iter().filter(|(name, _)| **name != CONTENT_LENGTH) {
        into.extend_from_slice(name.as_str().as_bytes());
        into.extend_from_slice(b": ");
        into.extend_from_slice(value.as_bytes());
        into.extend_from_slice(b"\r\n");
    }
    into.extend_from_slice(b"\r\n");
}

const MOST_WAITING: usize = 32 * 1024;

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use http::HeaderValue;

    use super::*;

    #[tokio::test]
    async fn what_comes_ahead_of_an_answer_is_said_before_it_and_never_behind() {
        let interim = Interim::default();
        let turn = interim.begin();
        let mut headers = HeaderMap::new();
        headers.insert("link", HeaderValue::from_static("</style.css>; rel=preload"));
        headers.insert(CONTENT_LENGTH, HeaderValue::from_static("5"));
        interim.say(turn, StatusCode::EARLY_HINTS, &headers);
        let mut cx = Context::from_waker(Waker::noop());
        let mut end = std::pin::pin!(interim.end());
        assert!(end.as_mut().poll(&mut cx).is_pending(), "the answer overtook it");
        let said = interim.take(&mut cx).unwrap();
        assert_eq!(said, "HTTP/1.1 103 Early Hints\r\nlink: </style.css>; rel=preload\r\n\r\n");
        assert!(end.as_mut().poll(&mut cx).is_pending(), "it is not written yet");
        interim.written();
        assert!(end.as_mut().poll(&mut cx).is_ready());
        interim.say(turn, StatusCode::EARLY_HINTS, &headers);
        assert_eq!(interim.take(&mut cx), None, "it was said behind its answer");
    }

    #[test]
    fn a_client_that_takes_none_of_it_holds_little() {
        let interim = Interim::default();
        let turn = interim.begin();
        for _ in 0..10_000 {
            interim.say(turn, StatusCode::PROCESSING, &HeaderMap::new());
        }
        let said = interim.take(&mut Context::from_waker(Waker::noop())).unwrap();
        assert!(said.len() <= MOST_WAITING && said.ends_with(b"\r\n\r\n"), "{}", said.len());
    }
}
