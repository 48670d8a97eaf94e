//! Watch the API server of a cluster, and hand deltas to the model.
//!
//! [`watch`] lists and follows one kind, [`lean`] keeps what of an object is read, [`objects`] decides what a change
//! means (it is sans-io), [`discovery`] tells which kinds there are, and this file feeds the model. What cannot be
//! asked stays as it was last known.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ::kube::Client;
use ::kube::runtime::watcher::DefaultBackoff;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tracing::{debug, info, warn};

use self::discovery::Discovery;
use self::error::WatchError;
use self::objects::{Objects, Unsynced};
use self::watch::{News, Watch};
use super::decode::Kind;
use super::{Problem, Report};
use crate::model::{Delta, Model};

mod connect;
mod discovery;
mod error;
mod lean;
mod objects;
mod standing;
mod watch;

pub use connect::{Access, ConnectError, client};
pub use error::sentence;

/// Feeds the model from the API server. Comes back only where the server is one that cannot be used.
///
/// The model is synced once every kind has been listed; a kind that the cluster does not have counts as listed and
/// empty, and is watched once it appears. `own_node` is the agent's, whose MeshNode it writes and need not read.
pub async fn run(
    client: Client,
    own_node: Option<Arc<str>>,
    model: Arc<Model>,
    report: Arc<Report>,
) -> Result<Infallible, ConnectError> {
    reach(&client, &report).await?;
    let (news, mut heard) = mpsc::channel(BATCH);
    let (found, mut discovered) = mpsc::channel(1);
    let answers = Arc::new(Notify::new());
    let mut tasks = JoinSet::new();
    tasks.spawn(discover(client.clone(), found));
    let mut feed = Feed::new(own_node, model, report);
    let mut batch = Vec::with_capacity(BATCH);
    loop {
        tokio::select! {
            count = heard.recv_many(&mut batch, BATCH) => {
                debug_assert!(count > 0, "this function holds a sender");
                feed.take(&mut batch);
                // What comes in quick succession is one step.
                tokio::time::sleep(BREATH).await;
            }
            Some(answer) = discovered.recv() => match answer {
                Ok(found) => {
                    for (kind, path) in feed.discovered(found) {
                        let (news, answers) = (news.clone(), answers.clone());
                        let watch = Watch { client: client.clone(), kind, path, news, answers };
                        tasks.spawn(watch.run());
                    }
                }
                Err(error) => feed.unreachable(&error),
            },
            // A watch ends by itself where its kind is gone, and has said so. One that panicked takes this with it.
            Some(Err(error)) = tasks.join_next() => std::panic::resume_unwind(error.into_panic()),
        }
    }
}

/// Reads a cluster once into a model, for a person who asks; tells what in it is not in force as written.
///
/// # Errors
/// A sentence for that person.
pub async fn load(access: &Access, model: &Arc<Model>) -> Result<Loaded, LoadError> {
    let client = client(access).await?;
    answers(&client).await?;
    model.update(|state| state.mesh.believe_mesh_nodes());
    let report = Report::new();
    tokio::select! {
        refused = run(client, None, model.clone(), report.clone()) => match refused {
            Ok(never) => match never {},
            Err(refused) => Err(refused.into()),
        },
        kinds = report.forbidden() => Err(LoadError::Forbidden(kinds.join(", "))),
        synced = tokio::time::timeout(LOAD_LIMIT, model.synced()) => match synced {
            Ok(()) => Ok(Loaded { objects: report.objects(), problems: report.problems() }),
            Err(_) => Err(LoadError::Incomplete(report.waiting().join("; "))),
        },
    }
}

/// What a cluster holds.
#[derive(Debug)]
pub struct Loaded {
    /// How many objects were read.
    pub objects: usize,
    pub problems: Arc<[Problem]>,
}

/// Why a cluster could not be read.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("you may not list and watch all of these: {0}; ask for the rights that ClusterRole selvedge-agent has")]
    Forbidden(String),
    #[error("the cluster could not be read in {limit} s: {0}", limit = LOAD_LIMIT.as_secs())]
    Incomplete(String),
}

