//! The client's connection, as hyper reads it.

use std::cell::{Cell, RefCell};
use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio::time::{Sleep, sleep};

use super::wire::{Inspector, Next, Violation};
use crate::transport::Stream;

/// A client that is known to speak HTTP.
pub struct Client {
    pub stream: Stream,
    /// What it has said already.
    pub said: BytesMut,
    pub speaks: Version,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Version {
    Http1,
    Http2,
}

/// What the check of a client's bytes and whoever serves it tell each other.
#[derive(Default)]
pub struct Check {
    inspector: RefCell<Inspector>,
    refused: Cell<Option<Violation>>,
    told: Notify,
    reader: RefCell<Option<Waker>>,
    /// Whether a request has come.
    begun: Cell<bool>,
}

impl Check {
    /// Notes that a request has come.
    pub fn begin(&self) {
        self.begun.set(true);
    }

    /// Why the client's bytes are refused, if they are.
    pub fn refused(&self) -> Option<Violation> {
        self.refused.get()
    }

    /// Completes when they are.
    pub async fn refusal(&self) {
        while self.refused().is_none() {
            self.told.notified().await;
        }
    }

    /// Whether it was a head that was refused, of which nobody has heard.
    pub fn is_head(&self) -> bool {
        !self.inspector.borrow().is_in_body()
    }

    /// A request for another protocol was granted.
    pub fn upgraded(&self) {
        self.inspector.borrow_mut().upgraded();
        self.wake();
    }

    /// Or was not.
    pub fn stayed(&self) {
        self.inspector.borrow_mut().stayed();
        self.wake();
    }

    fn wake(&self) {
        if let Some(waker) = self.reader.take() {
            waker.wake();
        }
    }

    /// In the midst of a body whoever reads it must learn of it; of a head nobody has heard.
    fn refuse(&self, violation: Violation) -> Poll<io::Result<()>> {
        self.refused.set(Some(violation));
        self.told.notify_one();
        if self.is_head() {
            return self.silence();
        }
        Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, violation)))
    }

    /// Nothing more comes. Where requests came before, their answers may still be on their way, and this must not look as
    /// if the client had gone: whoever serves it was told, and ends behind them.
    fn silence(&self) -> Poll<io::Result<()>> {
        if self.begun.get() { Poll::Pending } else { Poll::Ready(Ok(())) }
    }
}

/// Hands on the bytes of a client that are beyond doubt. Dropped before it was shut down, it resets.
pub struct ClientIo {
    stream: Stream,
    /// What was read, and not handed on.
    raw: BytesMut,
    /// So many bytes of it are beyond doubt.
    cleared: usize,
    ended: bool,
    /// The time for a head that has begun.
    owed: Option<Pin<Box<Sleep>>>,
    /// None: the protocol's own framing leaves no room for doubt.
    check: Option<Rc<Check>>,
}

impl ClientIo {
    pub fn new(client: Client, check: Option<Rc<Check>>) -> Self {
        let Client { stream, said, .. } = client;
        let cleared = if check.is_some() { 0 } else { said.len() };
        Self { stream, raw: said, cleared, ended: false, owed: None, check }
    }

    /// The connection alone: what comes of it is nobody's.
    pub fn into_rest(self) -> Stream {
        self.stream
    }

    fn poll_next(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            if self.cleared > 0 {
                self.hand_on(buffer);
                return Poll::Ready(Ok(()));
            }
            let Some(check) = self.check.clone() else { return Pin::new(&mut self.stream).poll_read(cx, buffer) };
            if check.refused().is_some() {
                return check.silence();
            }
            if !self.raw.is_empty() {
                let next = check.inspector.borrow_mut().next(&self.raw);
                match next {
                    Ok(Next::Pass(count)) => {
                        self.cleared = count;
                        self.owed = None;
                        continue;
                    }
                    Ok(Next::More(_)) => {
                        let owed = self.owed.get_or_insert_with(|| Box::pin(sleep(HEAD_TIME)));
                        if owed.as_mut().poll(cx).is_ready() {
                            return check.refuse(Violation::Slow);
                        }
                    }
                    Ok(Next::Wait) => {
                        check.reader.replace(Some(cx.waker().clone()));
                        return Poll::Pending;
                    }
                    Err(violation) => return check.refuse(violation),
                }
            }
            if self.ended {
                return Poll::Ready(Ok(()));
            }
            ready!(self.poll_more(cx))?;
        }
    }

    fn hand_on(&mut self, buffer: &mut ReadBuf<'_>) {
        let count = self.cleared.min(buffer.remaining());
        buffer.put_slice(&self.raw[..count]);
        self.raw.advance(count);
        self.cleared -= count;
        if self.raw.is_empty() {
            // A client that is silent holds no buffer.
            self.raw = BytesMut::new();
        }
    }

    fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut room = [const { MaybeUninit::uninit() }; CHUNK];
        let mut read = ReadBuf::uninit(&mut room);
        ready!(Pin::new(&mut self.stream).poll_read(cx, &mut read))?;
        self.ended = read.filled().is_empty();
        self.raw.extend_from_slice(read.filled());
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for ClientIo {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.poll_next(cx, buffer)
    }
}

impl AsyncWrite for ClientIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

const CHUNK: usize = 8 * 1024;
/// From a head's first byte to its last.
const HEAD_TIME: Duration = Duration::from_secs(30);
