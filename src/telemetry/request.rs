use std::net::SocketAddr;
use std::ops::Deref;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use metrics::{Counter, Histogram, Key, Label};

use super::access_log::{AccessLogFormat, Line, Record, Told};
use super::catalogue;
use super::connection::{ConnectionInfo, Telemetry, Verdict};
use super::series::{Kept, Labels, Sets, counter, histogram};
use super::traces::{Span, TraceId};
use crate::mesh::{NamespacedName, Reason};

/// One request, from its head to the last byte of its answer. Dropped without an end, the client has given it up.
#[derive(Debug)]
pub struct RequestTelemetry {
    telemetry: Telemetry,
    started: Instant,
    time: SystemTime,
    info: Option<Box<RequestInfo>>,
    span: Option<Span>,
}

/// A connection as its requests tell of it: they share it, with what is worked out once for all of them.
#[derive(Debug)]
pub struct RequestConnection {
    info: ConnectionInfo,
    /// Its ends, as the lines of the one access log have them.
    parties: OnceLock<Box<str>>,
    /// The metrics that the last of them was counted in.
    counted: Mutex<Option<(RequestLabels, Arc<RequestSeries>)>>,
}

impl RequestConnection {
    pub fn new(info: ConnectionInfo) -> Arc<Self> {
        Arc::new(Self { info, parties: OnceLock::new(), counted: Mutex::default() })
    }

    pub(super) fn write_parties(&self, format: AccessLogFormat, line: &mut Line<'_>) {
        line.fields(self.parties.get_or_init(|| {
            let mut text = String::new();
            Line::within(&mut text, format).parties(&self.info.source, &self.info.destination);
            text.into()
        }));
    }

    /// The metrics of a request that went on it. Most are like the one before, and spare the search by all labels.
    fn series(&self, request: &RequestInfo, table: &RequestSeriesTable) -> Arc<RequestSeries> {
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        match &*counted {
            Some((labels, series)) if labels.are_of(request) => series.clone(),
            _ => {
                let labels = RequestLabels::of(request);
                let series = table.get(&labels);
                // There may be room for its own soon.
                *counted = (!series.stands_in).then(|| (labels, series.clone()));
                series
            }
        }
    }
}

impl Deref for RequestConnection {
    type Target = ConnectionInfo;

    fn deref(&self) -> &ConnectionInfo {
        &self.info
    }
}

/// All that metrics and the access log say about a request.
#[derive(Clone, Debug)]
pub struct RequestInfo {
    /// That it went on, or the client's where it was answered here.
    pub connection: Arc<RequestConnection>,
    /// Whom it was for, whatever connection it went on.
    pub service: Option<NamespacedName>,
    pub requested: Option<SocketAddr>,
    pub protocol: RequestProtocol,
    pub method: String,
    pub host: String,
    /// Without the query, which may hold what nobody should read.
    pub path: String,
    pub route: Option<NamespacedName>,
    /// The trace that it is a part of, where it is sampled.
    pub trace: Option<TraceId>,
    /// As the client got it; 0 where it got none.
    pub status: u16,
    /// What policy said of it, where it was asked here, and the policy that made it so.
    pub verdict: Option<Verdict>,
    pub policy: Option<NamespacedName>,
    /// The `grpc-status` of a gRPC answer, where it came.
    pub grpc_status: Option<u16>,
    /// Why it was answered here, or went badly.
    pub reason: Option<Reason>,
    pub detail: String,
    /// Bytes of the bodies.
    pub sent: u64,
    pub received: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RequestProtocol {
    Http1,
    Http2,
    Grpc,
}

impl RequestProtocol {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http1 => "http/1",
            Self::Http2 => "http/2",
            Self::Grpc => "grpc",
        }
    }
}

impl Telemetry {
    /// A request's head has come; what `info` lacks is amended as it is learnt.
    pub fn request(&self, info: RequestInfo) -> RequestTelemetry {
        let (started, time) = (Instant::now(), SystemTime::now());
        RequestTelemetry { telemetry: self.clone(), started, time, info: Some(Box::new(info)), span: None }
    }
}

