use std::cell::Cell;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::LocalBoxFuture;
use tokio::net::TcpStream;

use super::baggage::baggage;
use super::connections::{Connection, Opening, Registered};
use super::counted::Counted;
use super::denial::Source;
use super::downstream::{self, Downstream};
use super::failure::{Failure, Finding};
use super::pods::ServedPod;
use super::resolve::resolve;
use super::same_node::{Neighbour, Reached};
use super::workers::{Thread, with_random};
use super::{Proxy, apart, carry, dial, requests};
use crate::mesh::{
    Destination, Identity, NamespacedName, Path, Reason, ServiceDestination, TUNNEL_PORT, Workload, is_reserved_port,
};
use crate::policy::PeerMode;
use crate::telemetry::{self, ConnectionInfo, Direction, Party, Transport};
use crate::transport::Behalf;
use crate::transport::fast::{self, Early};
use crate::transport::hbone::{self, ConnectHead, OpenError, PoolKey};
use crate::transport::relay::TcpEnd;
use crate::transport::tls::{Offer, PeerInfo};

/// The life of one connection that a joined pod dialled.
pub fn serve(
    proxy: Arc<Proxy>,
    thread: Rc<Thread>,
    pod: Arc<ServedPod>,
    downstream: Downstream,
) -> impl Future<Output = ()> {
    // Each part on the heap and of its own size: what connecting needs is gone once there is a connection, which may then
    // be silent for long.
    let connecting = Box::pin(connect(proxy, thread, pod, downstream));
    async move {
        if let Some(joined) = connecting.await {
            joined.carry().await;
        }
    }
}

/// Finds whom the client means, and tells the client whether somebody is there.
async fn connect(proxy: Arc<Proxy>, thread: Rc<Thread>, pod: Arc<ServedPod>, downstream: Downstream) -> Option<Joined> {
    let (client, dialled) = downstream.ends();
    // Else the client has gone already.
    let application = downstream.take_up(&pod).ok()?;
    let info = ConnectionInfo {
        direction: Direction::Outbound,
        transport: Transport::Plaintext,
        source: Party::of(client, &pod.captured.workload),
        destination: Party::stranger(dialled),
        service: None,
        requested: None,
        key_exchange: None,
    };
    let opening = Opening { pod: pod.uid(), source: client, dialled, peer: None, via: None, info };
    let connection = proxy.connections.register(&proxy.telemetry, opening);
    let attempt = Attempt {
        proxy: &proxy,
        thread: &thread,
        pod: &pod,
        client: client.ip(),
        dialled,
        connection: &connection,
        behalf: None,
        early: Cell::new(Some(application.early())),
        passing: Cell::default(),
        proven: Cell::default(),
    };
    let upstream = tokio::select! {
        upstream = attempt.run(&application) => upstream,
        reason = connection.control.reset_requested() => Err(Failure::new(reason, "ended while connecting")),
        () = application.gone(&pod) => Err(attempt.given_up()),
    };
    let found = match upstream {
        Ok(found) => found,
        Err(failure) => {
            application.refuse(&failure);
            connection.failed(&failure);
            return None;
        }
    };
    let application = match application.connected(&pod, || proxy.accept_own(&thread, &pod, client)).await {
        Ok(application) => application,
        Err(failure) => {
            connection.failed(&failure);
            return None;
        }
    };
    let application = match &found {
        // What was said early is there already.
        Found::Upstream(Upstream { way: Way::Fast(_), .. }) => application,
        _ => application.with_ahead(attempt.early.take().map(Early::into_kept).unwrap_or_default()),
    };
    Some(Joined { application, found, dialled, connection, proxy, thread, pod })
}

/// A client whose `connect()` has succeeded, and what is to be done with it.
struct Joined {
    application: TcpEnd,
    found: Found,
    dialled: SocketAddr,
    connection: Registered,
    proxy: Arc<Proxy>,
    thread: Rc<Thread>,
    pod: Arc<ServedPod>,
}

