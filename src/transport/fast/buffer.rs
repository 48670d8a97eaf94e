use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

/// Room for bytes on their way, from this thread's store. It goes back when dropped.
pub struct Buffer(Box<[u8]>);

impl Buffer {
    pub fn small() -> Self {
        Self(with_store(|store| store.small.pop()).unwrap_or_else(|| vec![0; SMALL].into_boxed_slice()))
    }

    /// For who moves much. What readers that stall may hold of these is bounded; beyond, only small ones are left.
    pub fn large() -> Self {
        let found = with_store(|store| {
            let kept = store.large.pop();
            if kept.is_none() && store.large_lent >= MOST_LARGE {
                return None;
            }
            store.large_lent += 1;
            Some(kept)
        });
        match found {
            Some(kept) => Self(kept.unwrap_or_else(|| vec![0; LARGE].into_boxed_slice())),
            None => Self::small(),
        }
    }

    pub fn is_large(&self) -> bool {
        self.0.len() == LARGE
    }
}

/// Lets go of what this thread keeps for the bytes of later.
pub fn give_back() {
    with_store(|store| {
        (store.small, store.large) = (Vec::new(), Vec::new());
        None::<()>
    });
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.0);
        let large = bytes.len() == LARGE;
        with_store(|store| {
            store.large_lent -= usize::from(large && store.large_lent > 0);
            let (kept, most) =
                if large { (&mut store.large, MOST_LARGE_KEPT) } else { (&mut store.small, MOST_SMALL_KEPT) };
            if kept.len() < most {
                kept.push(bytes);
            }
            None::<()>
        });
    }
}

#[derive(Default)]
struct Store {
    small: Vec<Box<[u8]>>,
    large: Vec<Box<[u8]>>,
    large_lent: usize,
}

thread_local! {
    static STORE: RefCell<Store> = RefCell::default();
}

/// The store is gone when its thread ends: then a buffer is made, or goes, by itself.
fn with_store<T>(f: impl FnOnce(&mut Store) -> Option<T>) -> Option<T> {
    STORE.try_with(|store| f(&mut store.borrow_mut())).ok().flatten()
}

/// One record of the largest size, and room behind it for a few small ones.
const SMALL: usize = 17 * 1024;
/// Eight of them: what fits in a core's own cache both ways.
const LARGE: usize = 8 * SMALL;
/// Lent at once, a thread: 32 MiB.
const MOST_LARGE: usize = 240;
/// Free ones that a thread keeps: 0.8 MiB and 0.5 MiB.
const MOST_LARGE_KEPT: usize = 6;
const MOST_SMALL_KEPT: usize = 32;
