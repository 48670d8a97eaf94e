use std::io;
use std::task::{Context, Poll, ready};

use bytes::Bytes;

use super::buffer::{Buffer, SIZE};
use super::pipe::Pipe;
use super::{Broken, CHUNKS_A_TURN, Count, End, Ended, Lane, Lost, RelayControl, TcpEnd, carry, watch};

/// Joins two applications' sockets: as [`super::relay`], but bytes in bulk stay in the kernel.
///
/// Every control sees the bytes, and each may end it.
pub fn join<'a>(downstream: TcpEnd, upstream: TcpEnd, controls: &'a [&'a RelayControl]) -> impl Future<Output = Ended> {
    carry(downstream, upstream, [Joined::default(), Joined::default()], controls)
}

/// One direction between two sockets.
///
/// Small chunks are copied: one read and one write are cheaper than two splices and what they do to pages. Once a
/// read fills its buffer the next chunks go through a pipe, until they are small again.
#[derive(Default)]
struct Joined {
    /// Never empty between two turns.
    pipe: Option<Pipe>,
    /// Copied, and not written yet.
    pending: Bytes,
    bulk: bool,
    ended: bool,
    closed: bool,
    lost: Lost,
}

impl Lane<TcpEnd, TcpEnd> for Joined {
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut TcpEnd,
        to: &mut TcpEnd,
        count: &Count<'_>,
    ) -> Result<bool, Broken> {
        for _ in 0..CHUNKS_A_TURN {
            if self.holds() {
                match self.write(cx, to) {
                    Poll::Ready(Ok(written)) => count.add(written),
                    Poll::Ready(Err(error)) => return Err(Broken::To(error)),
                    Poll::Pending => return self.lost.watch(cx, from, to),
                }
                continue;
            }
            if self.ended {
                if !self.closed {
                    match to.poll_shutdown(cx) {
                        Poll::Ready(Ok(())) => self.closed = true,
                        Poll::Ready(Err(error)) => return Err(Broken::To(error)),
                        Poll::Pending => {}
                    }
                }
                return watch(self.closed, cx, from, to);
            }
            match from.poll_readable(cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => return Err(Broken::From(error)),
                Poll::Pending => return Ok(false),
            }
            match to.poll_capacity(cx) {
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(error)) => return Err(Broken::To(error)),
                Poll::Pending => return self.lost.watch(cx, from, to),
            }
            let pipe = if self.bulk && !from.has_ahead() { Pipe::take() } else { None };
            let moved = match pipe {
                Some(pipe) => self.fill(from, pipe),
                None => self.copy(from, to, count)?,
            };
            match moved {
                Ok(0) => {
                    self.lost.end()?;
                    self.ended = true;
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(Broken::From(error)),
            }
        }
        // Others on this thread have a turn.
        cx.waker().wake_by_ref();
        Ok(false)
    }
}

impl Joined {
    fn holds(&self) -> bool {
        self.pipe.is_some() || !self.pending.is_empty()
    }

    fn write(&mut self, cx: &mut Context<'_>, to: &mut TcpEnd) -> Poll<io::Result<usize>> {
        let Some(pipe) = &mut self.pipe else { return to.poll_write(cx, &mut self.pending) };
        loop {
            ready!(to.poll_capacity(cx))?;
            match pipe.drain(to.stream()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
                Ok(moved) => {
                    if pipe.is_empty() {
                        self.pipe.take().into_iter().for_each(Pipe::put_back);
                    }
                    return Poll::Ready(Ok(moved));
                }
            }
        }
    }

    fn fill(&mut self, from: &TcpEnd, mut pipe: Pipe) -> io::Result<usize> {
        let moved = pipe.fill(from.stream());
        match moved {
            Ok(1..) => self.pipe = Some(pipe),
            _ => pipe.put_back(),
        }
        self.bulk = moved.as_ref().is_ok_and(|moved| *moved >= BULK) || moved.is_err();
        moved
    }

    /// Reads once, and writes as much of it as the other side takes now. The outer error is the writing side's.
    fn copy(&mut self, from: &mut TcpEnd, to: &TcpEnd, count: &Count<'_>) -> Result<io::Result<usize>, Broken> {
        let mut buffer = Buffer::take();
        let read = match from.try_read(&mut buffer.bytes) {
            Ok(read) if read > 0 => read,
            other => return Ok(other),
        };
        self.bulk = read >= BULK;
        let written = match to.stream().try_write(&buffer.bytes[..read]) {
            Ok(written) => written,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            Err(error) => return Err(Broken::To(error)),
        };
        count.add(written);
        if written < read {
            self.pending = buffer.keep(written..read);
        }
        Ok(Ok(read))
    }
}

/// A chunk that is worth a pipe.
const BULK: usize = SIZE / 2;
