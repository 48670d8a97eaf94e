//! What follows an upgrade: bytes both ways, of a protocol that is nobody's business here.

use bytes::Bytes;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, copy_bidirectional_with_sizes};
use tokio::sync::oneshot;

use super::body::Trail;
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
        Ok((client, application)) => join(&mut TokioIo::new(client), &mut TokioIo::new(application)).await,
        Err(error) => Err(error.to_string()),
    };
    over(trail, outcome);
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
