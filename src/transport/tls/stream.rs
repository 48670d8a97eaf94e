use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::engine::{Engine, READ, Stand, Wanted, tls_error};

/// A TLS connection as a byte stream: what HTTP/2 runs on.
///
/// An end without close_notify is an error (`UnexpectedEof`), never the end of the stream.
pub struct TlsStream {
    tcp: TcpStream,
    engine: Engine,
    /// How much of `engine.plain` has been read, and of `engine.outgoing` sent.
    read: usize,
    sent: usize,
    ended: bool,
    closing: bool,
}

impl TlsStream {
    pub(super) fn new(tcp: TcpStream, engine: Engine) -> Self {
        Self { tcp, engine, read: 0, sent: 0, ended: false, closing: false }
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.sent < self.engine.outgoing.len() {
            let written = ready!(Pin::new(&mut self.tcp).poll_write(cx, &self.engine.outgoing[self.sent..]))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.sent += written;
        }
        self.sent = 0;
        self.engine.outgoing.clear();
        self.engine.outgoing.shrink_to(SMALL);
        Poll::Ready(Ok(()))
    }

    fn advance(&mut self, wanted: Wanted<'_>) -> io::Result<()> {
        loop {
            match self.engine.advance(wanted).map_err(tls_error)? {
                Stand::PeerClosed => self.ended = true,
                Stand::Closed if matches!(wanted, Wanted::Data(_)) => return Err(io::ErrorKind::BrokenPipe.into()),
                Stand::Handshaking | Stand::Open | Stand::Closed => return Ok(()),
            }
        }
    }

    fn give(&mut self, into: &mut ReadBuf<'_>) {
        let plain = &mut self.engine.plain;
        let count = into.remaining().min(plain.len() - self.read);
        into.put_slice(&plain[self.read..self.read + count]);
        self.read += count;
        if self.read == plain.len() {
            self.read = 0;
            plain.clear();
            plain.shrink_to(SMALL);
        }
    }
}

impl AsyncRead for TlsStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            if !this.engine.plain.is_empty() {
                this.give(into);
                return Poll::Ready(Ok(()));
            }
            if this.ended {
                return Poll::Ready(Ok(()));
            }
            this.engine.incoming.reserve(READ);
            match pin!(this.tcp.read_buf(&mut this.engine.incoming)).poll(cx) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => {
                    // A quiet connection holds no more than it needs for a small message.
                    this.engine.incoming.shrink_to(SMALL);
                    return Poll::Pending;
                }
            }
            let advanced = this.advance(Wanted::Nothing);
            // A key update is answered, and an error told, also while nobody writes.
            if !this.engine.outgoing.is_empty() {
                let _ = this.poll_send(cx);
            }
            advanced?;
        }
    }
}

impl AsyncWrite for TlsStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.engine.outgoing.len() - this.sent >= MOST_UNSENT {
            ready!(this.poll_send(cx))?;
        }
        let data = &data[..data.len().min(RECORD)];
        this.advance(Wanted::Data(data))?;
        // Whatever does not go at once goes with the next write or flush.
        let _ = this.poll_send(cx)?;
        Poll::Ready(Ok(data.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().poll_send(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.closing {
            this.closing = true;
            this.advance(Wanted::Close)?;
        }
        ready!(this.poll_send(cx))?;
        Pin::new(&mut this.tcp).poll_shutdown(cx)
    }
}

/// RFC 8446, section 5.1: what one record holds.
const RECORD: usize = 16 * 1024;
/// Ciphertext that may wait for the socket before writers wait too.
const MOST_UNSENT: usize = 64 * 1024;
const SMALL: usize = 1024;
