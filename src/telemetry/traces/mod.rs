//! Traces: a span for each request that is sampled, sent to a collector by OTLP.
//!
//! [`Traces::begin`] reads the [W3C Trace Context](https://www.w3.org/TR/trace-context/) of a request, decides whether it is
//! sampled, and writes the context of whoever comes next; the [`Span`] is told by [`RequestTelemetry`](super::RequestTelemetry)
//! when the request ends. Without a collector nothing of this happens, and the headers go on as they are. Spans wait in a
//! bounded queue and never make a request wait: what the [`Exporter`] cannot send in time is dropped and counted.

mod context;
mod export;
mod proto;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::HeaderMap;
use tokio::sync::mpsc;

pub use self::context::{SpanId, TraceContext, TraceId};
pub use self::export::{Collector, CollectorError, Exporter};
use super::catalogue;
use super::connection::Direction;
use super::request::RequestInfo;
use crate::mesh::NamespacedName;

/// Where spans go. Cheap to clone; by default nowhere.
#[derive(Clone, Debug, Default)]
pub struct Traces(Option<Arc<Shared>>);

#[derive(Debug)]
struct Shared {
    share: TraceShare,
    queue: mpsc::Sender<Finished>,
}

/// The share of requests that are sampled where nobody before has decided: from 0 to 1.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct TraceShare(f64);

impl std::str::FromStr for TraceShare {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let share = text.parse().ok().filter(|share| (0.0..=1.0).contains(share));
        share
            .map(Self)
            .ok_or_else(|| format!("{text:?} is no share from 0 to 1; write 0.01 for one request in a hundred"))
    }
}

impl std::fmt::Display for TraceShare {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// Who sends spans.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Observer {
    /// The agent of a node, on behalf of the workloads there.
    Agent { node: String },
    /// A waypoint, by its Gateway: its spans are its own.
    Waypoint(NamespacedName),
}

/// Which side of a request its span tells of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SpanKind {
    Client,
    Server,
}

impl From<Direction> for SpanKind {
    fn from(direction: Direction) -> Self {
        match direction {
            // A waypoint is a server to whoever asks it, as a gateway is.
            Direction::Inbound | Direction::Relayed => Self::Server,
            Direction::Outbound | Direction::Passthrough => Self::Client,
        }
    }
}

/// The part of a trace that one agent sees: from a request's head to the last byte of its answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Span {
    pub context: TraceContext,
    /// None: the trace begins here.
    pub parent: Option<SpanId>,
    pub kind: SpanKind,
}

/// A span that is over.
#[derive(Debug)]
struct Finished {
    span: Span,
    info: Box<RequestInfo>,
    started: SystemTime,
    duration: Duration,
}

impl Traces {
    /// Sends spans to a collector for as long as the [`Exporter`] runs.
    pub fn start(collector: Collector, share: TraceShare, observer: Observer) -> (Self, Exporter) {
        let (queue, finished) = mpsc::channel(QUEUE_LENGTH);
        (Self(Some(Arc::new(Shared { share, queue }))), Exporter::new(collector, observer, finished))
    }

    /// The span of a request with these headers, which then name it as the parent of what follows. None where the request
    /// is not sampled; whoever comes next is told so.
    pub fn begin(&self, kind: SpanKind, headers: &mut HeaderMap) -> Option<Span> {
        let shared = self.0.as_ref()?;
        let parent = TraceContext::read(headers);
        let context = match &parent {
            Some(parent) if !parent.is_sampled() => return None,
            Some(parent) => parent.child(),
            None => TraceContext::begin(rand::random_bool(shared.share.0)),
        };
        if parent.is_none() {
            TraceContext::forget(headers);
        }
        context.write(headers);
        let parent = parent.map(|parent| parent.span);
        context.is_sampled().then_some(Span { context, parent, kind })
    }

    /// A span is over.
    pub(super) fn end(&self, span: Span, info: Box<RequestInfo>, started: SystemTime, duration: Duration) {
        let Some(shared) = &self.0 else { return };
        if shared.queue.try_send(Finished { span, info, started, duration }).is_err() {
            metrics::counter!(catalogue::SPANS, "outcome" => "dropped").increment(1);
        }
    }
}

/// A few megabytes at most.
const QUEUE_LENGTH: usize = 4096;

#[cfg(test)]
mod tests;
