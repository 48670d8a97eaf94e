use super::*;
use crate::model::Model;
use crate::source::fixture;

mod agents;
mod through;

const PODS: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop, annotations: {selvedge.dev/mesh: enabled}}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: shop}
spec: {nodeName: one, serviceAccountName: client}
status: {podIPs: [{ip: 10.0.1.1}, {ip: 'fd00::1:1'}]}
---
apiVersion: v1
kind: Pod
metadata: {name: server, namespace: shop}
spec: {nodeName: two, serviceAccountName: server}
status: {podIPs: [{ip: 'fd00::2:1'}]}
";

fn asked(manifests: &str, from: &str, to: &str, port: u16) -> Explanation {
    let model = fixture::model(&format!("{PODS}{manifests}"));
    let party = |name| Party::Named(NamespacedName::new("shop", name));
    explain(&model.read(), &Question { from: party(from), to: party(to), port: Some(port) }).unwrap()
}

fn service(target: u16, spec: &str, endpoints: &str) -> String {
    format!(
        "
---
apiVersion: v1
kind: Service
metadata: {{name: web, namespace: shop}}
spec: {{clusterIP: 'fd00::9:1', ports: [{{port: 80, targetPort: {target}}}]{spec}}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: web, namespace: shop, labels: {{kubernetes.io/service-name: web}}}}
addressType: IPv6
ports: [{{name: '', port: {target}}}]
endpoints: {endpoints}
"
    )
}

#[test]
fn pods_of_one_node_are_joined_unless_somebody_watches_their_interfaces() {
    let neighbour = "
---
apiVersion: v1
kind: Pod
metadata: {name: neighbour, namespace: shop, labels: {app: neighbour}}
spec: {nodeName: one, serviceAccountName: neighbour}
status: {podIPs: [{ip: 10.0.1.2}]}
";
    let path = |manifests: &str, to| asked(manifests, "client", to, 80).endpoints[0].path.clone();
    assert_eq!(path(neighbour, "neighbour"), "same-node");
    assert_eq!(path(neighbour, "server"), "tunnel");
    let watched = format!(
        "{neighbour}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: watches, namespace: shop}}
spec: {{podSelector: {{matchLabels: {{app: neighbour}}}}, policyTypes: [Ingress]}}
"
    );
    assert_eq!(path(&watched, "neighbour"), "tunnel");
}

#[test]
fn a_pod_of_two_families_is_seen_by_the_address_that_it_dials_from() {
    let policy = "
---
apiVersion: selvedge.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: six, namespace: shop}
spec: {action: ALLOW, rules: [{from: [{source: {ipBlocks: ['fd00::1:1']}}]}]}
";
    assert_eq!(asked(policy, "client", "server", 80).verdict, Verdict::Allow);
}

#[test]
fn a_service_answers_by_the_endpoints_that_the_agent_would_choose_from() {
    let ready = "[{addresses: ['fd00::2:1'], nodeName: two}";
    let both = service(
        8080,
        "",
        &format!(
            "{ready}, {{addresses: ['fd00::2:2'], conditions: {{ready: false, serving: true, terminating: true}}}}]"
        ),
    );
    assert_eq!(
        asked(&both, "client", "web", 80).endpoints.len(),
        1,
        "one that terminates is left out beside a ready one"
    );
    let local = service(8080, ", internalTrafficPolicy: Local", &format!("{ready}]"));
    let answer = asked(&local, "client", "web", 80);
    assert_eq!((answer.verdict, answer.reason.as_deref()), (Verdict::Deny, Some("no-endpoint")));
}

#[test]
fn a_name_that_a_pod_and_a_service_have_is_not_guessed_at() {
    let both =
        service(8080, "", "[{addresses: ['fd00::2:1']}]").replace("name: web, namespace", "name: server, namespace");
    let model = fixture::model(&format!("{PODS}{both}"));
    let name = || NamespacedName::new("shop", "server");
    let asked = |from, to| explain(&model.read(), &Question { from, to, port: Some(80) });
    let client = || Party::Named(NamespacedName::new("shop", "client"));
    let refused = asked(client(), Party::Named(name())).unwrap_err();
    assert_eq!(refused, "there are both a Pod and a Service shop/server: write pod/shop/server or service/shop/server");
    assert_eq!(asked(client(), Party::Pod(name())).unwrap().to, "pod shop/server");
    assert_eq!(asked(client(), Party::Service(name())).unwrap().to, "service shop/server");
    // Only pods dial: there the name is nobody else's.
    assert!(asked(Party::Named(name()), Party::Pod(name())).is_ok());
    assert!(asked(Party::Service(name()), Party::Pod(name())).unwrap_err().contains("dials nobody"));
}

#[test]
fn a_service_that_leads_to_a_port_of_the_mesh_is_refused() {
    let answer = asked(&service(15008, "", "[{addresses: ['fd00::2:1']}]"), "client", "web", 80);
    assert_eq!(answer.reason.as_deref(), Some("protocol"));
}
