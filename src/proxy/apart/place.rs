use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

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
use super::super::inward::outlived;
use super::super::line::Line;
use super::super::onward::{Bond, Onward, RequestPlace};
use super::super::pods::{RequestsOf, ServedPod};
use super::super::workers::Thread;
use crate::mesh::balance::Client;
use crate::mesh::{Destination, Reason, ServiceDestination, Workload};
use crate::model::{Model, State};
use crate::policy::{Decision, Query, Reads, RequestHead, Verdict, normal_path};
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
    /// What that certificate rests on; none where nobody spoke over a wire.
    pub(super) peer: Option<Arc<PeerInfo>>,
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

    /// What policy says of a request of the client to an endpoint; none where nobody reads requests to it, and where its
    /// connection is allowed.
    fn decide(
        &self,
        state: &State,
        endpoint: SocketAddr,
        request: &RequestHead<'_>,
    ) -> Result<Option<Decision>, Refusal> {
        let Destination::Workload(workload) = state.mesh.destination(endpoint) else { return Ok(None) };
        let (query, reads) = self.query(state, &workload, endpoint);
        if reads == Reads::Nothing {
            return allowed(&state.policies.decide(&query)).map_err(Refusal::unreached).map(|()| None);
        }
        // Policy is held against one form of a path alone.
        if !normal_path(request.path).is_ok_and(|normal| normal == request.path) {
            return Err(Refusal::malformed(StatusCode::BAD_REQUEST, "the path is not in its normal form"));
        }
        Ok(Some(state.policies.decide_request(&query, request)))
    }

    /// For metrics and the log.
    fn note(&self, decision: &Decision) {
        if let Some(connection) = &self.connection {
            connection.judged(decision);
        }
    }

    /// Whether the endpoint's agent leaves it to this waypoint to read requests.
    fn holds(&self, state: &State, endpoint: SocketAddr) -> bool {
        let own = self.proxy.settings.gateway.as_ref();
        state.mesh.own_waypoints_at(endpoint).any(|waypoint| Some(&waypoint.gateway) == own)
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
                () = outlived(peer) => {}
            }
        }
        .boxed_local()
    }

    fn keeps(&self) -> bool {
        !*self.proxy.draining.borrow()
    }

    fn pick(&self, to: &Receiver, tried: &[SocketAddr]) -> Option<SocketAddr> {
        self.proxy.pick(to, || self.client(), tried)
    }

    fn choosing(&self) -> Option<Choosing> {
        Some(Choosing::at(&self.proxy, self.client(), self.behalf.identity.namespace.clone()))
    }

    fn settle(&self, endpoint: SocketAddr, request: &mut Parts) -> Result<Option<Parts>, Refusal> {
        let rules = {
            let state = self.proxy.model.read();
            let Destination::Workload(workload) = state.mesh.destination(endpoint) else { return Ok(None) };
            let (query, reads) = self.query(&state, &workload, endpoint);
            if reads == Reads::Nothing {
                // Where nobody judges it, the path is the application's affair.
                return Ok(None);
            }
            // Of whom no request is allowed, no token is looked at.
            let decision = state.policies.decide(&query);
            if decision.verdict == Verdict::Deny {
                self.note(&decision);
            }
            allowed(&decision).map_err(Refusal::unreached)?;
            state.policies.token_rules(&query)
        };
        waypoint::settle_path(request)?;
        waypoint::authenticate(&rules, request)
    }

    fn judge(&self, endpoint: SocketAddr, request: &RequestHead<'_>) -> Result<Option<Permit>, Refusal> {
        let state = self.proxy.model.read();
        let Some(decision) = self.decide(&state, endpoint, request)? else { return Ok(None) };
        self.note(&decision);
        allowed(&decision).map_err(Refusal::unreached)?;
        // An agent that reads requests itself takes their tokens, and asks whoever is to be asked, once for all.
        let is_last = self.holds(&state, endpoint);
        let asks = if is_last { asked(&state, &decision)? } else { Vec::new() };
        Ok(Some(Permit { policy: decision.clause.map(|clause| clause.policy.name), asks, is_last }))
    }

    fn judge_again(&self, endpoint: SocketAddr, request: &RequestHead<'_>) -> Result<(), Refusal> {
        let state = self.proxy.model.read();
        match self.decide(&state, endpoint, request)? {
            Some(decision) => allowed(&decision).map_err(Refusal::unreached),
            None => Ok(()),
        }
    }

    /// The waypoint itself asks, as whom it is.
    fn asker(&self, authorizer: &ServiceDestination) -> Option<Rc<dyn Place>> {
        let own = SocketAddr::new(*self.workload().pod.ips.first()?, 0);
        Onward::new(&self.proxy, &self.thread, &self.pod, own, self.dialled).asker(authorizer)
    }

    fn counted(&self, endpoint: SocketAddr) -> Option<Counted> {
        Some(Counted::begin(&self.proxy, endpoint))
    }

    fn reached(&self, endpoint: SocketAddr, well: bool) {
        self.proxy.reached(endpoint, well);
    }

    fn bond(&self, endpoint: SocketAddr) -> Option<Bond> {
        let behalf = &self.behalf;
        Bond::to(&self.proxy, &self.pod, (behalf.address.ip(), Some(behalf.identity.clone())), endpoint)
    }

    fn connect<'a>(&'a self, to: &'a Receiver, endpoint: SocketAddr) -> LocalBoxFuture<'a, Result<Line, Failure>> {
        self.line(to, endpoint).boxed_local()
    }
}
