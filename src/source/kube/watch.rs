//! The watch of one kind: listed whole, then followed, for as long as the cluster has the kind.
//!
//! kube's own watcher hides bookmarks, and that a watch which was lost is open again. Both say how old our knowledge
//! is, so the few steps are taken here, as the API's conventions ask
//! (<https://kubernetes.io/docs/reference/using-api/api-concepts/#efficient-detection-of-changes>).

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use ::kube::Client;
use ::kube::api::{ListParams, WatchParams};
use ::kube::core::Request;
use ::kube::core::response::Status;
use ::kube::runtime::watcher::DefaultBackoff;
use futures_util::io::AsyncBufReadExt;
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{debug, info, warn};

use super::WatchError;
use super::lean::Keep;
use super::standing::Definition;
use crate::mesh::NamespacedName;
use crate::source::decode::Kind;

/// What one watch tells.
#[derive(Debug)]
pub(super) enum News {
    /// An object as it is now, met in the listing of this number or since.
    Object(Value, u32),
    Gone(NamespacedName),
    /// The listing of this number is whole: what it did not show is gone.
    Listed(u32),
    /// Changes arrive from now on.
    Open,
    /// They do not, for this reason.
    Lost {
        cause: String,
        is_forbidden: bool,
    },
    /// The cluster does not have the kind, or not any more. What is known of it stays in force.
    Absent,
}

/// One kind, its collection, and where its news go.
pub(super) struct Watch {
    pub client: Client,
    pub kind: Kind,
    pub path: String,
    pub news: mpsc::Sender<(Kind, News)>,
    /// Of all watches: told of whenever the API server answers one of them.
    pub answers: Arc<Notify>,
}

/// Where a watch is.
struct Place {
    /// From where it goes on; none: from a listing.
    version: Option<String>,
    listing: u32,
    /// Whether the server is asked to list by the watch itself.
    streams: bool,
}

impl Watch {
    /// Runs until the cluster does not have the kind, or nobody listens.
    pub async fn run(self) {
        // Other servers behind the API server may ignore what they do not know, and would never end such a listing.
        let mut place = Place { version: None, listing: 0, streams: !matches!(self.kind, Kind::Cni(_)) };
        let mut pauses = DefaultBackoff::default();
        loop {
            let began = Instant::now();
            let Err(error) = self.follow(&mut place).await else {
                // A server that ends every watch at once must not be asked without a pause.
                sleep_until(began + LEAST_TURN).await;
                continue;
            };
            match &error {
                WatchError::Closed => return,
                WatchError::Expired => {
                    debug!(kind = self.kind.as_str(), "The watch is too far behind; everything is listed again.");
                    place.version = None;
                    sleep_until(began + LEAST_TURN).await;
                    continue;
                }
                WatchError::NoStreaming => {
                    info!(kind = self.kind.as_str(), "The API server streams no lists; objects are listed in pages.");
                    place.streams = false;
                    continue;
                }
                WatchError::Api(status) if status.code == 404 => {
                    let _ = self.news.send((self.kind, News::Absent)).await;
                    return;
                }
                _ => {}
            }
            let code = error.code();
            metrics::counter!(FAILURES, "kind" => self.kind.as_str(), "code" => code).increment(1);
            let pause = pauses.next().unwrap_or(LONGEST_PAUSE);
            debug!(kind = self.kind.as_str(), %error, again = ?pause, "The watch failed.");
            let lost = News::Lost { cause: error.to_string(), is_forbidden: code == "forbidden" };
            if self.news.send((self.kind, lost)).await.is_err() {
                return;
            }
            let answers = self.answers.notified();
            tokio::select! {
                () = sleep(pause) => {}
                // It was out of reach, and another watch has reached it. Not all at once.
                () = answers, if error.is_out_of_reach() => {
                    pauses = DefaultBackoff::default();
                    sleep(rand::random_range(SPREAD)).await;
                }
            }
        }
    }

    /// Lists what there is if need be, then tells of changes until the server ends the watch, as it does every few
    /// minutes.
    async fn follow(&self, place: &mut Place) -> Result<(), WatchError> {
        if place.version.is_none() {
            place.listing = LISTINGS.fetch_add(1, Ordering::Relaxed);
            if !place.streams {
                let version = self.list(place.listing).await?;
                self.tell(News::Listed(place.listing)).await?;
                place.version = Some(version);
            }
        }
        let streamed = place.version.is_none();
        let seconds = rand::random_range(WATCH_SECONDS);
        let parameters = WatchParams { send_initial_events: streamed, ..WatchParams::default().timeout(seconds) };
        let from = place.version.clone().unwrap_or_default();
        let request = Request::new(self.path.as_str()).watch(&parameters, &from).map_err(WatchError::request)?;
        let lines = match timeout(ANSWER_LIMIT, self.client.request_stream(request)).await? {
            Err(::kube::Error::Api(status)) if streamed && matches!(status.code, 400 | 422) => {
                return Err(WatchError::NoStreaming);
            }
            answer => answer?,
        };
        self.answers.notify_waiters();
        let mut lines = std::pin::pin!(lines);
        if !streamed {
            self.tell(News::Open).await?;
        }
        let mut line = Vec::new();
        loop {
            line.clear();
            // A buffer that held a giant is given back.
            line.shrink_to(LINE_KEPT);
            // Bookmarks come every minute: a silent connection is a dead one.
            let read = timeout(SILENCE_LIMIT, lines.read_until(b'\n', &mut line)).await?;
            let read = read.map_err(|cause| WatchError::Transport(cause.to_string()))?;
            if read == 0 || !line.ends_with(b"\n") {
                return Ok(());
            }
            metrics::counter!(BYTES, "kind" => self.kind.as_str()).increment(read as u64);
            self.take(&line, place).await?;
        }
    }

