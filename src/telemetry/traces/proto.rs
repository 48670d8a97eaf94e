//! Spans as OTLP has them, under the names of OpenTelemetry's
//! [semantic conventions](https://opentelemetry.io/docs/specs/semconv/http/http-spans/).

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, InstrumentationScope, KeyValue};
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind as Kind;
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span, Status};

use super::{Finished, Observer, SpanKind};
use crate::mesh::NamespacedName;
use crate::telemetry::connection::Party;
use crate::telemetry::request::{RequestInfo, RequestProtocol};

/// The spans of one export, by the workload that each tells of.
pub fn request(spans: Vec<Finished>, observer: &Observer) -> ExportTraceServiceRequest {
    let mut by_workload: HashMap<Subject, Vec<Span>> = HashMap::new();
    for finished in &spans {
        by_workload.entry(Subject::of(finished, observer)).or_default().push(span(finished));
    }
    let resource_spans = by_workload.into_iter().map(|(subject, spans)| ResourceSpans {
        resource: Some(subject.resource(observer)),
        scope_spans: vec![ScopeSpans { scope: Some(scope()), spans, schema_url: String::new() }],
        schema_url: SCHEMA.to_owned(),
    });
    ExportTraceServiceRequest { resource_spans: resource_spans.collect() }
}

/// Whose span it is: the client's, the server's, or the waypoint's.
#[derive(PartialEq, Eq, Hash)]
struct Subject {
    workload: Option<Arc<str>>,
    namespace: Option<Arc<str>>,
    pod: Option<Arc<str>>,
}

impl Subject {
    fn of(finished: &Finished, observer: &Observer) -> Self {
        let party = match (observer, finished.span.kind) {
            (Observer::Waypoint(NamespacedName { namespace, name }), _) => {
                return Self { workload: Some(name.clone()), namespace: Some(namespace.clone()), pod: None };
            }
            (Observer::Agent { .. }, SpanKind::Client) => &finished.info.connection.source,
            (Observer::Agent { .. }, SpanKind::Server) => &finished.info.connection.destination,
        };
        let pod = party.pod.as_ref();
        Self {
            workload: party.workload.clone(),
            namespace: pod.map(|pod| pod.namespace.clone()),
            pod: pod.map(|pod| pod.name.clone()),
        }
    }

    fn resource(&self, observer: &Observer) -> Resource {
        let node = match observer {
            Observer::Agent { node } => Some(node.as_str()),
            Observer::Waypoint(_) => None,
        };
        let said = [
            ("service.name", Some(self.workload.as_deref().unwrap_or("unknown_service"))),
            ("service.namespace", self.namespace.as_deref()),
            ("k8s.namespace.name", self.namespace.as_deref()),
            ("k8s.pod.name", self.pod.as_deref()),
            ("k8s.node.name", node),
            ("telemetry.sdk.name", Some("selvedge")),
            ("telemetry.sdk.language", Some("rust")),
            ("telemetry.sdk.version", Some(env!("CARGO_PKG_VERSION"))),
        ];
        let attributes = said.into_iter().filter_map(|(name, value)| Some(text(name, value?))).collect();
        Resource { attributes, ..Resource::default() }
    }
}

fn span(finished: &Finished) -> Span {
    let Finished { span, info, started, duration } = finished;
    let started = started.duration_since(UNIX_EPOCH).unwrap_or_default();
    Span {
        trace_id: span.context.trace.0.to_be_bytes().to_vec(),
        span_id: span.context.span.0.to_be_bytes().to_vec(),
        parent_span_id: span.parent.map(|parent| parent.0.to_be_bytes().to_vec()).unwrap_or_default(),
        name: name(info),
        kind: match span.kind {
            SpanKind::Client => Kind::Client,
            SpanKind::Server => Kind::Server,
        }
        .into(),
        start_time_unix_nano: nanos(started),
        end_time_unix_nano: nanos(started.saturating_add(*duration)),
        attributes: attributes(span.kind, info),
        status: Some(status(span.kind, info)),
        ..Span::default()
    }
}

/// Of low cardinality: a method, or what gRPC calls one.
fn name(info: &RequestInfo) -> String {
    match info.protocol {
        RequestProtocol::Grpc => info.path.trim_start_matches('/').to_owned(),
        _ => known_method(&info.method).unwrap_or("HTTP").to_owned(),
    }
}

