use std::io;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use nix::errno::Errno;
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::buffer::Buffer;
use crate::transport::relay::TcpEnd;

/// What an application has sent before anybody accepted it: kept, for a refusal means that nothing of it was
/// delivered, and the next one who is asked gets it all.
pub struct Early {
    /// None: it cannot say anything yet.
    application: Option<Arc<TcpStream>>,
    kept: Vec<u8>,
    /// The application has closed its direction behind that.
    ended: bool,
    /// Or has reset the connection. The socket tells it only once.
    broken: Option<io::Error>,
}

impl Early {
    pub fn of(application: &TcpEnd) -> Self {
        Self { application: Some(application.shared()), ..Self::none() }
    }

    /// Of an application that waits until somebody accepts it.
    pub fn none() -> Self {
        Self { application: None, kept: Vec::new(), ended: false, broken: None }
    }

    pub fn kept(&self) -> &[u8] {
        &self.kept
    }

    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Whether the application has not said a thing.
    pub fn is_silent(&self) -> bool {
        self.kept.is_empty() && !self.ended && self.broken.is_none()
    }

    /// What is to be sent before all else by whoever carries the connection in another way, and what follows it.
    pub fn into_kept(self) -> (Bytes, Option<io::Error>) {
        (self.kept.into(), self.broken)
    }

    /// How the application broke behind what it said, if it did.
    pub(super) fn take_broken(&mut self) -> Option<io::Error> {
        self.broken.take()
    }

    /// Takes what lies there already, whether the reactor knows of it or not.
    pub(super) fn look(&mut self) {
        self.read(|stream, room| nix::unistd::read(stream, room).map_err(io::Error::from));
    }

    /// Ready when more was kept, or the application's end. Nothing more is taken once the bound is reached.
    pub(super) fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.ended || self.broken.is_some() || self.kept.len() >= MOST_KEPT {
            return Poll::Pending;
        }
        let Some(application) = self.application.clone() else { return Poll::Pending };
        loop {
            if let Err(error) = ready!(application.poll_read_ready(cx)) {
                self.broken = Some(error);
                return Poll::Ready(());
            }
            let read = |stream: &TcpStream, room: &mut [u8]| {
                stream.try_io(Interest::READABLE, || nix::unistd::read(stream, room).map_err(io::Error::from))
            };
            if self.read(read) {
                return Poll::Ready(());
            }
        }
    }

    /// Whether there was anything.
    fn read(&mut self, read: impl Fn(&TcpStream, &mut [u8]) -> io::Result<usize>) -> bool {
        let Some(application) = &self.application else { return false };
        let mut room = Buffer::small();
        let most = room.len().min(MOST_KEPT - self.kept.len());
        let outcome = loop {
            match read(application, &mut room[..most]) {
                Err(error) if error.raw_os_error() == Some(Errno::EINTR as i32) => {}
                other => break other,
            }
        };
        match outcome {
            Ok(count) => {
                self.ended = count == 0;
                self.kept.extend_from_slice(&room[..count]);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
            // Whoever accepts it still hears what was said before.
            Err(error) => self.broken = Some(error),
        }
        true
    }
}

const MOST_KEPT: usize = 64 * 1024;
