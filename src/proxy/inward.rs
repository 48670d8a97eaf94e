//! The way into a pod of this node for a client whose requests policy reads: each is decided as it arrives, whoever sent
//! it and whichever way it came.

use std::cell::Cell;
use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use bytes::BytesMut;
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use http::HeaderMap;
use http::request::Parts;
use tokio::io::{AsyncRead, ReadBuf};
use tokio::net::TcpStream;

use super::connections::{Connection, Registered};
use super::counted::Counted;
use super::dial;
use super::failure::Failure;
use super::inbound::{allowed, asked, decide_request, token_rules};
use super::line::Line;
use super::onward::{Bond, Onward, RequestPlace};
use super::pods::ServedPod;
use super::source_ports::Held;
use super::workers::Thread;
use super::{Proxy, pods};
use crate::mesh::{Identity, Reason, ServiceDestination};
use crate::model::Model;
use crate::policy::RequestHead;
use crate::telemetry::{ConnectionInfo, Telemetry};
use crate::transport::Stream;
use crate::transport::relay::{Ended, Outcome};
use crate::transport::tls::PeerInfo;
use crate::waypoint::wire::{self, Heard};
use crate::waypoint::{self, Client, Look, Permit, Place, Pool, Receiver, Refusal, Room, Version, View};

/// A connection to an application of this node, made for a client, and the port that it holds.
pub type Dialled = (TcpStream, Held);

/// Who the client is, and where it has come.
pub struct Inward {
    pub proxy: Arc<Proxy>,
    pub pod: Arc<ServedPod>,
    pub client: SocketAddr,
    pub identity: Option<Identity>,
    /// The waypoint that says so.
    pub via: Option<Identity>,
    /// Of the tunnel that it has come through.
    pub peer: Option<Arc<PeerInfo>>,
    /// The address that the application sees.
    pub seen: IpAddr,
    pub to: SocketAddr,
}

impl Inward {
    /// Serves the requests of a client that was let in, over the connection to the application that was made for it, and
    /// others where that does not last. What is no request is reset: nobody could say what policy makes of it.
    pub async fn serve(self, mut stream: Stream, said: BytesMut, dialled: Dialled, connection: &Registered) {
        connection.connected();
        let hearing = hear(&mut stream, said);
        let heard = tokio::select! {
            heard = hearing => heard,
            reason = connection.control.reset_requested() => Err(Failure::new(reason, "ended before a request")),
        };
        let (speaks, said) = match heard {
            Ok(Some(heard)) => heard,
            Ok(None) => return ended(connection, Outcome::Orderly),
            Err(failure) => return connection.failed(&failure),
        };
        let client = Client { stream, said, speaks };
        let place = self.place(connection.shared().clone(), Some(dialled));
        tokio::select! {
            () = Box::pin(waypoint::serve(client, Rc::new(place))) => ended(connection, Outcome::Orderly),
            // Dropped halfway, it resets.
            reason = connection.control.reset_requested() => ended(connection, Outcome::ResetByUs(reason)),
        }
    }

    /// Where the requests of one client are served that was let in.
    pub(super) fn place(self, connection: Arc<Connection>, dialled: Option<Dialled>) -> impl Place {
        Served { inward: self, connection, dialled: Cell::new(dialled), pool: Pool::default() }
    }
}

/// Completes once what a client's tunnel rests on holds no more; never where there is no tunnel.
pub async fn outlived(peer: Option<Arc<PeerInfo>>) {
    match peer {
        Some(peer) => peer.outlived().await,
        None => std::future::pending().await,
    }
}

fn ended(connection: &Connection, outcome: Outcome) {
    let (sent, received) = (connection.control.sent(), connection.control.received());
    connection.ended(&Ended { sent, received, outcome, error: None });
}

/// What the client speaks, and what it has said of it; none where it has nothing to say.
async fn hear(stream: &mut Stream, mut said: BytesMut) -> Result<Option<(Version, BytesMut)>, Failure> {
    let mut room = [0; CHUNK];
    let mut is_over = false;
    loop {
        match wire::hear(&said, true, is_over) {
            Heard::Requests(_) if said.is_empty() => return Ok(None),
            Heard::Requests(speaks) => return Ok(Some((speaks, said))),
            Heard::Bytes | Heard::Foreign => {
                let text = "a policy reads the requests to this port, and what came is no HTTP";
                return Err(Failure::new(Reason::Protocol, text));
            }
            Heard::NotYet => {}
        }
        let mut read = ReadBuf::new(&mut room);
        let outcome: io::Result<()> = poll_fn(|cx| Pin::new(&mut *stream).poll_read(cx, &mut read)).await;
        outcome.map_err(|cause| Failure::new(Reason::Reset, format!("the client's side: {cause}")))?;
        is_over = read.filled().is_empty();
        said.extend_from_slice(read.filled());
    }
}

/// One client that is served, and what belongs to its connection.
struct Served {
    inward: Inward,
    connection: Arc<Connection>,
    /// Made as the client was let in, for its first request.
    dialled: Cell<Option<Dialled>>,
    /// What was said to the application for one client is said for no other.
    pool: Pool,
}

