use std::borrow::Cow;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use http::StatusCode;
use http::request::Parts;

use super::super::Proxy;
use super::super::choosing::Choosing;
use super::super::connections::Connection;
use super::super::counted::Counted;
use super::super::failure::Failure;
use super::super::inbound::{allowed, asked};
use super::super::onward::{Bond, Line, RequestPlace};
use super::super::pods::{RequestsOf, ServedPod};
use super::super::workers::{Thread, with_random};
use crate::authentication::Rule;
use crate::mesh::balance::Client;
use crate::mesh::{Destination, Path, Reason, ServiceDestination, Workload};
use crate::model::{Model, State};
use crate::policy::{Query, Reads, RequestHead, normal_path};
use crate::telemetry::{ConnectionInfo, Direction, Party, Telemetry, Transport};
use crate::transport::Behalf;
use crate::transport::tls::PeerInfo;
use crate::waypoint::{self, Look, Permit, Place, Pool, Receiver, Refusal, Room, View};

/// A waypoint in a process of its own, which serves one client and speaks for it.
#[derive(Clone)]
pub struct Relayed {
    pub(super) proxy: Arc<Proxy>,
    pub(super) thread: Rc<Thread>,
    /// The waypoint's own.
    pub(super) pod: Arc<ServedPod>,
    /// The client, as its certificate and its connection say.
    pub(super) behalf: Rc<Behalf>,
    /// What that certificate rests on.
    pub(super) peer: Arc<PeerInfo>,
    pub(super) source: Rc<Party>,
    /// The Service's address.
    pub(super) dialled: SocketAddr,
    /// The client's own, once it is let in.
    pub(super) connection: Option<Arc<Connection>>,
}

impl Relayed {
    pub(super) fn workload(&self) -> &Arc<Workload> {
        &self.pod.captured.workload
    }

    /// Zones and topology are the waypoint's: from here the way is measured. Affinity is the client's.
    fn client(&self) -> Client {
        Client {
            ip: self.behalf.address.ip(),
            node: self.workload().pod.node.clone(),
            zone: self.workload().zone.clone(),
        }
    }

    pub(super) fn info(&self) -> ConnectionInfo {
        ConnectionInfo {
            direction: Direction::Relayed,
            transport: Transport::None,
            source: Party::clone(&self.source),
            destination: Party::default(),
            service: None,
            requested: Some(self.dialled),
            key_exchange: None,
        }
    }

    /// The dialled Service, if it still has this waypoint.
    pub(super) fn service(&self) -> Option<(ServiceDestination, bool)> {
        let state = self.proxy.model.read();
        let Destination::Service(service) = state.mesh.destination(self.dialled) else { return None };
        let waypoint = state.mesh.own_waypoint(&service.service).and_then(Result::ok);
        let is_ours = waypoint.is_some_and(|waypoint| Some(&waypoint.gateway) == self.proxy.settings.gateway.as_ref());
        Some((service, is_ours))
    }

    /// Whether the endpoint's policies let the client in with bytes that are no requests. The endpoint's own agent asks them
    /// again; but where it does not take this waypoint's word, it judges the waypoint, whose rights are not the client's.
    pub(super) fn admits_bytes(&self, endpoint: SocketAddr) -> Result<(), Failure> {
        let state = self.proxy.model.read();
        let Destination::Workload(workload) = state.mesh.destination(endpoint) else { return Ok(()) };
        let (query, reads) = self.query(&state, &workload, endpoint);
        if reads == Reads::ToDecide {
            let text = format!("a policy over {endpoint} reads requests, and what came is none");
            return Err(Failure::new(Reason::Protocol, text));
        }
        allowed(&state.policies.decide(&query))
    }

    fn query<'a>(&'a self, state: &'a State, workload: &'a Workload, endpoint: SocketAddr) -> (Query<'a>, Reads) {
        state.query(self.behalf.address.ip(), Some(&self.behalf.identity), workload, endpoint)
    }
}

impl Place for Relayed {
    fn model(&self) -> &Model {
        &self.proxy.model
    }

    fn telemetry(&self) -> &Telemetry {
        &self.proxy.telemetry
    }

    fn pool(&self) -> &Pool {
        &self.thread.http
    }

    fn describe(&self) -> ConnectionInfo {
        self.info()
    }

    fn dialled(&self) -> SocketAddr {
        self.dialled
    }

    fn look(&self) -> Look {
        let Some((service, stays)) = self.service() else { return Look { view: None, stays: false } };
        // The certificate says which namespace is the consumer's.
        let client = &self.behalf.identity.namespace;
        let state = self.proxy.model.read();
        let routes = state.routes.routes(&service.service.name, &service.port, client).filter(|_| stays);
        Look { view: Some(View { to: Receiver::Service(service), routes }), stays }
    }

    fn count_request(&self) -> RequestPlace {
        RequestPlace::take(&self.pod, RequestsOf::Others)
    }

