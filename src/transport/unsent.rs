//! What has been taken of a sender and not been sent yet, under a budget that several share.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::task::AtomicWaker;

/// What one stream has taken and its connection has not sent yet. Where the budget is used up each stream still may have a
/// little, so that all of them go on.
///
/// A reset overtakes it: h2 throws away what is queued. A wire would not, so somebody who resets may wait for it.
#[derive(Debug)]
pub struct Unsent<B: Budget> {
    bytes: AtomicUsize,
    waiting: AtomicWaker,
    budget: B,
}

/// How much all who share it may hold together.
pub trait Budget: Send + Sync + 'static {
    fn left(&self) -> usize;
    /// May exceed what is left: who has nothing else may have a little.
    fn charge(&self, bytes: usize);
    fn give_back(&self, bytes: usize);
}

impl<B: Budget> Unsent<B> {
    pub fn new(budget: B) -> Arc<Self> {
        Arc::new(Self { bytes: AtomicUsize::new(0), waiting: AtomicWaker::new(), budget })
    }

    /// How many bytes the stream may take now. It waits for its own, so that whoever sends goes on, and a peer who does
    /// not read waits for itself alone.
    pub fn poll_room(&self, cx: &mut Context<'_>) -> Poll<usize> {
        if let Some(room) = self.room() {
            return Poll::Ready(room);
        }
        self.waiting.register(cx.waker());
        // Something may have been sent just before.
        self.room().map_or(Poll::Pending, Poll::Ready)
    }

    fn room(&self) -> Option<usize> {
        let left = self.budget.left();
        let floor = FLOOR.saturating_sub(self.bytes.load(Ordering::Acquire));
        Some(left.max(floor)).filter(|room| *room > 0)
    }

    /// Counts the bytes until nobody holds them any more.
    pub fn track(self: &Arc<Self>, data: Bytes) -> Bytes {
        self.bytes.fetch_add(data.len(), Ordering::AcqRel);
        self.budget.charge(data.len());
        Bytes::from_owner(Chunk { data, unsent: self.clone() })
    }

    pub fn poll_none(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.waiting.register(cx.waker());
        if self.bytes.load(Ordering::Acquire) == 0 { Poll::Ready(()) } else { Poll::Pending }
    }
}

/// One write; dropped once the connection has sent it, or has given it up.
struct Chunk<B: Budget> {
    data: Bytes,
    unsent: Arc<Unsent<B>>,
}

impl<B: Budget> AsRef<[u8]> for Chunk<B> {
    fn as_ref(&self) -> &[u8] {
        &self.data
    }
}

impl<B: Budget> Drop for Chunk<B> {
    fn drop(&mut self) {
        self.unsent.budget.give_back(self.data.len());
        self.unsent.bytes.fetch_sub(self.data.len(), Ordering::AcqRel);
        self.unsent.waiting.wake();
    }
}

/// What a stream may have unsent whatever the others have.
pub const FLOOR: usize = 16 * 1024;

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;

    struct Purse {
        total: usize,
        used: AtomicUsize,
    }

    impl Purse {
        fn new(total: usize) -> Arc<Self> {
            Arc::new(Self { total, used: AtomicUsize::new(0) })
        }
    }

    impl Budget for Arc<Purse> {
        fn left(&self) -> usize {
            self.total.saturating_sub(self.used.load(Ordering::Relaxed))
        }

        fn charge(&self, bytes: usize) {
            self.used.fetch_add(bytes, Ordering::Relaxed);
        }

        fn give_back(&self, bytes: usize) {
            self.used.fetch_sub(bytes, Ordering::Relaxed);
        }
    }

    #[test]
    fn streams_share_a_budget_and_each_goes_on_without_it() {
        let mut cx = Context::from_waker(Waker::noop());
        let budget = Purse::new(100 * 1024);
        let (greedy, modest) = (Unsent::new(budget.clone()), Unsent::new(budget.clone()));
        assert_eq!(greedy.poll_room(&mut cx), Poll::Ready(100 * 1024));
        let taken = greedy.track(Bytes::from(vec![0; 100 * 1024]));
        assert_eq!(greedy.poll_room(&mut cx), Poll::Pending, "the budget was exceeded");
        assert_eq!(modest.poll_room(&mut cx), Poll::Ready(FLOOR), "one who reads nothing stopped another");
        let little = modest.track(Bytes::from(vec![0; FLOOR]));
        assert_eq!(modest.poll_room(&mut cx), Poll::Pending);
        drop(little);
        assert_eq!(modest.poll_room(&mut cx), Poll::Ready(FLOOR));
        drop(taken);
        assert_eq!(budget.left(), 100 * 1024, "what was sent was not given back");
        assert_eq!(greedy.poll_none(&mut cx), Poll::Ready(()));
    }

    #[test]
    fn what_is_split_off_counts_until_it_is_sent() {
        let budget = Purse::new(10);
        let unsent = Unsent::new(budget.clone());
        let mut data = unsent.track(Bytes::from_static(b"0123456789"));
        let first = data.split_to(4);
        drop(first);
        assert_eq!(budget.left(), 0);
        drop(data);
        assert_eq!(budget.left(), 10);
    }
}
