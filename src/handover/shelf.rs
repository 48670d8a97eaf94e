use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::ListenerKey;
use super::wire::{Action, Request, Word};

/// The listeners that the parent holds.
#[derive(Debug)]
pub(super) struct Shelf {
    held: BTreeMap<ListenerKey, OwnedFd>,
    room: usize,
}

impl Shelf {
    /// A shelf for at most `room` listeners.
    pub(super) fn new(room: usize) -> Self {
        Self { held: BTreeMap::new(), room }
    }

    /// Does what a worker asks, and says how it went.
    pub(super) fn answer(&mut self, request: Request, fd: Option<OwnedFd>) -> Word {
        let refused = match request.action {
            Action::Keep { key } => self.keep(key, fd).err(),
            Action::Forget { key } => {
                self.held.remove(&key);
                None
            }
        };
        Word::Answer { seq: request.seq, refused }
    }

    fn keep(&mut self, key: ListenerKey, fd: Option<OwnedFd>) -> Result<(), String> {
        let refusal = match fd {
            None => format!(
                "the {key} did not arrive: the parent has no descriptor left; raise the limit on open files (ulimit -n)"
            ),
            Some(_) if self.held.len() >= self.room && !self.held.contains_key(&key) => format!(
                "the parent holds {} listeners already, its limit, and does not keep the {key}; raise the limit on open \
                 files (ulimit -n)",
                self.held.len()
            ),
            Some(fd) => {
                self.held.insert(key, fd);
                return Ok(());
            }
        };
        tracing::error!("{refusal}; connections to it will be refused while a worker is replaced");
        Err(refusal)
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = &ListenerKey> {
        self.held.keys()
    }

    pub(super) fn get(&self, key: &ListenerKey) -> Option<BorrowedFd<'_>> {
        self.held.get(key).map(AsFd::as_fd)
    }

    pub(super) fn len(&self) -> usize {
        self.held.len()
    }
}
