//! Whether an external authorizer can be asked, in its `status.conditions`.

use std::sync::Arc;

use kube::Client;
use kube::api::DynamicObject;
use kube::core::ApiResource;
use kube::runtime::reflector::Store;
use serde_json::json;

use super::routes::{RouteStatuses, versions};
use super::status::{ByGeneration, MANAGER, Told, conditions_of, now, written};
use crate::authorizer::Authorizer;
use crate::authorizer::status::{accepted, malformed};
use crate::mesh::NamespacedName;

/// Writes statuses where they say something else than what is so.
pub struct AuthorizerStatuses {
    client: Client,
    resource: ApiResource,
    authorizers: Store<DynamicObject>,
    /// What the decoder made of them, or why it is nothing.
    read: ByGeneration<Result<Arc<Authorizer>, String>>,
    /// Of everything that the last round looked at, if it wrote all that it wanted to.
    told: Option<u64>,
}

impl AuthorizerStatuses {
    pub fn new(client: Client, resource: ApiResource, authorizers: Store<DynamicObject>) -> Self {
        Self { client, resource, authorizers, read: ByGeneration::default(), told: None }
    }

    pub async fn tell(&mut self, statuses: &RouteStatuses) {
        // A Service that has not been listed yet is not missing.
        let Some(around) = statuses.told() else { return };
        let seen = Some(around.rotate_left(7) ^ versions(&self.authorizers));
        if self.told == seen {
            return;
        }
        let all = self.authorizers.state();
        self.read.keep(all.iter().map(|object| &**object));
        let mut is_told = true;
        for object in &all {
            is_told &= self.tell_one(object, statuses).await;
        }
        self.told = seen.filter(|_| is_told);
    }

    /// Whether its status says what is so.
    async fn tell_one(&mut self, object: &DynamicObject, statuses: &RouteStatuses) -> bool {
        let metadata = &object.metadata;
        let (Some(namespace), Some(name)) = (&metadata.namespace, &metadata.name) else { return true };
        let generation = metadata.generation.unwrap_or_default();
        let name = NamespacedName::new(namespace.as_str(), name.as_str());
        let Some(read) = self.read.of(object, || {
            let value = serde_json::to_value(object).map_err(|error| error.to_string())?;
            Authorizer::decode(&name, &value).map(Arc::new).map_err(|error| error.to_string())
        }) else {
            return true;
        };
        let condition = match read {
            Ok(read) => {
                let declared = statuses.protocol(&read.service, read.port);
                accepted(&read, statuses.facts(&read.service).as_ref(), declared)
            }
            Err(why) => malformed(&why),
        };
        let before = conditions_of(object);
        let wanted = written(condition, &before, generation, &now());
        if before.contains(&wanted) {
            return true;
        }
        let told = Told { client: &self.client, resource: &self.resource, object, what: "authorizer" };
        told.apply(MANAGER, json!({"conditions": [wanted]})).await
    }
}
