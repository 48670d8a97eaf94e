use futures_util::TryStreamExt;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::Api;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Client, ResourceExt};

use crate::identity::{CaError, SIGNED_BY, TrustKeeper, TrustSource, certificates_from_pem};

/// The trust bundle of the cluster, which the controller keeps in a ConfigMap.
///
/// Until it has been read once nobody is trusted. What has been read stays in force while the API server is away, and
/// if the ConfigMap is deleted.
pub struct ConfigMapAnchors {
    maps: Api<ConfigMap>,
    keeper: TrustKeeper,
}

impl ConfigMapAnchors {
    pub fn new(client: Client, namespace: &str) -> Self {
        Self { maps: Api::namespaced(client, namespace), keeper: TrustKeeper::new() }
    }

    pub fn trust(&self) -> TrustSource {
        self.keeper.source()
    }

    /// Follows the ConfigMap for as long as it is polled.
    pub async fn follow(self) {
        let config = watcher::Config::default().fields(&format!("metadata.name={NAME}"));
        let mut events = Box::pin(watcher(self.maps.clone(), config).default_backoff());
        let mut signed_by = None;
        loop {
            match events.try_next().await {
                Ok(Some(Event::Apply(map) | Event::InitApply(map))) => self.take(&map, &mut signed_by),
                Ok(Some(Event::Delete(_))) => {
                    tracing::warn!("ConfigMap {NAME} was deleted; the trust bundle that it held stays in force.");
                }
                Ok(Some(Event::Init | Event::InitDone)) => {}
                Ok(None) => return,
                Err(error) => tracing::warn!(%error, "ConfigMap {NAME} cannot be watched; it is tried again."),
            }
        }
    }

    fn take(&self, map: &ConfigMap, signed_by: &mut Option<String>) {
        // Where nothing is said, the first root signs.
        let now = map.annotations().get(SIGNED_BY).cloned().unwrap_or_default();
        let others_sign = signed_by.as_ref().is_some_and(|before| *before != now);
        match self.read(map, others_sign) {
            Ok(true) => tracing::info!("The trust bundle changed and is in force."),
            Ok(false) => {}
            Err(error) => tracing::warn!(%error, "The trust bundle cannot be used; the one before stays in force."),
        }
        *signed_by = Some(now);
    }

    fn read(&self, map: &ConfigMap, others_sign: bool) -> Result<bool, CaError> {
        let wrong = |cause: String| CaError::Unusable(format!("ConfigMap {NAME}, {KEY}: {cause}").into());
        let pem = map.data.as_ref().and_then(|data| data.get(KEY)).map_or("", String::as_str);
        self.keeper.replace(certificates_from_pem(pem.as_bytes()).map_err(wrong)?, others_sign)
    }
}

const NAME: &str = "selvedge-trust-bundle";
const KEY: &str = "ca.crt";
