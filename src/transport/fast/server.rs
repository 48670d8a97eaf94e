use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::{Duration, SystemTime};

use metrics::counter;
use tokio::sync::oneshot;

use super::ProtocolError;
use super::flow::{After, Progress, Side, carry, settle};
use super::frame::Kind;
use super::header::Header;
use super::link::Link;
use super::stream::Stream;
use crate::transport::hbone::Refusal;
use crate::transport::metrics::{FAST_REFUSED, FastConnection};
use crate::transport::relay::{Ended, RelayControl, TcpEnd};
use crate::transport::tls::{PeerInfo, Session};

#[derive(Clone, Copy, Debug)]
pub struct ServerSettings {
    /// A connection without a flow is closed after so long. Clients close theirs earlier.
    pub idle: Duration,
}

impl Default for ServerSettings {
    fn default() -> Self {
        Self { idle: Duration::from_secs(300) }
    }
}

/// The server's side of one connection: flow after flow.
pub struct Server {
    /// None while it is lent to who reads a flow as a stream.
    link: Option<Link>,
    lent: Option<oneshot::Receiver<Link>>,
    peer: PeerInfo,
    settings: ServerSettings,
    /// What a client sent before it heard of a refusal may still come: so many bytes.
    discarding: Option<usize>,
    _counted: FastConnection,
}

/// Why a connection took its last flow, other than in order.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error("the peer broke the protocol: {0}")]
    Protocol(#[from] ProtocolError),
    #[error("the tunnel's connection broke: {0}")]
    Io(#[from] std::io::Error),
}

impl Server {
    pub fn new(session: Session<Link>, settings: ServerSettings) -> Self {
        // The handshake is over: a connection that was made ahead may wait for its first flow like for any other.
        let Session { stream, peer, permit: _ } = session;
        let counted = FastConnection::begin("server");
        Self { link: Some(stream), lent: None, peer, settings, discarding: None, _counted: counted }
    }

    /// Waits for the next flow. `None` once the connection has been closed in order: by the client, because it was
    /// idle, because its certificates or trust are no longer those of now, or because `drain` resolved.
    ///
    /// # Errors
    /// How it ended otherwise.
    pub async fn next(
        &mut self,
        mut drain: Pin<&mut impl Future<Output = ()>>,
    ) -> Result<Option<Request<'_>>, ServerError> {
        let mut late = pin!(tokio::time::sleep(self.settings.idle));
        let mut checks = tokio::time::interval(CHECKING);
        let header = poll_fn(|cx| {
            if drain.as_mut().poll(cx).is_ready() || late.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Ok(None));
            }
            while checks.poll_tick(cx).is_ready() {
                if !self.peer.is_current(SystemTime::now()) {
                    return Poll::Ready(Ok(None));
                }
            }
            self.poll_header(cx)
        });
        match header.await? {
            Some(header) if self.peer.is_trusted(SystemTime::now()) => Ok(Some(Request { server: self, header })),
            // A close that answers a header says that nobody has looked at it.
            Some(_) | None => Ok(None),
        }
    }

    fn poll_header(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<Result<Header, ProtocolError>>, ServerError>> {
        loop {
            let Some(link) = &mut self.link else { return Poll::Ready(Ok(None)) };
            if let Poll::Ready(Err(error)) = link.poll_flush(cx) {
                return Poll::Ready(Err(error.into()));
            }
            ready!(link.poll_fill(cx))?;
            let Some(frame) = link.front() else { return Poll::Ready(Ok(None)) };
            match (frame.kind, &mut self.discarding) {
                (Kind::Open, _) => {
                    let header = Header::read(link.payload(frame));
                    link.pop();
                    self.discarding = None;
                    return Poll::Ready(Ok(Some(header)));
                }
                (Kind::Data, Some(left)) if frame.length <= *left => *left -= frame.length,
                (Kind::End, Some(_)) => {}
                _ => return Poll::Ready(Err(ProtocolError::Order.into())),
            }
            link.pop();
        }
    }

    /// Closes the connection in order: no flow is under way.
    pub async fn close(self) {
        if let Some(link) = self.link {
            link.close().await;
        }
    }
}

/// One flow that a client asks for: to be accepted once the application has, or refused.
pub struct Request<'a> {
    server: &'a mut Server,
    header: Result<Header, ProtocolError>,
}

impl Request<'_> {
    /// Where to. Whether that is an address of the pod connected to is for the caller to check.
    pub fn header(&self) -> Result<&Header, ProtocolError> {
        self.header.as_ref().map_err(|error| *error)
    }

    /// Resolves when the client has given the request up: nobody waits for the application any more.
    pub async fn abandoned(&mut self) {
        let Some(link) = &mut self.server.link else { return };
        poll_fn(|cx| match link.front() {
            // It waits for the application.
            Some(_) => link.poll_failure(cx).map(drop),
            None => match link.poll_fill(cx) {
                Poll::Ready(Ok(())) if link.front().is_some() => link.poll_failure(cx).map(drop),
                Poll::Ready(_) => Poll::Ready(()),
                Poll::Pending => Poll::Pending,
            },
        })
        .await;
    }

    /// Says no: nothing of the flow was delivered.
    pub fn refuse(self, refusal: Refusal) -> After {
        counter!(FAST_REFUSED, "status" => refusal.status().to_string()).increment(1);
        self.server.discarding = Some(MOST_EARLY);
        let link = self.server.link.as_mut();
        match link.map(|link| link.push(Kind::Refused, &refusal.status().to_be_bytes())) {
            Some(Ok(())) => After::Reusable,
            Some(Err(_)) | None => After::Spent,
        }
    }

    /// Says that the application has accepted, and carries the flow to its end. Then the connection can take another,
    /// if what is returned settles.
    pub async fn accept(self, application: TcpEnd, control: &RelayControl) -> (Ended, After) {
        let broken = |error| {
            let outcome = crate::transport::relay::Outcome::ResetByDownstream;
            (Ended { sent: 0, received: 0, outcome, error }, After::Spent)
        };
        let Some(link) = &mut self.server.link else { return broken(None) };
        match link.push(Kind::Ok, &[]) {
            Ok(()) => carry(application, link, Progress::default(), None, Side::Server, control).await,
            Err(error) => broken(Some(error)),
        }
    }

    /// Says that the application has accepted, for who reads the flow rather than relaying it. The connection can take
    /// another behind it, if [`After::Lent`] settles.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn into_stream(self) -> std::io::Result<Stream> {
        let gone = || std::io::Error::from(std::io::ErrorKind::NotConnected);
        let mut link = self.server.link.take().ok_or_else(gone)?;
        link.push(Kind::Ok, &[])?;
        let (back, lent) = oneshot::channel();
        self.server.lent = Some(lent);
        Ok(Stream::accepted(link, back))
    }
}

impl Server {
    /// Whether the connection can take another flow, after what became of the last one.
    pub async fn settled(&mut self, after: After) -> bool {
        match after {
            After::Reusable => true,
            After::Unsettled(awaited) => match &mut self.link {
                Some(link) => settle(link, awaited).await,
                None => false,
            },
            After::Lent => {
                let Some(lent) = self.lent.take() else { return false };
                self.link = lent.await.ok();
                self.link.is_some()
            }
            After::Spent => false,
        }
    }
}

const CHECKING: Duration = Duration::from_secs(10);
/// What a client may send before it is answered, with room for a peer that counts differently.
const MOST_EARLY: usize = 1 << 20;
