use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use super::access_log::{AccessLog, OfConnection, Record, Told};
use super::request::RequestSeriesTable;
use super::series::{Labels, Series, SeriesTable};
use super::traces::Traces;
use super::{MetricsSettings, catalogue};
use crate::mesh::{Identity, NamespacedName, Reason, Workload};

/// Where connections are told to. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Telemetry(Arc<Shared>);

#[derive(Debug)]
pub(super) struct Shared {
    series: SeriesTable<Series>,
    pub(super) requests: RequestSeriesTable,
    pub(super) access_log: AccessLog,
    pub(super) traces: Traces,
}

impl Telemetry {
    /// `label_sets`: how many sets of labels there may be at a time, of connections and of requests each; others are
    /// counted as `other`.
    pub fn new(settings: &MetricsSettings, label_sets: usize, access_log: AccessLog, traces: Traces) -> Self {
        let series = SeriesTable::new(label_sets, settings.idle_timeout);
        let requests = RequestSeriesTable::new(label_sets, settings.idle_timeout);
        Self(Arc::new(Shared { series, requests, access_log, traces }))
    }

    /// Where spans begin.
    pub fn traces(&self) -> &Traces {
        &self.0.traces
    }

    pub(super) fn shared(&self) -> &Shared {
        &self.0
    }

    /// A connection has been accepted; what `info` lacks is [amended](ConnectionTelemetry::amend) as it is learnt.
    pub fn open(&self, info: ConnectionInfo) -> ConnectionTelemetry {
        ConnectionTelemetry {
            shared: self.0.clone(),
            started: Instant::now(),
            time: SystemTime::now(),
            state: Mutex::new(State { info, verdict: None, policy: None }),
            series: OnceLock::new(),
            connected: AtomicBool::new(false),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            ended: AtomicBool::new(false),
        }
    }
}

/// All that metrics and the access log say about a connection.
#[derive(Clone, Debug)]
pub struct ConnectionInfo {
    pub direction: Direction,
    pub transport: Transport,
    pub source: Party,
    pub destination: Party,
    /// The Service that was asked for, or that the destination is an endpoint of.
    pub service: Option<NamespacedName>,
    /// The address that the client connected to, where it is not the destination's own.
    pub requested: Option<SocketAddr>,
    /// Such as `X25519MLKEM768`; none without TLS.
    pub key_exchange: Option<&'static str>,
}

/// One side of a connection. What is not known is none.
#[derive(Clone, Debug, Default)]
pub struct Party {
    pub addr: Option<SocketAddr>,
    pub pod: Option<NamespacedName>,
    /// The controller behind the pod.
    pub workload: Option<Arc<str>>,
    pub identity: Option<Identity>,
}

impl Party {
    /// Somebody whom no object explains.
    pub fn stranger(addr: SocketAddr) -> Self {
        Self { addr: Some(addr), ..Self::default() }
    }

    pub fn of(addr: SocketAddr, workload: &Workload) -> Self {
        Self {
            addr: Some(addr),
            pod: Some(workload.name().clone()),
            workload: Some(workload.pod.owner.name.clone()),
            identity: workload.identity.clone(),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Direction {
    /// From a pod of this node.
    Outbound,
    /// To a pod of this node.
    Inbound,
    /// From a pod of this node to where the mesh has no say.
    Passthrough,
    /// Through a waypoint in a process of its own, as that tells it.
    Relayed,
}

impl Direction {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
            Self::Passthrough => "passthrough",
            Self::Relayed => "relayed",
        }
    }

    pub(super) fn reporter(self) -> &'static str {
        match self {
            Self::Outbound | Self::Passthrough => "source",
            Self::Inbound => "destination",
            Self::Relayed => "waypoint",
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Transport {
    Hbone,
    Fast,
    SameNode,
    Plaintext,
    /// Nothing went anywhere: a request that was answered here.
    None,
}

impl Transport {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Hbone => "hbone",
            Self::Fast => "fast",
            Self::SameNode => "same-node",
            Self::Plaintext => "plaintext",
            Self::None => "none",
        }
    }

    pub(super) fn security(self) -> &'static str {
        match self {
            Self::Hbone | Self::Fast => "mutual_tls",
            Self::SameNode | Self::Plaintext | Self::None => "none",
        }
    }
}

/// What policy said.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    Allow,
    Deny,
}

impl Verdict {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One connection, from its accept to its end. Dropped without an end, it ends with [`Reason::Internal`], so that
/// whatever happens each connection is counted and logged once.
#[derive(Debug)]
pub struct ConnectionTelemetry {
    shared: Arc<Shared>,
    started: Instant,
    time: SystemTime,
    state: Mutex<State>,
    series: OnceLock<Arc<Series>>,
    connected: AtomicBool,
    /// What has been counted so far.
    sent: AtomicU64,
    received: AtomicU64,
    ended: AtomicBool,
}

#[derive(Debug)]
struct State {
    info: ConnectionInfo,
    verdict: Option<Verdict>,
    policy: Option<NamespacedName>,
}

impl ConnectionTelemetry {
    /// Adds what has been learnt. Labels of metrics are settled by `connected`, or by the end.
    pub fn amend(&self, change: impl FnOnce(&mut ConnectionInfo)) {
        change(&mut self.state().info);
    }

