use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Instant;

use serde::Serialize;
use tokio::sync::watch;

use super::failure::Failure;
use crate::mesh::{Identity, NamespacedName, PodUid, Reason};
use crate::policy::{self, Decision};
use crate::telemetry::{ConnectionInfo, ConnectionTelemetry, Direction, Telemetry, Verdict};
use crate::transport::relay::{Ended, Outcome, RelayControl};

/// Every live connection of the agent: what `/dump` lists, what a policy change decides again, and what a pod that
/// leaves waits for.
#[derive(Debug, Default)]
pub struct Connections {
    next: AtomicU64,
    live: Mutex<Live>,
    changed: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct Live {
    by_pod: HashMap<PodUid, HashMap<u64, Arc<Connection>>>,
    total: usize,
}

/// One live connection.
#[derive(Debug)]
pub struct Connection {
    pub id: u64,
    pub pod: PodUid,
    pub direction: Direction,
    pub source: SocketAddr,
    /// Where the source dialled.
    pub dialled: SocketAddr,
    /// The identity that the peer proved; inbound only.
    pub peer: Option<Identity>,
    /// The waypoint that says so, where it is not the peer's own word.
    pub via: Option<Identity>,
    pub opened: Instant,
    pub control: RelayControl,
    pub telemetry: ConnectionTelemetry,
    exempt: AtomicBool,
    /// Its requests are read, and each is decided for itself; inbound only.
    read: AtomicBool,
    /// The pod of this node that it comes from without a tunnel; inbound only.
    neighbour: OnceLock<PodUid>,
    /// The other side of a connection that is joined to a pod of this node without a tunnel; outbound only.
    onward: OnceLock<Weak<Connection>>,
}

/// What a connection is registered with.
pub struct Opening<'a> {
    pub pod: &'a PodUid,
    pub source: SocketAddr,
    pub dialled: SocketAddr,
    pub peer: Option<Identity>,
    pub via: Option<Identity>,
    pub info: ConnectionInfo,
}

/// Takes the connection off the list on drop.
#[derive(Debug)]
pub struct Registered {
    connections: Arc<Connections>,
    connection: Arc<Connection>,
}

impl Connections {
    pub fn register(self: &Arc<Self>, telemetry: &Telemetry, opening: Opening<'_>) -> Registered {
        let connection = Arc::new(Connection {
            id: self.next.fetch_add(1, Ordering::Relaxed),
            pod: opening.pod.clone(),
            direction: opening.info.direction,
            source: opening.source,
            dialled: opening.dialled,
            peer: opening.peer,
            via: opening.via,
            opened: Instant::now(),
            control: RelayControl::default(),
            telemetry: telemetry.open(opening.info),
            exempt: AtomicBool::new(false),
            read: AtomicBool::new(false),
            neighbour: OnceLock::new(),
            onward: OnceLock::new(),
        });
        let mut live = self.lock();
        live.by_pod.entry(connection.pod.clone()).or_default().insert(connection.id, connection.clone());
        live.total += 1;
        drop(live);
        Registered { connections: self.clone(), connection }
    }

    pub fn live(&self, pod: &PodUid) -> usize {
        self.lock().by_pod.get(pod).map_or(0, HashMap::len)
    }

    pub fn total(&self) -> usize {
        self.lock().total
    }

    /// The pods that have any.
    pub fn pods(&self) -> Vec<PodUid> {
        self.lock().by_pod.keys().cloned().collect()
    }

    pub fn all(&self) -> Vec<Arc<Connection>> {
        self.lock().by_pod.values().flat_map(HashMap::values).cloned().collect()
    }

    /// Those of one pod.
    pub fn of(&self, pod: &PodUid) -> Vec<Arc<Connection>> {
        self.lock().by_pod.get(pod).into_iter().flat_map(HashMap::values).cloned().collect()
    }

    /// Resets every connection of one pod.
    pub fn reset_pod(&self, pod: &PodUid, reason: &Reason) {
        self.of(pod).iter().for_each(|connection| connection.reset(reason.clone()));
    }

