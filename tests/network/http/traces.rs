//! Spans of requests, as a collector gets them.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::trace::v1::Span;
use selvedge_lab::{AgentOptions, BOUND, Lab, Request, eventually, trial_with};
use tokio::sync::watch;
use tonic::Status;
use tonic::transport::server::{Server, TcpIncoming};

use super::Shop;
use crate::lab;

pub fn trials() -> Vec<Trial> {
    vec![trial_with("http::sampled_requests_are_told_to_the_collector", lab(), sampled_requests)]
}

fn sampled_requests(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    let collector = Collector::start(lab)?;
    let options = AgentOptions::default().arg("--otlp-endpoint").arg("http://127.0.0.1:4317");
    let agents = lab.start_agents(&options.arg("--trace-sampling").arg("0"))?;
    let ask = |path: &str, traceparent: &str| -> Result<String> {
        let request = Request::get(path).header("traceparent", traceparent);
        let answer = shop.web.http(shop.vip(), &request)?.json()?;
        Ok(answer["headers"]["traceparent"].as_str().context("no traceparent")?.to_owned())
    };
    let unsampled = PARENT.replace("-01", "-00");
    ensure!(ask("/unsampled", &unsampled)? == unsampled, "whose trace is not sampled goes on as it came");
    let said = ask("/sampled", PARENT)?;
    let (trace, rest) = said.split_at(36);
    ensure!(PARENT.starts_with(trace) && rest.ends_with("-01") && said != PARENT, "{said}");

    let span = eventually("the span of the client's side", BOUND, || {
        collector.spans().into_iter().find(|span| attribute(span, "url.path").as_deref() == Some("/sampled"))
    })?;
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    ensure!(hex(&span.trace_id) == PARENT[3..35] && hex(&span.parent_span_id) == PARENT[36..52], "{span:?}");
    ensure!(said[36..52] == hex(&span.span_id), "the application heard of another span: {said}, {span:?}");
    ensure!(attribute(&span, "selvedge.service").as_deref() == Some("shop/cart"), "{span:?}");
    let line = agents[0].access_line("the same trace", |line| line["trace_id"] == PARENT[3..35])?;
    ensure!(line["path"] == "/sampled", "{line}");
    ensure!(
        !collector.spans().iter().any(|span| attribute(span, "url.path").as_deref() == Some("/unsampled")),
        "a request was told that asked not to be"
    );
    Ok(())
}

fn attribute(span: &Span, name: &str) -> Option<String> {
    use opentelemetry_proto::tonic::common::v1::any_value::Value;
    let found = span.attributes.iter().find(|attribute| attribute.key == name)?;
    match found.value.as_ref()?.value.as_ref()? {
        Value::StringValue(text) => Some(text.clone()),
        _ => None,
    }
}

/// Takes spans on the loopback of the client's node, until it is dropped.
struct Collector {
    taken: Taken,
    _stop: watch::Sender<()>,
}

#[derive(Clone, Default)]
struct Taken(Arc<Mutex<Vec<Span>>>);

impl Collector {
    fn start(lab: &Lab) -> Result<Self> {
        let listener = lab.node("node-a").listen(SocketAddr::from(([127, 0, 0, 1], 4317)))?;
        listener.set_nonblocking(true)?;
        let (taken, stop) = (Taken::default(), watch::Sender::new(()));
        let (service, mut stopped) = (TraceServiceServer::new(taken.clone()), stop.subscribe());
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.unwrap_or_else(|error| panic!("no runtime: {error}"));
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener);
                let incoming = TcpIncoming::from(listener.unwrap_or_else(|error| panic!("no listener: {error}")));
                let serving = Server::builder().add_service(service).serve_with_incoming(incoming);
                tokio::select! {
                    ended = serving => ended.unwrap_or_else(|error| panic!("the collector ended: {error}")),
                    _ = stopped.changed() => {}
                }
            });
        });
        Ok(Self { taken, _stop: stop })
    }

    fn spans(&self) -> Vec<Span> {
        self.taken.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[tonic::async_trait]
impl TraceService for Taken {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, Status> {
        let resources = request.into_inner().resource_spans.into_iter();
        let spans = resources.flat_map(|resource| resource.scope_spans).flat_map(|scope| scope.spans);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend(spans);
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
