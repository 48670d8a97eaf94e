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
    application: Arc<TcpStream>,
    kept: Vec<u8>,
    /// The application has closed its direction behind that.
    ended: bool,
}

impl Early {
    pub fn of(application: &TcpEnd) -> Self {
        Self { application: application.shared(), kept: Vec::new(), ended: false }
    }

    pub fn kept(&self) -> &[u8] {
        &self.kept
    }

    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Whether the application has not said a thing.
    pub fn is_silent(&self) -> bool {
        self.kept.is_empty() && !self.ended
    }

    /// What is to be sent before all else by whoever carries the connection in another way.
    pub fn into_kept(self) -> Bytes {
        self.kept.into()
    }

    /// Takes what lies there already, whether the reactor knows of it or not.
    pub(super) fn look(&mut self) -> io::Result<()> {
        match self.read(|stream, room| nix::unistd::read(stream, room).map_err(io::Error::from)) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            other => other,
        }
    }

    /// Ready when more was kept, or the application's end. Nothing more is taken once the bound is reached; then only
    /// a reset is news.
    pub(super) fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.ended || self.kept.len() >= MOST_KEPT {
            return Poll::Pending;
        }
        loop {
            ready!(self.application.poll_read_ready(cx))?;
            let read = self.read(|stream, room| {
                stream.try_io(Interest::READABLE, || nix::unistd::read(stream, room).map_err(io::Error::from))
            });
            match read {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                other => return Poll::Ready(other),
            }
        }
    }

    fn read(&mut self, read: impl Fn(&TcpStream, &mut [u8]) -> io::Result<usize>) -> io::Result<()> {
        if self.ended {
            return Ok(());
        }
        let mut room = Buffer::small();
        let most = room.len().min(MOST_KEPT - self.kept.len());
        let count = loop {
            match read(&self.application, &mut room[..most]) {
                Err(error) if error.raw_os_error() == Some(Errno::EINTR as i32) => {}
                other => break other?,
            }
        };
        self.ended = count == 0;
        self.kept.extend_from_slice(&room[..count]);
        Ok(())
    }
}

const MOST_KEPT: usize = 64 * 1024;
