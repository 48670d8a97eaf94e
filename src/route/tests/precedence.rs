//! Which rule is met, and to which backend its requests go.

use super::*;

fn rules(rules: Value) -> Arc<Routes> {
    cart(&table([http_route("r", rules)]), "shop").unwrap()
}

fn path(kind: &str, value: &str) -> Value {
    json!({"path": {"type": kind, "value": value}})
}

#[test]
fn a_request_must_meet_all_of_one_match() {
    let routes = rules(json!([
        {"matches": [
            {
                "path": {"type": "Exact", "value": "/a"},
                "method": "POST",
                "headers": [{"name": "X-One", "value": "1"}],
                "queryParams": [{"name": "q", "value": "a b"}],
            },
            {"path": {"type": "RegularExpression", "value": "/v[0-9]+/.*"}},
        ]},
    ]));
    for (line, headers, wanted) in [
        ("POST /a?q=a%20b", &["x-one: 1"][..], "r/0"),
        ("POST /a?z=1&q=a+b", &["x-one: 1"], "r/0"),
        ("POST /a?q=a+b&q=c", &["x-one: 1"], "r/0"),
        ("POST /a?q=c&q=a+b", &["x-one: 1"], "404"),
        ("GET /a?q=a+b", &["x-one: 1"], "404"),
        ("POST /a/?q=a+b", &["x-one: 1"], "404"),
        ("POST /a?q=a+b", &["x-one: 1", "x-one: 2"], "404"),
        ("POST /a?q=a+b", &[], "404"),
        ("POST /a", &["x-one: 1"], "404"),
        ("GET /v12/x", &[], "r/0"),
        ("GET /v/x", &[], "404"),
        ("GET /a/v12/x", &[], "404"),
    ] {
        assert_eq!(met(&routes, &request(line, headers)), wanted, "{line} {headers:?}");
    }
}

#[test]
fn several_values_of_a_header_are_matched_joined() {
    let routes = rules(json!([{"matches": [{"headers": [{"name": "a", "value": "1,2"}]}]}]));
    assert_eq!(met(&routes, &request("GET /", &["a: 1", "a: 2"])), "r/0");
    assert_eq!(met(&routes, &request("GET /", &["a: 1"])), "404");
}

#[test]
fn of_two_entries_for_one_header_the_first_counts() {
    let routes = rules(json!([
        {"matches": [{"headers": [{"name": "a", "value": "1"}, {"name": "A", "value": "2"}]}]},
    ]));
    assert_eq!(met(&routes, &request("GET /", &["a: 1"])), "r/0");
}

#[test]
fn the_host_is_a_header_in_http_2_too() {
    let routes = rules(json!([{"matches": [{"headers": [{"name": "host", "value": "cart.shop"}]}]}]));
    assert_eq!(met(&routes, &request("GET http://cart.shop/", &[])), "r/0");
    assert_eq!(met(&routes, &request("GET /", &["host: cart.shop"])), "r/0");
}

/// HTTPRouteRule, `matches`: "Precedence must be given to the Route that has: ...".
#[test]
fn the_more_specific_rule_is_met_wherever_it_stands() {
    let header = |name: &str| json!({"name": name, "value": "1"});
    for (less, more) in [
        (path("PathPrefix", "/a/b"), path("Exact", "/a/b")),
        (path("PathPrefix", "/a"), path("PathPrefix", "/a/b")),
        (path("PathPrefix", "/a"), path("PathPrefix", "/a/")),
        (path("PathPrefix", "/a/b"), path("RegularExpression", "/.*")),
        (path("RegularExpression", "/.*"), path("RegularExpression", "/a/.*")),
        (path("RegularExpression", "/a/b/*|/c"), path("Exact", "/a/b")),
        (json!({"method": "GET"}), path("PathPrefix", "/a")),
        (json!({}), json!({"method": "GET"})),
        (json!({"headers": [header("x"), header("y")]}), json!({"method": "GET"})),
        (json!({"headers": [header("x")]}), json!({"headers": [header("y"), header("x")]})),
        (json!({"queryParams": [header("q"), header("r")]}), json!({"headers": [header("x")]})),
        (json!({"queryParams": [header("q")]}), json!({"queryParams": [header("r"), header("q")]})),
    ] {
        for (rules_, wanted) in [([&less, &more], "r/1"), ([&more, &less], "r/0")] {
            let routes = rules(json!([{"matches": [rules_[0]]}, {"matches": [rules_[1]]}]));
            let head = request("GET /a/b?q=1&r=1", &["x: 1", "y: 1"]);
            assert_eq!(met(&routes, &head), wanted, "{less} {more}");
        }
    }
}

