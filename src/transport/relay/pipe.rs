use std::cell::RefCell;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::unistd::pipe2;
use tokio::io::Interest;
use tokio::net::TcpStream;

/// A pipe of this thread's store, through which the kernel moves bytes from one socket to another.
///
/// It is held only while bytes are in it. One that is dropped with bytes in it is closed, and they are lost.
#[derive(Debug)]
pub(super) struct Pipe {
    out: OwnedFd,
    into: OwnedFd,
    held: usize,
    _counted: Counted,
}

impl Pipe {
    /// An empty pipe; `None` where there are as many as there may be, or the kernel gives none of use. The caller
    /// then copies.
    pub fn take() -> Option<Self> {
        STORE.with_borrow_mut(|store| {
            if let Some(pipe) = store.pipes.pop() {
                return Some(pipe);
            }
            if store.refused.is_some_and(|at| at.elapsed() < REFUSAL) {
                return None;
            }
            let made = Self::make();
            store.refused = made.is_none().then(Instant::now);
            made
        })
    }

    /// Gives an empty pipe back.
    pub fn put_back(self) {
        if self.held > 0 {
            return;
        }
        // The store is gone when its thread ends; the pipe then just goes too.
        let _ = STORE.try_with(|store| {
            let pipes = &mut store.borrow_mut().pipes;
            if pipes.len() < KEPT {
                pipes.push(self);
            }
        });
    }

    pub fn is_empty(&self) -> bool {
        self.held == 0
    }

    /// Moves what a socket has into the empty pipe; 0 once the other side has closed in order.
    pub fn fill(&mut self, from: &TcpStream) -> io::Result<usize> {
        let moved = from.try_io(Interest::READABLE, || moved(from, &self.into, SIZE))?;
        self.held += moved;
        Ok(moved)
    }

    /// Moves what the pipe has into a socket.
    pub fn drain(&mut self, to: &TcpStream) -> io::Result<usize> {
        let moved = to.try_io(Interest::WRITABLE, || moved(&self.out, to, self.held))?;
        self.held -= moved;
        Ok(moved)
    }

    fn make() -> Option<Self> {
        let counted = Counted::one()?;
        let (out, into) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).ok()?;
        // pipe(7): a user beyond pipe-user-pages-soft may not enlarge its pipes, and gets new ones of two pages.
        let size = fcntl(&into, FcntlArg::F_SETPIPE_SZ(SIZE as i32)).or_else(|_| fcntl(&into, FcntlArg::F_GETPIPE_SZ));
        let enough = size.is_ok_and(|size| size as usize >= LEAST);
        enough.then_some(Self { out, into, held: 0, _counted: counted })
    }
}

fn moved(from: &impl std::os::fd::AsFd, to: &impl std::os::fd::AsFd, most: usize) -> io::Result<usize> {
    loop {
        match splice(from, None, to, None, most, SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE) {
            Err(Errno::EINTR) => {}
            other => return Ok(other?),
        }
    }
}

/// One of the pipes that the process may have.
#[derive(Debug)]
struct Counted;

impl Counted {
    fn one() -> Option<Self> {
        let counted = Self;
        (PIPES.fetch_add(1, Ordering::Relaxed) < MOST).then_some(counted)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        PIPES.fetch_sub(1, Ordering::Relaxed);
    }
}

#[derive(Default)]
struct Store {
    pipes: Vec<Pipe>,
    /// When the last one could not be had.
    refused: Option<Instant>,
}

thread_local! {
    static STORE: RefCell<Store> = RefCell::default();
}

static PIPES: AtomicUsize = AtomicUsize::new(0);

/// Bytes that a pipe holds.
const SIZE: usize = 256 * 1024;
/// One that holds less moves too little at a time: what the kernel gives by default.
const LEAST: usize = 64 * 1024;
/// Free pipes that a thread keeps.
const KEPT: usize = 8;
/// Pipes of the process: two descriptors each, of those that are kept for all but connections.
const MOST: usize = 128;
/// How long none is asked for after one could not be had.
const REFUSAL: Duration = Duration::from_secs(1);
