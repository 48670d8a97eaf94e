//! The keys of token issuers: fetched from where a RequestAuthentication says they are, and written into its status.
//!
//! There the agents read them: it is the object that they watch anyway, its namespace's owner sees what was fetched, and
//! nobody needs the right to read ConfigMaps or to reach the issuer from every node.

mod cluster;
mod fetch;
mod tunnel;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::api::{Api, DynamicObject};
use kube::core::ApiResource;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tracing::{info, warn};

use super::status::{ByGeneration, MOST_CHARACTERS, Told, written_at};
use crate::api::{FetchedKeys, MeshNode, RequestAuthenticationStatus, StatusCondition};
use crate::authentication::{KeySet, KeySource, ServiceUrl};
use crate::policy::{PolicyKind, PolicyObject, RequestAuthentication, decode};
pub use cluster::ClusterAddresses;
use fetch::Fetched;
pub use fetch::Forbidden;
pub use tunnel::Tunnels;

/// Fetches keys, and writes what changed.
pub struct Keys {
    client: Client,
    tunnels: Tunnels,
    held: HashMap<Origin, Held>,
    read: ByGeneration<Sources>,
    fetches: JoinSet<(Origin, Result<Fetched, String>)>,
}

/// What one policy's keys are from.
type Sources = Arc<[(Origin, KeySource)]>;

/// Where keys are from: what two policies say alike is fetched once.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Origin {
    /// Of a ConfigMap's; a URL is the same for all.
    namespace: String,
    source: String,
    /// Certificates that it is trusted by.
    bundle: String,
}

#[derive(Debug)]
struct Held {
    jwks: Option<String>,
    fetched: Option<Timestamp>,
    error: Option<String>,
    due: Instant,
    is_fetching: bool,
    failures: u32,
}

impl Keys {
    pub fn new(client: Client, tunnels: Tunnels) -> Self {
        Self { client, tunnels, held: HashMap::new(), read: ByGeneration::default(), fetches: JoinSet::new() }
    }

    /// About all policies. What is to be fetched is fetched meanwhile, and told in a later round.
    pub async fn tell(
        &mut self,
        resource: &ApiResource,
        policies: Vec<Arc<DynamicObject>>,
        nodes: &[Arc<MeshNode>],
        forbidden: Option<&Arc<Forbidden>>,
    ) {
        self.collect();
        let mut wanted = HashMap::new();
        self.read.keep(policies.iter().map(|policy| &**policy));
        let with_origins =
            |policy: Arc<DynamicObject>| Some((self.read.of(&policy, || origins(&policy).into())?, policy));
        let policies: Vec<_> = policies.into_iter().filter_map(with_origins).collect();
        for (origins, _) in &policies {
            wanted.extend(origins.iter().cloned());
        }
        self.held.retain(|origin, held| held.is_fetching || wanted.contains_key(origin));
        if let Some(forbidden) = forbidden {
            for (origin, source) in wanted {
                self.begin(origin, source, nodes, forbidden);
            }
        }
        for (origins, policy) in policies {
            self.write(resource, &policy, &origins).await;
        }
    }

    /// Takes what has been fetched.
    fn collect(&mut self) {
        while let Some(done) = self.fetches.try_join_next() {
            let Ok((origin, outcome)) = done else { continue };
            let Some(held) = self.held.get_mut(&origin) else { continue };
            held.is_fetching = false;
            let outcome = outcome.and_then(|fetched| match KeySet::parse(&fetched.text) {
                Ok(_) => Ok(fetched),
                Err(error) => Err(error.to_string()),
            });
            metrics::counter!(FETCHES, "outcome" => if outcome.is_ok() { "ok" } else { "failed" }).increment(1);
            let now = Instant::now();
            match outcome {
                Ok(Fetched { text, fresh }) => {
                    if held.error.take().is_some() {
                        info!(source = origin.source, "The keys of a token issuer are fetched again.");
                    }
                    (held.jwks, held.fetched, held.failures) = (Some(text), Some(Timestamp::now()), 0);
                    held.due = now
                        + match (origin.is_config_map(), fresh) {
                            (true, _) => CONFIG_MAP_INTERVAL,
                            (false, None) => INTERVAL,
                            (false, Some(fresh)) => fresh.clamp(LEAST_INTERVAL, INTERVAL),
                        };
                }
                Err(error) => {
                    if held.error.as_ref() != Some(&error) {
                        warn!(
                            source = origin.source,
                            error, "The keys of a token issuer cannot be fetched; it is tried again."
                        );
                    }
                    // A ConfigMap that is there no more, or says nothing, takes its keys with it.
                    if origin.is_config_map() {
                        (held.jwks, held.fetched) = (None, None);
                    }
                    held.error = Some(error);
                    held.failures += 1;
                    held.due = now + (FIRST_PAUSE * 2u32.saturating_pow(held.failures.min(8))).min(INTERVAL);
                }
            }
        }
    }

