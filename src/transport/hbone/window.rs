use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};

use metrics::gauge;

use crate::transport::metrics::WINDOWS;

/// What all peers together may have on the way to this process unread.
///
/// Each connection starts with little. One that has delivered several windows' worth gets twice as much while the
/// budget lasts, and falls back when it has been silent.
#[derive(Clone)]
pub struct WindowBudget {
    inner: Arc<Inner>,
}

struct Inner {
    total: usize,
    used: AtomicUsize,
}

impl WindowBudget {
    pub fn new(total: usize) -> Self {
        Self { inner: Arc::new(Inner { total, used: AtomicUsize::new(0) }) }
    }

    pub fn used(&self) -> usize {
        self.inner.used.load(Ordering::Relaxed)
    }

    fn take(&self, bytes: usize) -> bool {
        let fits = |used: usize| used.checked_add(bytes).filter(|sum| *sum <= self.inner.total);
        let taken = self.inner.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_ok();
        gauge!(WINDOWS).set(self.used() as f64);
        taken
    }

    fn give_back(&self, bytes: usize) {
        self.inner.used.fetch_sub(bytes, Ordering::Relaxed);
        gauge!(WINDOWS).set(self.used() as f64);
    }
}

/// The process's own budget: every clone draws from the same.
impl Default for WindowBudget {
    fn default() -> Self {
        static PROCESS: LazyLock<WindowBudget> = LazyLock::new(|| WindowBudget::new(128 * MIB));
        PROCESS.clone()
    }
}

/// The windows of one connection: how large a stream's and the connection's own are, drawn from the budget.
pub(super) struct Windows {
    budget: WindowBudget,
    level: u32,
    /// What the budget gave. The smallest level is every connection's right, budget or not.
    held: usize,
}

impl Windows {
    pub fn new(budget: WindowBudget) -> Self {
        let mut windows = Self { budget, level: 0, held: 0 };
        windows.grow();
        windows
    }

    /// RFC 9113, section 6.9.2. The connection's window is several times a stream's, lest one reader who stalls
    /// stall the others.
    pub fn stream(&self) -> u32 {
        SMALLEST_STREAM << self.level
    }

    pub fn connection(&self) -> u32 {
        if self.level == 0 { SMALLEST_CONNECTION } else { (self.stream() * 8).min(16 * MIB as u32) }
    }

    pub fn grow(&mut self) -> bool {
        if self.level == HIGHEST {
            return false;
        }
        let before = self.connection() as usize;
        let next = Self { budget: self.budget.clone(), level: self.level + 1, held: 0 };
        let more = next.connection() as usize - if self.level == 0 { 0 } else { before };
        if !self.budget.take(more) {
            return false;
        }
        self.held += more;
        self.level += 1;
        true
    }

    /// Back to where a connection starts.
    pub fn shrink(&mut self) -> bool {
        if self.level <= 1 {
            return false;
        }
        self.budget.give_back(self.held);
        (self.held, self.level) = (0, 0);
        self.grow();
        true
    }
}

impl Drop for Windows {
    fn drop(&mut self) {
        if self.held > 0 {
            self.budget.give_back(self.held);
        }
    }
}

const MIB: usize = 1 << 20;
/// The initial window of HTTP/2 itself: nothing smaller can be had without a round trip.
const SMALLEST_STREAM: u32 = 64 * 1024;
/// What a connection has where the budget gives nothing: tunnels are bounded, and so is what all of them hold so.
const SMALLEST_CONNECTION: u32 = 2 * SMALLEST_STREAM;
/// 4 MiB a stream, 16 MiB a connection.
const HIGHEST: u32 = 6;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_grow_within_the_budget_and_give_it_back() {
        let budget = WindowBudget::new(3 * MIB);
        let mut a = Windows::new(budget.clone());
        assert_eq!((a.stream(), a.connection()), (128 * 1024, MIB as u32));
        assert!(a.grow());
        assert_eq!(budget.used(), 2 * MIB);
        assert!(!a.grow(), "the budget was exceeded");
        let b = Windows::new(budget.clone());
        assert_eq!(budget.used(), 3 * MIB);
        let c = Windows::new(budget.clone());
        assert_eq!(c.stream(), SMALLEST_STREAM, "an exhausted budget must still let a connection live");
        assert!(a.shrink());
        assert_eq!(budget.used(), 2 * MIB);
        drop((a, b, c));
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn the_largest_windows_are_the_fields() {
        let mut windows = Windows::new(WindowBudget::new(64 * MIB));
        while windows.grow() {}
        assert_eq!((windows.stream(), windows.connection()), (4 * MIB as u32, 16 * MIB as u32));
    }
}
