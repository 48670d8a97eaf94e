//! The way from a pod for its requests, each to an endpoint of a Service.

use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use http::request::Parts;

use super::Proxy;
use super::choosing::Choosing;
use super::connections::Opening;
use super::counted::Counted;
use super::failure::Failure;
use super::line::{Line, LinePod};
use super::pods::{RequestsOf, ServedPod};
use super::workers::Thread;
use crate::mesh::{
    AppProtocol, Destination, Identity, Path, PodUid, ServiceDestination, ServiceKind, Waypoint, Workload,
};
use crate::model::Model;
use crate::policy::RequestHead;
use crate::telemetry::{ConnectionInfo, Direction, Party, Telemetry, Transport};
use crate::waypoint::{self, Look, Permit, Place, Receiver, Refusal, Room, View};

/// A pod of this node that sends requests on, from one of its addresses, to a Service whose routes decide where to. The
/// server's agent judges them.
#[derive(Clone)]
pub struct Onward {
    proxy: Arc<Proxy>,
    thread: Rc<Thread>,
    pod: Arc<ServedPod>,
    /// Where the client's own connection comes from, and where it went to.
    client: SocketAddr,
    dialled: SocketAddr,
}

/// What connections of one pod to one endpoint have in common: whoever may use the one may use the other.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Bond {
    pub source: PodUid,
    pub source_ip: IpAddr,
    /// Whom a waypoint speaks for on it.
    pub behalf: Option<Identity>,
    pub endpoint: SocketAddr,
    /// The pod at the endpoint, and how it is reached; none where the mesh has no say.
    pub destination: Option<(PodUid, Path)>,
}

impl Bond {
    /// What a pod's connection to an endpoint has to be like now, from an address and on somebody's behalf; none where none
    /// may be kept.
    pub(super) fn to(
        proxy: &Proxy,
        pod: &ServedPod,
        (source_ip, behalf): (IpAddr, Option<Identity>),
        endpoint: SocketAddr,
    ) -> Option<Self> {
        let destination = match proxy.model.read().mesh.destination(endpoint) {
            Destination::Workload(workload) => {
                let path = Path::between(&pod.captured.workload, &workload, endpoint.port());
                // What holds of it may be another thing in a moment.
                if matches!(path, Path::Uncaptured | Path::Refused(..)) {
                    return None;
                }
                Some((workload.uid().clone(), path))
            }
            _ => None,
        };
        Some(Self { source: pod.uid().clone(), source_ip, behalf, endpoint, destination })
    }
}

impl Onward {
    pub(super) fn new(
        proxy: &Arc<Proxy>,
        thread: &Rc<Thread>,
        pod: &Arc<ServedPod>,
        client: SocketAddr,
        dialled: SocketAddr,
    ) -> Self {
        Self { proxy: proxy.clone(), thread: thread.clone(), pod: pod.clone(), client, dialled }
    }

    fn workload(&self) -> &Arc<Workload> {
        &self.pod.captured.workload
    }

    async fn line(&self, to: &Receiver, endpoint: SocketAddr) -> Result<Line, Failure> {
        let info = ConnectionInfo {
            direction: Direction::Outbound,
            transport: Transport::Plaintext,
            source: Party::of(self.client, self.workload()),
            destination: Party::stranger(endpoint),
            service: to.service().cloned(),
            requested: Some(self.dialled),
            key_exchange: None,
        };
        let opening =
            Opening { pod: self.pod.uid(), source: self.client, dialled: self.dialled, peer: None, via: None, info };
        let pod = LinePod { proxy: self.proxy.clone(), pod: self.pod.clone(), ip: self.client.ip(), behalf: None };
        pod.line(&self.thread, opening, endpoint).await
    }
}

impl Place for Onward {
    fn model(&self) -> &Model {
        &self.proxy.model
    }

    fn telemetry(&self) -> &Telemetry {
        &self.proxy.telemetry
    }

    fn pool(&self) -> &waypoint::Pool {
        &self.thread.http
    }

