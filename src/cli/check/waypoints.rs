//! Waypoints in processes of their own: whether those that are asked for are there, and who asks for one in vain.

use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding};
use kube::api::DynamicObject;
use serde_json::Value;

use super::super::cluster::{CONTROLLER, NAMESPACE};
use super::facts::Fact;
use super::{Area, Findings};
use crate::mesh::{GATEWAY_LABEL, OwnWaypoint, TrustDomain, WAYPOINT_CLASS};
use crate::model::State;

/// What the cluster says of waypoints in general.
pub struct Facts {
    pub class: Fact<Option<DynamicObject>>,
    /// What one may read, and who may.
    pub role: Fact<Option<ClusterRole>>,
    pub binding: Fact<Option<ClusterRoleBinding>>,
}

pub fn judge(facts: &Facts, state: &State, trust_domain: &TrustDomain, findings: &mut Findings) {
    let gateways = state.mesh.gateways().filter(|gateway| gateway.is_waypoint()).map(|gateway| &gateway.name);
    let mut waypoints: Vec<OwnWaypoint> = gateways.filter_map(|name| OwnWaypoint::of(name, trust_domain)).collect();
    waypoints.sort();
    let before = findings.0.len();
    if !waypoints.is_empty() {
        class(facts, findings);
        rights(facts, &waypoints, findings);
    }
    waypoints.iter().for_each(|waypoint| readiness(state, waypoint, findings));
    services(state, findings);
    if findings.0.len() == before && !waypoints.is_empty() {
        let text = match waypoints.len() {
            1 => "the waypoint of its own has a pod that is ready".to_owned(),
            count => format!("each of {count} waypoints of their own has a pod that is ready"),
        };
        findings.ok(Area::Waypoints, text);
    }
}

fn class(facts: &Facts, findings: &mut Findings) {
    let cure = format!("the controller makes and accepts it: kubectl -n {NAMESPACE} logs deployment/{CONTROLLER}");
    match &facts.class {
        Err(cause) => findings.unknown(Area::Waypoints, format!("GatewayClass {WAYPOINT_CLASS}: {cause}")),
        Ok(None) => findings.error(Area::Waypoints, format!("there is no GatewayClass {WAYPOINT_CLASS}"), cure),
        Ok(Some(class)) => {
            let conditions = class.data.pointer("/status/conditions").and_then(Value::as_array);
            let mut conditions = conditions.into_iter().flatten();
            if !conditions.any(|condition| condition["type"] == "Accepted" && condition["status"] == "True") {
                findings.error(Area::Waypoints, format!("GatewayClass {WAYPOINT_CLASS} is not Accepted"), cure);
            }
        }
    }
}

fn rights(facts: &Facts, waypoints: &[OwnWaypoint], findings: &mut Findings) {
    let install = "install anew: kubectl apply -k daemonset/base, or the chart selvedge";
    match &facts.role {
        Err(cause) => findings.unknown(Area::Waypoints, format!("ClusterRole {READERS}: {cause}")),
        Ok(None) => {
            let text = format!("there is no ClusterRole {READERS}, so no waypoint may read anything");
            findings.error(Area::Waypoints, text, install);
        }
        Ok(Some(_)) => {}
    }
    let binding = match &facts.binding {
        Err(cause) => return findings.unknown(Area::Waypoints, format!("ClusterRoleBinding {READERS}: {cause}")),
        Ok(None) => {
            let text = format!("there is no ClusterRoleBinding {READERS}, so no waypoint may read anything");
            return findings.error(Area::Waypoints, text, install);
        }
        Ok(Some(binding)) => binding,
    };
    for own in waypoints.iter().map(|waypoint| &waypoint.service) {
        let mut subjects = binding.subjects.iter().flatten();
        if !subjects.any(|one| one.namespace.as_deref() == Some(&*own.namespace) && one.name == *own.name) {
            findings.error(
                Area::Waypoints,
                format!("ClusterRoleBinding {READERS} lacks service account {own}, so its waypoint may read nothing"),
                format!("the controller enters it: kubectl -n {NAMESPACE} logs deployment/{CONTROLLER}"),
            );
        }
    }
}

fn readiness(state: &State, waypoint: &OwnWaypoint, findings: &mut Findings) {
    let OwnWaypoint { gateway, service, .. } = waypoint;
    let (namespace, name) = (&gateway.namespace, &gateway.name);
    match state.mesh.door_of(waypoint) {
        Err(_) => findings.error(
            Area::Waypoints,
            format!("Gateway {gateway} has no Service {service} with port 15008, so nobody finds its waypoint"),
            format!("kubectl -n {namespace} describe gateway {name} says what is in the way"),
        ),
        Ok(door) if state.mesh.ready_pod_of(waypoint, &door).is_none() => findings.error(
            Area::Waypoints,
            format!("no pod of Gateway {gateway} is ready, so connections to its Services are refused"),
            format!("kubectl -n {namespace} get pods -l {GATEWAY_LABEL}={name}, and their logs"),
        ),
        Ok(_) => {}
    }
}

fn services(state: &State, findings: &mut Findings) {
    let vain = state.mesh.services().filter_map(|service| Some((service, state.mesh.own_waypoint(service)?.err()?)));
    let mut vain: Vec<_> = vain.collect();
    vain.sort_by(|(a, _), (b, _)| a.name.cmp(&b.name));
    for (service, problem) in vain {
        findings.error(
            Area::Waypoints,
            format!("connections to Service {} are refused: {problem}", service.name),
            "or correct selvedge.dev/waypoint on the Service or its namespace; see docs/waypoints.md",
        );
    }
}

