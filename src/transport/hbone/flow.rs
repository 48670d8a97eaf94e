use std::io;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};

use super::connection::StreamGuard;
use super::io_error;
use super::send_budget::SendBudget;
use crate::transport::relay::End;
use crate::transport::unsent::Unsent;

/// One accepted CONNECT stream: END_STREAM is half-close, RST_STREAM is reset.
pub struct Flow {
    send: SendStream<Bytes>,
    recv: RecvStream,
    guard: StreamGuard,
    reserved: bool,
    /// Read, and not taken.
    ahead: Option<Bytes>,
    baggage: Option<String>,
    unsent: Arc<Unsent<SendBudget>>,
}

impl Flow {
    pub(super) fn new(send: SendStream<Bytes>, recv: RecvStream, guard: StreamGuard, baggage: Option<String>) -> Self {
        Self { send, recv, guard, reserved: false, ahead: None, baggage, unsent: Unsent::new(SendBudget::default()) }
    }

    /// What the peer says of itself, for telemetry.
    pub fn baggage(&self) -> Option<&str> {
        self.baggage.as_deref()
    }

    /// Ready when the far side has said something, or has closed or reset: nothing of it is taken.
    pub fn poll_spoken(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.ahead.is_none()
            && let Ok(Some(data)) = ready!(self.poll_read(cx, usize::MAX))
        {
            self.ahead = Some(data);
        }
        Poll::Ready(())
    }

    fn broken(&mut self, cx: &mut Context<'_>) -> io::Error {
        match self.send.poll_reset(cx) {
            Poll::Ready(Ok(reason)) => reset_by(reason),
            Poll::Ready(Err(error)) => io_error(error),
            Poll::Pending => io::ErrorKind::BrokenPipe.into(),
        }
    }
}

impl End for Flow {
    fn poll_readable(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Its data lies in the connection already, within the window.
        Poll::Ready(Ok(()))
    }

    fn poll_read(&mut self, cx: &mut Context<'_>, _: usize) -> Poll<io::Result<Option<Bytes>>> {
        if let Some(ahead) = self.ahead.take() {
            return Poll::Ready(Ok(Some(ahead)));
        }
        loop {
            return match self.recv.poll_data(cx) {
                Poll::Ready(Some(Ok(data))) if data.is_empty() => continue,
                Poll::Ready(Some(Ok(data))) => Poll::Ready(Ok(Some(data))),
                Poll::Ready(Some(Err(error))) => Poll::Ready(Err(io_error(error))),
                // RFC 9113, section 8.5: a tunnel's stream carries no trailers.
                Poll::Ready(None) if !self.recv.is_end_stream() => Poll::Ready(Err(reset_by(Reason::PROTOCOL_ERROR))),
                Poll::Ready(None) => Poll::Ready(Ok(None)),
                Poll::Pending => Poll::Pending,
            };
        }
    }

    fn delivered(&mut self, bytes: usize) -> io::Result<()> {
        self.guard.shared.delivered(bytes);
        self.recv.flow_control().release_capacity(bytes).map_err(io_error)
    }

    fn poll_capacity(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let Poll::Ready(room) = self.unsent.poll_room(cx) else {
            self.release();
            return Poll::Pending;
        };
        if self.send.capacity() == 0 {
            self.send.reserve_capacity(CHUNK);
            self.reserved = true;
        }
        loop {
            let capacity = self.send.capacity();
            if capacity > 0 {
                return Poll::Ready(Ok(capacity.min(room)));
            }
            match self.send.poll_capacity(cx) {
                Poll::Ready(Some(Ok(_))) => {}
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(io_error(error))),
                Poll::Ready(None) => return Poll::Ready(Err(self.broken(cx))),
                Poll::Pending => return Poll::Pending,
            }
        }
    }

    fn release(&mut self) {
        if self.reserved {
            // Else this silent stream would keep part of the connection's window from the others.
            self.send.reserve_capacity(0);
            self.reserved = false;
        }
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, data: &mut Bytes) -> Poll<io::Result<usize>> {
        let capacity = match self.poll_capacity(cx) {
            Poll::Ready(Ok(capacity)) => capacity,
            Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
            Poll::Pending => return Poll::Pending,
        };
        let written = capacity.min(data.len());
        match self.send.send_data(self.unsent.track(data.split_to(written)), false) {
            Ok(()) => Poll::Ready(Ok(written)),
            Err(_) => Poll::Ready(Err(self.broken(cx))),
        }
    }

    fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.send.send_data(Bytes::new(), true) {
            Ok(()) => Poll::Ready(Ok(())),
            Err(_) => Poll::Ready(Err(self.broken(cx))),
        }
    }

    fn poll_sent(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.unsent.poll_none(cx).is_ready() {
            return Poll::Ready(());
        }
        End::poll_reset(self, cx).map(drop)
    }

    fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        match self.send.poll_reset(cx) {
            Poll::Ready(Ok(reason)) => Poll::Ready(reset_by(reason)),
            Poll::Ready(Err(error)) => Poll::Ready(io_error(error)),
            Poll::Pending => Poll::Pending,
        }
    }

    fn finish(&mut self) {}

    fn reset(&mut self) {
        self.send.send_reset(Reason::CANCEL);
    }
}

fn reset_by(reason: Reason) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, format!("the peer reset the stream: {reason}"))
}

/// What is reserved of the window at a time: as much as one read takes.
const CHUNK: usize = 64 * 1024;
