//! Reads the root, makes the first one, and leads a rotation through its phases.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use futures_util::TryStreamExt;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, ListParams, PostParams};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, watcher};
use kube::{Client, Error};
use tokio::sync::Notify;
use tracing::{debug, error, info, warn};

use super::material::{Bundle, CaSecret, SECRET, TRUST_BUNDLE};
use super::rotation::{NodeTrust, Phase, Step, next, signing_pair};
use super::{Alarm, Root};
use crate::controller::lease::Leadership;
use crate::controller::mesh_node::MeshNodeView;
use crate::controller::metrics;
use crate::identity::CaError;
use crate::mesh::TrustDomain;

/// Keeps [`Root`] true to the cluster. Every replica runs one; what changes a rotation is the leader's.
pub struct Keeper {
    secrets: Api<Secret>,
    bundles: Api<ConfigMap>,
    nodes: Api<MeshNodeView>,
    namespace: String,
    trust_domain: TrustDomain,
    longest: Duration,
    root: Arc<Root>,
    leadership: Leadership,
    changed: Notify,
    /// The nodes last waited for, told once.
    behind: Mutex<Option<String>>,
}

/// What one look came to.
enum Look {
    Alarm(Alarm),
    /// Both are there and can be used.
    Whole(Box<CaSecret>, Box<Bundle>),
    /// Something was made just now: look again.
    Again,
}

impl Keeper {
    pub fn new(
        client: Client,
        namespace: &str,
        trust_domain: TrustDomain,
        longest: Duration,
        root: Arc<Root>,
        leadership: Leadership,
    ) -> Arc<Self> {
        Arc::new(Self {
            secrets: Api::namespaced(client.clone(), namespace),
            bundles: Api::namespaced(client.clone(), namespace),
            nodes: Api::all(client),
            namespace: namespace.to_owned(),
            trust_domain,
            longest,
            root,
            leadership,
            changed: Notify::new(),
            behind: Mutex::default(),
        })
    }

    /// Looks after every change, and now and then, for as long as it is polled.
    pub async fn run(self: Arc<Self>) {
        let looking = async {
            loop {
                let wait = match self.look_and_act().await {
                    Ok(wait) => wait,
                    Err(error) => {
                        // Who signs stays in force: nothing can be asked now, and so nothing has been said against it.
                        warn!(%error, "The root cannot be looked after; it is tried again.");
                        AFTER_FAILURE
                    }
                };
                let _ = tokio::time::timeout(wait, self.changed.notified()).await;
            }
        };
        tokio::join!(
            looking,
            self.follow(self.secrets.clone(), SECRET),
            self.follow(self.bundles.clone(), TRUST_BUNDLE)
        );
    }

    async fn follow<K>(&self, api: Api<K>, name: &str)
    where
        K: kube::Resource + Clone + std::fmt::Debug + serde::de::DeserializeOwned + Send + 'static,
    {
        let config = watcher::Config::default().fields(&format!("metadata.name={name}"));
        let mut events = Box::pin(watcher(api, config).default_backoff());
        loop {
            match events.try_next().await {
                Ok(Some(_)) => self.changed.notify_one(),
                Ok(None) => return,
                Err(error) => debug!(%error, name, "It cannot be watched; it is read now and then."),
            }
        }
    }

    /// How long to wait for the next look, unless something changes.
    async fn look_and_act(&self) -> Result<Duration, Error> {
        let (secret, bundle) = match self.look().await? {
            Look::Again => return Ok(Duration::ZERO),
            Look::Alarm(alarm) => {
                self.raise(Some(alarm));
                return Ok(NOW_AND_THEN);
            }
            Look::Whole(secret, bundle) => (secret, bundle),
        };
        let phase = Phase::of(&secret, &bundle);
        metrics::record_phase(phase);
        match signing_pair(&secret, &bundle).map(|pair| pair.signing()).transpose() {
            Err(alarm) => {
                self.raise(Some(alarm));
                return Ok(NOW_AND_THEN);
            }
            Ok(signing) => {
                self.raise(None);
                if signing.is_some_and(|signing| self.root.set_signing(signing)) {
                    info!(phase = phase.as_str(), "The root is in force.");
                }
            }
        }
        if !self.leadership.is_leader() {
            return Ok(NOW_AND_THEN);
        }
        // A Secret that cannot sign must not be made everybody's anchor first.
        if let Err(alarm) = secret.current.signing() {
            self.raise(Some(alarm));
            return Ok(NOW_AND_THEN);
        }
        self.act(&secret, &bundle).await
    }