impl Joined {
    /// Carries the connection to its end: on the heap, of the size that it takes for whom was found.
    fn carry(self) -> LocalBoxFuture<'static, ()> {
        let Self { application, found, dialled, connection, proxy, thread, pod } = self;
        let client = connection.source.ip();
        match found {
            Found::Upstream(Upstream { way, endpoint }) => Box::pin(async move {
                let _counted = &endpoint;
                let source = Source { proxy: &proxy, pod: &pod, ip: client, behalf: None };
                relay(source, &connection, application, way).await;
            }),
            Found::Requests(service) => Box::pin(async move {
                let attempt = Attempt {
                    proxy: &proxy,
                    thread: &thread,
                    pod: &pod,
                    client,
                    dialled,
                    connection: &connection,
                    behalf: None,
                    early: Cell::default(),
                    passing: Cell::default(),
                    proven: Cell::default(),
                };
                attempt.requests(application, &service).await;
            }),
        }
    }
}

/// Carries the bytes of the client to whom was found: on the heap, for ways are of different sizes.
fn relay<'a>(source: Source<'a>, connection: &'a Connection, application: TcpEnd, way: Way) -> LocalBoxFuture<'a, ()> {
    let denied = move || source.denied_now(connection);
    match way {
        Way::Fast(flow) => Box::pin(carry::into_fast_tunnel(connection, application, flow, denied)),
        Way::Hbone(flow) => Box::pin(carry::into_tunnel(connection, application, *flow, denied)),
        Way::Plain(upstream) => Box::pin(carry::plain(connection, application, upstream)),
        Way::SameNode(reached) => Box::pin(async move {
            let (stream, inbound, _held) = reached.into_parts();
            carry::same_node(connection, &inbound, application, stream).await;
        }),
    }
}

/// What became of the search for somebody who answers.
pub enum Found {
    Upstream(Upstream),
    /// Requests decide, each for itself.
    Requests(Box<ServiceDestination>),
}

/// A connection made, and the Service endpoint that it counts for.
pub struct Upstream {
    pub way: Way,
    pub endpoint: Option<Counted>,
}

pub enum Way {
    Fast(fast::Flow),
    Hbone(Box<hbone::Flow>),
    SameNode(Box<Reached>),
    Plain(TcpStream),
}

/// The search for somebody who answers.
pub struct Attempt<'a> {
    pub proxy: &'a Arc<Proxy>,
    pub thread: &'a Rc<Thread>,
    pub pod: &'a Arc<ServedPod>,
    pub client: IpAddr,
    pub dialled: SocketAddr,
    pub connection: &'a Connection,
    /// Where a waypoint dials: the client that it dials for.
    pub behalf: Option<&'a Behalf>,
    /// What the client has said already. It is away while a tunnel is being opened.
    pub early: Cell<Option<Early>>,
    /// What failed in passing last.
    pub passing: Cell<Option<Failure>>,
    /// Who stands at the other end of the tunnel that was taken, and what that rests on.
    pub proven: Cell<Option<Rc<PeerInfo>>>,
}

impl<'a> Attempt<'a> {
    /// Tries until it is known what to tell the client. What fails in passing is tried again as long as the client waits:
    /// an agent that starts anew costs the time that this takes, and no more.
    async fn run(&self, client: &downstream::Client) -> Result<Found, Failure> {
        let began = Instant::now();
        let mut pause = FIRST_PAUSE;
        loop {
            match self.once().await {
                Err(failure) if failure.finding == Finding::Passing && client.waits() && began.elapsed() < PATIENCE => {
                    self.passing.set(Some(failure));
                    tokio::time::sleep(pause).await;
                    pause = LONGEST_PAUSE.min(pause * 2);
                }
                outcome => return outcome,
            }
        }
    }

    fn given_up(&self) -> Failure {
        match self.passing.take() {
            Some(last) => Failure { detail: format!("{}; the client gave it up", last.detail), ..last },
            None => Failure::new(Reason::Reset, "the client gave it up while connecting"),
        }
    }

    /// Carries the bytes of the client to whom was found.
    pub async fn relay(&self, application: TcpEnd, way: Way) {
        relay(self.source(), self.connection, application, way).await;
    }