impl RequestTelemetry {
    pub fn started(&self) -> Instant {
        self.started
    }

    /// It is sampled.
    pub fn traced(&mut self, span: Span) {
        self.span = Some(span);
        self.amend(|info| info.trace = Some(span.context.trace));
    }

    pub fn amend(&mut self, change: impl FnOnce(&mut RequestInfo)) {
        if let Some(info) = &mut self.info {
            change(info);
        }
    }

    /// The answer has gone to its end, or as far as it will.
    pub fn ended(&mut self) {
        let Some(info) = self.info.take() else { return };
        let now = Instant::now();
        let duration = now.saturating_duration_since(self.started);
        let shared = self.telemetry.shared();
        info.connection.series(&info, &shared.requests).ended(duration, now);
        if shared.access_log.is_on() {
            shared.access_log.write(&Record { time: self.time, duration, told: Told::Request(&info) });
        }
        if let Some(span) = self.span {
            shared.traces.end(span, info, self.time, duration);
        }
    }
}

impl Drop for RequestTelemetry {
    fn drop(&mut self) {
        self.amend(|info| {
            info.reason.get_or_insert(Reason::Reset);
            if info.detail.is_empty() {
                info.detail.push_str("the client gave it up");
            }
        });
        self.ended();
    }
}

impl RequestInfo {
    /// gRPC knows seventeen, and takes any other for UNKNOWN.
    fn grpc_label(&self) -> Option<u16> {
        self.grpc_status.map(|code| if code <= MOST_GRPC { code } else { GRPC_UNKNOWN })
    }

    pub(super) fn write(&self, line: &mut Line<'_>) {
        line.word("protocol", Some(self.protocol.as_str()));
        line.word("method", Some(&self.method));
        line.word("host", (!self.host.is_empty()).then_some(&self.host));
        line.word("path", Some(&self.path));
        line.number("status", self.status);
        line.shown("grpc_status", self.grpc_status);
        line.object("route", self.route.as_ref());
        line.shown("trace_id", self.trace);
    }
}

/// One label set of requests.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct RequestLabels {
    ends: Labels,
    protocol: RequestProtocol,
    status: u16,
    /// Of gRPC, where it came.
    grpc: Option<u16>,
    /// None: no route. What stands in for label sets beyond the cap has none either.
    route: Option<NamespacedName>,
}

impl RequestLabels {
    fn of(info: &RequestInfo) -> Self {
        let ends = Labels::of_request(&info.connection, info.service.clone());
        let (protocol, status, grpc, route) = (info.protocol, info.status, info.grpc_label(), info.route.clone());
        Self { ends, protocol, status, grpc, route }
    }

    /// Whether a request on the same connection has these labels.
    fn are_of(&self, info: &RequestInfo) -> bool {
        self.protocol == info.protocol
            && self.status == info.status
            && self.grpc == info.grpc_label()
            && self.route == info.route
            && self.ends.service() == info.service.as_ref()
    }

    fn key(&self, name: &'static str) -> Key {
        let route = self.route.as_ref().map_or_else(|| "none".to_owned(), ToString::to_string);
        let grpc = self.grpc.map_or_else(|| "none".to_owned(), |code| code.to_string());
        let labels = [
            Label::from_static_parts("request_protocol", self.protocol.as_str()),
            Label::new("response_code", self.status.to_string()),
            Label::new("grpc_response_status", grpc),
            Label::new("route", route),
        ];
        self.ends.key(name, labels)
    }
}

/// The metrics of one label set.
#[derive(Debug)]
pub(super) struct RequestSeries {
    /// For label sets beyond the cap.
    stands_in: bool,
    keep: Duration,
    requests: Kept<Counter>,
    duration: Kept<Histogram>,
    last_used: AtomicU64,
}

