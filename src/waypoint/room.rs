//! How many bytes the agent holds for the requests of one pod: no tenant takes the memory of the others.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use metrics::Gauge;

use super::{CROWDED, HELD};
use crate::transport::unsent::Budget;

/// What the requests of one pod may hold, or those of others to it.
#[derive(Debug)]
pub struct Room {
    held: AtomicUsize,
    most: usize,
    shown: Gauge,
}

/// What there is no room for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Want {
    /// The head of a request.
    Head,
    /// A body that is kept for a mirror or another try.
    Body,
    /// A body that an external authorizer is shown.
    Checked,
    /// The larger windows of an HTTP/2 connection.
    Windows,
}

impl Want {
    fn name(self) -> &'static str {
        match self {
            Self::Head => "head",
            Self::Body => "body",
            Self::Checked => "authorizer",
            Self::Windows => "windows",
        }
    }

    /// How much of the room may be taken for it, in quarters: connections stay for long, and leave some to requests.
    fn quarters(self) -> usize {
        if self == Self::Windows { 2 } else { 4 }
    }
}

impl Room {
    pub fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { held: AtomicUsize::new(0), most, shown: metrics::gauge!(HELD) })
    }

    /// Room for so many bytes, as long as what is returned lives; none: there is not as much left, which is counted.
    pub fn take(self: &Arc<Self>, want: Want, bytes: usize) -> Option<Share> {
        let mut share = Share { room: self.clone(), bytes: 0 };
        share.grow(want, bytes).then_some(share)
    }

    /// Makes room for so many more beside what is held already, if anything is; false: there is none.
    pub fn widen(self: &Arc<Self>, share: &mut Option<Share>, want: Want, bytes: usize) -> bool {
        match share {
            Some(share) => share.grow(want, bytes),
            None => {
                *share = self.take(want, bytes);
                share.is_some()
            }
        }
    }
}

/// Bytes that somebody holds.
#[derive(Debug)]
pub struct Share {
    room: Arc<Room>,
    bytes: usize,
}

impl Share {
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    fn grow(&mut self, want: Want, bytes: usize) -> bool {
        let most = self.room.most / 4 * want.quarters();
        let fits = |held: usize| held.checked_add(bytes).filter(|sum| *sum <= most);
        let taken = self.room.held.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_ok();
        if taken {
            self.bytes += bytes;
            self.room.shown.increment(bytes as f64);
        } else {
            metrics::counter!(CROWDED, "what" => want.name()).increment(1);
        }
        taken
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.room.give_back(self.bytes);
    }
}

/// How much of what it is sent a connection of HTTP/2 takes before anybody reads it. Where the room is taken it has what the
/// protocol begins with, which is every connection's right.
#[derive(Debug)]
pub struct Windows {
    pub stream: u32,
    pub connection: u32,
    _share: Option<Share>,
}

impl Windows {
    pub fn of(room: &Arc<Room>) -> Self {
        let share = room.take(Want::Windows, LARGE_CONNECTION as usize);
        let (stream, connection) =
            if share.is_some() { (LARGE_STREAM, LARGE_CONNECTION) } else { (LEAST_WINDOW, LEAST_WINDOW) };
        Self { stream, connection, _share: share }
    }
}

/// What was taken of one answer and has not reached its client's connection yet.
impl Budget for Arc<Room> {
    fn left(&self) -> usize {
        self.most.saturating_sub(self.held.load(Ordering::Relaxed))
    }

    fn charge(&self, bytes: usize) {
        self.held.fetch_add(bytes, Ordering::Relaxed);
        self.shown.increment(bytes as f64);
    }

    fn give_back(&self, bytes: usize) {
        self.held.fetch_sub(bytes, Ordering::AcqRel);
        self.shown.decrement(bytes as f64);
    }
}

/// Of one pod's own requests, and of those of others to it.
pub const ROOM_OF_POD: usize = 64 << 20;
/// Of a waypoint in a process of its own, which is there for nothing else.
pub const ROOM_OF_WAYPOINT: usize = 512 << 20;
const LARGE_STREAM: u32 = 256 * 1024;
const LARGE_CONNECTION: u32 = 1024 * 1024;
/// RFC 9113, section 6.9.2.
const LEAST_WINDOW: u32 = 65_535;

#[cfg(test)]
mod tests {
    use std::task::{Context, Waker};

    use bytes::Bytes;

    use super::*;
    use crate::transport::unsent::{FLOOR, Unsent};

    #[test]
    fn what_is_taken_is_bounded_and_comes_back() {
        let room = Room::new(4000);
        let windows = room.take(Want::Windows, 2000).unwrap();
        assert!(room.take(Want::Windows, 1).is_none(), "connections leave half of it to requests");
        let mut body = room.take(Want::Body, 1500).unwrap();
        assert!(!body.grow(Want::Body, 501), "more was held than may be");
        assert!(body.grow(Want::Body, 500));
        assert!(room.take(Want::Head, 1).is_none());
        drop(body);
        assert!(room.take(Want::Head, 2000).is_some());
        drop(windows);
        assert_eq!(room.held.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn an_answer_that_nobody_reads_waits_for_itself_alone() {
        let mut cx = Context::from_waker(Waker::noop());
        let room = Room::new(FLOOR);
        let (slow, other) = (Unsent::new(room.clone()), Unsent::new(room.clone()));
        let held = [slow.track(Bytes::from(vec![0; FLOOR])), slow.track(Bytes::from(vec![0; FLOOR]))];
        assert!(slow.poll_room(&mut cx).is_pending(), "what nobody reads is held without end");
        assert!(other.poll_room(&mut cx).is_ready(), "others wait for it");
        let sent = other.track(Bytes::from_static(b"other"));
        assert_eq!(&sent[..], b"other");
        drop(held);
        assert!(slow.poll_room(&mut cx).is_ready());
        drop(sent);
        assert_eq!(room.held.load(Ordering::Relaxed), 0);
    }
}
