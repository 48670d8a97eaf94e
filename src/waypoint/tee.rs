//! What is kept of a request's body, for mirrors and another try: up to a bound, or nothing at all.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use bytes::Bytes;
use http::HeaderMap;
use tokio::sync::Notify;

use super::room::{Room, Share, Want};

/// Keeps a body as it passes.
pub struct Tee {
    room: Arc<Room>,
    share: RefCell<Option<Share>>,
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
    /// What its pod's requests may hold is held.
    Crowded,
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
    pub fn new(room: &Arc<Room>) -> Rc<Self> {
        Rc::new(Self {
            room: room.clone(),
            share: RefCell::default(),
            kept: RefCell::default(),
            state: Cell::default(),
            changed: Notify::new(),
        })
    }

    pub fn data(&self, data: &Bytes) {
        let mut kept = self.kept.borrow_mut();
        kept.size += data.len();
        if self.state.get() != State::Passing {
            return;
        }
        let refused = if kept.size > MOST_KEPT {
            Some(State::Oversize)
        } else if !self.room.widen(&mut self.share.borrow_mut(), Want::Body, data.len()) {
            Some(State::Crowded)
        } else {
            None
        };
        if let Some(refused) = refused {
            *kept = Kept { size: kept.size, ..Kept::default() };
            drop(kept);
            self.share.take();
            return self.become_(refused);
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
        let room = Room::new(3 * MOST_KEPT);
        let tee = Tee::new(&room);
        tee.data(&Bytes::from_static(b"one"));
        assert!(tee.whole().is_none(), "it is not over");
        tee.data(&Bytes::from_static(b"two"));
        tee.end(true);
        assert_eq!(tee.settled().await, State::Whole);
        assert_eq!(tee.whole().unwrap().data.concat(), b"onetwo");

        let large = Tee::new(&room);
        large.data(&Bytes::from(vec![0; MOST_KEPT]));
        large.data(&Bytes::from_static(b"x"));
        large.end(true);
        assert_eq!((large.settled().await, large.whole().is_none()), (State::Oversize, true));

        let broken = Tee::new(&room);
        broken.data(&Bytes::from_static(b"x"));
        broken.end(false);
        assert_eq!((broken.settled().await, broken.whole().is_none()), (State::Broken, true));

        let full = Room::new(8);
        let crowded = Tee::new(&full);
        crowded.data(&Bytes::from_static(b"one"));
        crowded.data(&Bytes::from_static(b"two and more"));
        crowded.end(true);
        assert_eq!((crowded.settled().await, crowded.whole().is_none()), (State::Crowded, true));
        assert!(full.take(Want::Body, 8).is_some(), "what was given up is held");
    }
}