    async fn act(&self, secret: &CaSecret, bundle: &Bundle) -> Result<Duration, Error> {
        let now = Timestamp::now();
        // Read anew each time: what a watch remembers could be older than the bundle.
        let nodes = if bundle.introducing.is_empty() { Vec::new() } else { self.nodes().await? };
        let step = next(secret, bundle, &nodes, now, self.longest);
        let written = match &step {
            Step::Nothing => return Ok(NOW_AND_THEN),
            Step::AwaitNodes(behind) => {
                let behind = behind.join(", ");
                if self.behind.lock().unwrap_or_else(PoisonError::into_inner).replace(behind.clone()).as_ref()
                    != Some(&behind)
                {
                    info!(nodes = behind, "The new trust bundle is not everywhere yet; the old root signs.");
                }
                return Ok(WHILE_ROTATING);
            }
            Step::AwaitRenewal(until) => {
                debug!(%until, "Certificates of the old root may still be in use.");
                return Ok(NOW_AND_THEN);
            }
            Step::MakeRoot => match secret.with_new_root(&self.trust_domain, SystemTime::now()) {
                Ok(object) => {
                    self.put_secret(&object, "A new root was made, and signs once every agent trusts it.").await
                }
                Err(error) => return self.cannot_make(&error),
            },
            Step::DropRequest => {
                let why = "A new root was asked for, but this one was brought: replace it where it comes from.";
                self.put_secret(&secret.without_request(), why).await
            }
            Step::Introduce(missing) => {
                self.put_bundle(&bundle.with(missing), "The trust bundle holds the new root beside the old one.").await
            }
            Step::Switch => {
                let object = bundle.switched(&secret.current.anchors, now);
                self.put_bundle(&object, "Every agent trusts the new root: from now on it signs.").await
            }
            Step::Retire => {
                let object = bundle.retired(&secret.current.anchors);
                self.put_bundle(&object, "The old root is trusted no more: the rotation is over.").await
            }
            Step::DropPrevious => self.put_secret(&secret.without_previous(), "The old root's key is gone.").await,
        };
        match written {
            Ok(()) => Ok(Duration::ZERO),
            Err(error) if is_conflict(&error) => Ok(AFTER_CONFLICT),
            Err(error) => Err(error),
        }
    }

    /// Reads both; makes what is missing where nothing says that it was ever there.
    async fn look(&self) -> Result<Look, Error> {
        // In this order: whoever made the Secret may not have made the ConfigMap yet, and marks the Secret when it has.
        let secret = self.secrets.get_opt(SECRET).await?;
        let bundle = self.bundles.get_opt(TRUST_BUNDLE).await?;
        match (secret, bundle) {
            (Some(secret), Some(bundle)) => {
                match CaSecret::read(secret).and_then(|secret| Ok((secret, Bundle::read(bundle)?))) {
                    Err(alarm) => Ok(Look::Alarm(alarm)),
                    Ok((secret, _)) if !secret.is_published => {
                        self.put_secret(&secret.published(), "The trust bundle is published.")
                            .await
                            .or_else(pass_conflict)?;
                        Ok(Look::Again)
                    }
                    Ok((secret, bundle)) => Ok(Look::Whole(secret.into(), bundle.into())),
                }
            }
            (Some(secret), None) => match CaSecret::read(secret) {
                Err(alarm) => Ok(Look::Alarm(alarm)),
                Ok(secret) if secret.is_published => Ok(Look::Alarm(Alarm::BundleMissing)),
                Ok(secret) => {
                    // It must be able to sign before anybody trusts it.
                    if let Err(alarm) = secret.current.signing() {
                        return Ok(Look::Alarm(alarm));
                    }
                    let object = Bundle::first(&self.namespace, &secret.current);
                    match self.bundles.create(&PostParams::default(), &object).await {
                        Ok(_) => info!("Made the trust bundle, ConfigMap {TRUST_BUNDLE}."),
                        Err(error) => pass_conflict(error)?,
                    }
                    Ok(Look::Again)
                }
            },
            (None, Some(_)) => match self.secrets.get_opt(SECRET).await? {
                // Made between our two looks.
                Some(_) => Ok(Look::Again),
                None => Ok(Look::Alarm(Alarm::SecretMissing)),
            },
            (None, None) => {
                match CaSecret::first(&self.namespace, &self.trust_domain, SystemTime::now()) {
                    Ok(object) => match self.secrets.create(&PostParams::default(), &object).await {
                        Ok(_) => info!("Made a new root, Secret {SECRET}."),
                        // Another replica was first.
                        Err(error) => pass_conflict(error)?,
                    },
                    Err(error) => return self.cannot_make(&error).map(|_| Look::Again),
                }
                Ok(Look::Again)
            }
        }
    }

    async fn nodes(&self) -> Result<Vec<NodeTrust>, Error> {
        let listed = match self.nodes.list(&ListParams::default()).await {
            Ok(listed) => listed,
            // The definition is not installed: there is no agent that could write one.
            Err(Error::Api(status)) if status.code == 404 => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let trust = listed.items.into_iter().map(|node| NodeTrust {
            hash: node.status.trust_bundle_hash,
            node: node.metadata.name.unwrap_or_default(),
        });
        Ok(trust.collect())
    }

    async fn put_secret(&self, object: &Secret, done: &str) -> Result<(), Error> {
        self.secrets.replace(SECRET, &PostParams::default(), object).await?;
        info!("{done}");
        Ok(())
    }

    async fn put_bundle(&self, object: &ConfigMap, done: &str) -> Result<(), Error> {
        self.bundles.replace(TRUST_BUNDLE, &PostParams::default(), object).await?;
        info!("{done}");
        Ok(())
    }

    fn cannot_make(&self, cause: &CaError) -> Result<Duration, Error> {
        error!(%cause, "No root could be made.");
        Ok(AFTER_FAILURE)
    }

    fn raise(&self, alarm: Option<Alarm>) {
        metrics::record_alarm(alarm.as_ref());
        let told = alarm.as_ref().map(ToString::to_string);
        if self.root.set_alarm(alarm) {
            match told {
                Some(told) => error!("The root needs a person: {told}."),
                None => info!("The root needs nobody any more."),
            }
        }
    }
}

fn is_conflict(error: &Error) -> bool {
    matches!(error, Error::Api(status) if status.code == 409)
}

fn pass_conflict(error: Error) -> Result<(), Error> {
    if is_conflict(&error) { Ok(()) } else { Err(error) }
}

const NOW_AND_THEN: Duration = Duration::from_secs(10);
const WHILE_ROTATING: Duration = Duration::from_secs(1);
const AFTER_CONFLICT: Duration = Duration::from_millis(200);
const AFTER_FAILURE: Duration = Duration::from_secs(2);