    pub fn check_limits(&self) -> Result<(), Failure> {
        if self.proxy.limits.admits(self.pod.uid()) {
            return Ok(());
        }
        Err(Failure::new(Reason::Limit, "too many connections; raise the descriptor limit of the agent"))
    }

    async fn once(&self) -> Result<Found, Failure> {
        self.check_limits()?;
        if is_reserved_port(self.dialled.port()) {
            let text = format!("port {} belongs to the mesh and is no destination", self.dialled.port());
            return Err(Failure::new(Reason::Protocol, text));
        }
        match resolve(&self.proxy.model, self.dialled).await {
            Destination::Service(service) if requests::decide(self.proxy, &service) => {
                self.asked_for(&service);
                Ok(Found::Requests(Box::new(service)))
            }
            Destination::Service(service) => {
                self.asked_for(&service);
                let upstream = match apart::decide(self.proxy, &service) {
                    Some(waypoint) => self.waypoint(waypoint).await,
                    None => self.any_endpoint(&service).await,
                };
                upstream.map(Found::Upstream)
            }
            Destination::Workload(workload) => {
                let way = self.workload(&workload, self.dialled).await?;
                Ok(Found::Upstream(Upstream { way, endpoint: None }))
            }
            Destination::Node | Destination::Outside => {
                let way = self.plain(self.dialled).await?;
                Ok(Found::Upstream(Upstream { way, endpoint: None }))
            }
            Destination::NoSuchPort(service) => {
                let text = format!("Service {} has no TCP port {}", service.name, self.dialled.port());
                Err(Failure::new(Reason::NoEndpoint, text))
            }
            Destination::Unknown => {
                let text = format!("{} lies in the cluster's ranges, but no Pod or Service has it", self.dialled.ip());
                Err(Failure::new(Reason::UnknownDestination, text))
            }
        }
    }

    fn asked_for(&self, service: &ServiceDestination) {
        self.connection.telemetry.amend(|info| {
            info.service = Some(service.service.name.clone());
            info.requested = Some(self.dialled);
        });
    }

    /// Tries the endpoints of a Service until one accepts. Nothing of the application's has been delivered then, so a
    /// second try repeats nothing.
    pub async fn any_endpoint(&self, service: &ServiceDestination) -> Result<Upstream, Failure> {
        self.any_of(service, |endpoint| self.endpoint(endpoint)).await
    }

    /// The same, where `reach` says how to get to one.
    pub async fn any_of(
        &self,
        service: &ServiceDestination,
        reach: impl AsyncFn(SocketAddr) -> Result<Way, Failure>,
    ) -> Result<Upstream, Failure> {
        let client = self.proxy.client(self.client);
        let wish = self.proxy.wish_of_connection(&service.service.name, self.client);
        let mut tried = Vec::new();
        let mut last = None;
        while tried.len() < ENDPOINT_TRIES {
            let picked = with_random(|random| {
                self.proxy.balancer().pick_as(service, &client, &wish, &tried, Instant::now(), random)
            });
            let Some(endpoint) = picked else { break };
            let counted = Counted::begin(self.proxy, endpoint);
            match reach(endpoint).await {
                Ok(way) => {
                    self.proxy.balancer().succeeded(endpoint, Instant::now());
                    return Ok(Upstream { way, endpoint: Some(counted) });
                }
                Err(failure) if failure.retry => {
                    self.proxy.balancer().failed(endpoint, Instant::now());
                    tried.push(endpoint);
                    // As long as one may come back, nobody can say that the Service refuses.
                    last = last.filter(|last: &Failure| last.finding == Finding::Passing).or(Some(failure));
                }
                Err(failure) => return Err(failure),
            }
        }
        Err(last.unwrap_or_else(|| {
            let text = format!("Service {} has no endpoint that is ready for {}", service.service.name, self.dialled);
            Failure::new(Reason::NoEndpoint, text)
        }))
    }

