use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::oneshot;

use super::ProtocolError;
use super::flow::{Awaited, Progress, settle};
use super::frame::Kind;
use super::link::Link;
use super::pool::Lease;

/// One accepted flow as a stream of bytes, without an application's socket at this end.
///
/// Its connection goes back to the pool once both sides have finished, also when the stream is dropped before that: what
/// is left to be said is said behind it.
pub struct Stream {
    /// None once dropped.
    held: Option<Held>,
    progress: Progress,
    /// The connection broke, or the peer reset the flow.
    broken: Option<Broken>,
}

/// A connection, and whose it is again behind the flow.
pub(super) enum Held {
    /// The pool's.
    Lease(Box<Lease>),
    /// The server's, which waits for it.
    Lent(Box<Link>, oneshot::Sender<Link>),
}

impl Held {
    fn link(&mut self) -> &mut Link {
        match self {
            Self::Lease(lease) => &mut lease.link,
            Self::Lent(link, _) => link,
        }
    }

    fn give_back(self) {
        match self {
            Self::Lease(lease) => lease.give_back(),
            // Who waited for it may have gone: then it closes.
            Self::Lent(link, owner) => drop(owner.send(*link)),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Broken {
    /// The peer sent RESET.
    Reset,
    Link,
}

impl Stream {
    pub(super) fn new(held: Held, progress: Progress) -> Self {
        Self { held: Some(held), progress, broken: None }
    }

    /// Whether this side has said its end.
    pub fn is_shut_down(&self) -> bool {
        self.progress.end_sent
    }

    fn link(&mut self) -> io::Result<&mut Link> {
        match self.broken {
            Some(_) => Err(reset_by_peer()),
            None => self.held.as_mut().map(Held::link).ok_or_else(reset_by_peer),
        }
    }

    fn poll_fill(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.progress.end_received {
            return Poll::Ready(Ok(()));
        }
        loop {
            let awaits_done = self.progress.end_sent && !self.progress.done_received;
            let link = self.link()?;
            if link.has_unsent() {
                // Such as our yes to the flow: who reads need not write first.
                let _ = link.poll_flush(cx)?;
            }
            let Some(frame) = link.front() else {
                if link.is_ended() {
                    let text = "the peer closed the tunnel with a flow under way";
                    return Poll::Ready(Err(io::Error::new(io::ErrorKind::UnexpectedEof, text)));
                }
                ready!(link.poll_fill(cx))?;
                continue;
            };
            match frame.kind {
                Kind::Data => {
                    link.copy_out(buffer);
                    return Poll::Ready(Ok(()));
                }
                Kind::End => {
                    link.pop();
                    self.progress.end_received = true;
                    if self.progress.end_sent {
                        self.say_done()?;
                        // What does not go now goes with the next flush, or behind the stream.
                        let _ = self.link()?.poll_flush(cx)?;
                    }
                    return Poll::Ready(Ok(()));
                }
                Kind::Done if awaits_done => {
                    link.pop();
                    self.progress.done_received = true;
                }
                Kind::Reset => {
                    link.pop();
                    self.broken = Some(Broken::Reset);
                    return Poll::Ready(Err(reset_by_peer()));
                }
                _ => return Poll::Ready(Err(ProtocolError::Order.into())),
            }
        }
    }

    /// Ready when the peer has reset the flow, behind its end.
    pub fn poll_failure(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        loop {
            let link = match self.link() {
                Ok(link) => link,
                Err(error) => return Poll::Ready(error),
            };
            match link.front().map(|frame| frame.kind) {
                Some(Kind::Reset) => {
                    link.pop();
                    self.broken = Some(Broken::Reset);
                    return Poll::Ready(reset_by_peer());
                }
                // It is for whoever reads.
                Some(_) => return link.poll_failure(cx),
                None if link.is_ended() => return Poll::Ready(io::ErrorKind::UnexpectedEof.into()),
                None => {
                    if let Err(error) = ready!(link.poll_fill(cx)) {
                        self.broken.get_or_insert(Broken::Link);
                        return Poll::Ready(error);
                    }
                }
            }
        }
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let link = self.link()?;
        while !link.has_room() {
            ready!(link.poll_flush(cx))?;
        }
        let chunk = &bytes[..bytes.len().min(CHUNK)];
        link.push(Kind::Data, chunk)?;
        // A socket that is full is no error: the next write waits for it.
        let _ = link.poll_flush(cx)?;
        Poll::Ready(Ok(chunk.len()))
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.progress.end_sent {
            self.link()?.push(Kind::End, &[])?;
            self.progress.end_sent = true;
            if self.progress.end_received {
                self.say_done()?;
            }
        }
        self.link()?.poll_flush(cx)
    }

    fn say_done(&mut self) -> io::Result<()> {
        self.link()?.push(Kind::Done, &[])?;
        self.progress.done_sent = true;
        Ok(())
    }

    /// An error of the connection is told once, and holds from then on.
    fn noted<T>(&mut self, outcome: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if let Poll::Ready(Err(_)) = &outcome {
            self.broken.get_or_insert(Broken::Link);
        }
        outcome
    }
}

impl AsyncRead for Stream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let outcome = self.poll_fill(cx, buffer);
        self.noted(outcome)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let outcome = self.poll_send(cx, bytes);
        self.noted(outcome)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let outcome = self.link().map_or_else(|error| Poll::Ready(Err(error)), |link| link.poll_flush(cx));
        self.noted(outcome)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let outcome = self.poll_close(cx);
        self.noted(outcome)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let Some(mut held) = self.held.take() else { return };
        let awaited = match self.broken {
            Some(Broken::Link) => return,
            Some(Broken::Reset) => match held.link().push(Kind::ResetAck, &[]) {
                Ok(()) => Some(Awaited::Nothing),
                Err(_) => return,
            },
            None if self.progress.end_sent => None,
            None => match held.link().push(Kind::Reset, &[]) {
                Ok(()) => Some(Awaited::Acknowledgement),
                Err(_) => return,
            },
        };
        let progress = self.progress;
        tokio::task::spawn_local(async move {
            let fit = match awaited {
                Some(awaited) => settle(held.link(), awaited).await,
                None => finish(held.link(), progress).await,
            };
            if fit {
                held.give_back();
            }
        });
    }
}

/// After our own END: waits for the peer's end and says DONE, so that the next flow can begin; whether it can.
async fn finish(link: &mut Link, mut progress: Progress) -> bool {
    let finishing = async {
        loop {
            if progress.end_received && !progress.done_sent {
                link.push(Kind::Done, &[])?;
                progress.done_sent = true;
            }
            std::future::poll_fn(|cx| link.poll_flush(cx)).await?;
            if progress.is_complete() {
                return io::Result::Ok(());
            }
            std::future::poll_fn(|cx| link.poll_fill(cx)).await?;
            let frame = link.front().ok_or_else(reset_by_peer)?;
            match frame.kind {
                // Nobody reads it any more.
                Kind::Data if !progress.end_received => {}
                Kind::End if !progress.end_received => progress.end_received = true,
                Kind::Done if !progress.done_received => progress.done_received = true,
                _ => return Err(reset_by_peer()),
            }
            link.pop();
        }
    };
    let finished = matches!(tokio::time::timeout(FINISHING, finishing).await, Ok(Ok(())));
    link.rest();
    finished
}

fn reset_by_peer() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, "the peer reset the flow")
}

/// Of bytes in one frame: it fits a record together with its head.
const CHUNK: usize = 16_000;
const FINISHING: Duration = Duration::from_secs(1);
