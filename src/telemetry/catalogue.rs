//! Every metric that this room makes: its name, kind and meaning.

use metrics::Unit;

/// One metric, as documented.
#[derive(Clone, Copy, Debug)]
struct Metric {
    name: &'static str,
    kind: Kind,
    unit: Unit,
    meaning: &'static str,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Counter,
    Gauge,
    Histogram,
}

/// Tells the recorder the unit and meaning of each.
pub fn describe_metrics() {
    for metric in &CATALOGUE {
        match metric.kind {
            Kind::Counter => metrics::describe_counter!(metric.name, metric.unit, metric.meaning),
            Kind::Gauge => metrics::describe_gauge!(metric.name, metric.unit, metric.meaning),
            Kind::Histogram => metrics::describe_histogram!(metric.name, metric.unit, metric.meaning),
        }
    }
}

const fn counter(name: &'static str, unit: Unit, meaning: &'static str) -> Metric {
    Metric { name, kind: Kind::Counter, unit, meaning }
}

const fn gauge(name: &'static str, unit: Unit, meaning: &'static str) -> Metric {
    Metric { name, kind: Kind::Gauge, unit, meaning }
}

const fn seconds(name: &'static str, meaning: &'static str) -> Metric {
    Metric { name, kind: Kind::Histogram, unit: Unit::Seconds, meaning }
}

pub(super) const OPENED: &str = "selvedge_tcp_connections_opened_total";
pub(super) const CLOSED: &str = "selvedge_tcp_connections_closed_total";
pub(super) const FAILED: &str = "selvedge_connections_failed_total";
pub(super) const OPEN: &str = "selvedge_connections_open";
pub(super) const SENT: &str = "selvedge_tcp_sent_bytes_total";
pub(super) const RECEIVED: &str = "selvedge_tcp_received_bytes_total";
pub(super) const CONNECT: &str = "selvedge_connect_duration_seconds";
pub(super) const KEY_EXCHANGES: &str = "selvedge_tls_key_exchanges_total";
pub(super) const DECISIONS: &str = "selvedge_policy_decisions_total";
pub(super) const OBSERVED: &str = "selvedge_policy_observed_total";
pub(super) const DROPPED: &str = "selvedge_access_log_dropped_total";
pub(super) const OVERFLOW: &str = "selvedge_metrics_overflow_total";
pub(super) const OPEN_FDS: &str = "selvedge_process_open_fds";
pub(super) const CPU_TIME: &str = "selvedge_process_cpu_seconds";
pub(super) const REQUESTS: &str = "selvedge_http_requests_total";
pub(super) const REQUEST_DURATION: &str = "selvedge_http_request_duration_seconds";
pub(super) const SPANS: &str = "selvedge_trace_spans_total";
pub(super) const RESIDENT_MEMORY: &str = "selvedge_process_resident_memory_bytes";

static CATALOGUE: [Metric; 19] = [
    gauge("selvedge_build_info", Unit::Count, "Always 1; its labels say which build this is."),
    gauge(OPEN_FDS, Unit::Count, "Descriptors that the worker holds open."),
    gauge(CPU_TIME, Unit::Seconds, "Processor time that the worker has used."),
    gauge(RESIDENT_MEMORY, Unit::Bytes, "Memory of the worker that is resident."),
    counter(OPENED, Unit::Count, "Connections whose far side was reached."),
    counter(CLOSED, Unit::Count, "Connections that had been opened and have ended."),
    counter(FAILED, Unit::Count, "Connections refused, never opened or ended badly, by reason."),
    gauge(OPEN, Unit::Count, "Connections open now."),
    counter(SENT, Unit::Bytes, "Bytes from the client to the server."),
    counter(RECEIVED, Unit::Bytes, "Bytes from the server to the client."),
    seconds(CONNECT, "From accepting a connection to reaching its far side."),
    counter(KEY_EXCHANGES, Unit::Count, "Connections over mutual TLS, by key exchange."),
    counter(
        REQUESTS,
        Unit::Count,
        "Requests that were answered, here or by an application, by response code and route.",
    ),
    seconds(REQUEST_DURATION, "From a request's head to the last byte of its answer."),
    counter(
        DECISIONS,
        Unit::Count,
        "Policy decisions about connections and requests, by verdict and the policy that made them.",
    ),
    counter(OBSERVED, Unit::Count, "Matches of AUDIT and dry-run policies, by what they would have done."),
    counter(DROPPED, Unit::Count, "Access log lines dropped because standard output did not keep up."),
    counter(
        SPANS,
        Unit::Count,
        "Spans of sampled requests: sent to the collector, lost as it did not take them, or dropped as too many waited.",
    ),
    counter(
        OVERFLOW,
        Unit::Count,
        "Connections and requests counted under the labels \"other\", the cap on label sets being reached.",
    ),
];
