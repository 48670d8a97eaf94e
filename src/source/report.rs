use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::Problem;

/// What the source says about itself: its problems, and how old its view is. Shared with `/dump` and `/metrics`.
#[derive(Debug, Default)]
pub struct Report {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    problems: Arc<[Problem]>,
    checked: Option<Instant>,
}

impl Report {
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// What is not in force as written, in the order of files and lines.
    pub fn problems(&self) -> Arc<[Problem]> {
        self.lock().problems.clone()
    }

    /// How long ago the source last confirmed that its view is current; `None` before the first time.
    pub fn age(&self) -> Option<Duration> {
        self.lock().checked.map(|checked| checked.elapsed())
    }

    /// Sets the gauges; called every few seconds, since an age grows by itself.
    pub fn record_metrics(&self) {
        let (problems, age) = (self.problems().len(), self.age());
        metrics::gauge!("selvedge_manifest_problems").set(problems as f64);
        if let Some(age) = age {
            metrics::gauge!("selvedge_model_age_seconds").set(age.as_secs_f64());
        }
    }

    pub(super) fn checked(&self, now: Instant) {
        self.lock().checked = Some(now);
    }

    /// Takes the problems of now; each is logged once when it appears and once when it goes.
    pub(super) fn replace_problems(&self, problems: &[Problem]) {
        let before = self.problems();
        if *before == *problems {
            return;
        }
        let (old, new): (BTreeSet<_>, BTreeSet<_>) = (before.iter().collect(), problems.iter().collect());
        for problem in new.difference(&old) {
            warn!(
                file = %problem.file.display(), line = problem.line, object = problem.object, field = problem.field,
                cause = problem.cause, "A manifest is not in force as written."
            );
        }
        for problem in old.difference(&new) {
            info!(
                file = %problem.file.display(), object = problem.object, field = problem.field,
                "A problem of a manifest is gone."
            );
        }
        self.lock().problems = problems.into();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells the exporter what this room's metrics mean.
pub fn describe_metrics() {
    metrics::describe_gauge!(
        "selvedge_manifest_problems",
        metrics::Unit::Count,
        "Manifests, or fields of them, that are not in force as written."
    );
    metrics::describe_gauge!(
        "selvedge_model_age_seconds",
        metrics::Unit::Seconds,
        "Time since the source last confirmed that its view of the objects is current."
    );
}