    fn begin(&mut self, origin: Origin, source: KeySource, nodes: &[Arc<MeshNode>], forbidden: &Arc<Forbidden>) {
        let now = Instant::now();
        let fresh = || Held { jwks: None, fetched: None, error: None, due: now, is_fetching: false, failures: 0 };
        let held = self.held.entry(origin.clone()).or_insert_with(fresh);
        if held.is_fetching || held.due > now || self.fetches.len() >= MOST_AT_ONCE {
            return;
        }
        held.is_fetching = true;
        let (client, tunnels, forbidden) = (self.client.clone(), self.tunnels.clone(), forbidden.clone());
        let of_service = if let KeySource::Url(url) = &source { ServiceUrl::parse(url) } else { None };
        let of_service = of_service.map(|url| {
            let captured = nodes.iter().flat_map(|node| node.status.captured.iter().cloned());
            (url, captured.collect::<HashSet<String>>())
        });
        self.fetches.spawn(async move {
            let outcome = match (&source, &of_service) {
                (KeySource::Url(_), Some((url, captured))) => {
                    fetch::by_tunnel(url, &tunnels, captured, &forbidden).await
                }
                (KeySource::Url(url), None) => fetch::by_https(url, &origin.bundle, &forbidden).await,
                (KeySource::ConfigMap { name, key }, _) => of_config_map(&client, &origin.namespace, name, key).await,
                (KeySource::Inline, _) => Err("it has its keys with it".to_owned()),
            };
            (origin, outcome)
        });
    }

    async fn write(&self, resource: &ApiResource, policy: &DynamicObject, origins: &[(Origin, KeySource)]) {
        let status = policy.data.get("status").cloned().unwrap_or(Value::Null);
        let before: RequestAuthenticationStatus = serde_json::from_value(status).unwrap_or_default();
        let generation = policy.metadata.generation.unwrap_or_default();
        let held: Vec<_> = origins.iter().map(|(origin, _)| (origin.source.as_str(), self.held.get(origin))).collect();
        let (keys, condition) = wanted(&held, &before, generation, Timestamp::now());
        let says = |one: &StatusCondition| {
            (one.status.clone(), one.reason.clone(), one.message.clone(), one.observed_generation)
        };
        let told = before.conditions.iter().find(|one| one.kind == CONDITION).map(says);
        if keys == before.keys && told == condition.as_ref().map(says) {
            return;
        }
        let told = Told { client: &self.client, resource, object: policy, what: "keys" };
        told.apply(MANAGER, json!({"conditions": condition.into_iter().collect::<Vec<_>>(), "keys": keys})).await;
    }
}

impl Origin {
    fn is_config_map(&self) -> bool {
        !self.namespace.is_empty()
    }
}

/// What a policy has to be fetched from.
fn origins(policy: &DynamicObject) -> Vec<(Origin, KeySource)> {
    let Some(read) = read(policy) else { return Vec::new() };
    let namespace = policy.metadata.namespace.clone().unwrap_or_default();
    let bundle = |at: usize| {
        let written = policy.data.pointer(&format!("/spec/jwtRules/{at}/jwksCaBundle"));
        written.and_then(Value::as_str).unwrap_or_default().to_owned()
    };
    let origin = |(at, rule): (usize, &Arc<crate::authentication::Rule>)| {
        let source = rule.keys.source.clone();
        let (namespace, bundle) = match &source {
            KeySource::Inline => return None,
            KeySource::ConfigMap { .. } => (namespace.clone(), String::new()),
            KeySource::Url(_) => (String::new(), bundle(at)),
        };
        Some((Origin { namespace, source: source.to_string(), bundle }, source))
    };
    let mut origins: Vec<_> = read.rules.iter().enumerate().filter_map(origin).collect();
    // In the status a source stands once.
    let mut seen = BTreeSet::new();
    origins.retain(|(origin, _)| seen.insert(origin.source.clone()));
    origins
}

fn read(policy: &DynamicObject) -> Option<Box<RequestAuthentication>> {
    let mut value = serde_json::to_value(policy).ok()?;
    value.as_object_mut()?.remove("status");
    match decode(PolicyKind::RequestAuthentication, &value) {
        Ok(PolicyObject::RequestAuthentication(read)) => Some(read),
        _ => None,
    }
}

