use std::cell::RefCell;
use std::ops::Range;

use bytes::Bytes;

/// Reads into a buffer of this thread's store. What is large keeps the buffer until it is written; what is small is
/// copied, so that a trickle of bytes behind a stalled peer never holds whole buffers.
pub(super) fn read_with<E>(limit: usize, read: impl FnOnce(&mut [u8]) -> Result<usize, E>) -> Result<Bytes, E> {
    let mut buffer = Buffer::take();
    let limit = limit.min(SIZE);
    let read = read(&mut buffer.bytes[..limit])?;
    Ok(buffer.keep(0..read))
}

/// Bytes that one read takes at most.
pub(super) const SIZE: usize = 64 * 1024;

/// A buffer of this thread's store, back there on drop.
pub(super) struct Buffer {
    pub bytes: Box<[u8]>,
    filled: Range<usize>,
}

impl Buffer {
    pub fn take() -> Self {
        let kept = STORE.with_borrow_mut(Vec::pop);
        Self { bytes: kept.unwrap_or_else(|| vec![0; SIZE].into_boxed_slice()), filled: 0..0 }
    }

    /// A part of it, to be written later.
    pub fn keep(mut self, part: Range<usize>) -> Bytes {
        if part.len() < SIZE / 4 {
            return Bytes::copy_from_slice(&self.bytes[part]);
        }
        self.filled = part;
        Bytes::from_owner(self)
    }
}

/// Lets go of what this thread keeps for the bytes of later.
pub fn give_back() {
    let _ = STORE.try_with(|store| store.replace(Vec::new()));
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[self.filled.clone()]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        // The store is gone when its thread ends; the buffer then just goes too.
        let _ = STORE.try_with(|store| {
            let mut store = store.borrow_mut();
            if store.len() < KEPT {
                store.push(bytes);
            }
        });
    }
}

thread_local! {
    static STORE: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

/// Free buffers a thread keeps: 1 MiB.
const KEPT: usize = 16;
