//! The life of one connection: outbound, inbound through the tunnel, inbound in plaintext, and both at once where the
//! two pods are this node's (`same_node`).
//!
//! | listener | what arrives | file |
//! | --- | --- | --- |
//! | 15001 | what a joined pod dials | `outbound` |
//! | 15008 | the tunnel, from peers in the mesh | `tunnel` |
//! | 15006 | plaintext for a joined pod, and probes where the kernel cannot queue them | `plaintext` |
//!
//! Where requests are told apart, they are served over either: `requests` and `onward` for what the pod dials, `inward`
//! for what comes to it.
//!
//! Decisions are the model's; this room asks, dials and relays.

#![forbid(unsafe_code)]

mod accept;
mod apart;
mod baggage;
mod carry;
mod choosing;
mod connections;
mod counted;
mod denial;
mod dial;
mod downstream;
mod failure;
mod held;
mod hold_loop;
mod inbound;
mod inward;
mod limits;
mod line;
mod onward;
mod outbound;
mod plaintext;
mod pods;
mod recheck;
mod requests;
mod resolve;
mod same_node;
mod source_ports;
mod tunnel;
mod workers;

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use tokio::sync::watch;

pub use choosing::{Choosing, of_source, wish};
pub use connections::{Connection, ConnectionStatus, Connections};
pub use counted::Counted;
pub use failure::Failure;
pub use limits::Limits;
pub use line::Line;
pub use onward::{Bond, Onward, RequestPlace};
pub use recheck::follow;
pub use same_node::SameNode;
pub use source_ports::PortRanges;
pub use workers::{Workers, with_random};

use crate::capture::NetNs;
use crate::identity::Identities;
use crate::mesh::NamespacedName;
use crate::mesh::balance::Balancer;
use crate::model::Model;
use crate::telemetry::Telemetry;
use crate::transport::tls::{Offer, Tls};
use crate::waypoint::{Guards, Rates};
use held::{Bounds, HeldSyns};
use pods::Pods;
use source_ports::SourcePorts;

/// What every connection of the agent shares.
pub struct Proxy {
    pub model: Arc<Model>,
    pub identities: Arc<Identities>,
    pub tls: Tls,
    pub telemetry: Telemetry,
    pub connections: Arc<Connections>,
    pub limits: Limits,
    pub workers: Workers,
    settings: ProxySettings,
    balancer: Balancer,
    guards: Guards,
    rates: Rates,
    source_ports: Arc<SourcePorts>,
    pods: Pods,
    held: Arc<HeldSyns>,
    draining: watch::Sender<bool>,
    /// Counts the pods whose listeners were dealt to threads.
    accepting: AtomicUsize,
}

/// What does not change while the agent runs.
#[derive(Clone, Debug)]
pub struct ProxySettings {
    pub node: Arc<str>,
    pub cluster: String,
    pub source_ports: PortRanges,
    pub node_netns: NetNs,
    /// What may carry connections between nodes.
    pub tunnel: Offer,
    pub same_node: SameNode,
    /// The Gateway that this process is the waypoint of, where it is one: then it serves one pod, its own.
    pub gateway: Option<NamespacedName>,
    /// A peer's tunnel without a connection in it is closed after so long.
    pub tunnel_idle: Duration,
}

impl Proxy {
    #[expect(clippy::too_many_arguments, reason = "the wiring calls it once, with one argument a room")]
    pub fn new(
        settings: ProxySettings,
        model: Arc<Model>,
        identities: Arc<Identities>,
        tls: Tls,
        telemetry: Telemetry,
        connections: Arc<Connections>,
        limits: Limits,
        workers: Workers,
    ) -> Arc<Self> {
        Arc::new(Self {
            source_ports: SourcePorts::new(settings.source_ports.clone()),
            held: HeldSyns::new(Bounds::of(limits.total())),
            model,
            identities,
            tls,
            telemetry,
            connections,
            limits,
            workers,
            settings,
            balancer: Balancer::default(),
            guards: Guards::default(),
            rates: Rates::default(),
            pods: Pods::default(),
            draining: watch::Sender::new(false),
            accepting: AtomicUsize::new(0),
        })
    }

    /// Asks tunnel peers to take their new connections elsewhere; what is open goes on.
    pub fn drain(&self) {
        self.draining.send_replace(true);
        self.workers.on_each(|thread| thread.http.evict_all());
    }

    /// What is done every few seconds: bytes of connections that go on are counted, old balancer state expires.
    pub fn tick(&self) {
        self.connections.all().iter().for_each(|connection| connection.tick());
        let now = Instant::now();
        self.balancer().expire(now);
        self.guards.expire(now);
        self.rates.expire(now);
        self.workers.on_each(|thread| thread.http.expire());
    }

    /// Completes when new requests of or to the pod are to go elsewhere: the agent drains, or the pod leaves.
    fn leaving(&self, pod: &Arc<pods::ServedPod>) -> impl Future<Output = ()> + use<> {
        let mut draining = self.draining.subscribe();
        let pod = pod.clone();
        async move {
            tokio::select! {
                _ = draining.wait_for(|draining| *draining) => {}
                () = pod.leaving() => {}
            }
        }
    }

    fn balancer(&self) -> &Balancer {
        &self.balancer
    }

    fn guards(&self) -> &Guards {
        &self.guards
    }

    fn rates(&self) -> &Rates {
        &self.rates
    }
}

pub fn describe_metrics() {
    use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};
    describe_counter!(
        "selvedge_accept_errors_total",
        Unit::Count,
        "Times that accepting a connection failed and was tried again."
    );
    describe_gauge!("selvedge_connect_held", Unit::Count, "Clients whose connect() waits for an answer now.");
    describe_histogram!(
        "selvedge_connect_held_duration_seconds",
        Unit::Seconds,
        "How long connect() waited for its answer, by direction."
    );
    describe_counter!(
        "selvedge_connect_answers_total",
        Unit::Count,
        "What connect() was told, by direction and answer; eager where too many waited, so that it was told at once."
    );
    describe_counter!(
        "selvedge_peer_uncaptured_total",
        Unit::Count,
        "Connections sent in plaintext to a joined pod that its node has not captured yet, as PERMISSIVE allows."
    );
}
