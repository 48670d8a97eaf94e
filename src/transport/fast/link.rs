mod receiving;
mod sending;
#[cfg(test)]
mod tests;

use std::io;
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::ReadBuf;
use tokio::net::TcpStream;

use super::ProtocolError;
use super::frame::{Frame, Kind};
use super::record::{ContentType, Opener, RecordError, Sealer};
use crate::transport::relay::Watch;
use crate::transport::tls::{Keys, Rekey};
use receiving::Receiving;
use sending::Sending;

/// One TLS connection of the fast tunnel: frames in, frames out. It lives on one thread.
///
/// Buffers are held only while bytes are in them. Dropping it anywhere but after [`Link::close`] resets the TCP
/// connection, so that a peer that does not read learns of it too.
pub struct Link {
    tcp: Arc<TcpStream>,
    ciphers: Box<Ciphers>,
    receiving: Receiving,
    sending: Sending,
    failure: Watch,
    closed: bool,
}

/// What follows the bytes that were taken from an application.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Behind {
    /// Nothing yet: it wakes the task.
    Nothing,
    /// Perhaps.
    More,
    End,
}

struct Ciphers {
    sealer: Sealer,
    opener: Opener,
    rekey: Rekey,
}

impl Link {
    /// # Errors
    /// What came behind the handshake is none of this protocol, or the keys are of no use.
    pub(in crate::transport) fn new(tcp: TcpStream, keys: Keys) -> Result<Self, ProtocolError> {
        let mut link = Self {
            tcp: Arc::new(tcp),
            ciphers: Box::new(Ciphers {
                sealer: Sealer::new(keys.sending)?,
                opener: Opener::new(keys.receiving)?,
                rekey: keys.rekey,
            }),
            receiving: Receiving::default(),
            sending: Sending::default(),
            failure: Watch::default(),
            closed: false,
        };
        link.receiving.begin(&keys.plain, &keys.incoming)?;
        link.decrypt()?;
        Ok(link)
    }

    /// Ready when a frame is there, or the peer has closed in order ([`Link::is_ended`]).
    ///
    /// Everything that came before must have been taken.
    pub(super) fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.receiving.frames.is_empty() && !self.receiving.ended {
            match self.tcp.poll_read_ready(cx) {
                Poll::Ready(outcome) => outcome?,
                Poll::Pending => {
                    self.receiving.rest();
                    return Poll::Pending;
                }
            }
            match self.receiving.read(&self.tcp) {
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
                Ok(_) => self.decrypt()?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        Poll::Ready(Ok(()))
    }

    fn decrypt(&mut self) -> Result<(), ProtocolError> {
        while let Some((content, payload)) = self.receiving.open(&mut self.ciphers.opener)? {
            match (content, &self.receiving.bytes()[payload]) {
                // RFC 8446, section 6.1.
                (ContentType::Alert, [_, 0]) => self.receiving.ended = true,
                (ContentType::Alert, [_, code]) => return Err(ProtocolError::Alert(*code)),
                // RFC 8446, section 4.6.3: the last octet asks for the same in return.
                (ContentType::Handshake, [KEY_UPDATE, 0, 0, 1, asked @ (0 | 1)]) => {
                    self.sending.rekey |= *asked == 1;
                    self.ciphers.opener = Opener::new(self.ciphers.rekey.receiving().map_err(|_| RecordError::Keys)?)?;
                }
                _ => return Err(ProtocolError::Handshake),
            }
        }
        Ok(())
    }

    pub(super) fn front(&self) -> Option<Frame> {
        self.receiving.frames.front().copied()
    }

    pub(super) fn pop(&mut self) {
        self.receiving.frames.pop_front();
    }

    pub(super) fn payload(&self, frame: Frame) -> &[u8] {
        &self.receiving.bytes()[frame.start..frame.start + frame.length]
    }

    /// Copies DATA that has come from the front of the queue.
    pub(super) fn copy_out(&mut self, room: &mut ReadBuf<'_>) {
        self.receiving.copy_out(room);
    }

    /// Whether the peer has closed in order, and everything before that was taken.
    pub(super) fn is_ended(&self) -> bool {
        self.receiving.ended && self.receiving.frames.is_empty()
    }

    /// Whether the flow was reset behind frames that wait to be taken.
    pub(super) fn is_reset_ahead(&self) -> bool {
        self.receiving.frames.iter().any(|frame| frame.kind == Kind::Reset)
    }

    /// Writes DATA that has come to an application; how many bytes.
    pub(super) fn poll_deliver(&mut self, cx: &mut Context<'_>, application: &TcpStream) -> Poll<io::Result<usize>> {
        loop {
            ready!(application.poll_write_ready(cx))?;
            match self.receiving.deliver(application) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                other => return Poll::Ready(other),
            }
        }
    }

