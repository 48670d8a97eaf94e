//! Network namespaces: which one this is, who owns it, and running code inside it.

use std::cell::RefCell;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// A held network namespace: while a clone lives, the kernel keeps the namespace and no other gets its number.
#[derive(Clone)]
pub struct NetNs {
    fd: Arc<OwnedFd>,
    id: NetNsId,
}

/// Device and inode of a namespace's file: what the kernel tells namespaces apart by.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct NetNsId {
    pub dev: u64,
    pub ino: u64,
}

impl NetNs {
    /// The namespace of the calling thread.
    pub fn current() -> io::Result<Self> {
        Self::open(Path::new("/proc/thread-self/ns/net"))
    }

    /// Opens a namespace by its file. Anything that is not a network namespace is refused.
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::of(File::open(path)?).ok_or_else(|| not_a_namespace(path.display()))?
    }

    /// Takes a namespace by its descriptor. Anything that is not a network namespace is refused.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        Self::of(File::from(fd)).ok_or_else(|| not_a_namespace("what was handed over"))?
    }

    fn of(file: File) -> Option<io::Result<Self>> {
        // SAFETY: the descriptor is open, and NS_GET_NSTYPE takes no argument.
        let kind = unsafe { libc::ioctl(file.as_raw_fd(), NS_GET_NSTYPE) };
        (kind == libc::CLONE_NEWNET).then(|| NetNsId::of(&file).map(|id| Self { fd: Arc::new(file.into()), id }))
    }

    pub fn id(&self) -> NetNsId {
        self.id
    }

    /// Where any process that may look at this one finds the namespace, while this one holds it.
    pub fn handle(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.fd.as_raw_fd()).into()
    }

    /// The user namespace that owns this namespace: root there is root here.
    pub fn owner(&self) -> io::Result<NetNsId> {
        // SAFETY: the descriptor is open, and NS_GET_USERNS takes no argument and returns a new descriptor.
        let fd = unsafe { libc::ioctl(self.fd.as_raw_fd(), NS_GET_USERNS) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call above succeeded, so this is a descriptor of ours alone.
        NetNsId::of(&File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Runs `f` with the calling thread inside this namespace. Sockets that it makes stay there.
    ///
    /// `f` must not start a thread or a process that outlives the call, and must not wait for async work. A thread
    /// that cannot come back would do other work in the wrong namespace, so then the process ends.
    pub fn enter<T>(&self, f: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let home = match HERE.with_borrow(Clone::clone) {
            Some(here) => here,
            None => Self::current()?,
        };
        if home.id == self.id {
            return f();
        }
        set_ns(self.fd.as_raw_fd())?;
        HERE.set(Some(self.clone()));
        let back = Back(home);
        let result = f();
        drop(back);
        result
    }

    /// Runs `f` inside this namespace on a thread of its own, which may start children.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("netns".into()).spawn_scoped(scope, || {
                set_ns(self.fd.as_raw_fd())?;
                f()
            })?;
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

impl AsFd for NetNs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl fmt::Debug for NetNs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NetNs({})", self.id)
    }
}

impl NetNsId {
    /// The namespace behind a path such as `/proc/1/ns/net`, without opening it.
    pub fn of_path(path: &Path) -> io::Result<Self> {
        let meta = std::fs::metadata(path)?;
        Ok(Self { dev: meta.dev(), ino: meta.ino() })
    }

    fn of(file: &File) -> io::Result<Self> {
        let meta = file.metadata()?;
        Ok(Self { dev: meta.dev(), ino: meta.ino() })
    }
}

impl fmt::Display for NetNsId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "net:[{}]", self.ino)
    }
}

/// Runs `f` on a thread of its own inside a new network namespace that ends with it.
pub fn in_scratch<T: Send>(f: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("scratch-netns".into()).spawn_scoped(scope, || {
            // SAFETY: unshare with CLONE_NEWNET changes the calling thread alone, which ends right after `f`.
            if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
                return Err(io::Error::last_os_error());
            }
            f()
        })?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Brings the thread home when it goes out of scope, also when `f` panics.
struct Back(NetNs);

impl Drop for Back {
    fn drop(&mut self) {
        if let Err(error) = set_ns(self.0.fd.as_raw_fd()) {
            tracing::error!(%error, "A thread cannot come back from a pod's network namespace; the process ends.");
            std::process::abort();
        }
        HERE.set(Some(self.0.clone()));
    }
}

thread_local! {
    /// Where this thread is, once it has entered a namespace: only [`NetNs::enter`] moves a thread that goes on to other
    /// work. It spares opening and closing the thread's own namespace for each socket.
    static HERE: RefCell<Option<NetNs>> = const { RefCell::new(None) };
}

fn not_a_namespace(what: impl fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("{what} is not a network namespace"))
}

fn set_ns(fd: RawFd) -> io::Result<()> {
    // SAFETY: setns takes an open descriptor and changes the calling thread alone.
    match unsafe { libc::setns(fd, libc::CLONE_NEWNET) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// `linux/nsfs.h`: `_IO(0xb7, 1)` and `_IO(0xb7, 3)`.
const NS_GET_USERNS: libc::Ioctl = 0xb701;
const NS_GET_NSTYPE: libc::Ioctl = 0xb703;
