//! One message a packet, and at most one descriptor beside it.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, socketpair,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::ListenerKey;

/// What a worker asks of its parent.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Request {
    pub seq: u64,
    pub action: Action,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Action {
    Keep { key: ListenerKey },
    Forget { key: ListenerKey },
}

/// What a parent says to its worker.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Word {
    Offer { key: ListenerKey },
    Offered { count: usize },
    Answer { seq: u64, refused: Option<String> },
}

/// Both ends, closed on exec.
pub(super) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?)
}

pub(crate) fn send(socket: BorrowedFd<'_>, message: &impl Serialize, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let text = serde_json::to_vec(message)?;
    if text.len() > MAX_MESSAGE {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the message to the other process is too long"));
    }
    let fds: Vec<RawFd> = fd.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let control = if fds.is_empty() { &[][..] } else { &rights[..] };
    loop {
        match sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&text)], control, MsgFlags::MSG_NOSIGNAL, None) {
            Err(Errno::EINTR) => continue,
            Err(error) => return Err(error.into()),
            Ok(_) => return Ok(()),
        }
    }
}

/// One message, or `None` where the other side is gone.
pub(crate) fn receive<T: DeserializeOwned>(socket: BorrowedFd<'_>) -> io::Result<Option<(T, Option<OwnedFd>)>> {
    let mut text = [0; MAX_MESSAGE];
    let mut control = cmsg_space!(RawFd);
    let (length, fd) = loop {
        let mut parts = [IoSliceMut::new(&mut text)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        match recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags) {
            Err(Errno::EINTR) => continue,
            Err(Errno::ECONNRESET) => return Ok(None),
            Err(error) => return Err(error.into()),
            Ok(received) => {
                // Truncated control data means that the descriptor did not fit into our table: the message alone
                // arrives, and who wanted the descriptor says so.
                let fd = match received.cmsgs() {
                    Ok(messages) => messages.filter_map(own).last(),
                    Err(_) => None,
                };
                break (received.bytes, fd);
            }
        }
    };
    if length == 0 {
        return Ok(None);
    }
    Ok(Some((serde_json::from_slice(&text[..length])?, fd)))
}

// Takes every descriptor of a control message, so that none is left open without an owner; ours carry one.
fn own(message: ControlMessageOwned) -> Option<OwnedFd> {
    let ControlMessageOwned::ScmRights(fds) = message else { return None };
    // SAFETY: the kernel has just installed these descriptors for this process, and nobody else knows them.
    let mut owned: Vec<OwnedFd> = fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).collect();
    owned.pop()
}

/// A key is some two hundred bytes; a refusal is a sentence; a pod that starts has a few annotations.
const MAX_MESSAGE: usize = 16_384;