    /// Takes what an application has sent, as DATA to send; how many bytes, 0 at its end. There must be
    /// [`Link::has_room`].
    pub(super) fn poll_take(&mut self, cx: &mut Context<'_>, application: &TcpStream) -> Poll<io::Result<usize>> {
        loop {
            ready!(application.poll_read_ready(cx))?;
            match self.take_now(application) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                other => return Poll::Ready(other),
            }
        }
    }

    /// What an application has behind what was taken last, as far as is known without waiting for it. That it has
    /// reset is told once: here, or by the next read.
    pub(super) fn behind(&self, cx: &mut Context<'_>, application: &TcpStream) -> io::Result<Behind> {
        if self.sending.took_in_bulk() {
            return Ok(Behind::More);
        }
        if application.poll_read_ready(cx)?.is_pending() {
            return Ok(Behind::Nothing);
        }
        match SockRef::from(application).peek(&mut [MaybeUninit::uninit()]) {
            Ok(0) => Ok(Behind::End),
            Ok(_) => Ok(Behind::More),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                Ok(Behind::More)
            }
            Err(error) => Err(error),
        }
    }

    /// As [`Link::poll_take`], whatever the reactor knows of the socket.
    pub(super) fn take_now(&mut self, application: &TcpStream) -> io::Result<usize> {
        self.change_keys()?;
        self.sending.take(application, &mut self.ciphers.sealer)
    }

    pub(super) fn has_room(&self) -> bool {
        self.sending.has_room()
    }

    /// What the last [`Link::poll_take`] took, in plain text no more.
    pub(super) fn push(&mut self, kind: Kind, payload: &[u8]) -> io::Result<()> {
        self.change_keys()?;
        self.sending.push(kind, payload, &mut self.ciphers.sealer)
    }

    fn change_keys(&mut self) -> io::Result<()> {
        if self.sending.rekey || self.ciphers.sealer.is_worn() {
            self.sending.rekey = false;
            self.sending.message(ContentType::Handshake, &[KEY_UPDATE, 0, 0, 1, 0], &mut self.ciphers.sealer)?;
            let next = self.ciphers.rekey.sending().map_err(|_| ProtocolError::from(RecordError::Keys))?;
            self.ciphers.sealer = Sealer::new(next).map_err(ProtocolError::from)?;
        }
        Ok(())
    }

    pub(super) fn has_unsent(&self) -> bool {
        self.sending.has_unsent()
    }

    /// Ready once everything is in the kernel's hands.
    pub(super) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.sending.has_unsent() {
            ready!(self.tcp.poll_write_ready(cx))?;
            match self.sending.write(&self.tcp) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                other => other?,
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Ready when the connection has broken, while nobody reads from it.
    pub(super) fn poll_failure(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        self.failure.poll(cx, &self.tcp)
    }

    /// Whether nothing has happened on a connection that waits for its next flow. It asks the kernel: what the
    /// reactor knows may be older.
    pub(super) fn is_quiet(&self) -> bool {
        let nothing =
            |outcome: io::Result<usize>| outcome.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock);
        !self.sending.has_unsent()
            && self.receiving.is_empty()
            && nothing(SockRef::from(&*self.tcp).peek(&mut [MaybeUninit::uninit()]))
    }

    /// Gives back what only a flow needs.
    pub(super) fn rest(&mut self) {
        self.failure = Watch::default();
        self.receiving.rest();
        self.sending.begin_flow();
    }

    /// Closes in order: the peer learns that no flow was under way. It is given a moment to close too, for a reset
    /// could overtake the news.
    pub(super) async fn close(mut self) {
        let said = self.sending.message(ContentType::Alert, &CLOSE_NOTIFY, &mut self.ciphers.sealer);
        let closing = async {
            said?;
            std::future::poll_fn(|cx| self.poll_flush(cx)).await?;
            SockRef::from(&*self.tcp).shutdown(Shutdown::Write)?;
            self.closed = true;
            loop {
                self.receiving.forget();
                std::future::poll_fn(|cx| self.poll_fill(cx)).await?;
                if self.is_ended() {
                    return io::Result::Ok(());
                }
            }
        };
        // Whoever does not listen does not need to know.
        let _ = tokio::time::timeout(FAREWELL, closing).await;
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if !self.closed {
            // Refused only for a socket that is broken already.
            let _ = SockRef::from(&*self.tcp).set_linger(Some(Duration::ZERO));
        }
    }
}

const KEY_UPDATE: u8 = 24;
/// RFC 8446, section 6: level `warning`, description `close_notify`.
const CLOSE_NOTIFY: [u8; 2] = [1, 0];
const FAREWELL: Duration = Duration::from_millis(100);
