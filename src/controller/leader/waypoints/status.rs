//! What people read of a waypoint: [GatewayStatus](https://gateway-api.sigs.k8s.io/reference/spec/#gatewaystatus).

use kube::api::DynamicObject;
use serde_json::{Value, json};

use super::super::status::{list, written};
use crate::api::StatusCondition;
use crate::mesh::{NamespacedName, TUNNEL_PORT, TUNNEL_PROTOCOL, own_name};
use crate::route::status::Condition;

/// What became of a Gateway.
#[derive(Default)]
pub struct Findings {
    /// It can be no waypoint, and why.
    pub refused: Option<String>,
    /// What of it has no effect.
    pub notes: Vec<String>,
    /// What stood in the way of its objects.
    pub failure: Option<String>,
    /// Pods that are ready.
    pub available: i32,
    /// Somebody else deploys it.
    pub by_hand: bool,
}

/// The status as it shall be; `None` where it says so already.
pub fn gateway_status(object: &DynamicObject, before: &Value, findings: &Findings, now: &str) -> Option<Value> {
    let generation = object.metadata.generation.unwrap_or_default();
    let namespace = object.metadata.namespace.clone().unwrap_or_default();
    let gateway = NamespacedName::new(namespace, object.metadata.name.clone().unwrap_or_default());
    let programmed = programmed(findings);
    let conditions = [accepted(findings), programmed.clone()];
    let listeners: Vec<Value> = list(&object.data, "/spec/listeners")
        .iter()
        .map(|listener| {
            let former = list(before, "/listeners").iter().find(|former| former["name"] == listener["name"]);
            let former = former.map_or(Value::Null, |former| former["conditions"].clone());
            let conditions = of_listener(listener, &programmed);
            let conditions = conditions.map(|one| written(one, &read(&former), generation, now));
            let kinds = ["HTTPRoute", "GRPCRoute"];
            let kinds = kinds.map(|kind| json!({"group": "gateway.networking.k8s.io", "kind": kind}));
            json!({
                "name": listener["name"],
                "supportedKinds": kinds,
                // Routes are attached to the Services behind it.
                "attachedRoutes": 0,
                "conditions": conditions,
            })
        })
        .collect();
    let conditions = conditions.map(|one| written(one, &read(&before["conditions"]), generation, now));
    let host = format!("{}.{}.svc", own_name(&gateway), gateway.namespace);
    let status = json!({
        "addresses": [{"type": "Hostname", "value": host}],
        "conditions": conditions,
        "listeners": listeners,
    });
    let same = ["addresses", "conditions", "listeners"].iter().all(|field| before[*field] == status[*field]);
    (!same).then_some(status)
}

/// The same of the GatewayClass.
pub fn class_status(before: &Value, generation: i64, now: &str) -> Option<Value> {
    let accepted = condition("Accepted", Ok("Accepted"), "Gateways of this class become waypoints.");
    let conditions = [written(accepted, &read(&before["conditions"]), generation, now)];
    let conditions = json!(conditions);
    (before["conditions"] != conditions).then(|| json!({"conditions": conditions}))
}

fn accepted(findings: &Findings) -> Condition {
    match &findings.refused {
        Some(cause) => condition("Accepted", Err("Invalid"), cause),
        None if findings.notes.is_empty() => condition("Accepted", Ok("Accepted"), "It is a waypoint."),
        None => {
            let notes = findings.notes.join("; ");
            condition("Accepted", Ok("Accepted"), &format!("It is a waypoint. Not all of it has an effect: {notes}"))
        }
    }
}

fn programmed(findings: &Findings) -> Condition {
    let kind = "Programmed";
    match (&findings.refused, &findings.failure) {
        (Some(cause), _) => condition(kind, Err("Invalid"), cause),
        (None, Some(failure)) => condition(kind, Err("NoResources"), failure),
        (None, None) if findings.by_hand => condition(kind, Ok(kind), "It is deployed by hand."),
        (None, None) if findings.available == 0 => condition(kind, Err("Pending"), "None of its pods is ready yet."),
        (None, None) => condition(kind, Ok(kind), "Its pods are ready."),
    }
}

fn of_listener(listener: &Value, programmed: &Condition) -> [Condition; 4] {
    let is_tunnel = listener["protocol"] == TUNNEL_PROTOCOL && listener["port"] == TUNNEL_PORT;
    let unsupported = format!("A waypoint listens on port {TUNNEL_PORT} with protocol {TUNNEL_PROTOCOL}.");
    let (accepted, programmed) = match is_tunnel {
        true => (condition("Accepted", Ok("Accepted"), "Clients' agents come in here."), programmed.clone()),
        false => (
            condition("Accepted", Err("UnsupportedProtocol"), &unsupported),
            condition("Programmed", Err("Invalid"), &unsupported),
        ),
    };
    let resolved = condition("ResolvedRefs", Ok("ResolvedRefs"), "It refers to nothing.");
    let conflicted = condition("Conflicted", Err("NoConflicts"), "No listener is in its way.");
    [accepted, programmed, resolved, conflicted]
}

/// `Ok`: it is true; the word is its reason.
fn condition(kind: &'static str, reason: Result<&'static str, &'static str>, message: &str) -> Condition {
    let (is_true, reason) = match reason {
        Ok(reason) => (true, reason),
        Err(reason) => (false, reason),
    };
    Condition { kind, is_true, reason, message: message.to_owned() }
}

fn read(conditions: &Value) -> Vec<StatusCondition> {
    serde_json::from_value(conditions.clone()).unwrap_or_default()
}
