use std::path::Path;

use http::Request;
use http::request::Parts;

use super::super::file;
use super::*;
use crate::mesh::{Destination, Waypoint};
use crate::model::Model;
use crate::route::{Decision, Forward, Routes, Target};
use crate::source::fixture;

/// A model of all that the page shows.
fn documented(page: &str) -> Model {
    let examples = fixture::examples(page);
    assert!(examples.len() >= 4, "only {} examples were found", examples.len());
    fixture::model(&examples.join("\n---\n"))
}

/// What rules an address for clients of namespace `web`, and whether its Service asks for that.
fn dialled(model: &Model, addr: &str) -> (Arc<Routes>, Waypoint) {
    let state = model.read();
    let Destination::Service(found) = state.mesh.destination(addr.parse().unwrap()) else { panic!("{addr}") };
    let routes = state.routes.routes(&found.service.name, &found.port, &"web".into()).unwrap();
    (routes, state.mesh.waypoint_of(&found.service).clone())
}

fn request(method: &str, uri: &str, headers: &[(&str, &str)]) -> Parts {
    let request = Request::builder().method(method).uri(uri);
    let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
    request.body(()).unwrap().into_parts().0
}

fn forward<'a>(routes: &'a Routes, head: &Parts, random: u64) -> Forward<'a> {
    match routes.decide(head, random) {
        Decision::Forward(forward) => forward,
        Decision::Answer(answer) => panic!("{answer:?}"),
    }
}

fn backend(routes: &Routes, head: &Parts, random: u64) -> String {
    match forward(routes, head, random).target() {
        Target::Backend(to) => to.service.name.to_string(),
        Target::Parent => "parent".to_owned(),
    }
}

#[test]
fn what_the_page_shows_is_read_and_rules_as_it_says() {
    let model = documented(PAGE);
    let (routes, waypoint) = dialled(&model, "10.96.0.10:80");
    assert_eq!(waypoint, Waypoint::Node);
    let plain = request("GET", "/", &[]);
    let new = (0..100).filter(|random| backend(&routes, &plain, *random) == "cart-v2").count();
    assert_eq!(new, 10, "one in ten");
    let tester = request("GET", "/", &[("x-tester", "true")]);
    assert!((0..100).all(|random| backend(&routes, &tester, random) == "cart-v2"));
    let Decision::Answer(moved) = routes.decide(&request("GET", "/basket/7", &[("host", "cart")]), 0) else { panic!() };
    assert_eq!((moved.status.as_u16(), &moved.headers["location"]), (308, &"http://cart/cart/7".parse().unwrap()));
    let mut api = request("POST", "/api/v1/items?dry-run=no", &[("host", "cart"), ("x-debug", "1")]);
    let chosen = forward(&routes, &api.clone(), 0);
    chosen.edit_request(&mut api);
    assert_eq!(api.uri, "/items?dry-run=no");
    assert_eq!(
        (&api.headers["host"], &api.headers["x-route"]),
        (&"cart.internal".parse().unwrap(), &"api".parse().unwrap())
    );
    assert!(!api.headers.contains_key("x-debug"));
    assert_eq!(chosen.rule().timeouts.request.unwrap().as_secs(), 10);
    let (grpc, _) = dialled(&model, "10.96.0.10:90");
    assert_eq!(backend(&grpc, &request("POST", "/shop.v1.Cart/Checkout", &[]), 0), "cart-v2");
    assert_eq!(backend(&grpc, &request("POST", "/shop.v1.Cart/List", &[]), 0), "cart");
}

#[test]
fn the_page_tells_every_reason() {
    for reason in ["NoMatchingParent", "NoWaypoint", "UnsupportedValue", "Conflicted", "InvalidKind", "BackendNotFound"]
    {
        assert!(PAGE.contains(&format!("`{reason}`")), "{reason}");
    }
}

