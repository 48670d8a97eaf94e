use std::io;
use std::net::Shutdown;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use nix::errno::Errno;
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::End;
use super::buffer::{self, SIZE};

/// An application's socket.
///
/// It has SO_LINGER {1, 0} from the start, so that an agent that is killed resets it: nobody takes a connection that
/// was cut for one that is complete. The option goes once both directions have closed in order.
pub struct TcpEnd {
    stream: Arc<TcpStream>,
    /// What was read from it before.
    ahead: Bytes,
    /// What the socket said behind that.
    broken: Option<io::Error>,
    failure: Watch,
}

/// Waits for an error of a socket that nobody reads from; made when first polled.
#[derive(Default)]
pub struct Watch(Option<Pin<Box<dyn Future<Output = io::Error> + Send>>>);

impl Watch {
    pub fn poll(&mut self, cx: &mut Context<'_>, stream: &Arc<TcpStream>) -> Poll<io::Error> {
        let failure = self.0.get_or_insert_with(|| {
            let stream = stream.clone();
            Box::pin(async move {
                match stream.ready(Interest::ERROR).await {
                    Ok(_) => match stream.take_error() {
                        Ok(Some(error)) | Err(error) => error,
                        Ok(None) => io::ErrorKind::ConnectionReset.into(),
                    },
                    Err(error) => error,
                }
            })
        });
        let failure = ready!(failure.as_mut().poll(cx));
        self.0 = None;
        Poll::Ready(failure)
    }
}

impl TcpEnd {
    /// # Errors
    /// The kernel refused the option: the socket is broken already.
    pub fn new(stream: TcpStream) -> io::Result<Self> {
        SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
        Ok(Self { stream: Arc::new(stream), ahead: Bytes::new(), broken: None, failure: Watch::default() })
    }

    /// One whose parts were [taken](Self::into_parts).
    pub fn of_parts(stream: Arc<TcpStream>, ahead: Bytes, broken: Option<io::Error>) -> Self {
        Self { stream, ahead, broken, failure: Watch::default() }
    }

    /// Gives back what was read from the socket already, and how it broke then: that comes first.
    #[must_use]
    pub fn with_ahead(self, (ahead, broken): (Bytes, Option<io::Error>)) -> Self {
        Self { ahead, broken, ..self }
    }

    /// Whether something comes before what is in the socket.
    pub(super) fn has_ahead(&self) -> bool {
        !self.ahead.is_empty() || self.broken.is_some()
    }

    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// The socket, what was read from it before, and how it broke then.
    pub fn into_parts(self) -> (Arc<TcpStream>, Bytes, Option<io::Error>) {
        (self.stream, self.ahead, self.broken)
    }

    pub(in crate::transport) fn shared(&self) -> Arc<TcpStream> {
        self.stream.clone()
    }

    /// Reads what is there; 0 once the other side has closed in order.
    pub(super) fn try_read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if !self.ahead.is_empty() {
            let count = into.len().min(self.ahead.len());
            self.ahead.split_to(count).copy_to_slice(&mut into[..count]);
            return Ok(count);
        }
        if let Some(error) = self.broken.take() {
            return Err(error);
        }
        let mut count = 0;
        let outcome = self.stream.try_io(Interest::READABLE, || {
            count = loop {
                match nix::unistd::read(&*self.stream, &mut *into) {
                    Err(Errno::EINTR) => {}
                    other => break other?,
                }
            };
            // A short read emptied the socket: saying so now saves the read that would find nothing.
            if count > 0 && count < into.len() { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
        });
        if count > 0 { Ok(count) } else { outcome.map(|()| 0) }
    }
}

impl End for TcpEnd {
    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.has_ahead() {
            return Poll::Ready(Ok(()));
        }
        self.stream.poll_read_ready(cx)
    }

    fn poll_read(&mut self, cx: &mut Context<'_>, limit: usize) -> Poll<io::Result<Option<Bytes>>> {
        let mut data = Bytes::new();
        let outcome = buffer::read_with(limit, |into| self.try_read(into)).map(|read| data = read);
        match outcome {
            _ if !data.is_empty() => Poll::Ready(Ok(Some(data))),
            Ok(()) => Poll::Ready(Ok(None)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => match self.stream.poll_read_ready(cx) {
                Poll::Ready(Ok(())) => {
                    cx.waker().wake_by_ref();
                    Poll::Pending
                }
                Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
                Poll::Pending => Poll::Pending,
            },
            Err(error) => Poll::Ready(Err(error)),
        }
    }

    fn delivered(&mut self, _: usize) -> io::Result<()> {
        Ok(())
    }

    fn poll_capacity(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        self.stream.poll_write_ready(cx).map_ok(|()| SIZE)
    }

    fn release(&mut self) {}

    fn poll_write(&mut self, cx: &mut Context<'_>, data: &mut Bytes) -> Poll<io::Result<usize>> {
        loop {
            match self.stream.poll_write_ready(cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => return Poll::Pending,
            }
            match self.stream.try_write(data) {
                Ok(written) => {
                    data.advance(written);
                    return Poll::Ready(Ok(written));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    fn poll_shutdown(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(SockRef::from(&*self.stream).shutdown(Shutdown::Write))
    }

    fn poll_sent(&mut self, _: &mut Context<'_>) -> Poll<()> {
        // The kernel has it.
        Poll::Ready(())
    }

    fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        self.failure.poll(cx, &self.stream)
    }

    fn finish(&mut self) {
        // Refused only for a socket that is broken: then there is nothing left to close in order.
        let _ = SockRef::from(&*self.stream).set_linger(None);
    }

    fn reset(&mut self) {
        // Closing it sends the reset, by the option that it has had from the start.
        self.failure = Watch::default();
    }
}