/// What shall stand in the status.
fn wanted(
    held: &[(&str, Option<&Held>)],
    before: &RequestAuthenticationStatus,
    generation: i64,
    now: Timestamp,
) -> (Vec<FetchedKeys>, Option<StatusCondition>) {
    let written: BTreeMap<&str, &FetchedKeys> = before.keys.iter().map(|keys| (keys.source.as_str(), keys)).collect();
    let (mut keys, mut missing, mut failing) = (Vec::new(), Vec::new(), Vec::new());
    for (source, held) in held {
        let before = written.get(source).copied();
        let fetched = held.and_then(|held| held.jwks.as_ref().zip(held.fetched));
        let error = held.and_then(|held| held.error.as_deref());
        let gone = source.starts_with("configmap/") && error.is_some();
        match (fetched, before.filter(|_| !gone)) {
            // What was written within the hour is as good.
            (Some((jwks, at)), Some(before))
                if before.jwks == *jwks && seconds_between(&before.fetch_time, at) < WRITTEN_EVERY =>
            {
                keys.push(before.clone());
            }
            (Some((jwks, at)), _) => {
                keys.push(FetchedKeys { source: (*source).to_owned(), jwks: jwks.clone(), fetch_time: written_at(at) });
            }
            // Another leader fetched them, or this one did before it failed to.
            (None, Some(before)) => keys.push(before.clone()),
            (None, None) => missing.push(format!("{source}: {}", error.unwrap_or("not fetched yet"))),
        }
        if let Some(error) = error.filter(|_| fetched.is_some() || before.is_some()) {
            failing.push(format!("{source}: {error}"));
        }
    }
    if held.is_empty() {
        return (keys, None);
    }
    let (status, reason, message) = match (missing.is_empty(), failing.is_empty()) {
        (false, _) => ("False", "NotFetched", format!("No token of these issuers is accepted: {}", missing.join("; "))),
        (_, false) => {
            ("False", "Failing", format!("The keys that were fetched last hold for 24 hours: {}", failing.join("; ")))
        }
        _ => ("True", "Fetched", "The keys of every issuer are there.".to_owned()),
    };
    let since = before.conditions.iter().find(|one| one.kind == CONDITION && one.status == status);
    let condition = StatusCondition {
        kind: CONDITION.to_owned(),
        status: status.to_owned(),
        observed_generation: Some(generation),
        last_transition_time: since.map_or_else(|| written_at(now), |one| one.last_transition_time.clone()),
        reason: reason.to_owned(),
        message: message.chars().take(MOST_CHARACTERS).collect(),
    };
    (keys, Some(condition))
}

fn seconds_between(written: &str, now: Timestamp) -> i64 {
    written.parse::<Timestamp>().map_or(i64::MAX, |written| now.as_second().saturating_sub(written.as_second()))
}

async fn of_config_map(client: &Client, namespace: &str, name: &str, key: &str) -> Result<Fetched, String> {
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    let found = match tokio::time::timeout(ANSWER_LIMIT, maps.get_opt(name)).await {
        Ok(Ok(Some(found))) => found,
        Ok(Ok(None)) => return Err(format!("there is no ConfigMap {namespace}/{name}")),
        Ok(Err(error)) => return Err(format!("ConfigMap {namespace}/{name} cannot be read: {error}")),
        Err(_) => return Err(format!("ConfigMap {namespace}/{name} cannot be read: the API server does not answer")),
    };
    let text = found.data.and_then(|mut data| data.remove(key));
    let text = text.ok_or_else(|| format!("ConfigMap {namespace}/{name} has no key {key:?} in its data"))?;
    Ok(Fetched { text, fresh: None })
}

pub const FETCHES: &str = "selvedge_controller_key_fetches_total";
const CONDITION: &str = "KeysFetched";
/// Another than that of the policy's other conditions: each owns what it writes.
const MANAGER: &str = "selvedge-controller-keys";
const INTERVAL: Duration = Duration::from_secs(300);
/// Of an issuer that says for how long its keys hold.
const LEAST_INTERVAL: Duration = Duration::from_secs(10);
const CONFIG_MAP_INTERVAL: Duration = Duration::from_secs(15);
const FIRST_PAUSE: Duration = Duration::from_secs(2);
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// Keys that are what they were are written anew so often, in seconds: it is by that time that agents tell their age.
const WRITTEN_EVERY: i64 = 3600;
const MOST_AT_ONCE: usize = 8;

#[cfg(test)]
mod tests;
