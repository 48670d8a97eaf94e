use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};

use metrics::{Gauge, gauge};

use crate::transport::metrics::UNSENT;
use crate::transport::unsent::Budget;

/// What all streams together may have taken and not sent: peers that read nothing, and grant windows without end, hold
/// so much and no more. Where it is used up, each stream still may have a little, so that all of them go on.
#[derive(Clone)]
pub(super) struct SendBudget {
    inner: Arc<Inner>,
}

struct Inner {
    used: AtomicUsize,
    shown: Gauge,
}

impl Budget for SendBudget {
    fn left(&self) -> usize {
        TOTAL.saturating_sub(self.inner.used.load(Ordering::Relaxed))
    }

    fn charge(&self, bytes: usize) {
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
        static PROCESS: LazyLock<SendBudget> = LazyLock::new(|| {
            let inner = Inner { used: AtomicUsize::new(0), shown: gauge!(UNSENT) };
            SendBudget { inner: Arc::new(inner) }
        });
        PROCESS.clone()
    }
}

const TOTAL: usize = 64 << 20;
