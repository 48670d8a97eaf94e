//! The label sets that connections are counted under, bounded in number.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use metrics::{Counter, Key, Label, Level, Metadata};

use super::catalogue;

/// One label set of a connection, in the order of [`LABELS`].
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct Labels(pub [Arc<str>; LABELS.len()]);

impl Labels {
    // What stands in for a label set beyond the cap: only what has few values is told apart.
    fn other(&self) -> Self {
        let other: Arc<str> = "other".into();
        let keep = |name| matches!(name, "reporter" | "direction" | "connection_security_policy" | "transport");
        Self(std::array::from_fn(|i| if keep(LABELS[i]) { self.0[i].clone() } else { other.clone() }))
    }

    fn key(&self, name: &'static str, extra: Option<Label>) -> Key {
        let labels = LABELS.into_iter().zip(&self.0).map(|(name, value)| Label::new(name, value.clone()));
        Key::from_parts(name, labels.chain(extra).collect::<Vec<_>>())
    }
}

/// The metrics of one label set. Keys, not handles: a series that expired while a connection was silent must come
/// back when it speaks, and the recorder hashes a kept key no second time.
#[derive(Debug)]
pub(super) struct Series {
    labels: Labels,
    opened: Key,
    closed: Key,
    sent: Key,
    received: Key,
    /// Seconds since the table was made.
    last_used: AtomicU64,
}

impl Series {
    fn new(labels: Labels) -> Self {
        Self {
            opened: labels.key(catalogue::OPENED, None),
            closed: labels.key(catalogue::CLOSED, None),
            sent: labels.key(catalogue::SENT, None),
            received: labels.key(catalogue::RECEIVED, None),
            labels,
            last_used: AtomicU64::new(0),
        }
    }

    pub(super) fn opened(&self) {
        counter(&self.opened).increment(1);
    }

    pub(super) fn closed(&self) {
        counter(&self.closed).increment(1);
    }

    pub(super) fn moved(&self, sent: u64, received: u64) {
        if sent > 0 {
            counter(&self.sent).increment(sent);
        }
        if received > 0 {
            counter(&self.received).increment(received);
        }
    }

    pub(super) fn failed(&self, reason: &'static str) {
        counter(&self.labels.key(catalogue::FAILED, Some(Label::from_static_parts("reason", reason)))).increment(1);
    }
}

/// Every label set in use, at most `cap` of them and one for the rest.
#[derive(Debug)]
pub(super) struct SeriesTable {
    made: Instant,
    cap: usize,
    idle_timeout: Duration,
    entries: Mutex<Entries>,
}

#[derive(Debug, Default)]
struct Entries {
    by_labels: HashMap<Labels, Arc<Series>>,
    swept: u64,
}

impl SeriesTable {
    /// `idle_timeout`: after which the recorder drops a series, and so this table its label set.
    pub(super) fn new(cap: usize, idle_timeout: Duration) -> Self {
        Self { made: Instant::now(), cap, idle_timeout, entries: Mutex::default() }
    }

    pub(super) fn get(&self, labels: &Labels) -> Arc<Series> {
        let now = self.made.elapsed().as_secs();
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let series = match entries.by_labels.get(labels).cloned() {
            Some(series) => series,
            None if entries.has_room(self.cap, now, self.idle_timeout.as_secs()) => entries.add(labels.clone()),
            None => {
                metrics::counter!(catalogue::OVERFLOW).increment(1);
                let other = labels.other();
                entries.by_labels.get(&other).cloned().unwrap_or_else(|| entries.add(other))
            }
        };
        series.last_used.store(now, Ordering::Relaxed);
        series
    }
}

impl Entries {
    fn add(&mut self, labels: Labels) -> Arc<Series> {
        let series = Arc::new(Series::new(labels.clone()));
        self.by_labels.insert(labels, series.clone());
        series
    }

    // Drops what no connection holds and nobody asked for lately; at most every few seconds, as it reads them all.
    fn has_room(&mut self, cap: usize, now: u64, idle: u64) -> bool {
        if self.by_labels.len() >= cap && now >= self.swept + SWEEP_SECONDS {
            self.swept = now;
            self.by_labels.retain(|_, series| {
                Arc::strong_count(series) > 1 || series.last_used.load(Ordering::Relaxed) + idle > now
            });
        }
        self.by_labels.len() < cap
    }
}

fn counter(key: &Key) -> Counter {
    metrics::with_recorder(|recorder| recorder.register_counter(key, &METADATA))
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
