use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use metrics::Gauge;

use super::access_log::{AccessLog, Record};
use super::series::{Labels, Series, SeriesTable};
use super::{MetricsSettings, catalogue};
use crate::mesh::{Identity, NamespacedName, Reason, Workload};

/// Where connections are told to. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Telemetry(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    series: SeriesTable,
    access_log: AccessLog,
}

impl Telemetry {
    /// `label_sets`: how many sets of connection labels there may be at a time; others are counted as `other`.
    pub fn new(settings: &MetricsSettings, label_sets: usize, access_log: AccessLog) -> Self {
        let series = SeriesTable::new(label_sets, settings.idle_timeout);
        Self(Arc::new(Shared { series, access_log }))
    }

    /// A connection has been accepted; what `info` lacks is [amended](ConnectionTelemetry::amend) as it is learnt.
    pub fn open(&self, info: ConnectionInfo) -> ConnectionTelemetry {
        ConnectionTelemetry {
            shared: self.0.clone(),
            started: Instant::now(),
            time: SystemTime::now(),
            state: Mutex::new(State { info, verdict: None, policy: None }),
            series: OnceLock::new(),
            open: OnceLock::new(),
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

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// From a pod of this node.
    Outbound,
    /// To a pod of this node.
    Inbound,
    /// From a pod of this node to where the mesh has no say.
    Passthrough,
}

impl Direction {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
            Self::Passthrough => "passthrough",
        }
    }

    fn reporter(self) -> &'static str {
        match self {
            Self::Outbound | Self::Passthrough => "source",
            Self::Inbound => "destination",
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Transport {
    Hbone,
    Fast,
    SameNode,
    Plaintext,
}

impl Transport {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Hbone => "hbone",
            Self::Fast => "fast",
            Self::SameNode => "same-node",
            Self::Plaintext => "plaintext",
        }
    }