    fn room(&self) -> &Arc<Room> {
        self.pod.room(RequestsOf::Others)
    }

    fn leaving(&self) -> LocalBoxFuture<'static, ()> {
        let (mut draining, peer) = (self.proxy.draining.subscribe(), self.peer.clone());
        async move {
            tokio::select! {
                _ = draining.wait_for(|draining| *draining) => {}
                () = peer.outlived() => {}
            }
        }
        .boxed_local()
    }

    fn keeps(&self) -> bool {
        !*self.proxy.draining.borrow()
    }

    fn pick(&self, to: &Receiver, tried: &[SocketAddr]) -> Option<SocketAddr> {
        let service = match to {
            Receiver::Service(service) => service,
            Receiver::Endpoint(endpoint) => return Some(*endpoint).filter(|endpoint| !tried.contains(endpoint)),
        };
        let client = self.client();
        with_random(|random| self.proxy.balancer().pick(service, &client, tried, Instant::now(), random))
    }

    fn choosing(&self) -> Option<Choosing> {
        Some(Choosing::at(&self.proxy, self.client(), self.behalf.identity.namespace.clone()))
    }

    fn settle(&self, to: &Receiver, request: &mut Parts) -> Result<(), Refusal> {
        let Receiver::Service(service) = to else { return waypoint::settle_path(request) };
        let state = self.proxy.model.read();
        let endpoints = service.candidates.iter().take(MOST_ASKED).map(|candidate| candidate.addr);
        let mut rules: Option<Vec<Arc<Rule>>> = None;
        for endpoint in endpoints {
            let Some(workload) = state.mesh.workload_by_ip(endpoint.ip()) else { continue };
            let (query, reads) = self.query(&state, workload, endpoint);
            if reads == Reads::Nothing {
                continue;
            }
            let own = state.policies.token_rules(&query);
            if rules.as_ref().is_some_and(|rules| *rules != own) {
                let text =
                    "the endpoints of the Service take tokens of different issuers, so none can be taken for all";
                return Err(Refusal::internal(text));
            }
            rules = Some(own);
        }
        // Where nobody judges it, the path is the application's affair.
        let Some(rules) = rules else { return Ok(()) };
        waypoint::settle_path(request)?;
        waypoint::authenticate(&rules, request)
    }

    fn judge(&self, endpoint: SocketAddr, request: &RequestHead<'_>) -> Result<Option<Permit>, Refusal> {
        let state = self.proxy.model.read();
        let Destination::Workload(workload) = state.mesh.destination(endpoint) else { return Ok(None) };
        let (query, reads) = self.query(&state, &workload, endpoint);
        if reads == Reads::Nothing {
            return allowed(&state.policies.decide(&query)).map_err(Refusal::unreached).map(|()| None);
        }
        // Policy is held against one form of a path alone.
        if !matches!(normal_path(request.path), Ok(Cow::Borrowed(_))) {
            return Err(Refusal::malformed(StatusCode::BAD_REQUEST, "the path is not in its normal form"));
        }
        let decision = state.policies.decide_request(&query, request);
        if let Some(connection) = &self.connection {
            connection.judged(&decision);
        }
        allowed(&decision).map_err(Refusal::unreached)?;
        // Nobody can be asked from here, so that what somebody else has to let pass is refused.
        let asks = asked(&state, &decision)?;
        Ok(Some(Permit { policy: decision.clause.map(|clause| clause.policy.name), asks }))
    }

    fn counted(&self, endpoint: SocketAddr) -> Option<Counted> {
        Some(Counted::begin(&self.proxy, endpoint))
    }

    fn reached(&self, endpoint: SocketAddr, well: bool) {
        let balancer = self.proxy.balancer();
        if well { balancer.succeeded(endpoint, Instant::now()) } else { balancer.failed(endpoint, Instant::now()) }
    }

    fn bond(&self, endpoint: SocketAddr) -> Option<Bond> {
        let state = self.proxy.model.read();
        let destination = match state.mesh.destination(endpoint) {
            Destination::Workload(workload) => {
                let path = Path::between(self.workload(), &workload, endpoint.port());
                // What holds of it may be another thing in a moment.
                if matches!(path, Path::Uncaptured | Path::Refused(..)) {
                    return None;
                }
                Some((workload.uid().clone(), path))
            }
            _ => None,
        };
        Some(Bond {
            source: self.pod.uid().clone(),
            source_ip: self.behalf.address.ip(),
            behalf: Some(self.behalf.identity.clone()),
            endpoint,
            destination,
        })
    }

    fn connect<'a>(&'a self, to: &'a Receiver, endpoint: SocketAddr) -> LocalBoxFuture<'a, Result<Line, Failure>> {
        self.line(to, endpoint).boxed_local()
    }
}

/// Endpoints that are asked whether anybody judges requests to them; where one beyond them does, a path that is not in its
/// normal form is refused.
const MOST_ASKED: usize = 32;
