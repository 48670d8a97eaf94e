//! Sockets between processes of one node: one message a packet (`SOCK_SEQPACKET`), at most one descriptor beside it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept4, bind, connect, getsockopt, listen, socket, sockopt,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::wire;

/// Listens at a path.
#[derive(Debug)]
pub struct Door(AsyncFd<OwnedFd>);

/// One connection.
#[derive(Debug)]
pub struct Channel(AsyncFd<OwnedFd>);

impl Door {
    /// Takes the path's place, from whoever listened there before. Call within a runtime.
    pub fn open(path: &Path) -> io::Result<Self> {
        let listener = socket(AddressFamily::Unix, SockType::SeqPacket, FLAGS, None)?;
        // Beside it first, so that there is no moment without one.
        let beside = path.with_extension(std::process::id().to_string());
        let _ = std::fs::remove_file(&beside);
        bind(listener.as_raw_fd(), &UnixAddr::new(&beside)?)?;
        listen(&listener, Backlog::new(BACKLOG)?)?;
        std::fs::rename(&beside, path)?;
        Ok(Self(watch(listener, Interest::READABLE)?))
    }

    /// The next caller, who is root here as we are: others are refused.
    pub async fn caller(&self) -> io::Result<Channel> {
        loop {
            let mut ready = self.0.readable().await?;
            match ready.try_io(|listener| accept(listener.get_ref())) {
                Ok(caller) => return Channel::over(caller?),
                Err(_would_block) => {}
            }
        }
    }
}

impl Channel {
    pub fn connect(path: &Path) -> io::Result<Self> {
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, FLAGS, None)?;
        connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
        Self::over(socket)
    }

    pub(super) fn over(socket: OwnedFd) -> io::Result<Self> {
        watch(socket, Interest::READABLE | Interest::WRITABLE).map(Self)
    }

    pub async fn send(&self, message: &impl Serialize, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        loop {
            let mut ready = self.0.writable().await?;
            match ready.try_io(|socket| wire::send(socket.get_ref().as_fd(), message, fd)) {
                Ok(sent) => return sent,
                Err(_would_block) => {}
            }
        }
    }

    /// The next message, or none where the other side is gone.
    pub async fn receive<T: DeserializeOwned>(&self) -> io::Result<Option<(T, Option<OwnedFd>)>> {
        loop {
            let mut ready = self.0.readable().await?;
            match ready.try_io(|socket| wire::receive(socket.get_ref().as_fd())) {
                Ok(received) => return received,
                Err(_would_block) => {}
            }
        }
    }
}

fn accept(listener: &OwnedFd) -> io::Result<OwnedFd> {
    let fd = accept4(listener.as_raw_fd(), FLAGS)?;
    // SAFETY: the call above succeeded, so this is a descriptor of ours alone.
    let caller = unsafe { OwnedFd::from_raw_fd(fd) };
    let uid = getsockopt(&caller, sockopt::PeerCredentials)?.uid();
    if uid != nix::unistd::geteuid().as_raw() {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("user {uid} called; only root may")));
    }
    Ok(caller)
}

fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the descriptor is owned by what watches it, which keeps it open and the same until it is dropped.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(io::Error::from)
}

const FLAGS: SockFlag = SockFlag::SOCK_CLOEXEC.union(SockFlag::SOCK_NONBLOCK);
const BACKLOG: i32 = 512;
