//! Whether an external authorizer can be asked, in its `status.conditions`.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::api::{Api, DynamicObject, Patch, PatchParams};
use kube::core::ApiResource;
use kube::runtime::reflector::Store;
use serde_json::json;

use super::record;
use super::routes::{RouteStatuses, list, versions, written};
use crate::api::StatusCondition;
use crate::authorizer::Authorizer;
use crate::authorizer::status::{accepted, malformed};
use crate::mesh::NamespacedName;

/// Writes statuses where they say something else than what is so.
pub struct AuthorizerStatuses {
    client: Client,
    resource: ApiResource,
    authorizers: Store<DynamicObject>,
    /// By UID: what the decoder made of one generation, or why it is nothing.
    read: HashMap<String, (i64, Result<Arc<Authorizer>, String>)>,
    /// Of everything that the last round looked at, if it wrote all that it wanted to.
    told: Option<u64>,
}

impl AuthorizerStatuses {
    pub fn new(client: Client, resource: ApiResource, authorizers: Store<DynamicObject>) -> Self {
        Self { client, resource, authorizers, read: HashMap::new(), told: None }
    }

    pub async fn tell(&mut self, statuses: &RouteStatuses) {
        // A Service that has not been listed yet is not missing.
        let Some(around) = statuses.told() else { return };
        let seen = Some(around.rotate_left(7) ^ versions(&self.authorizers));
        if self.told == seen {
            return;
        }
        let all = self.authorizers.state();
        let alive: BTreeSet<&str> = all.iter().filter_map(|object| object.metadata.uid.as_deref()).collect();
        self.read.retain(|uid, _| alive.contains(uid.as_str()));
        let mut is_told = true;
        for object in &all {
            is_told &= self.tell_one(object, statuses).await;
        }
        self.told = seen.filter(|_| is_told);
    }

    /// Whether its status says what is so.
    async fn tell_one(&mut self, object: &DynamicObject, statuses: &RouteStatuses) -> bool {
        let metadata = &object.metadata;
        let (Some(uid), Some(namespace), Some(name)) = (&metadata.uid, &metadata.namespace, &metadata.name) else {
            return true;
        };
        let generation = metadata.generation.unwrap_or_default();
        let condition = match self.read(object, uid, &NamespacedName::new(namespace.as_str(), name.as_str())) {
            Ok(read) => {
                let declared = statuses.protocol(&read.service, read.port);
                accepted(&read, statuses.facts(&read.service).as_ref(), declared)
            }
            Err(why) => malformed(&why),
        };
        let before: Vec<StatusCondition> = list(&object.data, "/status/conditions")
            .iter()
            .filter_map(|one| serde_json::from_value(one.clone()).ok())
            .collect();
        let now = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let wanted = written(condition, &before, generation, &now);
        if before.contains(&wanted) {
            return true;
        }
        let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), namespace, &self.resource);
        let applied = json!({
            "apiVersion": self.resource.api_version,
            "kind": self.resource.kind,
            "metadata": {"name": name, "namespace": namespace, "uid": uid},
            "status": {"conditions": [wanted]},
        });
        let manager = PatchParams::apply(MANAGER).force();
        let written = api.patch_status(name, &manager, &Patch::Apply(&applied)).await;
        record("authorizer", &format!("ExternalAuthorizer {namespace}/{name}"), written.as_ref().map(drop));
        written.is_ok()
    }

    /// As the agents read it.
    fn read(&mut self, object: &DynamicObject, uid: &str, name: &NamespacedName) -> Result<Arc<Authorizer>, String> {
        let generation = object.metadata.generation.unwrap_or_default();
        if let Some((_, read)) = self.read.get(uid).filter(|(known, _)| *known == generation) {
            return read.clone();
        }
        let value = serde_json::to_value(object).map_err(|error| error.to_string())?;
        let read = Authorizer::decode(name, &value).map(Arc::new).map_err(|error| error.to_string());
        self.read.insert(uid.to_owned(), (generation, read.clone()));
        read
    }
}

const MANAGER: &str = "selvedge-controller";
