//! How endpoints of Services are chosen for one client, and what is remembered of them.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Proxy;
use super::workers::with_random;
use crate::mesh::balance::{Client, Strategy, Wish, stable_hash};
use crate::mesh::{NamespacedName, ServiceDestination};
use crate::route::traffic::{Balance, HashOn, Way};
use crate::waypoint::{Guard, GuardKey, Rates};

/// The choices of one client.
#[derive(Clone)]
pub struct Choosing {
    proxy: Arc<Proxy>,
    client: Client,
    /// Whose clients it belongs to.
    namespace: Arc<str>,
    /// Nobody behind it reads the requests to a Service.
    is_last: bool,
}

impl Choosing {
    pub fn new(proxy: &Arc<Proxy>, client: IpAddr, namespace: &Arc<str>) -> Self {
        Self { proxy: proxy.clone(), client: proxy.client(client), namespace: namespace.clone(), is_last: false }
    }

    /// Of a client of a waypoint in a process of its own.
    pub fn at(proxy: &Arc<Proxy>, client: Client, namespace: Arc<str>) -> Self {
        Self { proxy: proxy.clone(), client, namespace, is_last: true }
    }

    /// Whether the limits of a Service are counted here: else the agents of its pods count.
    pub fn counts_services(&self) -> bool {
        self.is_last
    }

    pub fn client_ip(&self) -> IpAddr {
        self.client.ip
    }

    /// An endpoint of a Service other than those tried already.
    pub fn pick(&self, service: &ServiceDestination, wish: &Wish<'_>, tried: &[SocketAddr]) -> Option<SocketAddr> {
        let balancer = self.proxy.balancer();
        with_random(|random| balancer.pick_as(service, &self.client, wish, tried, Instant::now(), random))
    }

    pub fn took(&self, endpoint: SocketAddr, latency: Duration) {
        self.proxy.balancer().took(endpoint, latency, Instant::now());
    }

    /// How an endpoint is told from all others.
    pub fn key_of(&self, service: &ServiceDestination, endpoint: SocketAddr) -> Option<u64> {
        self.proxy.balancer().key_of(service, &self.client, endpoint, Instant::now())
    }

    /// The endpoint of that key.
    pub fn of_key(&self, service: &ServiceDestination, key: u64) -> Option<SocketAddr> {
        self.proxy.balancer().of_key(service, &self.client, key, Instant::now())
    }

    pub fn count(&self, service: &ServiceDestination) -> usize {
        self.proxy.balancer().count(service, &self.client, Instant::now())
    }

    /// What is remembered of a Service port.
    pub fn guard(&self, service: &ServiceDestination) -> Arc<Guard> {
        let key = GuardKey {
            clients: self.namespace.clone(),
            service: service.service.name.clone(),
            port: service.port.port,
        };
        self.proxy.guards().of(key)
    }

    /// What is left of the rates that are counted here.
    pub fn rates(&self) -> &Rates {
        self.proxy.rates()
    }

    /// Closes connections to a backend that no request is on, whichever thread has them: somebody waits for one.
    pub fn free(&self, guard: &Arc<Guard>) {
        let guard = guard.clone();
        self.proxy.workers.on_each(move |thread| thread.http.free(&guard));
    }
}

impl Proxy {
    /// How an address of a pod of this node stands to endpoints.
    pub(super) fn client(&self, ip: IpAddr) -> Client {
        let node = self.settings.node.clone();
        let zone = self.model.read().mesh.node(&node).and_then(|node| node.zone.clone());
        // The family that was dialled decides: an endpoint of the other may be out of reach.
        Client { ip, node: Some(node), zone }
    }

    /// What a connection, of which nobody reads requests, wants of its endpoint.
    pub(super) fn wish_of_connection(&self, service: &NamespacedName, client: IpAddr) -> Wish<'static> {
        let in_force = self.model.read().traffic.of_service(service);
        let Some(balance) = &in_force.balance else { return Wish::default() };
        let strategy = match &balance.way {
            Way::RoundRobin => Strategy::RoundRobin,
            Way::Random => Strategy::Random,
            Way::Hash(HashOn::Source) => Strategy::Hash(of_source(client)),
            // What these go by is said in requests.
            Way::LeastRequest | Way::PeakEwma | Way::Hash(_) => Strategy::LeastRequest,
        };
        wish(balance, strategy)
    }
}

/// What a policy wants of an endpoint, beside how it is drawn.
pub fn wish(balance: &Balance, strategy: Strategy) -> Wish<'static> {
    Wish { strategy, distribution: balance.distribution, warmup: balance.warmup, ..Wish::default() }
}

/// What the requests of one address have in common.
pub fn of_source(client: IpAddr) -> u64 {
    stable_hash(client.to_string().as_bytes())
}
