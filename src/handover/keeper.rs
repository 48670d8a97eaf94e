use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{SockType, getsockopt, setsockopt, sockopt};
use nix::sys::time::TimeVal;

use super::wire::{self, Action, Request, Word};
use super::{FD_VARIABLE, ListenerKey};

/// The worker's way to its parent. Calls wait for the parent's answer, which takes microseconds and at most
/// two seconds.
#[derive(Clone, Debug)]
pub struct Keeper(Option<Arc<Mutex<Line>>>);

#[derive(Debug)]
struct Line {
    socket: OwnedFd,
    seq: u64,
}

impl Keeper {
    /// Without a parent: keeps nothing, and that is no error.
    pub fn detached() -> Self {
        Self(None)
    }

    /// The way to the parent named by the environment, with every listener that it held when it started this
    /// worker; detached where there is none. What the worker does not go on with, it must [`forget`](Self::forget):
    /// a held listener keeps its pod's network namespace alive.
    ///
    /// To be called once, early: the descriptor is made close-on-exec here.
    pub fn inherit() -> io::Result<(Self, Vec<(ListenerKey, OwnedFd)>)> {
        let Some(number) = std::env::var_os(FD_VARIABLE) else { return Ok((Self::detached(), Vec::new())) };
        if INHERITED.swap(true, Ordering::SeqCst) {
            return Err(io::Error::other("the listeners were inherited already"));
        }
        let socket = number.to_str().and_then(|number| number.parse().ok()).and_then(adopt).ok_or_else(|| {
            io::Error::other(format!("{FD_VARIABLE}={number:?} names no socket of a parent; unset it"))
        })?;
        name_process();
        Self::over(socket)
    }

    /// Speaks over `socket`, whose other end a parent holds.
    pub(super) fn over(socket: OwnedFd) -> io::Result<(Self, Vec<(ListenerKey, OwnedFd)>)> {
        let limit = TimeVal::new(PATIENCE_SECONDS, 0);
        setsockopt(&socket, sockopt::ReceiveTimeout, &limit)?;
        setsockopt(&socket, sockopt::SendTimeout, &limit)?;
        let mut listeners = Vec::new();
        loop {
            match wire::receive(socket.as_fd())? {
                Some((Word::Offer { key }, Some(fd))) => listeners.push((key, fd)),
                Some((Word::Offer { key }, None)) => {
                    tracing::error!(
                        "The {key} did not arrive from the parent: this process has no descriptor left; raise the \
                         limit on open files (ulimit -n)."
                    );
                }
                Some((Word::Offered { .. }, _)) => break,
                Some((Word::Answer { .. }, _)) => {
                    return Err(io::Error::other("the parent answers before it was asked"));
                }
                None => return Err(parent_gone()),
            }
        }
        Ok((Self(Some(Arc::new(Mutex::new(Line { socket, seq: 0 })))), listeners))
    }

    /// Has the parent hold a copy of this listener until it is forgotten, in place of one it held under this key.
    /// Once this returns, a death of the worker no longer closes it.
    pub fn keep(&self, key: &ListenerKey, fd: BorrowedFd<'_>) -> io::Result<()> {
        let Some(line) = &self.0 else { return Ok(()) };
        line.lock().unwrap_or_else(PoisonError::into_inner).ask(Action::Keep { key: key.clone() }, Some(fd))
    }

    /// Has the parent close its copy: once this returns, it is closed. A failure is logged, there being nothing
    /// that a caller can do about it.
    pub fn forget(&self, key: &ListenerKey) {
        let Some(line) = &self.0 else { return };
        let forgotten =
            line.lock().unwrap_or_else(PoisonError::into_inner).ask(Action::Forget { key: key.clone() }, None);
        if let Err(error) = forgotten {
            tracing::error!(%error, "The parent could not be told to close the {key}.");
        }
    }
}

impl Line {
    fn ask(&mut self, action: Action, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        self.seq += 1;
        wire::send(self.socket.as_fd(), &Request { seq: self.seq, action }, fd)?;
        loop {
            match wire::receive(self.socket.as_fd())? {
                Some((Word::Answer { seq, refused }, _)) if seq == self.seq => {
                    return refused.map_or(Ok(()), |cause| Err(io::Error::other(cause)));
                }
                // The late answer to a question that was given up.
                Some(_) => continue,
                None => return Err(parent_gone()),
            }
        }
    }
}

// The descriptor behind the number, if it is what a parent hands down: a SOCK_SEQPACKET socket.
fn adopt(number: RawFd) -> Option<OwnedFd> {
    if number < 3 {
        return None;
    }
    // SAFETY: only looks at the number; where nothing is open under it, the calls below fail with EBADF.
    let socket = unsafe { BorrowedFd::borrow_raw(number) };
    if getsockopt(&socket, sockopt::SockType).ok()? != SockType::SeqPacket {
        return None;
    }
    fcntl(socket, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).ok()?;
    // SAFETY: the parent handed this descriptor down for us to own, and `INHERITED` lets us take it only once.
    Some(unsafe { OwnedFd::from_raw_fd(socket.as_raw_fd()) })
}

// A worker is started from /proc/self/exe, and would be listed as "exe".
fn name_process() {
    let name = std::env::args_os().next().and_then(|arg0| Path::new(&arg0).file_name().map(|name| name.to_owned()));
    if let Some(name) = name.and_then(|name| CString::new(name.into_vec()).ok()) {
        // A name is for people's eyes: without it everything works.
        let _ = nix::sys::prctl::set_name(&name);
    }
}

fn parent_gone() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the parent process, which keeps the listeners, is gone")
}

static INHERITED: AtomicBool = AtomicBool::new(false);
const PATIENCE_SECONDS: nix::libc::time_t = 2;
