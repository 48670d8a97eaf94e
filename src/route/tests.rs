mod edits;
mod oracle;
mod precedence;
mod scopes;

use std::sync::Arc;

use http::request::Parts;
use http::{HeaderMap, Request};
use serde_json::{Value, json};

use super::*;
use crate::mesh::{NamespacedName, ServicePort, TargetPort};

/// An HTTPRoute on Service `shop/cart`, without notes.
pub(super) fn http_route(name: &str, rules: Value) -> Route {
    let route = route_of(RouteKind::Http, name, json!({"name": "cart"}), rules);
    assert_eq!(route.notes, []);
    route
}

pub(super) fn route_of(kind: RouteKind, name: &str, mut parent: Value, rules: Value) -> Route {
    let (namespace, name) = name.split_once('/').unwrap_or(("shop", name));
    parent["group"] = "".into();
    parent["kind"] = "Service".into();
    let route = json!({
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"parentRefs": [parent], "rules": rules},
    });
    decode(kind, &route).unwrap()
}

pub(super) fn table(routes: impl IntoIterator<Item = Route>) -> Table {
    let mut table = Table::default();
    routes.into_iter().for_each(|route| table.apply(Delta::Apply(Arc::new(route))));
    table
}

/// What rules port 80, named `http`, of Service `shop/cart` for clients of a namespace.
pub(super) fn cart(table: &Table, client: &str) -> Option<Arc<Routes>> {
    table.routes(&NamespacedName::new("shop", "cart"), &port(80, "http"), &client.into())
}

pub(super) fn port(number: u16, name: &str) -> ServicePort {
    ServicePort { name: name.into(), port: number, target: TargetPort::Number(number), app_protocol: None }
}

/// `GET /a?b=c`, with headers of the form `name: value`.
pub(super) fn request(line: &str, headers: &[&str]) -> Parts {
    let (method, uri) = line.split_once(' ').unwrap();
    let mut request = Request::builder().method(method).uri(uri);
    for header in headers {
        let (name, value) = header.split_once(": ").unwrap();
        request = request.header(name, value);
    }
    request.body(()).unwrap().into_parts().0
}

/// Which rule a request meets, as `route/index`, or the status it is answered with.
pub(super) fn met(routes: &Routes, head: &Parts) -> String {
    match routes.decide(head, 0) {
        Decision::Forward(forward) => format!("{}/{}", forward.route().name.name, forward.rule().index),
        Decision::Answer(answer) => answer.status.as_u16().to_string(),
    }
}

pub(super) fn answer(routes: &Routes, head: &Parts) -> Answer {
    match routes.decide(head, 0) {
        Decision::Answer(answer) => answer,
        Decision::Forward(forward) => panic!("it goes to {:?}", forward.target()),
    }
}

/// The request as it goes on.
pub(super) fn edited(routes: &Routes, mut head: Parts) -> Parts {
    match routes.decide(&head, 0) {
        Decision::Forward(forward) => forward.edit_request(&mut head),
        Decision::Answer(answer) => panic!("{answer:?}"),
    }
    head
}

pub(super) fn values<'a>(headers: &'a HeaderMap, name: &str) -> Vec<&'a str> {
    headers.get_all(name).iter().map(|value| value.to_str().unwrap()).collect()
}