    pub async fn endpoint(&self, endpoint: SocketAddr) -> Result<Way, Failure> {
        let destination = self.proxy.model.read().mesh.destination(endpoint);
        match destination {
            Destination::Workload(workload) => self.workload(&workload, endpoint).await,
            Destination::Unknown => {
                let text = format!("endpoint {endpoint} lies in the cluster's ranges, but no Pod has it");
                Err(Failure { retry: true, ..Failure::new(Reason::UnknownDestination, text) })
            }
            _ => self.plain(endpoint).await,
        }
    }

    async fn workload(&self, workload: &Arc<Workload>, to: SocketAddr) -> Result<Way, Failure> {
        self.connection.telemetry.amend(|info| info.destination = Party::of(to, workload));
        match Path::between(&self.pod.captured.workload, workload, to.port()) {
            Path::Plain(_) => self.plain(to).await,
            Path::Tunnel { own, wanted } => match self.neighbour(workload, to) {
                Some(neighbour) => {
                    neighbour.reach(self.connection, &own).await.map(|reached| Way::SameNode(Box::new(reached)))
                }
                None => {
                    let hop = SocketAddr::new(to.ip(), TUNNEL_PORT);
                    self.tunnel(workload, &own, &wanted, hop, to).await
                }
            },
            Path::Refused(reason, text) => {
                // A peer that cannot prove who it is may be passed over; a source that cannot finds no other.
                let retry = reason == Reason::Tls;
                Err(Failure { retry, ..Failure::new(reason, text) })
            }
            Path::Uncaptured => {
                let mode = self.proxy.model.read().policies.peer_mode(workload, to.port());
                if let PeerMode::Strict(_) = mode {
                    let text = format!("{} is to be in the mesh, but its node has not captured it", workload.name());
                    return Err(Failure { retry: true, ..Failure::new(Reason::PeerUncaptured, text) });
                }
                metrics::counter!("selvedge_peer_uncaptured_total").increment(1);
                self.plain(to).await
            }
        }
    }

    async fn plain(&self, to: SocketAddr) -> Result<Way, Failure> {
        self.connection.telemetry.amend(|info| {
            info.transport = Transport::Plaintext;
            info.direction = Direction::Passthrough;
            if info.destination.pod.is_none() {
                info.destination = Party::stranger(to);
            }
        });
        let stream = dial::from_pod(self.pod, self.own_address(to), to).await;
        stream.map(Way::Plain).map_err(|cause| Failure::connect(&to.to_string(), &cause))
    }