impl RequestSeries {
    fn ended(&self, after: Duration, now: Instant) {
        self.requests.with(now, self.keep, counter, |requests| requests.increment(1));
        self.duration.with(now, self.keep, histogram, |duration| duration.record(after.as_secs_f64()));
    }
}

impl Sets for RequestSeries {
    type Labels = RequestLabels;

    fn new(labels: &RequestLabels, keep: Duration) -> Self {
        Self {
            stands_in: labels.ends.are_other(),
            keep,
            requests: Kept::new(labels.key(catalogue::REQUESTS)),
            duration: Kept::new(labels.key(catalogue::REQUEST_DURATION)),
            last_used: AtomicU64::new(0),
        }
    }

    fn other(labels: &RequestLabels) -> RequestLabels {
        RequestLabels { ends: labels.ends.other(), route: None, ..labels.clone() }
    }

    fn last_used(&self) -> &AtomicU64 {
        &self.last_used
    }
}

/// UNAUTHENTICATED, the last one.
const MOST_GRPC: u16 = 16;
const GRPC_UNKNOWN: u16 = 2;

/// What the agent as a whole has of them.
pub(super) type RequestSeriesTable = super::series::SeriesTable<RequestSeries>;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::access_log::tests::Shared;
    use crate::telemetry::metrics::recorder;
    use crate::telemetry::{AccessLog, Direction, MetricsSettings, Party, Telemetry, Traces, Transport};

    fn info() -> RequestInfo {
        RequestInfo {
            connection: RequestConnection::new(ConnectionInfo {
                direction: Direction::Outbound,
                transport: Transport::Fast,
                source: Party { workload: Some("web".into()), ..Party::default() },
                destination: Party::default(),
                service: None,
                requested: None,
                key_exchange: None,
            }),
            service: Some(NamespacedName::new("shop", "cart")),
            requested: None,
            protocol: RequestProtocol::Http1,
            method: "GET".to_owned(),
            host: "cart".to_owned(),
            path: "/a b\"".to_owned(),
            route: Some(NamespacedName::new("shop", "canary")),
            status: 0,
            verdict: None,
            policy: None,
            grpc_status: None,
            trace: None,
            reason: None,
            detail: String::new(),
            sent: 0,
            received: 3,
        }
    }

    #[test]
    fn a_request_is_counted_and_logged_once_whatever_becomes_of_it() {
        let settings = MetricsSettings::default();
        let recorder = recorder(&settings).unwrap();
        let output = Shared::default();
        let (log, writer) = AccessLog::start(AccessLogFormat::Json, output.clone()).unwrap();
        metrics::with_local_recorder(&recorder, || {
            let telemetry = Telemetry::new(&settings, 10, log, Traces::default());
            let info = info();
            let mut request = telemetry.request(info.clone());
            request.amend(|info| info.status = 200);
            request.ended();
            drop(request);
            drop(telemetry.request(info));
        });
        assert!(writer.finish(Duration::from_secs(10)));
        let text = recorder.handle().render();
        let counted = |code: &str| {
            let label = format!("response_code=\"{code}\"");
            text.lines()
                .filter(|line| line.starts_with("selvedge_http_requests_total{") && line.contains(&label))
                .count()
        };
        assert_eq!((counted("200"), counted("0")), (1, 1), "{text}");
        assert!(text.contains("route=\"shop/canary\"") && text.contains("destination_service=\"cart\""), "{text}");
        let lines: Vec<serde_json::Value> =
            output.text().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 2);
        assert_eq!(
            (&lines[0]["path"], &lines[0]["status"], &lines[0]["bytes_received"]),
            (&"/a b\"".into(), &200.into(), &3.into())
        );
        assert!(lines.iter().all(|line| line["source_workload"] == "web"), "{lines:?}");
        assert_eq!((&lines[1]["reason"], &lines[1]["route"]), (&"reset".into(), &"shop/canary".into()));
    }
}