    async fn take(&self, line: &[u8], place: &mut Place) -> Result<(), WatchError> {
        let event: Event<'_> = serde_json::from_slice(line)?;
        match event.what {
            "ADDED" | "MODIFIED" => {
                let header: Header<'_> = serde_json::from_str(event.object.get())?;
                let object = Keep::of(self.kind).read(event.object.get())?;
                self.tell(News::Object(object, place.listing)).await?;
                if place.version.is_some() {
                    place.version = Some(header.metadata.resource_version.to_owned());
                }
            }
            "DELETED" => {
                let header: Header<'_> = serde_json::from_str(event.object.get())?;
                let namespace = header.metadata.namespace.unwrap_or_default();
                let name = NamespacedName::new(namespace, header.metadata.name.unwrap_or_default());
                if Definition::of(self.kind, &self.path).stands(&self.client).await {
                    self.tell(News::Gone(name)).await?;
                } else {
                    warn!(kind = self.kind.as_str(), %name, "Its definition is being deleted: the policy stays in force.");
                }
                place.version = Some(header.metadata.resource_version.to_owned());
            }
            "BOOKMARK" => {
                let header: Header<'_> = serde_json::from_str(event.object.get())?;
                if place.version.is_none() && header.metadata.ends_listing() {
                    self.tell(News::Listed(place.listing)).await?;
                    self.tell(News::Open).await?;
                    place.version = Some(String::new());
                }
                if let Some(version) = &mut place.version {
                    header.metadata.resource_version.clone_into(version);
                }
            }
            "ERROR" => {
                let status: Status = serde_json::from_str(event.object.get())?;
                return Err(if status.code == 410 { WatchError::Expired } else { WatchError::Api(Box::new(status)) });
            }
            _ => {}
        }
        Ok(())
    }

    /// Lists in pages; returns the version from which to watch.
    async fn list(&self, listing: u32) -> Result<String, WatchError> {
        let mut parameters = ListParams::default().limit(PAGE);
        loop {
            let request = Request::new(self.path.as_str()).list(&parameters).map_err(WatchError::request)?;
            let text = timeout(ANSWER_LIMIT, self.client.request_text(request)).await?;
            let text = match text {
                Err(::kube::Error::Api(status)) if status.code == 410 => return Err(WatchError::Expired),
                text => text?,
            };
            metrics::counter!(BYTES, "kind" => self.kind.as_str()).increment(text.len() as u64);
            let page: Page<'_> = serde_json::from_str(&text)?;
            for item in page.items {
                self.tell(News::Object(Keep::of(self.kind).read(item.get())?, listing)).await?;
            }
            match page.metadata.next.filter(|next| !next.is_empty()) {
                Some(next) => parameters.continue_token = Some(next),
                None => return Ok(page.metadata.resource_version),
            }
        }
    }

    async fn tell(&self, news: News) -> Result<(), WatchError> {
        let news = match news {
            // What a definition that is being deleted took with it is not gone by anybody's will.
            News::Listed(_) if !Definition::of(self.kind, &self.path).stands(&self.client).await => News::Open,
            news => news,
        };
        self.news.send((self.kind, news)).await.map_err(|_| WatchError::Closed)
    }
}

#[derive(Deserialize)]
struct Event<'a> {
    #[serde(rename = "type")]
    what: &'a str,
    #[serde(borrow)]
    object: &'a RawValue,
}

#[derive(Deserialize)]
struct Header<'a> {
    #[serde(borrow)]
    metadata: HeaderMetadata<'a>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct HeaderMetadata<'a> {
    #[serde(default)]
    name: Option<&'a str>,
    #[serde(default)]
    namespace: Option<&'a str>,
    resource_version: &'a str,
    #[serde(borrow, default)]
    annotations: Option<&'a RawValue>,
}

impl HeaderMetadata<'_> {
    /// <https://kubernetes.io/docs/reference/using-api/api-concepts/#streaming-lists>
    fn ends_listing(&self) -> bool {
        self.annotations.is_some_and(|annotations| annotations.get().contains("k8s.io/initial-events-end"))
    }
}

#[derive(Deserialize)]
struct Page<'a> {
    metadata: PageMetadata,
    #[serde(borrow)]
    items: Vec<&'a RawValue>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PageMetadata {
    resource_version: String,
    #[serde(rename = "continue", default)]
    next: Option<String>,
}

pub(super) const BYTES: &str = "selvedge_kubernetes_read_bytes_total";
pub(super) const FAILURES: &str = "selvedge_kubernetes_watch_failures_total";

/// Gives every listing a number that no other has: a watch that is begun anew must not take what a former one showed
/// for its own.
static LISTINGS: AtomicU32 = AtomicU32::new(1);

/// client-go's are five to ten minutes; shorter ones spread agents over API servers sooner after a restart of one.
const WATCH_SECONDS: std::ops::Range<u32> = 240..480;
const LEAST_TURN: Duration = Duration::from_secs(1);
const SILENCE_LIMIT: Duration = Duration::from_secs(150);
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// How long after an answer to one watch the others ask.
const SPREAD: std::ops::Range<Duration> = Duration::ZERO..Duration::from_secs(2);
/// Objects a page: of pods of 8 KB a page is under a megabyte.
const PAGE: u32 = 100;
const LINE_KEPT: usize = 64 << 10;
