use std::io;
use std::net::Shutdown;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
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
    /// Waits for an error of the socket; made when first wanted.
    failure: Option<Pin<Box<dyn Future<Output = io::Error> + Send>>>,
}

impl TcpEnd {
    /// # Errors
    /// The kernel refused the option: the socket is broken already.
    pub fn new(stream: TcpStream) -> io::Result<Self> {
        SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
        Ok(Self { stream: Arc::new(stream), failure: None })
    }

    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Reads what is there; 0 once the other side has closed in order.
    pub(super) fn try_read(&self, into: &mut [u8]) -> io::Result<usize> {
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
        let failure = self.failure.get_or_insert_with(|| {
            let stream = self.stream.clone();
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
        failure.as_mut().poll(cx)
    }

    fn finish(&mut self) {
        // Refused only for a socket that is broken: then there is nothing left to close in order.
        let _ = SockRef::from(&*self.stream).set_linger(None);
    }

    fn reset(&mut self) {
        // Closing it sends the reset, by the option that it has had from the start.
        self.failure = None;
    }
}