#[test]
fn between_equals_the_first_rule_is_met() {
    let routes = rules(json!([
        {"matches": [{"headers": [{"name": "a", "value": "1"}]}]},
        {"matches": [{"headers": [{"name": "b", "value": "1"}]}]},
    ]));
    assert_eq!(met(&routes, &request("GET /", &["a: 1", "b: 1"])), "r/0");
    assert_eq!(met(&routes, &request("GET /", &["b: 1"])), "r/1");
}

#[test]
fn between_equal_routes_the_oldest_is_met_and_then_the_first_by_name() {
    let aged = |name: &str, created: Option<i64>| Route { created, ..http_route(name, json!(null)) };
    for (routes, wanted) in [
        ([aged("a", Some(2)), aged("b", Some(1))], "b/0"),
        ([aged("a", Some(2)), aged("b", Some(2))], "a/0"),
        ([aged("b", None), aged("a", None)], "a/0"),
        ([aged("a", None), aged("b", Some(1))], "b/0"),
    ] {
        let routes = cart(&table(routes), "shop").unwrap();
        assert_eq!(met(&routes, &request("GET /", &[])), wanted);
    }
}

/// GRPCRouteRule, `matches`: characters of the service, then of the method, then the number of headers.
#[test]
fn of_grpc_rules_the_most_specific_one_is_met() {
    let rules = json!([
        {},
        {"matches": [{"headers": [{"name": "x", "value": "1"}]}]},
        {"matches": [{"method": {"method": "Get"}}]},
        {"matches": [{"method": {"service": "a.B"}}]},
        {"matches": [{"method": {"service": "a.B", "method": "Get"}}]},
        {"matches": [{"method": {"service": "a.B", "method": "Get"}, "headers": [{"name": "x", "value": "1"}]}]},
        {"matches": [{"method": {"type": "RegularExpression", "service": "a[.].+"}}]},
    ]);
    let routes = cart(&table([route_of(RouteKind::Grpc, "g", json!({"name": "cart"}), rules)]), "shop").unwrap();
    assert_eq!(routes.kind(), RouteKind::Grpc);
    for (path, headers, wanted) in [
        ("/a.B/Get", &["x: 1"][..], "g/6"),
        ("/c.B/Get", &["x: 1"], "g/2"),
        ("/c.B/Put", &["x: 1"], "g/1"),
        ("/c.B/Put", &[], "g/0"),
        ("/", &[], "g/0"),
        ("/a.B/Get/more", &[], "g/0"),
    ] {
        assert_eq!(met(&routes, &request(&format!("POST {path}"), headers)), wanted, "{path} {headers:?}");
    }
}

#[test]
fn a_grpc_rule_of_a_service_takes_its_methods_and_no_others() {
    let rules = json!([
        {"matches": [{"method": {"service": "a.B"}}]},
        {"matches": [{"method": {"service": "a.B", "method": "Get"}}]},
    ]);
    let routes = cart(&table([route_of(RouteKind::Grpc, "g", json!({"name": "cart"}), rules)]), "shop").unwrap();
    for (path, wanted) in [("/a.B/Get", "g/1"), ("/a.B/Put", "g/0"), ("/a.B", "404"), ("/a.Bc/Get", "404")] {
        assert_eq!(met(&routes, &request(&format!("POST {path}"), &[])), wanted, "{path}");
    }
}

#[test]
fn backends_get_their_shares() {
    let backend = |name: &str, weight: u32| json!({"name": name, "port": 80, "weight": weight});
    let routes = rules(json!([{"backendRefs": [backend("a", 1), backend("none", 0), backend("b", 3)]}]));
    let head = request("GET /", &[]);
    let target = |random| match routes.decide(&head, random) {
        Decision::Forward(forward) => match forward.target() {
            Target::Backend(to) => to.service.name.to_string(),
            Target::Parent => "parent".to_owned(),
        },
        Decision::Answer(answer) => answer.status.to_string(),
    };
    assert_eq!((0..8).map(target).collect::<Vec<_>>(), ["a", "b", "b", "b", "a", "b", "b", "b"]);
}

