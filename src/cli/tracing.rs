use std::path::PathBuf;

use clap::Args;

use super::Failure;
use crate::telemetry::{Collector, Exporter, Observer, TraceShare, Traces};

/// Where spans of requests go.
#[derive(Args, Debug, Clone)]
pub struct TracingArgs {
    /// The collector that takes spans of requests by OTLP over gRPC, such as http://otel-collector.observability:4317.
    /// Default: none; trace headers go through untouched.
    #[arg(long, env = "SELVEDGE_OTLP_ENDPOINT", value_name = "URL")]
    pub otlp_endpoint: Option<String>,

    /// The roots that the certificate of a collector with `https` leads to, in PEM.
    #[arg(long, env = "SELVEDGE_OTLP_CA", value_name = "FILE", requires = "otlp_endpoint")]
    pub otlp_ca: Option<PathBuf>,

    /// The share of requests that are traced, from 0 to 1, where nobody before has decided: a request that brings
    /// `traceparent` says it itself.
    #[arg(long, env = "SELVEDGE_TRACE_SAMPLING", value_name = "SHARE", default_value = "0.01")]
    pub trace_sampling: TraceShare,
}

impl TracingArgs {
    /// Where spans are told to, and who sends them on, where there is a collector.
    pub fn start(&self, observer: Observer) -> Result<(Traces, Option<Exporter>), Failure> {
        // An empty variable says nothing, as in a manifest whose value was not filled in.
        let Some(address) = self.otlp_endpoint.as_deref().filter(|address| !address.is_empty()) else {
            return Ok((Traces::default(), None));
        };
        let collector = Collector::new(address, self.otlp_ca.as_ref()).map_err(Failure::configuration)?;
        let (traces, exporter) = Traces::start(collector, self.trace_sampling, observer);
        Ok((traces, Some(exporter)))
    }
}
