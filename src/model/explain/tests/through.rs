//! Services with a waypoint in a process of its own.

use http::Request;

use super::*;

const WORLD: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop, annotations: {selvedge.dev/mesh: enabled}}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: shop}
spec: {nodeName: one, serviceAccountName: client}
status: {podIPs: [{ip: 10.0.1.1}], phase: Running}
---
apiVersion: v1
kind: Pod
metadata: {name: cart-1, namespace: shop, labels: {app: cart}}
spec: {nodeName: two, serviceAccountName: cart}
status: {podIPs: [{ip: 10.0.2.1}], phase: Running, conditions: [{type: Ready, status: 'True'}]}
---
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop, annotations: {selvedge.dev/waypoint: infra/gw}}
spec: {clusterIP: 10.96.0.10, selector: {app: cart}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: plain, namespace: shop}
spec: {clusterIP: 10.96.0.11, selector: {app: cart}, ports: [{name: http, port: 80, targetPort: 8081}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: r, namespace: shop}
spec:
  parentRefs: [{group: '', kind: Service, name: cart}]
  rules:
  - matches: [{path: {value: /plain}}]
    backendRefs: [{name: plain, port: 80}]
  - backendRefs: [{name: cart, port: 80}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: gw, namespace: infra}
spec:
  gatewayClassName: selvedge-waypoint
  listeners: [{name: mesh, port: 15008, protocol: HBONE, allowedRoutes: {namespaces: {from: All}}}]
---
apiVersion: v1
kind: Service
metadata: {name: gw-selvedge-waypoint, namespace: infra}
spec:
  clusterIP: 10.96.0.12
  selector: {gateway.networking.k8s.io/gateway-name: gw}
  ports: [{name: tunnel, port: 15008, targetPort: 15008}]
---
apiVersion: selvedge.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: client, namespace: shop}
spec:
  rules:
  - from: [{source: {principals: [cluster.local/ns/shop/sa/client]}}]
    to: [{operation: {ports: ['8081']}}, {operation: {methods: [GET]}}]
";

const WAYPOINT: &str = "
---
apiVersion: v1
kind: Pod
metadata: {name: gw-1, namespace: infra, labels: {gateway.networking.k8s.io/gateway-name: gw}}
spec: {nodeName: one, serviceAccountName: gw-selvedge-waypoint}
status: {podIPs: [{ip: 10.0.1.9}], phase: Running, conditions: [{type: Ready, status: 'True'}]}
";

fn question(to: &str, port: u16) -> Question {
    let party = |name| Party::Named(NamespacedName::new("shop", name));
    Question { from: party("client"), to: party(to), port: Some(port) }
}

fn request(model: &Model, line: &str) -> RequestExplanation {
    let (method, uri) = line.split_once(' ').unwrap();
    let head = Request::builder().method(method).uri(uri).body(()).unwrap().into_parts().0;
    explain_request(&model.read(), &question("cart", 80), &head, 0).unwrap()
}

#[test]
fn the_waypoint_on_the_way_is_named_and_the_client_is_who_is_judged() {
    let model = fixture::model(&format!("{WORLD}{WAYPOINT}"));
    let told = explain(&model.read(), &question("cart", 80)).unwrap();
    assert_eq!((told.verdict, told.through.as_deref()), (Verdict::Allow, Some("infra/gw")));
    let endpoint = &told.endpoints[0];
    assert_eq!(endpoint.source_identity.as_deref(), Some("spiffe://cluster.local/ns/shop/sa/client"));
    assert!(told.to_string().contains("\n  through waypoint infra/gw\n"), "{told}");
    for (line, verdict) in [("GET /x", Verdict::Allow), ("POST /x", Verdict::Deny)] {
        let told = request(&model, line);
        assert_eq!(told.through.as_deref(), Some("infra/gw"));
        assert_eq!(told.backends[0].connection.as_ref().unwrap().verdict, verdict, "{told}");
    }
    assert_eq!(explain(&model.read(), &question("plain", 80)).unwrap().through, None);
}

#[test]
fn where_a_route_leads_elsewhere_the_waypoint_is_judged_too() {
    let model = fixture::model(&format!("{WORLD}{WAYPOINT}"));
    let told = request(&model, "GET /plain");
    let connection = told.backends[0].connection.as_ref().unwrap();
    assert_eq!((connection.verdict, connection.reason.as_deref()), (Verdict::Deny, Some("policy:shop/client")));
    let endpoint = &connection.endpoints[0];
    assert_eq!(endpoint.source_identity.as_deref(), Some("spiffe://cluster.local/ns/infra/sa/gw-selvedge-waypoint"));
    assert!(endpoint.note.as_deref().is_some_and(|note| note.contains("judged too")), "{told}");
}

#[test]
fn nobody_comes_beside_a_waypoint_that_reads_requests_nor_through_one_that_is_not_there() {
    let with = fixture::model(&format!("{WORLD}{WAYPOINT}"));
    let beside = explain(&with.read(), &question("cart-1", 8080)).unwrap();
    assert_eq!((beside.verdict, beside.reason.as_deref()), (Verdict::Deny, Some("waypoint")), "{beside}");
    let open = explain(&with.read(), &question("cart-1", 8081)).unwrap();
    assert_eq!(open.verdict, Verdict::Allow, "{open}");
    let without = fixture::model(WORLD);
    let told = explain(&without.read(), &question("cart", 80)).unwrap();
    assert_eq!((told.verdict, told.reason.as_deref(), told.through), (Verdict::Deny, Some("waypoint"), None));
    assert_eq!(told.summary, "no pod of the waypoint infra/gw is ready");
    let told = request(&without, "GET /x");
    assert!(told.summary.contains("connections to the Service are refused: no pod of"), "{told}");
    assert_eq!(told.backends[0].connection.as_ref().unwrap().reason.as_deref(), Some("waypoint"));
}