    fn describe(&self) -> ConnectionInfo {
        ConnectionInfo {
            direction: Direction::Outbound,
            transport: Transport::None,
            source: Party::of(self.client, self.workload()),
            destination: Party::default(),
            service: None,
            requested: Some(self.dialled),
            key_exchange: None,
        }
    }

    fn dialled(&self) -> SocketAddr {
        self.dialled
    }

    fn look(&self) -> Look {
        let state = self.proxy.model.read();
        let Destination::Service(service) = state.mesh.destination(self.dialled) else {
            return Look { view: None, stays: false };
        };
        let stays = *state.mesh.waypoint_of(&service.service) == Waypoint::Node
            && service.port.protocol().is_none_or(AppProtocol::is_http);
        let client = &self.workload().name().namespace;
        let routes = state.routes.routes(&service.service.name, &service.port, client).filter(|_| stays);
        Look { view: Some(View { to: Receiver::Service(service), routes }), stays }
    }

    fn count_request(&self) -> RequestPlace {
        RequestPlace::take(&self.pod, RequestsOf::Own)
    }

    fn room(&self) -> &Arc<Room> {
        self.pod.room(RequestsOf::Own)
    }

    fn leaving(&self) -> LocalBoxFuture<'static, ()> {
        self.proxy.leaving(&self.pod).boxed_local()
    }

    fn left(&self) -> LocalBoxFuture<'static, ()> {
        let (pod, client, dialled) = (self.pod.clone(), self.client, self.dialled);
        async move { pod.socket_closed(client, dialled).await }.boxed_local()
    }

    fn keeps(&self) -> bool {
        !*self.proxy.draining.borrow() && !self.pod.is_leaving()
    }

    fn pick(&self, to: &Receiver, tried: &[SocketAddr]) -> Option<SocketAddr> {
        self.proxy.pick(to, || self.proxy.client(self.client.ip()), tried)
    }

    fn choosing(&self) -> Option<Choosing> {
        Some(Choosing::new(&self.proxy, self.client.ip(), &self.workload().name().namespace))
    }

    fn settle(&self, _: SocketAddr, _: &mut Parts) -> Result<Option<Parts>, Refusal> {
        Ok(None)
    }

    fn judge(&self, _: SocketAddr, _: &RequestHead<'_>) -> Result<Option<Permit>, Refusal> {
        Ok(None)
    }

    fn judge_again(&self, _: SocketAddr, _: &RequestHead<'_>) -> Result<(), Refusal> {
        Ok(())
    }

    fn counted(&self, endpoint: SocketAddr) -> Option<Counted> {
        Some(Counted::begin(&self.proxy, endpoint))
    }

    fn reached(&self, endpoint: SocketAddr, well: bool) {
        self.proxy.reached(endpoint, well);
    }

    fn bond(&self, endpoint: SocketAddr) -> Option<Bond> {
        Bond::to(&self.proxy, &self.pod, (self.client.ip(), None), endpoint)
    }

    fn asker(&self, to: &ServiceDestination) -> Option<Rc<dyn Place>> {
        let dialled = match &to.service.kind {
            ServiceKind::ClusterIp(addresses) => addresses.iter().find(|ip| ip.is_ipv4() == self.client.is_ipv4()),
            ServiceKind::Headless | ServiceKind::ExternalName => None,
        };
        let dialled = dialled.map_or(self.dialled, |ip| SocketAddr::new(*ip, to.port.port));
        Some(Rc::new(Self { dialled, ..self.clone() }))
    }

    fn connect<'a>(&'a self, to: &'a Receiver, endpoint: SocketAddr) -> LocalBoxFuture<'a, Result<Line, Failure>> {
        self.line(to, endpoint).boxed_local()
    }
}

/// One request's place among those of its pod.
pub struct RequestPlace {
    pod: Arc<ServedPod>,
    of: RequestsOf,
    /// How many there are with it.
    pub count: usize,
}

impl RequestPlace {
    pub(super) fn take(pod: &Arc<ServedPod>, of: RequestsOf) -> Self {
        Self { count: pod.begin_request(of), pod: pod.clone(), of }
    }
}

impl Drop for RequestPlace {
    fn drop(&mut self) {
        self.pod.end_request(self.of);
    }
}
