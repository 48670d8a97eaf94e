use std::net::SocketAddr;
use std::sync::Mutex;

use http::HeaderValue;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1 as otlp;
use tokio::net::TcpListener;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tonic::{Request, Response, Status};

use super::*;
use crate::mesh::{NamespacedName, Reason};
use crate::telemetry::{ConnectionInfo, Direction, Party, RequestConnection, RequestProtocol, Transport};

/// A collector at the end of a real connection; it refuses first as often as it is told to.
struct Taking {
    refusals: Mutex<Vec<Status>>,
    asked: UnboundedSender<Asked>,
}

/// None: it was refused.
type Asked = Option<ExportTraceServiceRequest>;

#[tonic::async_trait]
impl TraceService for Taking {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        if let Some(refusal) = self.refusals.lock().unwrap().pop() {
            self.asked.send(None).unwrap();
            return Err(refusal);
        }
        self.asked.send(Some(request.into_inner())).unwrap();
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

async fn collector(refusals: Vec<Status>) -> (SocketAddr, UnboundedReceiver<Asked>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (asked, receiver) = unbounded_channel();
    let service = TraceServiceServer::new(Taking { refusals: Mutex::new(refusals), asked });
    let incoming = tonic::transport::server::TcpIncoming::from(listener);
    tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
    (address, receiver)
}

fn tracing(address: SocketAddr, share: &str) -> (Traces, Exporter) {
    let collector = Collector::new(&format!("http://{address}"), None).unwrap();
    Traces::start(collector, share.parse().unwrap(), Observer::Agent { node: "node-a".to_owned() })
}

fn info() -> Box<RequestInfo> {
    let party = |name: &str, addr: &str| Party {
        addr: Some(addr.parse().unwrap()),
        pod: Some(NamespacedName::new("shop", format!("{name}-1"))),
        workload: Some(name.into()),
        identity: Some(format!("spiffe://cluster.local/ns/shop/sa/{name}").parse().unwrap()),
    };
    Box::new(RequestInfo {
        connection: RequestConnection::new(ConnectionInfo {
            direction: Direction::Outbound,
            transport: Transport::Fast,
            source: party("web", "10.0.0.1:4000"),
            destination: party("cart", "10.0.1.1:8080"),
            service: None,
            requested: None,
            key_exchange: None,
        }),
        service: Some(NamespacedName::new("shop", "cart")),
        requested: None,
        protocol: RequestProtocol::Http1,
        method: "GET".to_owned(),
        host: "cart:80".to_owned(),
        path: "/a".to_owned(),
        route: Some(NamespacedName::new("shop", "canary")),
        trace: None,
        status: 503,
        verdict: None,
        policy: None,
        grpc_status: None,
        reason: Some(Reason::Connect),
        detail: "nobody is there".to_owned(),
        sent: 1,
        received: 2,
    })
}

fn headers(traceparent: &str) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert("tracestate", HeaderValue::from_static("vendor=1"));
    if !traceparent.is_empty() {
        headers.insert("traceparent", traceparent.parse().unwrap());
    }
    headers
}

fn value<'a>(attributes: &'a [KeyValue], name: &str) -> Option<&'a Value> {
    attributes.iter().find(|attribute| attribute.key == name)?.value.as_ref()?.value.as_ref()
}

fn text(attributes: &[KeyValue], name: &str) -> String {
    match value(attributes, name) {
        Some(Value::StringValue(text)) => text.clone(),
        Some(Value::IntValue(number)) => number.to_string(),
        other => panic!("{name}: {other:?}"),
    }
}

#[tokio::test]
async fn a_sampled_request_is_told_to_the_collector_and_to_whoever_comes_next() {
    let (address, mut taken) = collector(Vec::new()).await;
    let (traces, exporter) = tracing(address, "0");
    let exporting = exporter.spawn();
    let mut asked = headers(PARENT);
    let span = traces.begin(SpanKind::Client, &mut asked).unwrap();
    assert_eq!(span.parent.unwrap().to_string(), "b7ad6b7169203331");
    let said = asked["traceparent"].to_str().unwrap();
    assert_eq!(said, format!("00-0af7651916cd43dd8448eb211c80319c-{}-01", span.context.span));
    assert_eq!(asked["tracestate"], "vendor=1");
    traces.end(span, info(), SystemTime::UNIX_EPOCH + Duration::from_secs(5), Duration::from_millis(7));
    exporting.finish().await;
    let request = taken.recv().await.unwrap().unwrap();
    let [resource] = &request.resource_spans[..] else { panic!("{request:?}") };
    let about = &resource.resource.as_ref().unwrap().attributes;
    assert_eq!((text(about, "service.name"), text(about, "k8s.pod.name")), ("web".to_owned(), "web-1".to_owned()));
    let [span] = &resource.scope_spans[0].spans[..] else { panic!("{request:?}") };
    assert_eq!((span.name.as_str(), span.kind()), ("GET", otlp::span::SpanKind::Client));
    assert_eq!(span.end_time_unix_nano - span.start_time_unix_nano, 7_000_000);
    assert_eq!(span.status.as_ref().unwrap().code(), otlp::status::StatusCode::Error);
    for (name, wanted) in [
        ("http.request.method", "GET"),
        ("http.response.status_code", "503"),
        ("server.address", "cart"),
        ("server.port", "80"),
        ("network.peer.address", "10.0.1.1"),
        ("error.type", "connect"),
        ("selvedge.route", "shop/canary"),
        ("selvedge.source.identity", "spiffe://cluster.local/ns/shop/sa/web"),
    ] {
        assert_eq!(text(&span.attributes, name), wanted, "{name}");
    }
}

