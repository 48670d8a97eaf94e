//! Gateways of the Gateway API, as far as they are waypoints.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector as WrittenSelector;
use serde::Deserialize;
use serde_json::Value;

use super::field::{Fault, SUBDOMAIN, check_namespaced, is_subdomain, parse, port};
use super::{Item, Key, Kind, Read, identify, network_policy};
use crate::mesh::{AllowedNamespaces, Gateway, Listener, Object, TUNNEL_PROTOCOL, WAYPOINT_CLASS};

/// A Gateway of the API server, as agents read it; and what of it has no effect, each in words.
///
/// # Errors
/// What makes it unreadable.
pub fn read_gateway(object: Value) -> Result<(Gateway, Vec<String>), String> {
    let told = |fault: Fault| format!("{}: {}", fault.field, fault.cause);
    let key = identify(Kind::Gateway, &object).map_err(told)?;
    let written: Written = parse(object).map_err(told)?;
    let (gateway, notes) = decode(&key, written).map_err(told)?;
    Ok((gateway, notes.into_iter().map(told).collect()))
}

/// Of a Gateway that is somebody else's nothing is told.
pub(super) fn gateway(key: &Key, written: Written) -> Result<Read, Fault> {
    let (gateway, notes) = decode(key, written)?;
    Ok((Item::Other(Object::Gateway(gateway)), notes))
}

fn decode(key: &Key, written: Written) -> Result<(Gateway, Vec<Fault>), Fault> {
    check_namespaced(key, is_subdomain, SUBDOMAIN)?;
    let is_ours = written.spec.gateway_class_name == WAYPOINT_CLASS;
    let mut notes = Vec::new();
    let mut listeners = Vec::new();
    for (index, listener) in written.spec.listeners.into_iter().enumerate().filter(|_| is_ours) {
        let at = |field: &str| format!("spec.listeners[{index}].{field}");
        let (from, fault) = allowed(listener.allowed_routes.and_then(|routes| routes.namespaces).unwrap_or_default());
        notes.extend(fault.map(|(field, cause)| Fault::new(at(&format!("allowedRoutes.namespaces.{field}")), cause)));
        let listener = Listener {
            name: listener.name.into(),
            port: port(|| at("port"), listener.port)?,
            protocol: listener.protocol.into(),
            from,
        };
        if !listener.is_tunnel() {
            let cause =
                format!("a waypoint listens on port 15008 with protocol {TUNNEL_PROTOCOL}; this one has no effect");
            notes.push(Fault::new(format!("spec.listeners[{index}]"), cause));
        }
        listeners.push(listener);
    }
    let class = written.spec.gateway_class_name.into();
    Ok((Gateway { name: key.name.clone(), class, listeners }, notes))
}

/// What cannot be read admits nobody.
fn allowed(written: Namespaces) -> (AllowedNamespaces, Option<(&'static str, String)>) {
    match (written.from.as_deref().unwrap_or("Same"), written.selector) {
        ("Same", _) => (AllowedNamespaces::Same, None),
        ("All", _) => (AllowedNamespaces::All, None),
        ("None", _) => (AllowedNamespaces::None, None),
        ("Selector", Some(selector)) => match network_policy::selector(selector) {
            Ok(selector) => (AllowedNamespaces::Labelled(selector), None),
            Err(fault) => {
                (AllowedNamespaces::None, Some(("selector", format!("{}; it admits no namespace", fault.cause))))
            }
        },
        ("Selector", None) => {
            (AllowedNamespaces::None, Some(("selector", "it is missing, so no namespace is admitted".to_owned())))
        }
        (other, _) => {
            let cause = format!("{other:?} is none of All, Same, Selector, None; it admits no namespace");
            (AllowedNamespaces::None, Some(("from", cause)))
        }
    }
}

#[derive(Deserialize)]
pub(super) struct Written {
    spec: Spec,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    gateway_class_name: String,
    #[serde(default)]
    listeners: Vec<WrittenListener>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct WrittenListener {
    name: String,
    port: i32,
    protocol: String,
    allowed_routes: Option<AllowedRoutes>,
}

#[derive(Deserialize)]
struct AllowedRoutes {
    namespaces: Option<Namespaces>,
}

#[derive(Deserialize, Default)]
struct Namespaces {
    from: Option<String>,
    selector: Option<WrittenSelector>,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::mesh::{NamespacedName, OwnWaypoint};
    use crate::source::fixture;

    #[test]
    fn what_the_page_shows_is_read_and_stands_as_it_says() {
        let examples = fixture::examples(PAGE);
        assert_eq!(examples.len(), 3);
        let model = fixture::model(&examples.join("\n---\n"));
        let state = model.read();
        for (namespace, name, gateway) in [("shop", "cart", "shop/shop"), ("web", "front", "infra/shared")] {
            let service = state.mesh.service(&NamespacedName::new(namespace, name)).unwrap();
            let waypoint = state.mesh.own_waypoint(service).unwrap().unwrap();
            assert_eq!(waypoint.gateway.to_string(), gateway);
        }
        let pod = state.mesh.workload_by_name(&NamespacedName::new("shop", "own-1")).unwrap();
        assert_eq!(state.mesh.gateway_of(&pod.pod), Some(NamespacedName::new("shop", "own")));
        let own = OwnWaypoint::of(&NamespacedName::new("shop", "own"), state.mesh.trust_domain()).unwrap();
        assert_eq!(state.mesh.door_of(&own).unwrap().candidates.len(), 1);
    }

    const PAGE: &str = include_str!("../../../docs/waypoints.md");

    fn read(class: &str, listener: &Value) -> (Gateway, Vec<String>) {
        let written = json!({"spec": {"gatewayClassName": class, "listeners": [listener]}});
        let key = Key::new(Kind::Gateway, Some("infra"), "gw");
        let (item, notes) = gateway(&key, parse(written).unwrap()).unwrap();
        let Item::Other(Object::Gateway(gateway)) = item else { panic!("it became another object") };
        (gateway, notes.into_iter().map(|fault| fault.field).collect())
    }

    #[test]
    fn whom_a_listener_admits_is_read_and_what_cannot_be_read_admits_nobody() {
        let from = |namespaces: Value| {
            let listener = json!({"name": "mesh", "port": 15008, "protocol": "HBONE",
                                  "allowedRoutes": {"namespaces": namespaces}});
            let (gateway, notes) = read("selvedge-waypoint", &listener);
            (gateway.listeners[0].from.clone(), notes.join(" "))
        };
        assert_eq!(from(json!(null)), (AllowedNamespaces::Same, String::new()));
        assert_eq!(from(json!({"from": "All"})), (AllowedNamespaces::All, String::new()));
        assert_eq!(from(json!({"from": "None"})).0, AllowedNamespaces::None);
        let selector = json!({"from": "Selector", "selector": {"matchLabels": {"a": "b"}}});
        assert!(matches!(from(selector).0, AllowedNamespaces::Labelled(_)));
        for (written, field) in [(json!({"from": "Selector"}), "selector"), (json!({"from": "Any"}), "from")] {
            let place = format!("spec.listeners[0].allowedRoutes.namespaces.{field}");
            assert_eq!(from(written), (AllowedNamespaces::None, place));
        }
    }

    #[test]
    fn a_listener_that_is_no_waypoints_is_told_and_other_classes_are_passed_over() {
        let http = json!({"name": "web", "port": 80, "protocol": "HTTP"});
        assert_eq!(read("selvedge-waypoint", &http).1, ["spec.listeners[0]"]);
        assert!(read("nginx", &http).1.is_empty());
        assert!(!read("nginx", &http).0.is_waypoint());
    }
}