    /// The destination, where it is a pod of this node that may be reached without a tunnel.
    fn neighbour(&self, workload: &Workload, to: SocketAddr) -> Option<Neighbour<'a>> {
        let client = SocketAddr::new(self.own_address(to)?, self.connection.source.port());
        Neighbour::find(self.proxy, self.pod, client, workload, to)
    }

    /// Through the tunnel port `hop` of a pod, to an address that is the pod's own, or a Service's where the pod is its
    /// waypoint.
    pub async fn tunnel(
        &self,
        workload: &Workload,
        identity: &Identity,
        wanted: &Identity,
        hop: SocketAddr,
        to: SocketAddr,
    ) -> Result<Way, Failure> {
        let direction = if self.behalf.is_some() { Direction::Relayed } else { Direction::Outbound };
        self.connection.telemetry.amend(|info| info.direction = direction);
        let own = &self.pod.captured.workload;
        let key = PoolKey {
            source_pod: own.uid().clone(),
            source_ip: self.client,
            source_identity: identity.clone(),
            destination_pod: workload.uid().clone(),
            destination_addr: hop,
            destination_identity: wanted.clone(),
        };
        let mut opened = self.open(&key, to).await;
        // Nothing of the application's was delivered, so that nothing is repeated: an agent that restarts, or a tunnel
        // that broke as it was used, costs no connection.
        for pause in TUNNEL_PAUSES {
            if !opened.as_ref().is_err_and(OpenError::is_passing) {
                break;
            }
            tokio::time::sleep(pause).await;
            opened = self.open(&key, to).await;
        }
        match opened {
            Ok((way, peer)) => {
                self.connection.telemetry.amend(|info| {
                    info.destination.identity = Some(peer.identity.clone());
                    info.key_exchange = Some(peer.key_exchange);
                });
                self.connection.telemetry.decided_there(telemetry::Verdict::Allow, None);
                self.proven.set(Some(peer));
                Ok(way)
            }
            Err(error) => Err(self.explain(Failure::open(&hop.to_string(), &error), workload, to)),
        }
    }

    /// Opens a way through the tunnel: the fast one where both sides speak it.
    async fn open(&self, key: &PoolKey, to: SocketAddr) -> Result<(Way, Rc<PeerInfo>), OpenError> {
        let mut session = None;
        if self.proxy.settings.tunnel == Offer::Both
            && let Some(mut early) = self.early.take()
        {
            self.connection.telemetry.amend(|info| info.transport = Transport::Fast);
            let header = fast::Header { destination: to, traceparent: None, behalf: self.behalf.cloned() };
            let opened = self.thread.fast.open(key, &header, &mut early, self.dial(key)).await;
            self.early.set(Some(early));
            match opened? {
                fast::Opened::Fast(flow, peer) => return Ok((Way::Fast(flow), peer)),
                fast::Opened::Hbone(found) => session = found.map(|session| *session),
            }
        }
        self.connection.telemetry.amend(|info| info.transport = Transport::Hbone);
        let head = ConnectHead {
            authority: to,
            forwarded: Some(self.connection.source),
            baggage: baggage(&self.proxy.settings.cluster, &self.pod.captured.workload),
            traceparent: None,
            behalf: self.behalf.cloned(),
        };
        let (own, wanted) = (&key.source_identity, &key.destination_identity);
        let dial = async {
            if let Some(session) = session {
                return Ok(session);
            }
            let hop = key.destination_addr;
            let tcp = dial::tunnel(self.pod, self.own_address(hop), hop).await.map_err(OpenError::from)?;
            self.proxy.tls.connect_hbone(tcp, own, wanted).await.map_err(OpenError::from)
        };
        let (flow, peer) = self.thread.pool.open(key, &head, dial).await?;
        Ok((Way::Hbone(Box::new(flow)), Rc::new(peer)))
    }

    /// Makes connections for a key, also when this attempt is over.
    fn dial(&self, key: &PoolKey) -> fast::Dial {
        let (proxy, pod, key) = (self.proxy.clone(), self.pod.clone(), Rc::new(key.clone()));
        let from = self.own_address(key.destination_addr);
        Rc::new(move || {
            let (proxy, pod, key) = (proxy.clone(), pod.clone(), key.clone());
            Box::pin(async move {
                let tcp = dial::tunnel(&pod, from, key.destination_addr).await.map_err(OpenError::from)?;
                let made = proxy.tls.connect(tcp, &key.source_identity, &key.destination_identity, Offer::Both);
                made.await.map_err(OpenError::from)
            })
        })
    }

    /// The far agent's refusal carries no words; this agent has the same policies and finds them.
    fn explain(&self, failure: Failure, workload: &Workload, to: SocketAddr) -> Failure {
        if failure.reason != Reason::Denied {
            return failure;
        }
        let (reason, policy) = self.denial(workload, to).unwrap_or((Reason::Denied, None));
        self.connection.telemetry.decided_there(telemetry::Verdict::Deny, policy);
        Failure { reason, ..failure }
    }

    fn denial(&self, workload: &Workload, to: SocketAddr) -> Option<(Reason, Option<NamespacedName>)> {
        self.source().denial(workload, to)
    }

    fn own_address(&self, to: SocketAddr) -> Option<IpAddr> {
        self.source().own_address(to)
    }

    fn source(&self) -> Source<'a> {
        Source { proxy: self.proxy, pod: self.pod, ip: self.client, behalf: self.behalf }
    }
}

const ENDPOINT_TRIES: usize = 5;
/// How long a client that waits is tried for before its SYN is dropped. What comes again begins anew.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between the tries of a client that waits.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);
/// Before each further try of one tunnel.
const TUNNEL_PAUSES: [Duration; 2] = [Duration::from_millis(5), Duration::from_millis(100)];
