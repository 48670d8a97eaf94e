use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use http::request::Parts;

use super::super::Proxy;
use super::super::counted::Counted;
use super::super::denial::Source;
use super::super::failure::Failure;
use super::super::onward::{Bond, Line, RequestPlace};
use super::super::pods::{RequestsOf, ServedPod};
use super::super::workers::{Thread, with_random};
use crate::mesh::balance::Client;
use crate::mesh::{Destination, Path, ServiceDestination, Workload};
use crate::model::Model;
use crate::policy::RequestHead;
use crate::telemetry::{ConnectionInfo, Direction, Party, Telemetry, Transport};
use crate::transport::Behalf;
use crate::waypoint::{Look, Permit, Place, Pool, Receiver, Refusal, View};

/// A waypoint in a process of its own, which serves one client and speaks for it.
#[derive(Clone)]
pub struct Relayed {
    pub(super) proxy: Arc<Proxy>,
    pub(super) thread: Rc<Thread>,
    /// The waypoint's own.
    pub(super) pod: Arc<ServedPod>,
    /// The client, as its certificate and its connection say.
    pub(super) behalf: Rc<Behalf>,
    pub(super) source: Rc<Party>,
    /// The Service's address.
    pub(super) dialled: SocketAddr,
}

impl Relayed {
    pub(super) fn workload(&self) -> &Arc<Workload> {
        &self.pod.captured.workload
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

    /// Whether the endpoint's policies let the client in. The endpoint's own agent asks them again; but where it does not
    /// take this waypoint's word, it judges the waypoint, whose rights are not the client's.
    pub(super) fn admits(&self, endpoint: SocketAddr) -> Result<(), Failure> {
        let Destination::Workload(workload) = self.proxy.model.read().mesh.destination(endpoint) else { return Ok(()) };
        let source =
            Source { proxy: &self.proxy, pod: &self.pod, ip: self.behalf.address.ip(), behalf: Some(&self.behalf) };
        match source.denial(&workload, endpoint) {
            None => Ok(()),
            Some((reason, _)) => {
                let text = format!("policy does not let {} in at {endpoint}", self.behalf.identity);
                Err(Failure::new(reason, text))
            }
        }
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

    fn leaving(&self) -> LocalBoxFuture<'static, ()> {
        let mut draining = self.proxy.draining.subscribe();
        async move { drop(draining.wait_for(|draining| *draining).await) }.boxed_local()
    }

    fn keeps(&self) -> bool {
        !*self.proxy.draining.borrow()
    }

    fn pick(&self, to: &Receiver, tried: &[SocketAddr]) -> Option<SocketAddr> {
        let service = match to {
            Receiver::Service(service) => service,
            Receiver::Endpoint(endpoint) => return Some(*endpoint).filter(|endpoint| !tried.contains(endpoint)),
        };
        // Zones and topology are the waypoint's: from here the way is measured. Affinity is the client's.
        let client = Client {
            ip: self.behalf.address.ip(),
            node: self.workload().pod.node.clone(),
            zone: self.workload().zone.clone(),
        };
        with_random(|random| self.proxy.balancer().pick(service, &client, tried, Instant::now(), random))
    }

    fn settle(&self, _: &mut Parts) -> Result<(), Refusal> {
        Ok(())
    }

    fn judge(&self, endpoint: SocketAddr, _: &RequestHead<'_>) -> Result<Option<Permit>, Refusal> {
        self.admits(endpoint).map_err(Refusal::unreached).map(|()| None)
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
