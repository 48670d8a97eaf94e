//! Which routes rule which Service port for whom.

use super::*;

fn named(name: &str, parent: Value) -> Route {
    route_of(RouteKind::Http, name, parent, json!(null))
}

fn met_at(table: &Table, service: &str, port: ServicePort, client: &str) -> Option<String> {
    let routes = table.routes(&NamespacedName::new("shop", service), &port, &client.into())?;
    Some(met(&routes, &request("GET /", &[])))
}

#[test]
fn a_consumer_s_routes_replace_the_producer_s_for_its_own_clients() {
    let table = table([
        named("shop/producer", json!({"name": "cart"})),
        named("web/consumer", json!({"name": "cart", "namespace": "shop"})),
        named("shop/other", json!({"name": "other"})),
    ]);
    for (service, client, wanted) in [
        ("cart", "shop", Some("producer/0")),
        ("cart", "web", Some("consumer/0")),
        ("cart", "third", Some("producer/0")),
        ("other", "web", Some("other/0")),
        ("none", "web", None),
    ] {
        assert_eq!(met_at(&table, service, port(80, "http"), client).as_deref(), wanted, "{service} {client}");
    }
}

#[test]
fn a_third_namespace_rules_its_own_clients_alone() {
    let table = table([named("third/r", json!({"name": "cart", "namespace": "shop"}))]);
    assert_eq!(met_at(&table, "cart", port(80, ""), "third").as_deref(), Some("r/0"));
    for client in ["shop", "web"] {
        assert_eq!(met_at(&table, "cart", port(80, ""), client), None, "{client}");
    }
}

#[test]
fn a_route_rules_the_ports_that_it_names() {
    for (parent, ports) in [
        (json!({"name": "cart"}), [true, true, true]),
        (json!({"name": "cart", "port": 80}), [true, false, false]),
        (json!({"name": "cart", "sectionName": "admin"}), [false, true, false]),
        (json!({"name": "cart", "port": 81, "sectionName": "admin"}), [false, true, false]),
        (json!({"name": "cart", "port": 80, "sectionName": "admin"}), [false, false, false]),
    ] {
        let table = table([named("r", parent.clone())]);
        let met = [port(80, "http"), port(81, "admin"), port(82, "")]
            .map(|port| met_at(&table, "cart", port, "web").is_some());
        assert_eq!(met, ports, "{parent}");
    }
}

#[test]
fn a_consumer_s_route_of_one_port_leaves_the_others_to_the_producer() {
    let table = table([
        named("shop/producer", json!({"name": "cart"})),
        named("web/consumer", json!({"name": "cart", "namespace": "shop", "port": 80})),
    ]);
    assert_eq!(met_at(&table, "cart", port(80, "a"), "web").as_deref(), Some("consumer/0"));
    assert_eq!(met_at(&table, "cart", port(81, "b"), "web").as_deref(), Some("producer/0"));
}

#[test]
fn routes_of_all_ports_and_of_one_are_weighed_together() {
    let on_port = json!({"name": "cart", "port": 80});
    let long = json!([{"matches": [{"path": {"value": "/a/b"}}]}]);
    let table = table([
        route_of(RouteKind::Http, "one", on_port, json!([{"matches": [{"path": {"value": "/a"}}]}])),
        route_of(RouteKind::Http, "all", json!({"name": "cart"}), long),
    ]);
    let routes = cart(&table, "web").unwrap();
    assert_eq!(met(&routes, &request("GET /a/b", &[])), "all/0");
    assert_eq!(met(&routes, &request("GET /a/c", &[])), "one/0");
}

#[test]
fn grpc_routes_rule_before_http_routes_port_by_port() {
    let table = table([
        named("h", json!({"name": "cart"})),
        route_of(RouteKind::Grpc, "g", json!({"name": "cart", "port": 81}), json!(null)),
    ]);
    assert_eq!(met_at(&table, "cart", port(80, "a"), "web").as_deref(), Some("h/0"));
    assert_eq!(met_at(&table, "cart", port(81, "b"), "web").as_deref(), Some("g/0"));
}

#[test]
fn a_route_whose_rules_are_all_dropped_rules_nothing() {
    let dropped = route_of(RouteKind::Http, "r", json!({"name": "cart"}), json!([{"matches": [{"method": "BREW"}]}]));
    assert_eq!(dropped.notes.len(), 1);
    assert!(cart(&table([dropped]), "shop").is_none());
}

#[test]
fn what_goes_is_gone() {
    let mut table = table([named("a", json!({"name": "cart"})), named("b", json!({"name": "cart"}))]);
    table.apply(Delta::Delete(RouteRef { kind: RouteKind::Http, name: NamespacedName::new("shop", "a") }));
    assert_eq!(met_at(&table, "cart", port(80, ""), "web").as_deref(), Some("b/0"));
    table.apply(Delta::Apply(Arc::new(named("b", json!({"name": "other"})))));
    assert_eq!(met_at(&table, "cart", port(80, ""), "web"), None);
    assert_eq!(met_at(&table, "other", port(80, ""), "web").as_deref(), Some("b/0"));
    assert_eq!(table.all().count(), 1);
}
