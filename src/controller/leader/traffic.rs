//! What became of a policy about traffic, in its status: `status.conditions` of ours, `status.ancestors` of the Gateway
//! API's.

use std::sync::Arc;

use kube::Client;
use kube::api::DynamicObject;
use kube::core::ApiResource;
use kube::runtime::reflector::Store;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::routes::{CONTROLLER, RouteStatuses, RoutesOf, versions};
use super::status::{ByGeneration, Told, conditions_of, list, merged, now, written};
use crate::api::StatusCondition;
use crate::route::is_core;
use crate::route::status::Condition;
use crate::route::traffic::status::{accepted, conditions, look};
use crate::route::traffic::{Delta, Table, TrafficKind, TrafficPolicy, decode};

/// Writes statuses where they say something else than what is so.
pub struct TrafficStatuses {
    client: Client,
    /// What the decoder made of them, or why it is nothing.
    read: ByGeneration<Result<Arc<TrafficPolicy>, String>>,
    /// Of everything that the last round looked at, if it wrote all that it wanted to.
    told: Option<u64>,
}

/// The policies of one kind.
pub struct PoliciesOf {
    pub kind: TrafficKind,
    pub resource: ApiResource,
    pub store: Store<DynamicObject>,
}

impl TrafficStatuses {
    pub fn new(client: Client) -> Self {
        Self { client, read: ByGeneration::default(), told: None }
    }

    pub async fn tell(&mut self, all: &[PoliciesOf], statuses: &RouteStatuses, routes: &[RoutesOf]) {
        // What has not been listed yet is not missing.
        let Some(around) = statuses.told() else { return };
        let seen =
            Some(all.iter().map(|of_kind| versions(&of_kind.store)).fold(around, |sum, one| sum.rotate_left(7) ^ one));
        if self.told == seen {
            return;
        }
        let mut table = Table::default();
        let mut policies = Vec::new();
        for of_kind in all {
            for object in of_kind.store.state() {
                let Some(read) = self.read(of_kind.kind, &object) else { continue };
                if let Ok(policy) = &read {
                    table.apply(Delta::Apply(policy.clone()));
                }
                policies.push((of_kind, object, read));
            }
        }
        self.read.keep(policies.iter().map(|(_, object, _)| &**object));
        let mut is_told = true;
        for (of_kind, object, read) in &policies {
            is_told &= self.tell_one(of_kind, object, read, &table, statuses, routes).await;
        }
        self.told = seen.filter(|_| is_told);
    }

    /// Whether its status says what is so.
    async fn tell_one(
        &self,
        of_kind: &PoliciesOf,
        object: &DynamicObject,
        read: &Result<Arc<TrafficPolicy>, String>,
        table: &Table,
        statuses: &RouteStatuses,
        routes: &[RoutesOf],
    ) -> bool {
        let (generation, now) = (object.metadata.generation.unwrap_or_default(), now());
        let look_at = |policy: &TrafficPolicy, target: &_| {
            look(target, &policy.fields, |name| statuses.facts(name), |route| statuses.find(routes, route))
        };
        let status = match of_kind.kind {
            TrafficKind::Traffic => {
                let said = match read {
                    Ok(policy) => conditions(policy, table, |target| look_at(policy, target)),
                    Err(why) => ["Accepted", "Enforced"].map(|kind| malformed(kind, why)).into(),
                };
                let before = conditions_of(object);
                let wanted: Vec<_> = said.into_iter().map(|one| written(one, &before, generation, &now)).collect();
                (wanted != before).then(|| json!({"conditions": wanted}))
            }
            TrafficKind::Backend => {
                let before = list(&object.data, "/status/ancestors");
                let targets = list(&object.data, "/spec/targetRefs");
                // Others speak for what is no Service.
                let services = targets.iter().enumerate().filter(|(_, target)| is_service(target));
                let said = services.map(|(index, target)| {
                    let condition = match read {
                        Ok(policy) => {
                            let here = policy.targets.iter().filter(|target| target.index == index).cloned().collect();
                            let alone = TrafficPolicy { targets: here, ..(**policy).clone() };
                            accepted(&alone, table, |target| look_at(policy, target))
                        }
                        Err(why) => malformed("Accepted", why),
                    };
                    (target.clone(), in_known_words(condition))
                });
                ancestors(before, said, generation, &now).map(|ancestors| json!({"ancestors": ancestors}))
            }
        };
        let Some(status) = status else { return true };
        Told { client: &self.client, resource: &of_kind.resource, object, what: "traffic" }.merge(status).await
    }

