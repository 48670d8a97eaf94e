//! What carries a connection, as a stream of bytes: for who speaks a protocol over it rather than relaying it.

use std::io;
use std::net::Shutdown;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;

use super::relay::{End, Watch};
use super::{fast, hbone};

/// One connection, whatever carries it. Dropped before its writing side was shut down, it is reset.
pub enum Stream {
    Tcp(Socket),
    Hbone(HboneStream),
    Fast(fast::Stream),
}

impl Stream {
    pub fn fast(flow: fast::Flow) -> Self {
        Self::Fast(flow.into_stream())
    }

    pub fn hbone(flow: hbone::Flow) -> Self {
        Self::Hbone(HboneStream { flow, ahead: Bytes::new(), ended: false, shut_down: false })
    }

    /// Whether this side has closed its direction in order.
    pub fn is_shut_down(&self) -> bool {
        match self {
            Self::Tcp(socket) => socket.shut_down,
            Self::Hbone(stream) => stream.shut_down,
            Self::Fast(stream) => stream.is_shut_down(),
        }
    }

    /// Ready when the other side has reset it, behind the end of what it had to say.
    pub fn poll_failure(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        match self {
            Self::Tcp(socket) => socket.failure.poll(cx, &socket.stream),
            Self::Hbone(stream) => stream.flow.poll_reset(cx),
            Self::Fast(stream) => stream.poll_failure(cx),
        }
    }
}

/// An application's socket. It has SO_LINGER {1, 0} from the start; the option goes once it was shut down in order.
pub struct Socket {
    stream: Arc<TcpStream>,
    shut_down: bool,
    failure: Watch,
}

impl Socket {
    pub fn new(stream: impl Into<Arc<TcpStream>>) -> Self {
        Self { stream: stream.into(), shut_down: false, failure: Watch::default() }
    }
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let room = buffer.remaining();
        loop {
            ready!(self.stream.poll_read_ready(cx))?;
            match self.stream.try_read_buf(buffer) {
                Ok(read) => {
                    if (1..room).contains(&read) {
                        self.expect_nothing();
                    }
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl Socket {
    /// Less than there was room for was all that there is: the next read waits, and saves the call that would find nothing.
    /// What came since the last read is still to be heard of, for a thread hears of its sockets between its tasks.
    fn expect_nothing(&self) {
        let _ = self.stream.try_io(Interest::READABLE, || io::Result::<()>::Err(io::ErrorKind::WouldBlock.into()));
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.stream.poll_write_ready(cx))?;
            match self.stream.try_write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                outcome => return Poll::Ready(outcome),
            }
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.stream.poll_write_ready(cx))?;
            match self.stream.try_write_vectored(slices) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                outcome => return Poll::Ready(outcome),
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.shut_down {
            return Poll::Ready(Ok(()));
        }
        self.shut_down = true;
        let socket = SockRef::from(&*self.stream);
        // Refused only for a socket that is broken: then there is nothing left to close in order.
        let _ = socket.set_linger(None);
        Poll::Ready(socket.shutdown(Shutdown::Write))
    }
}

/// One HBONE stream.
pub struct HboneStream {
    flow: hbone::Flow,
    /// Read from the flow, and not yet taken.
    ahead: Bytes,
    ended: bool,
    shut_down: bool,
}

impl AsyncRead for HboneStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.ahead.is_empty() && !self.ended {
            match ready!(self.flow.poll_read(cx, usize::MAX))? {
                Some(data) => self.ahead = data,
                None => self.ended = true,
            }
        }
        let count = self.ahead.len().min(buffer.remaining());
        buffer.put_slice(&self.ahead[..count]);
        self.ahead.advance(count);
        if count > 0 {
            self.flow.delivered(count)?;
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for HboneStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let capacity = ready!(self.flow.poll_capacity(cx))?;
        let mut data = Bytes::copy_from_slice(&bytes[..bytes.len().min(capacity)]);
        let outcome = self.flow.poll_write(cx, &mut data);
        self.flow.release();
        outcome
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.shut_down {
            return Poll::Ready(Ok(()));
        }
        self.shut_down = true;
        self.flow.poll_shutdown(cx)
    }
}

impl Drop for HboneStream {
    fn drop(&mut self) {
        if !self.shut_down {
            self.flow.reset();
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::Hbone(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::Fast(stream) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Hbone(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Fast(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
            Self::Hbone(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
            Self::Fast(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        matches!(self, Self::Tcp(_))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Self::Hbone(stream) => Pin::new(stream).poll_flush(cx),
            Self::Fast(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Hbone(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Fast(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
