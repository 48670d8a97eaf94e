use std::future::{self, poll_fn};
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::{Duration, SystemTime};

use futures_util::future::Either;
use metrics::counter;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::ProtocolError;
use super::flow::{After, Progress, Side, carry, settle};
use super::frame::Kind;
use super::header::Header;
use super::link::Link;
use super::stream::{Held, Stream};
use crate::transport::hbone::Refusal;
use crate::transport::metrics::{FAST_REFUSED, FastConnection};
use crate::transport::relay::{Ended, Outcome, RelayControl, TcpEnd};
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
    link: Link,
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
        Self { link: stream, peer, settings, discarding: None, _counted: counted }
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
        let late = Instant::now() + self.settings.idle;
        let mut check = pin!(tokio::time::sleep(Duration::ZERO));
        let header = poll_fn(|cx| {
            if drain.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Ok(None));
            }
            while check.as_mut().poll(cx).is_ready() {
                let now = Instant::now();
                if now >= late || !self.peer.is_current(SystemTime::now()) {
                    return Poll::Ready(Ok(None));
                }
                check.as_mut().reset(late.min(now + CHECKING));
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
            if let Poll::Ready(Err(error)) = self.link.poll_flush(cx) {
                return Poll::Ready(Err(error.into()));
            }
            ready!(self.link.poll_fill(cx))?;
            let Some(frame) = self.link.front() else { return Poll::Ready(Ok(None)) };
            match (frame.kind, &mut self.discarding) {
                (Kind::Open, _) => {
                    let header = Header::read(self.link.payload(frame));
                    self.link.pop();
                    self.discarding = None;
                    return Poll::Ready(Ok(Some(header)));
                }
                (Kind::Data, Some(left)) if frame.length <= *left => *left -= frame.length,
                (Kind::End, Some(_)) => {}
                _ => return Poll::Ready(Err(ProtocolError::Order.into())),
            }
            self.link.pop();
        }
    }

    /// Closes the connection in order: no flow is under way.
    pub async fn close(self) {
        self.link.close().await;
    }
}

/// One flow that a client asks for: to be accepted once the application has, or refused.
pub struct Request<'a> {
    server: &'a mut Server,
    header: Result<Header, ProtocolError>,
}

impl<'a> Request<'a> {
    /// Where to. Whether that is an address of the pod connected to is for the caller to check.
    pub fn header(&self) -> Result<&Header, ProtocolError> {
        self.header.as_ref().map_err(|error| *error)
    }

    /// Resolves when the client has given the request up: nobody waits for the application any more.
    pub async fn abandoned(&mut self) {
        let link = &mut self.server.link;
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
        match self.server.link.push(Kind::Refused, &refusal.status().to_be_bytes()) {
            Ok(()) => After::Reusable,
            Err(_) => After::Spent,
        }
    }

    /// Says that the application has accepted, and carries the flow to its end. Then the connection can take another,
    /// if what is returned settles.
    pub fn accept(self, application: TcpEnd, control: &'a RelayControl) -> impl Future<Output = (Ended, After)> {
        let link = &mut self.server.link;
        match link.push(Kind::Ok, &[]) {
            Ok(()) => Either::Left(carry(application, link, Progress::default(), None, Side::Server, control)),
            Err(error) => {
                let outcome = Outcome::ResetByDownstream;
                Either::Right(future::ready((
                    Ended { sent: 0, received: 0, outcome, error: Some(error) },
                    After::Spent,
                )))
            }
        }
    }
}

impl Server {
    /// Whether the connection can take another flow, after what became of the last one.
    pub async fn settled(&mut self, after: After) -> bool {
        match after {
            After::Reusable => true,
            After::Unsettled(awaited) => settle(&mut self.link, awaited).await,
            After::Spent => false,
        }
    }
}

/// A connection whose flow is carried by somebody else as a stream of bytes.
pub struct Lent {
    link: oneshot::Receiver<Link>,
    peer: PeerInfo,
    settings: ServerSettings,
    counted: FastConnection,
}

impl Server {
    /// Says that the flow is accepted that was asked for last, and hands it out as a stream of bytes.
    ///
    /// # Errors
    /// The connection broke.
    pub fn into_stream(mut self) -> std::io::Result<(Stream, Lent)> {
        self.link.push(Kind::Ok, &[])?;
        let (owner, link) = oneshot::channel();
        let stream = Stream::new(Held::Lent(Box::new(self.link), owner), Progress::default());
        Ok((stream, Lent { link, peer: self.peer, settings: self.settings, counted: self._counted }))
    }
}

impl Lent {
    /// Waits for the end of the flow. `None` where the connection can take no other.
    pub async fn returned(self) -> Option<Server> {
        let Self { link, peer, settings, counted } = self;
        let link = link.await.ok()?;
        Some(Server { link, peer, settings, discarding: None, _counted: counted })
    }
}

const CHECKING: Duration = Duration::from_secs(10);
/// What a client may send before it is answered, with room for a peer that counts differently.
const MOST_EARLY: usize = 1 << 20;