#[test]
fn a_backend_that_is_none_is_answered_with_500_in_its_share_and_so_are_backends_without_weight() {
    let routes = table([route_of(
        RouteKind::Http,
        "r",
        json!({"name": "cart"}),
        json!([{"backendRefs": [{"kind": "Bucket", "name": "a"}, {"name": "b", "port": 80}]}]),
    )]);
    let routes = cart(&routes, "shop").unwrap();
    let head = request("GET /", &[]);
    let answers: Vec<_> = (0..4).map(|random| matches!(routes.decide(&head, random), Decision::Answer(_))).collect();
    assert_eq!(answers, [true, false, true, false]);
    assert_eq!(answer(&routes, &head).because, Because::NoBackend);
    let routes = rules(json!([{"backendRefs": [{"name": "b", "port": 80, "weight": 0}]}]));
    assert_eq!(answer(&routes, &head).status, 500);
}

#[test]
fn a_rule_without_backends_goes_to_the_parent_itself() {
    let routes = rules(json!([{}]));
    let Decision::Forward(forward) = routes.decide(&request("GET /", &[]), 7).clone() else { panic!() };
    assert_eq!(forward.target(), Target::Parent);
}

#[test]
fn what_meets_no_rule_is_not_found_and_unimplemented_to_grpc() {
    let routes = rules(json!([{"matches": [path("Exact", "/a")]}]));
    let plain = answer(&routes, &request("GET /b", &[]));
    assert_eq!((plain.status.as_u16(), plain.because, plain.grpc, plain.route), (404, Because::NoMatch, None, None));
    for (kind, is_grpc) in [
        ("application/grpc", true),
        ("application/grpc+proto", true),
        ("Application/gRPC; x=y", true),
        ("application/grpc-web", false),
        ("application/json", false),
    ] {
        let answer = answer(&routes, &request("POST /a.B/C", &[&format!("content-type: {kind}")]));
        assert_eq!(answer.grpc.is_some(), is_grpc, "{kind}");
        let head = answer.into_head();
        assert_eq!(head.status.as_u16(), if is_grpc { 200 } else { 404 }, "{kind}");
        assert_eq!(values(&head.headers, "grpc-status"), if is_grpc { vec!["12"] } else { vec![] }, "{kind}");
    }
}

#[test]
fn five_thousand_routes_are_looked_up_like_one() {
    use crate::mesh::work;
    let of_path = |n: usize| json!([{"matches": [path("PathPrefix", &format!("/tenant-{n}/api"))]}]);
    let of_pattern = |n: usize| json!([{"matches": [path("RegularExpression", &format!("/tenant-{n}/api(/.*)?"))]}]);
    let of_header = |n: usize| json!([{"matches": [{"headers": [{"name": "tenant", "value": format!("t-{n}")}]}]}]);
    for rules in [&of_path as &dyn Fn(usize) -> Value, &of_pattern, &of_header] {
        let cost = |count: usize| {
            let table = table((0..count).map(|n| http_route(&format!("r-{n}"), rules(n))));
            let head = request("GET /tenant-0/api/x", &["tenant: t-0"]);
            let mut met_rule = String::new();
            let took = work::of(|| met_rule = met(&cart(&table, "shop").unwrap(), &head));
            assert_eq!(met_rule, "r-0/0");
            took
        };
        let (few, many) = (cost(10), cost(5_000));
        assert!(many <= few + 8, "{few} steps with ten routes, {many} with five thousand");
    }
}

#[test]
fn a_route_applied_costs_the_same_among_five_thousand() {
    use crate::mesh::work;
    let route = |n: usize| http_route(&format!("r-{n}"), json!([{"matches": [path("PathPrefix", &format!("/{n}"))]}]));
    let cost = |count: usize| {
        let mut table = table((0..count).map(route));
        let changed = Arc::new(Route { created: Some(1), ..route(0) });
        work::of(|| table.apply(Delta::Apply(changed)))
    };
    let (few, many) = (cost(10), cost(5_000));
    assert!(many <= few * 4 + 200, "{few} steps among ten routes, {many} among five thousand");
}
