//! What is kept of a request's body, for mirrors and another try: up to a bound, or nothing at all.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use bytes::Bytes;
use http::HeaderMap;
use tokio::sync::Notify;

/// Keeps a body as it passes.
#[derive(Default)]
pub struct Tee {
    kept: RefCell<Kept>,
    state: Cell<State>,
    changed: Notify,
}

#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum State {
    #[default]
    Passing,
    /// All of it is here.
    Whole,
    /// It is larger than what is kept.
    Oversize,
    /// It ended before its end.
    Broken,
}

/// A whole body.
#[derive(Clone, Default, Debug)]
pub struct Kept {
    pub data: Vec<Bytes>,
    pub trailers: Option<HeaderMap>,
    size: usize,
}

impl Kept {
    /// One piece.
    pub fn of(data: Bytes) -> Self {
        let size = data.len();
        Self { data: if size == 0 { Vec::new() } else { vec![data] }, trailers: None, size }
    }
}

impl Tee {
    pub fn new() -> Rc<Self> {
        Rc::default()
    }

    pub fn data(&self, data: &Bytes) {
        let mut kept = self.kept.borrow_mut();
        kept.size += data.len();
        if self.state.get() != State::Passing {
            return;
        }
        if kept.size > MOST_KEPT {
            *kept = Kept { size: kept.size, ..Kept::default() };
            drop(kept);
            return self.become_(State::Oversize);
        }
        // A copy: of a large buffer that a small piece lies in, nothing is held.
        kept.data.push(Bytes::copy_from_slice(data));
    }

    pub fn trailers(&self, trailers: &HeaderMap) {
        self.kept.borrow_mut().trailers = Some(trailers.clone());
    }

    /// The body has ended, in order or not.
    pub fn end(&self, whole: bool) {
        if self.state.get() == State::Passing {
            self.become_(if whole { State::Whole } else { State::Broken });
        }
    }

    /// The body, if all of it is here.
    pub fn whole(&self) -> Option<Kept> {
        (self.state.get() == State::Whole).then(|| self.kept.borrow().clone())
    }

    /// Waits until it is known what becomes of it.
    pub async fn settled(&self) -> State {
        loop {
            let changed = self.changed.notified();
            if self.state.get() != State::Passing {
                return self.state.get();
            }
            changed.await;
        }
    }

    fn become_(&self, state: State) {
        self.state.set(state);
        self.changed.notify_waiters();
    }
}

const MOST_KEPT: usize = 64 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_body_is_kept_whole_or_not_at_all() {
        let tee = Tee::new();
        tee.data(&Bytes::from_static(b"one"));
        assert!(tee.whole().is_none(), "it is not over");
        tee.data(&Bytes::from_static(b"two"));
        tee.end(true);
        assert_eq!(tee.settled().await, State::Whole);
        assert_eq!(tee.whole().unwrap().data.concat(), b"onetwo");

        let large = Tee::new();
        large.data(&Bytes::from(vec![0; MOST_KEPT]));
        large.data(&Bytes::from_static(b"x"));
        large.end(true);
        assert_eq!((large.settled().await, large.whole().is_none()), (State::Oversize, true));

        let broken = Tee::new();
        broken.data(&Bytes::from_static(b"x"));
        broken.end(false);
        assert_eq!((broken.settled().await, broken.whole().is_none()), (State::Broken, true));
    }
}
