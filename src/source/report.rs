use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tracing::{info, warn};

use super::Problem;
use super::decode::Key;
use crate::mesh::PodUid;

/// What the source says about itself: its problems, and how old its view is. Shared with `/dump` and `/metrics`.
#[derive(Debug)]
pub struct Report {
    state: Mutex<State>,
    own_node: watch::Sender<Option<BTreeSet<PodUid>>>,
    forbidden: watch::Sender<Vec<&'static str>>,
}

#[derive(Debug, Default)]
struct State {
    problems: Arc<[Problem]>,
    checked: Option<Instant>,
    waiting: Arc<[String]>,
    objects: usize,
    generations: Arc<Generations>,
}

/// The generation of each policy, as far as the source knows any.
pub type Generations = BTreeMap<Key, i64>;

impl Report {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            own_node: watch::Sender::new(None),
            forbidden: watch::Sender::default(),
        })
    }

    /// What is not in force as written, in the order of files and lines.
    pub fn problems(&self) -> Arc<[Problem]> {
        self.lock().problems.clone()
    }

    /// How long ago the source last confirmed that its view is current; `None` before the first time.
    pub fn age(&self) -> Option<Duration> {
        self.lock().checked.map(|checked| checked.elapsed())
    }

    /// What is still to be read before the model is whole, as sentences for people.
    pub fn waiting(&self) -> Arc<[String]> {
        self.lock().waiting.clone()
    }

    /// How many objects were read when the model became whole.
    pub(super) fn objects(&self) -> usize {
        self.lock().objects
    }

    pub(super) fn set_objects(&self, objects: usize) {
        self.lock().objects = objects;
    }

    pub fn generations(&self) -> Arc<Generations> {
        self.lock().generations.clone()
    }

    /// The pods that the API server lists as captured on this agent's own node; none: it has no such list.
    pub fn own_node(&self) -> watch::Receiver<Option<BTreeSet<PodUid>>> {
        self.own_node.subscribe()
    }

    /// Comes back once all that is still waited for are kinds that may not be read: these.
    pub(super) async fn forbidden(&self) -> Vec<&'static str> {
        let mut kinds = self.forbidden.subscribe();
        match kinds.wait_for(|kinds| !kinds.is_empty()).await {
            Ok(kinds) => kinds.clone(),
            Err(_) => std::future::pending().await,
        }
    }

    pub(super) fn set_forbidden(&self, kinds: Vec<&'static str>) {
        self.forbidden.send_replace(kinds);
    }

    /// Sets the gauges; called every few seconds, since an age grows by itself.
    pub fn record_metrics(&self) {
        let (problems, age) = (self.problems().len(), self.age());
        metrics::gauge!("selvedge_manifest_problems").set(problems as f64);
        if let Some(age) = age {
            metrics::gauge!("selvedge_model_age_seconds").set(age.as_secs_f64());
        }
    }

    pub(super) fn set_waiting(&self, waiting: Vec<String>) {
        let mut state = self.lock();
        if *state.waiting != *waiting {
            state.waiting = waiting.into();
        }
    }

    pub(super) fn set_generations(&self, generations: Generations) {
        let mut state = self.lock();
        if *state.generations != generations {
            state.generations = Arc::new(generations);
        }
    }

    pub(super) fn set_own_node(&self, listed: Option<BTreeSet<PodUid>>) {
        self.own_node.send_replace(listed);
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
            let Problem { file, line, object, field, cause } = problem;
            match file.as_os_str().is_empty() {
                true => warn!(object, field, cause, "An object is not in force as written."),
                false => {
                    warn!(file = %file.display(), line, object, field, cause, "A manifest is not in force as written.")
                }
            }
        }
        for problem in old.difference(&new) {
            let Problem { file, object, field, .. } = problem;
            match file.as_os_str().is_empty() {
                true => info!(object, field, "A problem of an object is gone."),
                false => info!(file = %file.display(), object, field, "A problem of a manifest is gone."),
            }
        }
        self.lock().problems = problems.into();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells the exporter what this room's metrics mean.
pub fn describe_metrics() {
    super::kube::describe_metrics();
    metrics::describe_gauge!(
        "selvedge_manifest_problems",
        metrics::Unit::Count,
        "Objects, or fields of them, that are not in force as written."
    );
    metrics::describe_gauge!(
        "selvedge_model_age_seconds",
        metrics::Unit::Seconds,
        "Time since the source last confirmed that its view of the objects is current."
    );
}