fn attributes(kind: SpanKind, info: &RequestInfo) -> Vec<KeyValue> {
    let connection = &info.connection;
    let method = known_method(&info.method);
    let version = match info.protocol {
        RequestProtocol::Http1 => "1.1",
        RequestProtocol::Http2 | RequestProtocol::Grpc => "2",
    };
    let (host, port) = match info.host.rsplit_once(':') {
        Some((host, port)) if !host.ends_with(':') && port.parse::<u16>().is_ok() => (host, port.parse().ok()),
        _ => (info.host.as_str(), None),
    };
    let peer = match kind {
        SpanKind::Client => connection.destination.addr,
        SpanKind::Server => connection.source.addr,
    };
    let is_grpc = info.protocol == RequestProtocol::Grpc;
    let all = [
        Some(text("http.request.method", method.unwrap_or("_OTHER"))),
        method.is_none().then(|| text("http.request.method_original", &info.method)),
        Some(text("url.scheme", "http")),
        Some(text("url.path", &info.path)),
        (!host.is_empty()).then(|| text("server.address", host)),
        port.map(|port: i64| number("server.port", port)),
        (info.status != 0).then(|| number("http.response.status_code", info.status.into())),
        Some(text("network.protocol.name", "http")),
        Some(text("network.protocol.version", version)),
        peer.map(|peer| text("network.peer.address", &peer.ip().to_string())),
        peer.map(|peer| number("network.peer.port", peer.port().into())),
        Some(number("http.request.body.size", info.sent.try_into().unwrap_or(i64::MAX))),
        Some(number("http.response.body.size", info.received.try_into().unwrap_or(i64::MAX))),
        is_grpc.then(|| text("rpc.system", "grpc")),
        info.grpc_status.map(|status| number("rpc.grpc.status_code", status.into())),
        error_type(kind, info).map(|kind| text("error.type", &kind)),
        info.route.as_ref().map(|route| text("selvedge.route", &route.to_string())),
        info.service.as_ref().map(|service| text("selvedge.service", &service.to_string())),
        Some(text("selvedge.transport", connection.transport.as_str())),
        identity("selvedge.source.identity", &connection.source),
        identity("selvedge.destination.identity", &connection.destination),
        (!info.detail.is_empty()).then(|| text("selvedge.detail", &info.detail)),
    ];
    all.into_iter().flatten().collect()
}

fn identity(name: &str, party: &Party) -> Option<KeyValue> {
    party.identity.as_ref().map(|identity| text(name, &identity.to_string()))
}

fn status(kind: SpanKind, info: &RequestInfo) -> Status {
    match error_type(kind, info) {
        Some(_) => Status { message: info.detail.clone(), code: StatusCode::Error.into() },
        None => Status::default(),
    }
}

/// Why it counts as failed, if it does: for a server, what is its own fault; for a client, whatever it did not want.
fn error_type(kind: SpanKind, info: &RequestInfo) -> Option<String> {
    if let Some(reason) = &info.reason {
        return Some(reason.code().to_owned());
    }
    let faults = match kind {
        SpanKind::Client => 400..600,
        SpanKind::Server => 500..600,
    };
    if faults.contains(&info.status) {
        return Some(info.status.to_string());
    }
    let failed = |status: &u16| match kind {
        SpanKind::Client => *status != 0,
        // Unknown, deadline exceeded, unimplemented, internal, unavailable, data loss.
        SpanKind::Server => [2, 4, 12, 13, 14, 15].contains(status),
    };
    info.grpc_status.filter(failed).map(|status| status.to_string())
}

fn known_method(method: &str) -> Option<&str> {
    METHODS.contains(&method).then_some(method)
}

fn scope() -> InstrumentationScope {
    let version = env!("CARGO_PKG_VERSION").to_owned();
    InstrumentationScope { name: "selvedge".to_owned(), version, ..InstrumentationScope::default() }
}

fn text(name: &str, value: &str) -> KeyValue {
    attribute(name, Value::StringValue(value.to_owned()))
}

fn number(name: &str, value: i64) -> KeyValue {
    attribute(name, Value::IntValue(value))
}

fn attribute(name: &str, value: Value) -> KeyValue {
    KeyValue { key: name.to_owned(), value: Some(AnyValue { value: Some(value) }), ..KeyValue::default() }
}

fn nanos(since: Duration) -> u64 {
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

const METHODS: [&str; 9] = ["CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"];
const SCHEMA: &str = "https://opentelemetry.io/schemas/1.37.0";
