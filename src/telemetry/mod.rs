//! Metrics, the access log, traces, and the agent's own log.
//!
//! A connection is told to [`ConnectionTelemetry`] once, as [`ConnectionInfo`], and a request to [`RequestTelemetry`] as
//! [`RequestInfo`]; metrics, the access log and spans follow from that. Metrics carry bounded labels only: a cap on label sets stands behind them, and series that nothing
//! moves expire ([`Metrics`]). The access log never makes a connection wait ([`AccessLog`]).

#![forbid(unsafe_code)]

mod access_log;
mod catalogue;
mod connection;
mod log;
mod metrics;
mod request;
mod seldom;
mod series;
mod traces;

pub use self::access_log::{AccessLog, AccessLogFormat, AccessLogWriter};
pub use self::catalogue::describe_metrics;
pub use self::connection::{ConnectionInfo, ConnectionTelemetry, Direction, Party, Telemetry, Transport, Verdict};
pub use self::log::{LogControl, LogError, LogFormat};
pub use self::metrics::{Metrics, MetricsError, MetricsSettings};
pub use self::request::{RequestConnection, RequestInfo, RequestProtocol, RequestTelemetry};
pub use self::seldom::Seldom;
pub use self::traces::{Collector, CollectorError, Exporter, Observer, Span, SpanKind, TraceId, TraceShare, Traces};
