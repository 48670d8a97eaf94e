//! Whether the agent ends for good. Only a deletion of its own DaemonSet means that; in doubt the rules stay, for pods
//! without an agent must not fall back to plaintext.

use std::sync::Arc;
use std::time::Duration;

use futures_util::TryStreamExt;
use k8s_openapi::api::apps::v1::DaemonSet;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client};
use tokio::sync::watch;
use tracing::{info, warn};

/// Follows the agent's DaemonSet.
pub(super) struct Uninstall {
    name: String,
    api: Api<DaemonSet>,
    seen: watch::Sender<Seen>,
}

/// What was last seen of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Seen {
    Nothing,
    There,
    Deleted,
}

impl Uninstall {
    /// Follows a DaemonSet by `namespace/name`.
    pub fn new(client: Client, daemonset: &str) -> Result<Arc<Self>, String> {
        let (namespace, name) =
            daemonset.split_once('/').ok_or_else(|| format!("--daemonset {daemonset}: write it as namespace/name"))?;
        let api = Api::namespaced(client, namespace);
        Ok(Arc::new(Self { name: name.to_owned(), api, seen: watch::Sender::new(Seen::Nothing) }))
    }

    /// Watches it. Ends never.
    pub async fn run(self: Arc<Self>) {
        let config = watcher::Config::default().fields(&format!("metadata.name={}", self.name));
        let mut events = std::pin::pin!(watcher(self.api.clone(), config).default_backoff());
        loop {
            match events.try_next().await {
                Ok(Some(Event::Apply(daemonset) | Event::InitApply(daemonset))) => self.note(is_there(&daemonset)),
                Ok(Some(Event::Delete(_))) => self.note(Seen::Deleted),
                Ok(Some(Event::Init | Event::InitDone)) => {}
                Ok(None) => return std::future::pending().await,
                Err(error) => tracing::debug!(%error, "The agent's DaemonSet cannot be watched for now."),
            }
        }
    }

    fn note(&self, seen: Seen) {
        let before = self.seen.send_replace(seen);
        if before != seen && seen == Seen::Deleted {
            info!("The agent's DaemonSet is being deleted: when the agent is told to end, it takes its rules along.");
        }
    }

    /// Asked when the agent is told to end: whether it is for good.
    pub async fn is_for_good(&self) -> bool {
        let seen = *self.seen.borrow();
        if seen == Seen::Nothing {
            warn!("The agent's DaemonSet was never seen, so this is taken for no uninstall: the rules stay.");
            return false;
        }
        // A deletion may have come with the signal; and one that was seen may have been of a DaemonSet made anew since.
        match tokio::time::timeout(PATIENCE, self.api.get_opt(&self.name)).await {
            Ok(Ok(Some(daemonset))) => is_there(&daemonset) == Seen::Deleted,
            Ok(Ok(None)) => true,
            Ok(Err(_)) | Err(_) => *self.seen.borrow() == Seen::Deleted,
        }
    }
}

fn is_there(daemonset: &DaemonSet) -> Seen {
    if daemonset.metadata.deletion_timestamp.is_some() { Seen::Deleted } else { Seen::There }
}

const PATIENCE: Duration = Duration::from_secs(4);