/// Whether the API server talks to us, for a person who would rather hear why not than wait.
///
/// # Errors
/// A sentence for that person.
pub async fn answers(client: &Client) -> Result<(), ConnectError> {
    match ask(client).await {
        Ok(usable) => usable,
        Err(WatchError::Api(status)) if status.code == 401 => Err(ConnectError::Stranger),
        Err(error) => Err(ConnectError::Silent(error.to_string())),
    }
}

/// Waits until the API server is one that we can use, and has read its own objects: before that it may not know of
/// definitions that it has, and a policy would be missed.
async fn reach(client: &Client, report: &Report) -> Result<(), ConnectError> {
    let mut pauses = DefaultBackoff::default();
    let mut told = String::new();
    loop {
        let error = match ask(client).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(refused)) => return Err(refused),
            Err(error) => error.to_string(),
        };
        let reason = format!("the API server cannot be asked: {error}");
        if reason != told {
            warn!(%error, "The API server cannot be asked; it is tried again until it answers.");
        }
        report.set_waiting(vec![reason.clone()]);
        told = reason;
        tokio::time::sleep(pauses.next().unwrap_or(DISCOVERY_INTERVAL)).await;
    }
}

async fn ask(client: &Client) -> Result<Result<(), ConnectError>, WatchError> {
    let answer = tokio::time::timeout(ANSWER_LIMIT, async {
        let request = http::Request::get("/readyz").body(Vec::new()).map_err(::kube::Error::HttpError)?;
        client.request_text(request).await?;
        connect::check_version(client).await
    });
    Ok(answer.await??)
}

/// Asks now and then which kinds there are; that also shows that the server is there.
async fn discover(client: Client, found: mpsc::Sender<Result<BTreeMap<Kind, String>, WatchError>>) {
    let mut discovery = Discovery::default();
    loop {
        let answer = match tokio::time::timeout(ANSWER_LIMIT, discovery.ask(&client)).await {
            Ok(answer) => answer,
            Err(elapsed) => Err(elapsed.into()),
        };
        if found.send(answer).await.is_err() {
            return;
        }
        tokio::time::sleep(DISCOVERY_INTERVAL.mul_f64(rand::random_range(0.9..1.1))).await;
    }
}

/// What becomes of news.
struct Feed {
    objects: Objects,
    unsynced: Unsynced,
    /// Kinds that have a watch, and those whose watch is open.
    watched: BTreeSet<Kind>,
    open: BTreeSet<Kind>,
    lost: BTreeMap<Kind, String>,
    forbidden: BTreeSet<Kind>,
    is_reachable: bool,
    model: Arc<Model>,
    report: Arc<Report>,
}

impl Feed {
    fn new(own_node: Option<Arc<str>>, model: Arc<Model>, report: Arc<Report>) -> Self {
        Self {
            objects: Objects::new(own_node),
            unsynced: Unsynced::all(),
            watched: BTreeSet::new(),
            open: BTreeSet::new(),
            lost: BTreeMap::new(),
            forbidden: BTreeSet::new(),
            is_reachable: true,
            model,
            report,
        }
    }

    /// Takes which kinds there are; returns those of which a watch must be begun.
    fn discovered(&mut self, found: BTreeMap<Kind, String>) -> Vec<(Kind, String)> {
        if !std::mem::replace(&mut self.is_reachable, true) {
            info!("The API server answers again.");
        }
        for kind in Kind::ALL {
            if !found.contains_key(&kind) && !self.watched.contains(&kind) {
                self.count_as_empty(kind);
            }
        }
        let new: Vec<_> = found.into_iter().filter(|(kind, _)| !self.watched.contains(kind)).collect();
        if !new.is_empty() {
            let kinds: Vec<_> = new.iter().map(|(kind, _)| kind.as_str()).collect();
            info!(kinds = kinds.join(","), "The cluster has these kinds; they are watched.");
        }
        for (kind, path) in &new {
            debug!(kind = kind.as_str(), path, "The cluster has this kind.");
            self.watched.insert(*kind);
            if !self.model.is_synced() {
                self.unsynced.add(*kind);
            }
        }
        if self.watched.is_subset(&self.open) {
            self.report.checked(Instant::now());
        }
        self.settle();
        new
    }

