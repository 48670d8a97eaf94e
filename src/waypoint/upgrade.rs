//! What follows an upgrade: bytes both ways, of a protocol that is nobody's business here.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf, copy_bidirectional_with_sizes};
use tokio::sync::oneshot;

use super::body::Trail;
use super::cause::of_http2;
use super::client::ClientIo;
use super::upstream::Handed;
use crate::mesh::Reason;

/// An HTTP/1 connection to an application that is about to speak another protocol.
pub struct Tunnel {
    pub handed: oneshot::Receiver<Handed>,
    pub trail: Trail,
}

impl Tunnel {
    /// Joins the client with it; `said` is what the client has said behind its request.
    pub async fn carry(self, mut client: ClientIo, said: Bytes) {
        let Self { handed, trail } = self;
        let Ok((mut line, heard)) = handed.await else {
            return over(trail, Err("the application's connection has gone".to_owned()));
        };
        let begun = async {
            line.write_all(&said).await?;
            client.write_all(&heard).await
        };
        let outcome = match begun.await {
            Ok(()) => join(&mut client, &mut line).await,
            Err(error) => Err(error.to_string()),
        };
        let before = (said.len() as u64, heard.len() as u64);
        over(trail, outcome.map(|(sent, received)| (sent + before.0, received + before.1)));
    }
}

/// As [`Tunnel::carry`], of two HTTP/2 streams: RFC 8441.
pub async fn carry_streams(client: OnUpgrade, application: OnUpgrade, trail: Trail) {
    let outcome = match futures_util::future::try_join(client, application).await {
        Ok((client, application)) => {
            let mut application = Heard { stream: TokioIo::new(application), is_deaf: false };
            join(&mut TokioIo::new(client), &mut application).await
        }
        Err(error) => Err(error.to_string()),
    };
    over(trail, outcome);
}

/// The stream to an application, which may end by saying that it wants to hear no more (RFC 9113, section 8.1: RST_STREAM
/// with NO_ERROR): that is no failure, and what is said from then on is nobody's.
struct Heard<T> {
    stream: T,
    is_deaf: bool,
}

impl<T> Heard<T> {
    fn written<U>(&mut self, outcome: Poll<io::Result<U>>, instead: U) -> Poll<io::Result<U>> {
        match outcome {
            Poll::Ready(Err(error)) if self.is_deaf || is_no_error(&error) => {
                self.is_deaf = true;
                Poll::Ready(Ok(instead))
            }
            outcome => outcome,
        }
    }
}

fn is_no_error(error: &io::Error) -> bool {
    let first = error.get_ref().map(|error| error as &(dyn std::error::Error + 'static));
    of_http2(first).any(|error| error.reason() == Some(h2::Reason::NO_ERROR))
}

impl<T: AsyncRead + Unpin> AsyncRead for Heard<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Heard<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.written(outcome, bytes.len())
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let outcome = Pin::new(&mut self.stream).poll_flush(cx);
        self.written(outcome, ())
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let outcome = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.written(outcome, ())
    }
}

async fn join(
    client: &mut (impl AsyncRead + AsyncWrite + Unpin),
    application: &mut (impl AsyncRead + AsyncWrite + Unpin),
) -> Result<(u64, u64), String> {
    copy_bidirectional_with_sizes(client, application, CHUNK, CHUNK).await.map_err(|error| error.to_string())
}

fn over(mut trail: Trail, outcome: Result<(u64, u64), String>) {
    match outcome {
        Ok((sent, received)) => {
            trail.sent.set(sent);
            trail.received = received;
        }
        Err(cause) => trail.record.amend(|info| {
            info.reason = Some(Reason::Reset);
            info.detail = format!("behind the upgrade: {cause}");
        }),
    }
    trail.end();
}

const CHUNK: usize = 16 * 1024;
