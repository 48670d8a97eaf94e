use http::Request;

use super::*;
use crate::mesh::NamespacedName;
use crate::policy::Verdict;
use crate::source::fixture;

const CLUSTER: &str = "
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
metadata: {name: outside, namespace: shop, annotations: {selvedge.dev/mesh: disabled}}
spec: {nodeName: one, serviceAccountName: client}
status: {podIPs: [{ip: 10.0.1.2}], phase: Running}
---
apiVersion: v1
kind: Pod
metadata: {name: cart, namespace: shop, labels: {app: cart}}
spec: {nodeName: two, serviceAccountName: cart}
status: {podIPs: [{ip: 10.0.2.1}], phase: Running, conditions: [{type: Ready, status: 'True'}]}
---
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop, annotations: {selvedge.dev/waypoint: node}}
spec: {clusterIP: 10.96.0.10, selector: {app: cart}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: new, namespace: shop}
spec: {clusterIP: 10.96.0.11, selector: {app: cart}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: r, namespace: shop}
spec:
  parentRefs: [{group: '', kind: Service, name: cart}]
  rules:
  - name: canary
    matches: [{path: {value: /api}}]
    filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /}}}]
    backendRefs:
    - {name: cart, port: 80, weight: 8}
    - {name: new, port: 80}
    - {kind: Bucket, name: old}
    - {name: cart, port: 80, weight: 0}
  - matches: [{path: {value: /moved}}]
    filters: [{type: RequestRedirect, requestRedirect: {hostname: new.example}}]
---
apiVersion: selvedge.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: all, namespace: shop}
spec:
  targetRefs: [{kind: Service, name: cart}]
  retry: {attempts: 1}
  timeouts: {request: 1s}
---
apiVersion: selvedge.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: canary, namespace: shop}
spec:
  targetRefs: [{group: gateway.networking.k8s.io, kind: HTTPRoute, name: r, sectionName: canary}]
  retry: {attempts: 2}
";

fn asked(from: &str, to: &str, line: &str) -> RequestExplanation {
    let model = fixture::model_of(fixture::load(CLUSTER));
    let to = to.parse().map_or_else(|_| Party::Named(NamespacedName::new("shop", to)), Party::Address);
    let question = Question { from: Party::Named(NamespacedName::new("shop", from)), to, port: Some(80) };
    let (method, uri) = line.split_once(' ').unwrap();
    let head = Request::builder().method(method).uri(uri).body(()).unwrap().into_parts().0;
    explain_request(&model.read(), &question, &head, 0).unwrap()
}

#[test]
fn a_request_is_told_its_rule_and_each_backend_with_its_share_and_verdict() {
    let told = asked("client", "10.96.0.10", "GET /api/items?a=b");
    assert_eq!(told.summary, "HTTPRoute shop/r, spec.rules[0] (canary), is met");
    let backends: Vec<_> = told.backends.iter().map(|one| (one.to.as_str(), one.weight, one.of)).collect();
    let wanted = [
        ("service shop/cart port 80", 8, 10),
        ("service shop/new port 80", 1, 10),
        ("nobody: it is no backend", 1, 10),
    ];
    assert_eq!(backends, wanted);
    assert_eq!(told.backends[0].request.as_deref(), Some("GET /items?a=b"));
    let connection = told.backends[1].connection.as_ref().unwrap();
    assert_eq!((connection.verdict, connection.endpoints[0].workload.as_deref()), (Verdict::Allow, Some("shop/cart")));
    assert_eq!(told.backends[2].answer.as_ref().unwrap().status, 500);
    let text = told.to_string();
    assert!(text.contains("8 of 10 go to service shop/cart port 80, as GET /items?a=b: allowed"), "{text}");
}

#[test]
fn what_is_answered_at_once_is_told() {
    let moved = asked("client", "10.96.0.10", "GET /moved/a");
    let answer = moved.answer.as_ref().unwrap();
    assert_eq!((answer.status, answer.location.as_deref()), (302, Some("http://new.example/moved/a")));
    assert!(moved.to_string().contains("is answered with 302, location http://new.example/moved/a"), "{moved}");
    let nothing = asked("client", "10.96.0.10", "GET /");
    assert_eq!((nothing.answer.unwrap().status, nothing.route), (404, None));
}

#[test]
fn where_no_route_has_a_say_it_is_told_why() {
    for (from, to, why) in [
        ("outside", "10.96.0.10", "the client's agent routes"),
        ("client", "10.96.0.11", "neither the Service nor its namespace says"),
        ("client", "10.0.2.1", "routes rule the ports of Services"),
    ] {
        let told = asked(from, to, "GET /api");
        assert!(told.summary.contains(why), "{}", told.summary);
        assert_eq!((told.backends.len(), told.backends[0].weight, told.backends[0].of), (1, 1, 1));
        assert_eq!(told.backends[0].connection.as_ref().unwrap().verdict, Verdict::Allow);
    }
}

#[test]
fn what_policies_say_about_traffic_is_named_with_where_it_comes_from() {
    let explanation = asked("client", "10.96.0.10", "GET /api/x");
    let told = |at: usize| {
        let fields = explanation.backends[at].traffic.iter();
        fields.map(|one| format!("{} {}", one.field, one.from)).collect::<Vec<_>>()
    };
    assert_eq!(told(0), ["timeouts.request TrafficPolicy shop/all", "retry TrafficPolicy shop/canary"]);
    assert_eq!(told(1), ["retry TrafficPolicy shop/canary"], "another Service");
    assert!(explanation.to_string().contains("    timeouts.request of TrafficPolicy shop/all"), "{explanation}");
}