    fn read(&mut self, kind: TrafficKind, object: &DynamicObject) -> Option<Result<Arc<TrafficPolicy>, String>> {
        self.read.of(object, || {
            let value = serde_json::to_value(object).map_err(|error| error.to_string())?;
            decode(kind, &value).map(Arc::new).map_err(|error| error.to_string())
        })
    }
}

fn malformed(kind: &'static str, why: &str) -> Condition {
    Condition { kind, is_true: false, reason: "Malformed", message: why.to_owned() }
}

fn is_service(target: &Value) -> bool {
    target["kind"] == "Service" && target["group"].as_str().is_none_or(is_core)
}

/// With one of the reasons that the Gateway API has for policies (PolicyConditionReason); the message says it more exactly.
fn in_known_words(condition: Condition) -> Condition {
    let reason = match condition.reason {
        "Malformed" => "Invalid",
        "NoWaypoint" => "TargetNotFound",
        known => known,
    };
    Condition { reason, ..condition }
}

/// `status.ancestors` as it shall be; `None` where it says so already. The entries of other controllers stay.
fn ancestors(
    before: &[Value],
    said: impl Iterator<Item = (Value, Condition)>,
    generation: i64,
    now: &str,
) -> Option<Vec<Value>> {
    let is_ours = |entry: &&Value| entry["controllerName"] == CONTROLLER;
    let own: Vec<Ancestor> =
        before.iter().filter(is_ours).filter_map(|entry| serde_json::from_value(entry.clone()).ok()).collect();
    let wanted: Vec<Ancestor> = said
        .map(|(ancestor_ref, condition)| {
            let former = own.iter().find(|entry| entry.ancestor_ref == ancestor_ref);
            let former = former.map_or(&[][..], |entry| &entry.conditions);
            let conditions = merged(vec![condition], former, generation, now);
            Ancestor { ancestor_ref, controller_name: CONTROLLER.to_owned(), conditions }
        })
        .collect();
    if own == wanted {
        return None;
    }
    let others = before.iter().filter(|entry| !is_ours(entry)).cloned();
    Some(others.chain(wanted.iter().filter_map(|entry| serde_json::to_value(entry).ok())).take(MOST).collect())
}

/// One entry (PolicyAncestorStatus).
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Ancestor {
    ancestor_ref: Value,
    controller_name: String,
    #[serde(default)]
    conditions: Vec<StatusCondition>,
}

/// As the schema has it.
const MOST: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_we_answer_for_is_services_in_the_words_that_the_gateway_api_has() {
        assert!(is_service(&json!({"group": "", "kind": "Service", "name": "a"})));
        assert!(!is_service(&json!({"group": "multicluster.x-k8s.io", "kind": "ServiceImport", "name": "a"})));
        assert!(!is_service(&json!({"group": "example.com", "kind": "Service", "name": "a"})));
        let said = |reason| {
            in_known_words(Condition { kind: "Accepted", is_true: false, reason, message: "so".to_owned() }).reason
        };
        assert_eq!(["NoWaypoint", "Malformed", "Conflicted"].map(said), ["TargetNotFound", "Invalid", "Conflicted"]);
    }

    #[test]
    fn the_entries_of_other_controllers_stay_and_ours_follow_the_policy() {
        let cart = json!({"group": "", "kind": "Service", "name": "cart"});
        let other = json!({"ancestorRef": {"name": "x"}, "controllerName": "example.com/gw", "conditions": []});
        let said = |is_true| {
            let condition = Condition { kind: "Accepted", is_true, reason: "Why", message: "so".to_owned() };
            std::iter::once((cart.clone(), condition))
        };
        let first = ancestors(std::slice::from_ref(&other), said(true), 1, "2026-01-01T00:00:00Z").unwrap();
        assert_eq!((first.len(), &first[0], &first[1]["ancestorRef"]), (2, &other, &cart));
        assert_eq!(ancestors(&first, said(true), 1, "2026-02-01T00:00:00Z"), None, "nothing changed");
        let next = ancestors(&first, said(false), 1, "2026-02-01T00:00:00Z").unwrap();
        assert_eq!(next[1]["conditions"][0]["lastTransitionTime"], "2026-02-01T00:00:00Z");
        assert_eq!(ancestors(&next, std::iter::empty(), 2, "2026-03-01T00:00:00Z").unwrap(), [other]);
    }
}