    fn unreachable(&mut self, error: &WatchError) {
        if std::mem::replace(&mut self.is_reachable, false) {
            warn!(%error, "The API server does not answer.");
        }
    }

    fn take(&mut self, batch: &mut Vec<(Kind, News)>) {
        let mut deltas: Vec<Delta> = Vec::new();
        for (kind, news) in batch.drain(..) {
            match news {
                News::Object(value, listing) => deltas.extend(self.objects.apply(kind, value, listing)),
                News::Gone(name) => deltas.extend(self.objects.delete(kind, &name)),
                News::Listed(listing) => {
                    deltas.extend(self.objects.listed(kind, listing));
                    self.unsynced.remove(kind);
                }
                News::Open => {
                    self.open.insert(kind);
                    self.forbidden.remove(&kind);
                    if self.lost.remove(&kind).is_some() && self.lost.is_empty() {
                        info!("The API server tells of changes of every kind again.");
                    }
                }
                News::Lost { cause, is_forbidden } => {
                    self.open.remove(&kind);
                    if is_forbidden {
                        self.forbidden.insert(kind);
                    }
                    // A server that is gone is told of once, not once a kind.
                    if !self.lost.values().any(|told| *told == cause) {
                        warn!(
                            kind = kind.as_str(),
                            cause, "The API server does not tell of changes; what was last known stays in force."
                        );
                    }
                    self.lost.insert(kind, cause);
                }
                // Whether it is there after all is for the next discovery to say: an API server that has just started
                // may not know of it yet.
                News::Absent => {
                    self.watched.remove(&kind);
                    self.open.remove(&kind);
                    self.lost.remove(&kind);
                    self.forbidden.remove(&kind);
                }
            }
        }
        if !deltas.is_empty() {
            self.model.apply(deltas);
            self.report.set_generations(self.objects.generations());
        }
        if let Some(listed) = self.objects.take_own_node() {
            self.report.set_own_node(listed);
        }
        self.settle();
    }

    fn count_as_empty(&mut self, kind: Kind) {
        if self.unsynced.remove(kind) {
            info!(kind = kind.as_str(), "The cluster does not have this kind; it counts as empty until it appears.");
        }
    }

    fn settle(&mut self) {
        let waiting = self.unsynced.iter().map(|kind| match self.lost.get(&kind) {
            Some(cause) => format!("{} objects cannot be listed: {cause}", kind.as_str()),
            None => format!("{} objects have not all been listed yet", kind.as_str()),
        });
        self.report.set_waiting(waiting.collect());
        // Whoever waits for these waits in vain.
        if !self.unsynced.is_empty() && self.unsynced.iter().all(|kind| self.forbidden.contains(&kind)) {
            self.report.set_forbidden(self.unsynced.iter().map(Kind::as_str).collect());
        }
        // While kinds are missing, much looks wrong that is not.
        if !self.unsynced.is_empty() {
            return;
        }
        if let Some(problems) = self.objects.take_problems() {
            self.report.replace_problems(&problems);
        }
        if !self.model.is_synced() {
            self.report.set_objects(self.objects.count());
            info!(objects = self.objects.count(), "Every kind has been listed.");
            self.model.set_synced();
        }
    }
}

/// Tells the exporter what this room's metrics mean.
pub fn describe_metrics() {
    metrics::describe_counter!(
        watch::BYTES,
        metrics::Unit::Bytes,
        "Bytes of objects read from the API server, by kind."
    );
    metrics::describe_counter!(
        watch::FAILURES,
        metrics::Unit::Count,
        "Watches that the API server did not begin or that broke, by kind and code."
    );
}

/// News taken in one step, and those that may wait: a list must not fill the memory.
const BATCH: usize = 128;
/// The shortest time between two steps of the model.
const BREATH: Duration = Duration::from_millis(20);
const DISCOVERY_INTERVAL: Duration = Duration::from_secs(10);
const ANSWER_LIMIT: Duration = Duration::from_secs(20);
const LOAD_LIMIT: Duration = Duration::from_secs(30);
