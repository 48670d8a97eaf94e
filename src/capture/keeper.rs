//! Who keeps our listeners while the worker is replaced.

use std::io;
use std::os::fd::BorrowedFd;

use crate::handover::{Keeper, ListenerKey};

/// Holds a copy of each listener, so that while there is no worker new connections wait and are not refused.
pub trait ListenerKeeper: Send + Sync {
    fn keep(&self, key: &ListenerKey, fd: BorrowedFd<'_>) -> io::Result<()>;
    fn forget(&self, key: &ListenerKey);
}

impl ListenerKeeper for Keeper {
    fn keep(&self, key: &ListenerKey, fd: BorrowedFd<'_>) -> io::Result<()> {
        Keeper::keep(self, key, fd)
    }

    fn forget(&self, key: &ListenerKey) {
        Keeper::forget(self, key);
    }
}
