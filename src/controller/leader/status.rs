//! How statuses are written: only where they would say something else, and never over what others write.

use std::collections::{HashMap, HashSet};

use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::api::{Api, DynamicObject, Patch, PatchParams};
use kube::core::ApiResource;
use serde_json::{Value, json};

use super::record;
use crate::api::StatusCondition;
use crate::route::status::Condition;

/// The object whose status it is.
pub struct Told<'a> {
    pub client: &'a Client,
    pub resource: &'a ApiResource,
    pub object: &'a DynamicObject,
    /// What is written, for who counts it.
    pub what: &'static str,
}

impl Told<'_> {
    /// Server-side apply: of the fields under `manager` these are left, those of others stay. False: it was not written.
    pub async fn apply(&self, manager: &str, status: Value) -> bool {
        let metadata = &self.object.metadata;
        let applied = json!({
            "apiVersion": self.resource.api_version,
            "kind": self.resource.kind,
            "metadata": {"name": metadata.name, "namespace": metadata.namespace, "uid": metadata.uid},
            "status": status,
        });
        self.patch(&PatchParams::apply(manager).force(), &Patch::Apply(&applied)).await
    }

    /// With the version that was read: what another controller writes at this moment is not lost. False: it was not written.
    pub async fn merge(&self, status: Value) -> bool {
        let merged = json!({
            "metadata": {"resourceVersion": self.object.metadata.resource_version},
            "status": status,
        });
        let manager = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
        self.patch(&manager, &Patch::Merge(&merged)).await
    }

    async fn patch(&self, manager: &PatchParams, patch: &Patch<&Value>) -> bool {
        let metadata = &self.object.metadata;
        // Without a name there is nothing to be told of.
        let Some(name) = &metadata.name else { return true };
        let (api, path): (Api<DynamicObject>, _) = match &metadata.namespace {
            Some(namespace) => {
                let api = Api::namespaced_with(self.client.clone(), namespace, self.resource);
                (api, format!("{namespace}/{name}"))
            }
            None => (Api::all_with(self.client.clone(), self.resource), name.clone()),
        };
        let written = api.patch_status(name, manager, patch).await;
        record(self.what, &format!("{} {path}", self.resource.kind), written.as_ref().map(drop));
        written.is_ok()
    }
}

/// What was made of each object, once for each generation of it.
pub struct ByGeneration<T> {
    by_uid: HashMap<String, (i64, T)>,
}

impl<T: Clone> ByGeneration<T> {
    /// What `make` makes of it, or made of it before; none of an object that no API server has taken.
    pub fn of(&mut self, object: &DynamicObject, make: impl FnOnce() -> T) -> Option<T> {
        let uid = object.metadata.uid.as_ref()?;
        let generation = object.metadata.generation.unwrap_or_default();
        if let Some((_, made)) = self.by_uid.get(uid).filter(|(known, _)| *known == generation) {
            return Some(made.clone());
        }
        let made = make();
        self.by_uid.insert(uid.clone(), (generation, made.clone()));
        Some(made)
    }

    /// What was made of it last.
    pub fn known(&self, object: &DynamicObject) -> Option<&T> {
        self.by_uid.get(object.metadata.uid.as_ref()?).map(|(_, made)| made)
    }

    /// Forgets all others.
    pub fn keep<'a>(&mut self, alive: impl IntoIterator<Item = &'a DynamicObject>) {
        let alive: HashSet<&str> = alive.into_iter().filter_map(|object| object.metadata.uid.as_deref()).collect();
        self.by_uid.retain(|uid, _| alive.contains(uid.as_str()));
    }
}

impl<T> Default for ByGeneration<T> {
    fn default() -> Self {
        Self { by_uid: HashMap::new() }
    }
}

/// The conditions of one of our entries: ours as they are now, each in its place, and whatever else somebody wrote there, which
/// is left alone (notes for implementors at RouteParentStatus and PolicyAncestorStatus).
pub fn merged(said: Vec<Condition>, former: &[StatusCondition], generation: i64, now: &str) -> Vec<StatusCondition> {
    let mut ours: Vec<_> = said.into_iter().map(|one| written(one, former, generation, now)).collect();
    let mut all = Vec::new();
    for one in former {
        match ours.iter().position(|ours| ours.kind == one.kind) {
            Some(at) => all.push(ours.remove(at)),
            None if OURS.contains(&&*one.kind) => {}
            None => all.push(one.clone()),
        }
    }
    all.extend(ours);
    all
}

/// A condition as it shall stand: its time moves only with its status.
pub fn written(condition: Condition, former: &[StatusCondition], generation: i64, now: &str) -> StatusCondition {
    let status = if condition.is_true { "True" } else { "False" };
    let former = former.iter().find(|former| former.kind == condition.kind && former.status == status);
    StatusCondition {
        kind: condition.kind.to_owned(),
        status: status.to_owned(),
        observed_generation: Some(generation),
        last_transition_time: former.map_or(now, |former| &former.last_transition_time).to_owned(),
        reason: condition.reason.to_owned(),
        message: condition.message.chars().take(MOST_CHARACTERS).collect(),
    }
}

/// The conditions that stand in an object's status.
pub fn conditions_of(object: &DynamicObject) -> Vec<StatusCondition> {
    let all = list(&object.data, "/status/conditions").iter();
    all.filter_map(|one| serde_json::from_value(one.clone()).ok()).collect()
}

pub fn list<'a>(value: &'a Value, path: &str) -> &'a [Value] {
    value.pointer(path).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

pub fn now() -> String {
    written_at(Timestamp::now())
}

/// As Kubernetes writes a time (RFC 3339).
pub fn written_at(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// The types of condition that nobody else writes into our entries.
const OURS: [&str; 3] = ["Accepted", "ResolvedRefs", "PartiallyInvalid"];
pub const MANAGER: &str = "selvedge-controller";
/// As much as people read, and less than the schema allows.
pub const MOST_CHARACTERS: usize = 4096;