    /// What is known of it.
    pub fn info(&self) -> ConnectionInfo {
        self.state().info.clone()
    }

    /// It carries requests, of which each is told by itself: nothing more is said of the connection.
    pub fn told_by_requests(&self) {
        self.ended.store(true, Ordering::Relaxed);
    }

    /// Where it went, as far as is known.
    pub fn destination(&self) -> Option<SocketAddr> {
        self.state().info.destination.addr
    }

    /// The far side was reached, `duration` after this connection was accepted.
    pub fn connected(&self, duration: Duration) {
        if self.connected.swap(true, Ordering::Relaxed) {
            return;
        }
        self.series().opened(duration);
        let (direction, key_exchange) = {
            let state = self.state();
            (state.info.direction.as_str(), state.info.key_exchange)
        };
        if let Some(key_exchange) = key_exchange {
            metrics::counter!(catalogue::KEY_EXCHANGES, "direction" => direction, "key_exchange" => key_exchange)
                .increment(1);
        }
    }

    /// Policy decided, for the first time or again: `policy` is the one that made the verdict, where one did.
    pub fn decision(&self, verdict: Verdict, policy: Option<&NamespacedName>) {
        count_policy(catalogue::DECISIONS, verdict, policy);
        let mut state = self.state();
        state.verdict = Some(verdict);
        state.policy = policy.cloned();
    }

    /// Policy decided about one of its requests, which tells the verdict by itself.
    pub fn request_decision(&self, verdict: Verdict, policy: Option<&NamespacedName>) {
        count_policy(catalogue::DECISIONS, verdict, policy);
    }

    /// The agent at the far side decided, and counts it: here it is for the access log alone.
    pub fn decided_there(&self, verdict: Verdict, policy: Option<NamespacedName>) {
        let mut state = self.state();
        state.verdict = Some(verdict);
        state.policy = policy;
    }

    /// An AUDIT or dry-run policy matched, and would have said `verdict`.
    pub fn observed(&self, verdict: Verdict, policy: &NamespacedName) {
        count_policy(catalogue::OBSERVED, verdict, Some(policy));
    }

    /// Counts what has moved so far; `sent` (client to server) and `received` are totals of this connection. To be
    /// called now and then on long ones.
    pub fn tick(&self, sent: u64, received: u64) {
        let grown = |counter: &AtomicU64, total| total - counter.fetch_max(total, Ordering::Relaxed).min(total);
        let (sent, received) = (grown(&self.sent, sent), grown(&self.received, received));
        // Labels are settled by what there is to count.
        if sent > 0 || received > 0 {
            self.series().moved(sent, received);
        }
    }

    /// The end, in order where there is no `reason`. `detail` is for people, and may be empty.
    pub fn closed(&self, sent: u64, received: u64, reason: Option<Reason>, detail: &str) {
        self.end(sent, received, reason, detail);
    }

    fn end(&self, sent: u64, received: u64, reason: Option<Reason>, detail: &str) {
        if self.ended.swap(true, Ordering::Relaxed) {
            return;
        }
        self.tick(sent, received);
        if let Some(reason) = &reason {
            self.series().failed(reason.code());
        }
        if self.connected.load(Ordering::Relaxed) {
            self.series().closed();
        }
        if !self.shared.access_log.is_on() {
            return;
        }
        let state = self.state();
        self.shared.access_log.write(&Record {
            time: self.time,
            duration: self.started.elapsed(),
            told: Told::Connection(OfConnection {
                info: &state.info,
                verdict: state.verdict,
                policy: state.policy.as_ref(),
                reason: reason.as_ref(),
                sent,
                received,
                detail,
            }),
        });
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn series(&self) -> &Series {
        self.series.get_or_init(|| self.shared.series.get(&Labels::of(&self.state().info)))
    }
}

impl Drop for ConnectionTelemetry {
    fn drop(&mut self) {
        let (sent, received) = (self.sent.load(Ordering::Relaxed), self.received.load(Ordering::Relaxed));
        self.end(sent, received, Some(Reason::Internal), "it was given up without a reason");
    }
}

// Bounded: policies are objects of the cluster, a handful each namespace, and idle ones expire.
fn count_policy(name: &'static str, verdict: Verdict, policy: Option<&NamespacedName>) {
    let policy = policy.map_or_else(|| "none".to_owned(), ToString::to_string);
    metrics::counter!(name, "verdict" => verdict.as_str(), "policy" => policy).increment(1);
}

#[cfg(test)]
mod tests;