impl Served {
    async fn line(&self, endpoint: SocketAddr) -> Result<Line, Failure> {
        let Inward { proxy, pod, seen, .. } = &self.inward;
        let (stream, held) = match self.dialled.take() {
            Some(dialled) => dialled,
            None => {
                let dialled = dial::application(proxy, pod, *seen, endpoint).await;
                dialled.map_err(|cause| Failure::connect(&format!("application at {endpoint}"), &cause))?
            }
        };
        Ok(Line::to_application(stream, held, self.connection.clone()))
    }
}

impl Served {
    /// Whether the rates of the Services that lead here let a request through.
    fn limit(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        let Inward { proxy, pod, to, .. } = &self.inward;
        let state = proxy.model.read();
        let own = &pod.captured.workload.name().namespace;
        for service in state.mesh.services_at(*to).filter(|service| service.namespace == *own) {
            let Some(limits) = state.traffic.rate_limits(service) else { continue };
            let client = self.connection.telemetry.info().source;
            let taken = proxy.rates().take(&format!("Service {service}"), &limits, &client, headers, Instant::now());
            taken.map_err(Refusal::rate_limit)?;
        }
        Ok(())
    }
}

impl Place for Served {
    fn model(&self) -> &Model {
        &self.inward.proxy.model
    }

    fn telemetry(&self) -> &Telemetry {
        &self.inward.proxy.telemetry
    }

    fn pool(&self) -> &Pool {
        &self.pool
    }

    fn describe(&self) -> ConnectionInfo {
        self.connection.telemetry.info()
    }

    fn dialled(&self) -> SocketAddr {
        self.inward.to
    }

    fn look(&self) -> Look {
        let to = Receiver::Endpoint(self.inward.to);
        Look { view: Some(View { to, routes: None }), stays: true }
    }

    fn count_request(&self) -> RequestPlace {
        RequestPlace::take(&self.inward.pod, pods::RequestsOf::Others)
    }

    fn room(&self) -> &Arc<Room> {
        self.inward.pod.room(pods::RequestsOf::Others)
    }

    fn leaving(&self) -> LocalBoxFuture<'static, ()> {
        let Inward { proxy, pod, peer, .. } = &self.inward;
        let (leaving, peer) = (proxy.leaving(pod), peer.clone());
        async move {
            tokio::select! {
                () = leaving => {}
                () = outlived(peer) => {}
            }
        }
        .boxed_local()
    }

    fn keeps(&self) -> bool {
        true
    }

    fn pick(&self, _: &Receiver, tried: &[SocketAddr]) -> Option<SocketAddr> {
        // A connection that was there may have been closed in this moment; one that is made anew says more.
        (tried.len() < TRIES).then_some(self.inward.to)
    }

    fn settle(&self, _: SocketAddr, request: &mut Parts) -> Result<Option<Parts>, Refusal> {
        waypoint::settle_path(request)?;
        let Inward { proxy, pod, client, identity, to, .. } = &self.inward;
        let rules = token_rules(proxy, pod, *client, identity.as_ref(), *to).map_err(Refusal::unreached)?;
        waypoint::authenticate(&rules, request)
    }

    fn judge_again(&self, _: SocketAddr, request: &RequestHead<'_>) -> Result<(), Refusal> {
        let Inward { proxy, pod, client, identity, via, to, .. } = &self.inward;
        let who = (*client, identity.as_ref(), via.as_ref());
        let decision = decide_request(proxy, pod, who, *to, request).map_err(Refusal::unreached)?;
        allowed(&decision).map_err(Refusal::unreached)
    }

    fn judge(&self, _: SocketAddr, request: &RequestHead<'_>) -> Result<Option<Permit>, Refusal> {
        let Inward { proxy, pod, client, identity, via, to, .. } = &self.inward;
        let who = (*client, identity.as_ref(), via.as_ref());
        let decision = decide_request(proxy, pod, who, *to, request).map_err(Refusal::unreached)?;
        self.connection.judged(&decision);
        allowed(&decision).map_err(Refusal::unreached)?;
        self.limit(request.headers)?;
        let asks = asked(&proxy.model.read(), &decision)?;
        Ok(Some(Permit { policy: decision.clause.map(|clause| clause.policy.name), asks, is_last: true }))
    }

    /// The pod itself asks, as whom it is.
    fn asker(&self, to: &ServiceDestination) -> Option<Rc<dyn Place>> {
        let Inward { proxy, pod, to: own, .. } = &self.inward;
        Onward::new(proxy, &Thread::here()?, pod, SocketAddr::new(own.ip(), 0), *own).asker(to)
    }

    fn counted(&self, _: SocketAddr) -> Option<Counted> {
        None
    }

    fn reached(&self, _: SocketAddr, _: bool) {}

    fn bond(&self, endpoint: SocketAddr) -> Option<Bond> {
        let Inward { pod, client, .. } = &self.inward;
        Some(Bond { source: pod.uid().clone(), source_ip: client.ip(), behalf: None, endpoint, destination: None })
    }

    fn connect<'a>(&'a self, _: &'a Receiver, endpoint: SocketAddr) -> LocalBoxFuture<'a, Result<Line, Failure>> {
        self.line(endpoint).boxed_local()
    }
}

const TRIES: usize = 2;
const CHUNK: usize = 4096;
