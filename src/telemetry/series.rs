//! The label sets that connections are counted under, bounded in number.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use metrics::{Counter, Gauge, Histogram, Key, Label, Level, Metadata};

use super::catalogue;
use super::connection::{ConnectionInfo, Direction, Party, Transport};
use crate::mesh::{Identity, NamespacedName};

/// One label set of a connection.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct Labels {
    direction: Direction,
    transport: Transport,
    /// None in what stands in for label sets beyond the cap: only what has few values is told apart.
    ends: Option<Ends>,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Ends {
    source: End,
    destination: End,
    service: Option<NamespacedName>,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct End {
    workload: Option<Arc<str>>,
    namespace: Option<Arc<str>>,
    principal: Option<Identity>,
}

impl Labels {
    pub(super) fn of(info: &ConnectionInfo) -> Self {
        Self::of_request(info, info.service.clone())
    }

    /// Of a request on a connection, and whom it was for.
    pub(super) fn of_request(info: &ConnectionInfo, service: Option<NamespacedName>) -> Self {
        let end = |party: &Party| End {
            workload: party.workload.clone(),
            namespace: party.pod.as_ref().map(|pod| pod.namespace.clone()),
            principal: party.identity.clone(),
        };
        let ends = Ends { source: end(&info.source), destination: end(&info.destination), service };
        Self { direction: info.direction, transport: info.transport, ends: Some(ends) }
    }

    pub(super) fn service(&self) -> Option<&NamespacedName> {
        self.ends.as_ref()?.service.as_ref()
    }

    /// Whether they stand in for label sets beyond the cap.
    pub(super) fn are_other(&self) -> bool {
        self.ends.is_none()
    }

    pub(super) fn other(&self) -> Self {
        Self { ends: None, ..self.clone() }
    }

    pub(super) fn key(&self, name: &'static str, extra: impl IntoIterator<Item = Label>) -> Key {
        let values = self.values();
        let labels = LABELS.into_iter().zip(values).map(|(name, value)| Label::new(name, value));
        Key::from_parts(name, labels.chain(extra).collect::<Vec<_>>())
    }

    /// In the order of [`LABELS`].
    fn values(&self) -> [Arc<str>; LABELS.len()] {
        let or = |value: Option<Arc<str>>, instead: &str| value.unwrap_or_else(|| instead.into());
        let (source, destination, [service, service_namespace]) = match &self.ends {
            None => (["other"; 3].map(Arc::from), ["other"; 3].map(Arc::from), ["other"; 2].map(Arc::from)),
            Some(Ends { source, destination, service }) => {
                let end = |end: &End| {
                    let principal = end.principal.as_ref().map(|identity| identity.to_string().into());
                    [end.workload.clone(), end.namespace.clone(), principal].map(|value| or(value, "unknown"))
                };
                let service = [service.as_ref().map(|s| s.name.clone()), service.as_ref().map(|s| s.namespace.clone())];
                (end(source), end(destination), service.map(|value| or(value, "unknown")))
            }
        };
        let [source_workload, source_namespace, source_principal] = source;
        let [destination_workload, destination_namespace, destination_principal] = destination;
        [
            self.direction.reporter().into(),
            self.direction.as_str().into(),
            source_workload,
            source_namespace,
            source_principal,
            destination_workload,
            destination_namespace,
            destination_principal,
            service,
            service_namespace,
            self.transport.security().into(),
            self.transport.as_str().into(),
        ]
    }
}

/// The metrics of one label set.
#[derive(Debug)]
pub(super) struct Series {
    labels: Labels,
    keep: Duration,
    opened: Kept<Counter>,
    closed: Kept<Counter>,
    sent: Kept<Counter>,
    received: Kept<Counter>,
    open: Kept<Gauge>,
    connect: Kept<Histogram>,
    /// Seconds since the table was made.
    last_used: AtomicU64,
}

impl Sets for Series {
    type Labels = Labels;

    fn new(labels: &Labels, keep: Duration) -> Self {
        let counter = |name| Kept::new(labels.key(name, None));
        let direction = Label::from_static_parts("direction", labels.direction.as_str());
        let transport = Label::from_static_parts("transport", labels.transport.as_str());
        let reporter = Label::from_static_parts("reporter", labels.direction.reporter());
        Self {
            opened: counter(catalogue::OPENED),
            closed: counter(catalogue::CLOSED),
            sent: counter(catalogue::SENT),
            received: counter(catalogue::RECEIVED),
            open: Kept::new(Key::from_parts(catalogue::OPEN, vec![reporter, direction.clone(), transport.clone()])),
            connect: Kept::new(Key::from_parts(catalogue::CONNECT, vec![direction, transport])),
            labels: labels.clone(),
            keep,
            last_used: AtomicU64::new(0),
        }
    }

    fn other(labels: &Labels) -> Labels {
        labels.other()
    }

    fn last_used(&self) -> &AtomicU64 {
        &self.last_used
    }
}

impl Series {
    /// A connection has reached the far side, so long after it was accepted.
    pub(super) fn opened(&self, after: Duration) {
        let now = Instant::now();
        self.opened.with(now, self.keep, counter, |opened| opened.increment(1));
        self.open.with(now, self.keep, gauge, |open| open.increment(1.0));
        self.connect.with(now, self.keep, histogram, |connect| connect.record(after.as_secs_f64()));
    }

    /// One that was opened has ended.
    pub(super) fn closed(&self) {
        let now = Instant::now();
        self.closed.with(now, self.keep, counter, |closed| closed.increment(1));
        self.open.with(now, self.keep, gauge, |open| open.decrement(1.0));
    }

    pub(super) fn moved(&self, sent: u64, received: u64) {
        if sent > 0 {
            self.count(&self.sent, sent);
        }
        if received > 0 {
            self.count(&self.received, received);
        }
    }

    pub(super) fn failed(&self, reason: &'static str) {
        counter(&self.labels.key(catalogue::FAILED, Some(Label::from_static_parts("reason", reason)))).increment(1);
    }

    fn count(&self, counted: &Kept<Counter>, by: u64) {
        counted.with(Instant::now(), self.keep, counter, |counter| counter.increment(by));
    }
}

/// A metric, and its handle for as long as it is used: the recorder takes microseconds to find one by a dozen labels.
///
/// After a rest it is asked for anew, for the recorder lets what rests expire, and counts in an expired one are lost.
#[derive(Debug)]
pub(super) struct Kept<T> {
    key: Key,
    handle: Mutex<Option<(T, Instant)>>,
}

impl<T> Kept<T> {
    pub(super) fn new(key: Key) -> Self {
        Self { key, handle: Mutex::new(None) }
    }

    pub(super) fn with(&self, now: Instant, keep: Duration, find: impl FnOnce(&Key) -> T, then: impl FnOnce(&T)) {
        let mut handle = self.handle.lock().unwrap_or_else(PoisonError::into_inner);
        handle.take_if(|(_, used)| now.saturating_duration_since(*used) >= keep);
        let (metric, used) = handle.get_or_insert_with(|| (find(&self.key), now));
        *used = now;
        then(metric);
    }
}

/// The metrics of one kind of label sets.
pub(super) trait Sets {
    type Labels: Clone + Eq + Hash + std::fmt::Debug;

    fn new(labels: &Self::Labels, keep: Duration) -> Self;
    /// What stands in for label sets beyond the cap: only what has few values is told apart.
    fn other(labels: &Self::Labels) -> Self::Labels;
    /// Seconds since the table was made.
    fn last_used(&self) -> &AtomicU64;
}

/// Every label set in use, at most `cap` of them and a few for the rest.
#[derive(Debug)]
pub(super) struct SeriesTable<S: Sets> {
    made: Instant,
    cap: usize,
    idle_timeout: Duration,
    entries: Mutex<Entries<S>>,
}

#[derive(Debug)]
struct Entries<S: Sets> {
    by_labels: HashMap<S::Labels, Arc<S>>,
    swept: u64,
}

impl<S: Sets> Default for Entries<S> {
    fn default() -> Self {
        Self { by_labels: HashMap::new(), swept: 0 }
    }
}

impl<S: Sets> SeriesTable<S> {
    /// `idle_timeout`: after which the recorder drops a series, and so this table its label set.
    pub(super) fn new(cap: usize, idle_timeout: Duration) -> Self {
        Self { made: Instant::now(), cap, idle_timeout, entries: Mutex::default() }
    }

    pub(super) fn get(&self, labels: &S::Labels) -> Arc<S> {
        let now = self.made.elapsed().as_secs();
        let keep = self.idle_timeout / 2;
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let series = match entries.by_labels.get(labels).cloned() {
            Some(series) => series,
            None if entries.has_room(self.cap, now, self.idle_timeout.as_secs()) => entries.add(labels.clone(), keep),
            None => {
                metrics::counter!(catalogue::OVERFLOW).increment(1);
                let other = S::other(labels);
                entries.by_labels.get(&other).cloned().unwrap_or_else(|| entries.add(other, keep))
            }
        };
        series.last_used().store(now, Ordering::Relaxed);
        series
    }
}

impl<S: Sets> Entries<S> {
    fn add(&mut self, labels: S::Labels, keep: Duration) -> Arc<S> {
        let series = Arc::new(S::new(&labels, keep));
        self.by_labels.insert(labels, series.clone());
        series
    }

    // Drops what no connection holds and nobody asked for lately; at most every few seconds, as it reads them all.
    fn has_room(&mut self, cap: usize, now: u64, idle: u64) -> bool {
        if self.by_labels.len() >= cap && now >= self.swept + SWEEP_SECONDS {
            self.swept = now;
            self.by_labels.retain(|_, series| {
                Arc::strong_count(series) > 1 || series.last_used().load(Ordering::Relaxed) + idle > now
            });
        }
        self.by_labels.len() < cap
    }
}

pub(super) fn counter(key: &Key) -> Counter {
    metrics::with_recorder(|recorder| recorder.register_counter(key, &METADATA))
}

fn gauge(key: &Key) -> Gauge {
    metrics::with_recorder(|recorder| recorder.register_gauge(key, &METADATA))
}

pub(super) fn histogram(key: &Key) -> Histogram {
    metrics::with_recorder(|recorder| recorder.register_histogram(key, &METADATA))
}

pub(super) const LABELS: [&str; 12] = [
    "reporter",
    "direction",
    "source_workload",
    "source_workload_namespace",
    "source_principal",
    "destination_workload",
    "destination_workload_namespace",
    "destination_principal",
    "destination_service",
    "destination_service_namespace",
    "connection_security_policy",
    "transport",
];
const SWEEP_SECONDS: u64 = 10;
static METADATA: Metadata<'static> = Metadata::new(module_path!(), Level::INFO, Some(module_path!()));