/// ClusterRole and binding of what waypoints read.
pub const READERS: &str = "selvedge-waypoint";

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::source::fixture;

    const GATEWAY: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: gw, namespace: infra}
spec:
  gatewayClassName: selvedge-waypoint
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
---
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: infra, annotations: {selvedge.dev/waypoint: gw}}
spec: {clusterIP: 10.96.0.10, ports: [{name: http, port: 80}]}
";
    const DOOR: &str = "
---
apiVersion: v1
kind: Service
metadata: {name: gw-selvedge-waypoint, namespace: infra}
spec:
  clusterIP: 10.96.0.12
  selector: {gateway.networking.k8s.io/gateway-name: gw}
  ports: [{name: tunnel, port: 15008, targetPort: 15008}]
";
    const POD: &str = "
---
apiVersion: v1
kind: Pod
metadata: {name: gw-1, namespace: infra, labels: {gateway.networking.k8s.io/gateway-name: gw}}
spec: {nodeName: one, serviceAccountName: gw-selvedge-waypoint}
status: {podIPs: [{ip: 10.0.1.9}], phase: Running, conditions: [{type: Ready, status: 'True'}]}
";
    const VAIN: &str = "
---
apiVersion: v1
kind: Service
metadata: {name: front, namespace: web, annotations: {selvedge.dev/waypoint: infra/gw}}
spec: {clusterIP: 10.96.0.11, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: lost, namespace: web, annotations: {selvedge.dev/waypoint: nobody}}
spec: {clusterIP: 10.96.0.13, ports: [{name: http, port: 80}]}
";

    fn well() -> Facts {
        let class = json!({
            "apiVersion": "gateway.networking.k8s.io/v1", "kind": "GatewayClass", "metadata": {"name": WAYPOINT_CLASS},
            "status": {"conditions": [{"type": "Accepted", "status": "True"}]},
        });
        let subject = json!({"kind": "ServiceAccount", "namespace": "infra", "name": "gw-selvedge-waypoint"});
        let binding = json!({
            "metadata": {"name": READERS}, "roleRef": {"apiGroup": "", "kind": "ClusterRole", "name": READERS},
            "subjects": [subject],
        });
        Facts {
            class: Ok(Some(serde_json::from_value(class).unwrap())),
            role: Ok(Some(ClusterRole::default())),
            binding: Ok(Some(serde_json::from_value(binding).unwrap())),
        }
    }

    fn judged(facts: &Facts, manifests: &[&str]) -> Vec<String> {
        let domain: TrustDomain = "cluster.local".parse().unwrap();
        let model = fixture::model_of(fixture::load(&manifests.concat()));
        let mut findings = Findings::default();
        judge(facts, &model.read(), &domain, &mut findings);
        findings.0.iter().map(|finding| format!("{} {}", finding.verdict.mark(), finding.text)).collect()
    }

    #[test]
    fn a_waypoint_that_is_not_there_is_named_and_who_asks_for_one_in_vain() {
        assert_eq!(judged(&well(), &[]), [""; 0]);
        let ready = "✓ the waypoint of its own has a pod that is ready";
        assert_eq!(judged(&well(), &[GATEWAY, DOOR, POD]), [ready]);
        let no_door = "✗ Gateway infra/gw has no Service infra/gw-selvedge-waypoint with port 15008";
        let found = judged(&well(), &[GATEWAY, POD]);
        assert!(found.len() == 1 && found[0].starts_with(no_door), "{found:?}");
        let no_pod = "✗ no pod of Gateway infra/gw is ready, so connections to its Services are refused";
        assert_eq!(judged(&well(), &[GATEWAY, DOOR]), [no_pod]);
        let found = judged(&well(), &[GATEWAY, DOOR, POD, VAIN]);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(
            found[0].starts_with("✗ connections to Service web/front are refused: no listener of Gateway infra/gw")
        );
        assert!(found[1].starts_with("✗ connections to Service web/lost are refused: there is no Gateway web/nobody"));
    }

    #[test]
    fn what_waypoints_need_of_the_cluster_is_missed_where_there_are_some() {
        let missing = Facts { class: Ok(None), role: Ok(None), binding: Ok(None) };
        assert_eq!(judged(&missing, &[]), [""; 0]);
        let found = judged(&missing, &[GATEWAY, DOOR, POD]);
        assert_eq!(found.len(), 3, "{found:?}");
        assert!(found.iter().all(|text| text.starts_with("✗ there is no ")), "{found:?}");
        let mut unbound = well();
        unbound.binding.as_mut().unwrap().as_mut().unwrap().subjects = None;
        let found = judged(&unbound, &[GATEWAY, DOOR, POD]);
        let lacks = "✗ ClusterRoleBinding selvedge-waypoint lacks service account infra/gw-selvedge-waypoint";
        assert!(found.len() == 1 && found[0].starts_with(lacks), "{found:?}");
        let mut unaccepted = well();
        unaccepted.class.as_mut().unwrap().as_mut().unwrap().data = json!({});
        assert_eq!(judged(&unaccepted, &[GATEWAY, DOOR, POD]), ["✗ GatewayClass selvedge-waypoint is not Accepted"]);
        let unread = Facts { class: Err("forbidden".to_owned()), ..well() };
        assert_eq!(judged(&unread, &[GATEWAY, DOOR, POD]), ["? GatewayClass selvedge-waypoint: forbidden"]);
    }
}