#[test]
fn what_is_wrong_with_a_route_is_told_by_line_and_field() {
    let text = "apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: r, namespace: shop}
spec:
  parentRefs:
  - {group: '', kind: Service, name: cart}
  rules:
  - matches:
    - path: {type: Exactly, value: /a}
  - filters:
    - type: ExternalAuth
";
    let content = file(Path::new("a.yaml"), text.as_bytes());
    let told: Vec<_> = content.problems.iter().map(|one| (one.line, one.object.as_str(), one.field.as_str())).collect();
    let route = "HTTPRoute shop/r";
    assert_eq!(
        told,
        [(9, route, "spec.rules[0].matches[0].path.type"), (11, route, "spec.rules[1].filters[0].externalAuth")]
    );
    assert_eq!(content.objects.len(), 1, "the rest of it holds");
}

#[test]
fn a_route_that_nobody_asked_for_is_told_of() {
    let told = |annotations: &str, parent: &str, backend: &str| {
        let text = format!(
            "apiVersion: v1
kind: Service
metadata: {{name: cart, namespace: shop, annotations: {{{annotations}}}}}
spec: {{clusterIP: 10.96.0.10, ports: [{{port: 80}}]}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: r, namespace: shop}}
spec:
  parentRefs: [{{group: '', kind: Service, name: {parent}}}]
  rules: [{{backendRefs: [{{name: {backend}, port: 80}}]}}]
"
        );
        let problems = fixture::load(&text).problems;
        problems.iter().map(|one| format!("{} {} {}", one.line, one.field, one.cause)).collect::<Vec<_>>()
    };
    let node = "selvedge.dev/waypoint: node";
    assert_eq!(told(node, "cart", "cart"), Vec::<String>::new());
    let [unasked] = &told("", "cart", "cart")[..] else { panic!() };
    assert!(unasked.starts_with("8 spec.parentRefs[0] Nobody routes requests to Service shop/cart"), "{unasked}");
    let [nobody] = &told(node, "crat", "cart")[..] else { panic!() };
    assert_eq!(nobody, "8 spec.parentRefs[0] There is no Service shop/crat.");
    let [missing] = &told(node, "cart", "crat")[..] else { panic!() };
    assert_eq!(missing, "8 spec.rules There is no Service shop/crat; its share is answered with 500");
}

#[test]
fn a_route_in_another_version_is_refused_and_other_kinds_of_the_gateway_api_are_passed_over() {
    let of = |version: &str, kind: &str| {
        let text = format!("apiVersion: gateway.networking.k8s.io/{version}\nkind: {kind}\nmetadata: {{name: r}}\n");
        let content = file(Path::new("a.yaml"), text.as_bytes());
        (content.objects.len(), content.broken.len(), content.ignored)
    };
    assert_eq!(of("v1", "HTTPRoute"), (1, 0, 0));
    assert_eq!(of("v1", "GRPCRoute"), (1, 0, 0));
    assert_eq!(of("v1alpha2", "GRPCRoute"), (0, 1, 0));
    assert_eq!(of("v1", "GatewayClass"), (0, 0, 1));
}

const PAGE: &str = include_str!("../../../../docs/http-routes.md");
const POLICIES: &str = include_str!("../../../../docs/traffic-policy.md");

#[test]
fn every_field_of_the_page_on_traffic_is_in_force() {
    let model = documented(POLICIES);
    let state = model.read();
    let Destination::Service(cart) = state.mesh.destination("10.96.0.10:80".parse().unwrap()) else { panic!() };
    let routes = state.routes.routes(&cart.service.name, &cart.port, &"web".into()).unwrap();
    let (route, rule) = routes.meet(&request("GET", "/api/x", &[])).unwrap();
    let sources = state.traffic.sources(Some((&route, rule)), &cart.service.name);
    let told: Vec<_> = sources
        .iter()
        .map(|(field, from)| format!("{field} {}", from.as_ref().map_or("itself", |from| &from.name.name)))
        .collect();
    assert_eq!(
        told,
        [
            "timeouts.request cart-time",
            "timeouts.backendRequest cart-time",
            "retry cart-retry",
            "retryConstraint cart-retry",
            "sessionPersistence cart-session",
            "faultInjection cart-faults",
            "rateLimits cart-limits",
            "circuitBreaker cart-breaker",
            "outlierDetection cart-outliers",
            "loadBalancer cart-balance",
        ]
    );
    let web = crate::mesh::NamespacedName::new("shop", "web");
    let sources = state.traffic.sources(None, &web);
    assert_eq!(sources[0].1.as_ref().unwrap().to_string(), "XBackendTrafficPolicy shop/web");
}
