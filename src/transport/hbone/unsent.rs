use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::task::AtomicWaker;
use metrics::{Gauge, gauge};

use crate::transport::metrics::UNSENT;

/// What a stream has taken and its connection has not sent yet.
///
/// A reset overtakes it: h2 throws away what is queued. A wire would not, so somebody who resets may wait for it.
pub(super) struct Unsent {
    bytes: AtomicUsize,
    waiting: AtomicWaker,
    budget: SendBudget,
}

/// What all streams together may have taken and not sent: peers that read nothing, and grant windows without end, hold
/// so much and no more. Where it is used up, each stream still may have a little, so that all of them go on.
#[derive(Clone)]
pub(super) struct SendBudget {
    inner: Arc<Inner>,
}

struct Inner {
    total: usize,
    used: AtomicUsize,
    shown: Gauge,
}

impl Unsent {
    pub fn new(budget: SendBudget) -> Arc<Self> {
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

    pub fn track(self: &Arc<Self>, data: Bytes) -> Bytes {
        self.bytes.fetch_add(data.len(), Ordering::AcqRel);
        self.budget.take(data.len());
        Bytes::from_owner(Chunk { data, unsent: self.clone() })
    }

    pub fn poll_none(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.waiting.register(cx.waker());
        if self.bytes.load(Ordering::Acquire) == 0 { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl SendBudget {
    pub fn new(total: usize) -> Self {
        Self { inner: Arc::new(Inner { total, used: AtomicUsize::new(0), shown: gauge!(UNSENT) }) }
    }

    fn left(&self) -> usize {
        self.inner.total.saturating_sub(self.inner.used.load(Ordering::Relaxed))
    }

    fn take(&self, bytes: usize) {
        let used = self.inner.used.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.inner.shown.set(used as f64);
    }

    fn give_back(&self, bytes: usize) {
        let used = self.inner.used.fetch_sub(bytes, Ordering::Relaxed) - bytes;
        self.inner.shown.set(used as f64);
    }
}

/// The process's own budget: every clone draws from the same.
impl Default for SendBudget {
    fn default() -> Self {
        static PROCESS: LazyLock<SendBudget> = LazyLock::new(|| SendBudget::new(64 << 20));
        PROCESS.clone()
    }
}

/// One write; dropped once the connection has sent it, or has given it up.
struct Chunk {
    data: Bytes,
    unsent: Arc<Unsent>,
}

impl AsRef<[u8]> for Chunk {
    fn as_ref(&self) -> &[u8] {
        &self.data
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        self.unsent.budget.give_back(self.data.len());
        self.unsent.bytes.fetch_sub(self.data.len(), Ordering::AcqRel);
        self.unsent.waiting.wake();
    }
}

/// What a stream may have unsent whatever the others have.
const FLOOR: usize = 16 * 1024;

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;

    #[test]
    fn streams_share_a_budget_and_each_goes_on_without_it() {
        let mut cx = Context::from_waker(Waker::noop());
        let budget = SendBudget::new(100 * 1024);
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
        let budget = SendBudget::new(10);
        let unsent = Unsent::new(budget.clone());
        let mut data = unsent.track(Bytes::from_static(b"0123456789"));
        let first = data.split_to(4);
        drop(first);
        assert_eq!(budget.left(), 0);
        drop(data);
        assert_eq!(budget.left(), 10);
    }
}