    /// Waits until no connection is left.
    pub async fn none_left(&self) {
        let mut changed = self.changed.subscribe();
        while self.total() > 0 {
            // The sender is ours and lives.
            let _ = changed.changed().await;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Connection {
    /// Ends the connection with a reset on both sides, whatever it is doing.
    pub fn reset(&self, reason: Reason) {
        self.control.reset(reason);
    }

    /// Notes what policy decided.
    pub fn decided(&self, decision: &Decision) {
        let verdict = verdict(decision.verdict);
        self.telemetry.decision(verdict, decision.clause.as_ref().map(|clause| &clause.policy.name));
        self.note_observed(decision);
    }

    /// Notes what policy decided about one of its requests.
    pub fn judged(&self, decision: &Decision) {
        let verdict = verdict(decision.verdict);
        self.telemetry.request_decision(verdict, decision.clause.as_ref().map(|clause| &clause.policy.name));
        self.note_observed(decision);
    }

    fn note_observed(&self, decision: &Decision) {
        for observed in &decision.observed {
            self.telemetry.observed(observed.would.map_or(Verdict::Allow, verdict), &observed.policy.name);
        }
    }

    pub fn connected(&self) {
        self.telemetry.connected(self.opened.elapsed());
    }

    /// It did not come about.
    pub fn failed(&self, failure: &Failure) {
        self.telemetry.closed(0, 0, Some(failure.reason.clone()), &failure.detail);
    }

    /// Its relay has ended.
    pub fn ended(&self, ended: &Ended) {
        let side = match &ended.outcome {
            Outcome::Orderly => return self.telemetry.closed(ended.sent, ended.received, None, ""),
            Outcome::ResetByUs(reason) => {
                let text = "ended by the agent";
                return self.telemetry.closed(ended.sent, ended.received, Some(reason.clone()), text);
            }
            Outcome::ResetByDownstream => "the client's side reset it",
            Outcome::ResetByUpstream => "the destination's side reset it",
        };
        let cause = ended.error.as_ref().map(|cause| format!(": {cause}")).unwrap_or_default();
        self.telemetry.closed(ended.sent, ended.received, Some(Reason::Reset), &format!("{side}{cause}"));
    }

    /// Counts the bytes that have moved since the last time.
    pub fn tick(&self) {
        self.telemetry.tick(self.control.sent(), self.control.received());
    }

    /// Says that policy has no word in it: a probe of the node.
    pub fn exempt(&self) {
        self.exempt.store(true, Ordering::Relaxed);
    }

    /// Says that it comes from a pod of this node, and through no tunnel.
    pub fn comes_from(&self, neighbour: &PodUid) {
        let _ = self.neighbour.set(neighbour.clone());
    }

    pub fn neighbour(&self) -> Option<&PodUid> {
        self.neighbour.get()
    }

    /// Says that it leads to a pod of this node, and through no tunnel.
    pub fn leads_to(&self, inbound: &Arc<Self>) {
        let _ = self.onward.set(Arc::downgrade(inbound));
    }

    pub fn onward(&self) -> Option<Arc<Self>> {
        self.onward.get()?.upgrade()
    }

    pub fn is_exempt(&self) -> bool {
        self.exempt.load(Ordering::Relaxed)
    }

    /// Says that its requests are read, each for itself.
    pub fn reads_requests(&self) {
        self.read.store(true, Ordering::Relaxed);
    }

    pub fn is_read(&self) -> bool {
        self.read.load(Ordering::Relaxed)
    }
}

fn verdict(verdict: policy::Verdict) -> Verdict {
    match verdict {
        policy::Verdict::Allow => Verdict::Allow,
        policy::Verdict::Deny => Verdict::Deny,
    }
}

impl Registered {
    pub fn shared(&self) -> &Arc<Connection> {
        &self.connection
    }
}

impl std::ops::Deref for Registered {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.connection
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        let mut live = self.connections.lock();
        if let Some(of_pod) = live.by_pod.get_mut(&self.connection.pod) {
            of_pod.remove(&self.connection.id);
            if of_pod.is_empty() {
                live.by_pod.remove(&self.connection.pod);
            }
            live.total -= 1;
        }
        drop(live);
        self.connections.changed.send_replace(());
    }
}

/// One line of `/dump`.
#[derive(Serialize)]
pub struct ConnectionStatus {
    pub id: u64,
    pub pod: String,
    pub direction: &'static str,
    pub source: SocketAddr,
    pub dialled: SocketAddr,
    pub peer: Option<String>,
    pub age_seconds: f64,
    pub bytes_sent: u64,
    pub bytes_received: u64,
}

impl ConnectionStatus {
    pub fn of(connection: &Connection, pod: Option<&NamespacedName>) -> Self {
        Self {
            id: connection.id,
            pod: pod.map_or_else(|| connection.pod.to_string(), ToString::to_string),
            direction: connection.direction.as_str(),
            source: connection.source,
            dialled: connection.dialled,
            peer: connection.peer.as_ref().map(ToString::to_string),
            age_seconds: connection.opened.elapsed().as_secs_f64(),
            bytes_sent: connection.control.sent(),
            bytes_received: connection.control.received(),
        }
    }
}
