//! The client's connection, as hyper reads and writes it.

use std::cell::{Cell, RefCell};
use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio::time::{Sleep, sleep};

use super::interim::Interim;
use super::room::{Room, Share, Want};
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
pub struct Check {
    /// What its pod's requests may hold.
    room: Arc<Room>,
    inspector: RefCell<Inspector>,
    refused: Cell<Option<Violation>>,
    told: Notify,
    reader: RefCell<Option<Waker>>,
    /// Whether a request has come.
    begun: Cell<bool>,
    /// The client has closed its direction, and may wait for an answer still.
    closed: Cell<bool>,
    /// What it is told ahead of an answer.
    pub interim: Arc<Interim>,
}

impl Check {
    pub fn new(room: Arc<Room>) -> Self {
        Self {
            room,
            inspector: RefCell::default(),
            refused: Cell::default(),
            told: Notify::new(),
            reader: RefCell::default(),
            begun: Cell::default(),
            closed: Cell::default(),
            interim: Arc::default(),
        }
    }

    /// Notes that a request has come.
    pub fn begin(&self) {
        self.begun.set(true);
    }

    /// Why the client's bytes are refused, if they are.
    pub fn refused(&self) -> Option<Violation> {
        self.refused.get()
    }

    /// Completes when no more requests come: what the client says is refused, or it has closed its direction.
    pub async fn over(&self) {
        while self.refused().is_none() && !self.closed.get() {
            self.told.notified().await;
        }
    }

    /// Whether the client has closed its direction behind its last request.
    pub fn is_closed(&self) -> bool {
        self.closed.get()
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

    /// The client's direction has come to its end. True: that ends nothing, for it may wait for an answer.
    fn close(&self, cx: &mut Context<'_>) -> bool {
        let inspector = self.inspector.borrow();
        if !self.begun.get() || inspector.is_in_body() || inspector.is_upgraded() {
            return false;
        }
        self.reader.replace(Some(cx.waker().clone()));
        if !inspector.is_asked() && !self.closed.replace(true) {
            self.told.notify_one();
        }
        true
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
    /// What a head takes that is not whole, beyond its first bytes.
    share: Option<Share>,
    /// None: the protocol's own framing leaves no room for doubt.
    check: Option<Rc<Check>>,
    /// What is said ahead of an answer, and not written yet.
    ahead: Bytes,
    /// Whether all that hyper has written before is on its way: only then something may be said in between.
    flushed: bool,
}

impl ClientIo {
    pub fn new(client: Client, check: Option<Rc<Check>>) -> Self {
        let Client { stream, said, .. } = client;
        let cleared = if check.is_some() { 0 } else { said.len() };
        Self {
            stream,
            raw: said,
            cleared,
            ended: false,
            owed: None,
            share: None,
            check,
            ahead: Bytes::new(),
            flushed: true,
        }
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
                        (self.owed, self.share) = (None, None);
                        continue;
                    }
                    Ok(Next::More(_)) => {
                        let owed = self.owed.get_or_insert_with(|| Box::pin(sleep(HEAD_TIME)));
                        if owed.as_mut().poll(cx).is_ready() {
                            return check.refuse(Violation::Slow);
                        }
                        if !self.has_room(&check.room) {
                            return check.refuse(Violation::Crowded);
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
                return match check.close(cx) {
                    // Whoever has gone altogether is found out at least where its end is a reset.
                    true => self.stream.poll_failure(cx).map(Err),
                    false => Poll::Ready(Ok(())),
                };
            }
            ready!(self.poll_more(cx))?;
        }
    }

    /// Whether there is room for what was read of a head.
    fn has_room(&mut self, room: &Arc<Room>) -> bool {
        if self.raw.len() <= CHUNK || self.ended {
            return true;
        }
        let held = self.share.as_ref().map_or(0, Share::bytes);
        room.widen(&mut self.share, Want::Head, (self.raw.len() - CHUNK).saturating_sub(held))
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

    /// Writes what is to be said ahead of the answer that hyper has not begun to write.
    fn poll_ahead(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Some(check) = self.check.clone() else { return Poll::Ready(Ok(())) };
        loop {
            if self.ahead.is_empty() {
                // In the midst of what hyper writes nothing can be said.
                match self.flushed.then(|| check.interim.take(cx)).flatten() {
                    Some(words) => self.ahead = words,
                    None => return Poll::Ready(Ok(())),
                }
            }
            let written = ready!(Pin::new(&mut self.stream).poll_write(cx, &self.ahead))?;
            self.ahead.advance(written);
            if self.ahead.is_empty() {
                check.interim.written();
            }
        }
    }
}

impl AsyncRead for ClientIo {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.poll_next(cx, buffer)
    }
}

impl AsyncWrite for ClientIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.poll_ahead(cx))?;
        self.flushed = false;
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_ahead(cx))?;
        self.flushed = false;
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // hyper asks for it once it has nothing left to write.
        self.flushed = true;
        ready!(self.poll_ahead(cx))?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

const CHUNK: usize = 8 * 1024;
/// From a head's first byte to its last.
const HEAD_TIME: Duration = Duration::from_secs(30);