    fn security(self) -> &'static str {
        match self {
            Self::Hbone | Self::Fast => "mutual_tls",
            Self::SameNode | Self::Plaintext => "none",
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
    /// Set once connected: the gauge that counts it.
    open: OnceLock<Gauge>,
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

    /// Where it went, as far as is known.
    pub fn destination(&self) -> Option<SocketAddr> {
        self.state().info.destination.addr
    }

    /// The far side was reached, `duration` after this connection was accepted.
    pub fn connected(&self, duration: Duration) {
        let info = self.state().info.clone();
        let (direction, transport) = (info.direction.as_str(), info.transport.as_str());
        let open = metrics::gauge!(
            catalogue::OPEN, "reporter" => info.direction.reporter(), "direction" => direction, "transport" => transport
        );
        if self.open.set(open.clone()).is_err() {
            return;
        }
        open.increment(1.0);
        self.series().opened();
        metrics::histogram!(catalogue::CONNECT, "direction" => direction, "transport" => transport)
            .record(duration.as_secs_f64());
        if let Some(key_exchange) = info.key_exchange {
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
        self.series().moved(grown(&self.sent, sent), grown(&self.received, received));
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
        if let Some(open) = self.open.get() {
            open.decrement(1.0);
            self.series().closed();
        }
        if !self.shared.access_log.is_on() {
            return;
        }
        let state = self.state();
        self.shared.access_log.write(Record {
            time: self.time,
            info: state.info.clone(),
            verdict: state.verdict,
            policy: state.policy.clone(),
            reason,
            sent,
            received,
            duration: self.started.elapsed(),
            detail: detail.to_owned(),
        });
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn series(&self) -> &Series {
        self.series.get_or_init(|| self.shared.series.get(&labels(&self.state().info)))
    }
}

impl Drop for ConnectionTelemetry {
    fn drop(&mut self) {
        let (sent, received) = (self.sent.load(Ordering::Relaxed), self.received.load(Ordering::Relaxed));
        self.end(sent, received, Some(Reason::Internal), "it was given up without a reason");
    }
}

fn labels(info: &ConnectionInfo) -> Labels {
    let unknown: Arc<str> = "unknown".into();
    let or_unknown = |value: Option<Arc<str>>| value.unwrap_or_else(|| unknown.clone());
    let workload = |party: &Party| or_unknown(party.workload.clone());
    let namespace = |party: &Party| or_unknown(party.pod.as_ref().map(|pod| pod.namespace.clone()));
    let principal = |party: &Party| or_unknown(party.identity.as_ref().map(|id| id.to_string().into()));
    Labels([
        info.direction.reporter().into(),
        info.direction.as_str().into(),
        workload(&info.source),
        namespace(&info.source),
        principal(&info.source),
        workload(&info.destination),
        namespace(&info.destination),
        principal(&info.destination),
        or_unknown(info.service.as_ref().map(|service| service.name.clone())),
        or_unknown(info.service.as_ref().map(|service| service.namespace.clone())),
        info.transport.security().into(),
        info.transport.as_str().into(),
    ])
}

// Bounded: policies are objects of the cluster, a handful each namespace, and idle ones expire.
fn count_policy(name: &'static str, verdict: Verdict, policy: Option<&NamespacedName>) {
    let policy = policy.map_or_else(|| "none".to_owned(), ToString::to_string);
    metrics::counter!(name, "verdict" => verdict.as_str(), "policy" => policy).increment(1);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::access_log::AccessLogFormat;
    use crate::telemetry::metrics::recorder;

    fn info(name: &str) -> ConnectionInfo {
        let party = |pod: &str| Party {
            addr: Some("10.0.0.1:80".parse().unwrap()),
            pod: Some(NamespacedName::new("shop", pod)),
            workload: Some(pod.into()),
            identity: Some(format!("spiffe://cluster.local/ns/shop/sa/{pod}").parse().unwrap()),
        };
        ConnectionInfo {
            direction: Direction::Outbound,
            transport: Transport::Hbone,
            source: party(name),
            destination: party("server"),
            service: Some(NamespacedName::new("shop", "web")),
            requested: None,
            key_exchange: Some("X25519MLKEM768"),
        }
    }

    fn rendered(cap: usize, story: impl FnOnce(&Telemetry)) -> String {
        let settings = MetricsSettings::default();
        let recorder = recorder(&settings).unwrap();
        let telemetry = Telemetry::new(&settings, cap, AccessLog::off());
        metrics::with_local_recorder(&recorder, || story(&telemetry));
        recorder.handle().render()
    }

    fn sum(text: &str, name: &str, needle: &str) -> f64 {
        text.lines()
            .filter(|line| line.starts_with(&format!("{name}{{")) && line.contains(needle))
            .map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap())
            .sum()
    }

    #[test]
    fn a_connection_is_counted_while_it_lives_and_once_at_its_end() {
        let text = rendered(10, |telemetry| {
            let one = telemetry.open(info("cart"));
            one.decision(Verdict::Allow, None);
            one.connected(Duration::from_millis(3));
            one.tick(100, 1000);
            one.tick(150, 1000);
            let two = telemetry.open(info("cart"));
            two.connected(Duration::from_millis(3));
            one.closed(200, 3000, None, "");
            std::mem::forget(two);
        });
        assert_eq!(sum(&text, catalogue::SENT, "source_workload=\"cart\""), 200.0);
        assert_eq!(sum(&text, catalogue::RECEIVED, "connection_security_policy=\"mutual_tls\""), 3000.0);
        assert_eq!(sum(&text, catalogue::OPENED, "destination_service=\"web\""), 2.0);
        assert_eq!(sum(&text, catalogue::CLOSED, "reporter=\"source\""), 1.0);
        assert_eq!(sum(&text, catalogue::OPEN, "transport=\"hbone\""), 1.0);
        assert_eq!(sum(&text, catalogue::FAILED, ""), 0.0);
        assert_eq!(sum(&text, catalogue::KEY_EXCHANGES, "key_exchange=\"X25519MLKEM768\""), 2.0);
    }

    #[test]
    fn a_refused_connection_is_a_failure_and_never_was_open() {
        let text = rendered(10, |telemetry| {
            let policy = NamespacedName::new("shop", "deny");
            let refused = telemetry.open(info("cart"));
            refused.decision(Verdict::Deny, Some(&policy));
            refused.closed(0, 0, Some(Reason::Policy(policy)), "");
        });
        assert_eq!(sum(&text, catalogue::FAILED, "reason=\"policy\""), 1.0);
        assert_eq!(sum(&text, catalogue::DECISIONS, "policy=\"shop/deny\""), 1.0);
        assert_eq!(sum(&text, catalogue::OPENED, "") + sum(&text, catalogue::CLOSED, ""), 0.0);
    }

    #[test]
    fn a_connection_that_is_dropped_ends_as_internal() {
        let text = rendered(10, |telemetry| {
            let lost = telemetry.open(info("cart"));
            lost.connected(Duration::ZERO);
        });
        assert_eq!(sum(&text, catalogue::FAILED, "reason=\"internal\""), 1.0);
        assert_eq!(sum(&text, catalogue::OPEN, ""), 0.0);
    }

    #[test]
    fn label_sets_beyond_the_cap_are_counted_as_other() {
        let text = rendered(3, |telemetry| {
            for i in 0..50 {
                let one = telemetry.open(info(&format!("client-{i}")));
                one.connected(Duration::ZERO);
                one.closed(1, 1, None, "");
            }
        });
        assert_eq!(text.lines().filter(|line| line.starts_with(&format!("{}{{", catalogue::OPENED))).count(), 4);
        assert_eq!(sum(&text, catalogue::OPENED, "source_workload=\"other\""), 47.0);
        assert!(text.contains(&format!("{} 47", catalogue::OVERFLOW)), "{text}");
    }

    #[test]
    fn what_is_learnt_later_is_in_the_log_and_the_labels() {
        let buffer = crate::telemetry::access_log::tests::Shared::default();
        let (log, writer) = AccessLog::start(AccessLogFormat::Json, buffer.clone()).unwrap();
        let settings = MetricsSettings::default();
        let telemetry = Telemetry::new(&settings, 10, log);
        let one = telemetry.open(ConnectionInfo { service: None, key_exchange: None, ..info("cart") });
        one.amend(|info| info.service = Some(NamespacedName::new("shop", "late")));
        one.decision(Verdict::Deny, Some(&NamespacedName::new("shop", "p")));
        one.closed(1, 2, Some(Reason::Policy(NamespacedName::new("shop", "p"))), "no \"ALLOW\" matches");
        assert!(writer.finish(Duration::from_secs(10)));
        let line: serde_json::Value = serde_json::from_str(buffer.text().trim()).unwrap();
        assert_eq!(line["service"], "shop/late");
        assert_eq!(line["verdict"], "deny");
        assert_eq!(line["reason"], "policy:shop/p");
        assert_eq!(line["source_identity"], "spiffe://cluster.local/ns/shop/sa/cart");
        assert_eq!(line["destination_identity"], "spiffe://cluster.local/ns/shop/sa/server");
        assert_eq!(line["bytes_received"], 2);
        assert_eq!(line["detail"], "no \"ALLOW\" matches");
    }
}