#[tokio::test]
async fn whoever_decided_first_is_followed_and_else_the_share_decides() {
    let (address, _taken) = collector(Vec::new()).await;
    let (all, _exporter) = tracing(address, "1");
    let mut unsampled = headers(&PARENT.replace("-01", "-00"));
    let before = unsampled.clone();
    assert_eq!((all.begin(SpanKind::Server, &mut unsampled), &unsampled), (None, &before));
    for unreadable in ["", "00-what-ever-01"] {
        let mut asked = headers(unreadable);
        let span = all.begin(SpanKind::Server, &mut asked).unwrap();
        assert_eq!((span.parent, asked.get("tracestate")), (None, None), "{unreadable}");
    }
    let (none, _exporter) = tracing(address, "0");
    let mut asked = headers("");
    assert_eq!(none.begin(SpanKind::Client, &mut asked), None);
    assert!(!TraceContext::read(&asked).unwrap().is_sampled(), "nobody behind samples it either");
    let mut asked = headers("00-what-ever-01");
    let before = asked.clone();
    assert_eq!((Traces::default().begin(SpanKind::Client, &mut asked), asked), (None, before), "without a collector");
}

#[tokio::test]
async fn what_may_pass_is_sent_again_and_what_does_not_is_lost_alone() {
    let refusals = vec![Status::unavailable("in a moment"), Status::invalid_argument("never")];
    let (address, mut asked) = collector(refusals).await;
    let (traces, exporter) = tracing(address, "1");
    let exporting = exporter.spawn();
    let span = || traces.begin(SpanKind::Client, &mut HeaderMap::new()).unwrap();
    traces.end(span(), info(), SystemTime::now(), Duration::ZERO);
    let mut next = async || tokio::time::timeout(Duration::from_secs(60), asked.recv()).await.unwrap().unwrap();
    assert_eq!(next().await, None, "refused for good");
    let kept = span();
    traces.end(kept, info(), SystemTime::now(), Duration::ZERO);
    assert_eq!(next().await, None, "refused for now");
    let request = next().await.unwrap();
    let arrived = &request.resource_spans[0].scope_spans[0].spans[0];
    assert_eq!(arrived.trace_id, kept.context.trace.0.to_be_bytes());
    exporting.finish().await;
}

#[tokio::test]
async fn a_collector_that_is_away_makes_nobody_wait() {
    let (traces, _exporter) = tracing("127.0.0.1:1".parse().unwrap(), "1");
    for _ in 0..2 * QUEUE_LENGTH {
        let span = traces.begin(SpanKind::Client, &mut HeaderMap::new()).unwrap();
        traces.end(span, info(), SystemTime::now(), Duration::ZERO);
    }
}

#[test]
fn what_cannot_be_a_collector_is_refused_with_the_cure() {
    let roots = std::path::PathBuf::from("/nowhere/ca.pem");
    for (address, roots, cure) in [
        ("collector:4317", None, "write one such as http://"),
        ("ftp://collector:4317", None, "write one such as http://"),
        ("http://collector:4317/v1/traces", None, "write one such as http://"),
        ("https://collector:4317", None, "--otlp-ca"),
        ("http://collector:4317", Some(&roots), "write https"),
        ("https://collector:4317", Some(&roots), "/nowhere/ca.pem"),
    ] {
        let refused = Collector::new(address, roots).unwrap_err().to_string();
        assert!(refused.contains(cure), "{address}: {refused}");
    }
    assert!("1.01".parse::<TraceShare>().is_err() && "NaN".parse::<TraceShare>().is_err());
}

const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
