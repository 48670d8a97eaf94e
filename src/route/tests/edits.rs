//! What filters make of requests and answers.

use super::*;

fn routes(filters: Value) -> Arc<Routes> {
    routes_at("/", filters)
}

fn routes_at(prefix: &str, filters: Value) -> Arc<Routes> {
    let route = http_route("r", json!([{"matches": [{"path": {"value": prefix}}], "filters": filters}]));
    cart(&table([route]), "shop").unwrap()
}

fn response(headers: &[(&'static str, &'static str)]) -> http::response::Parts {
    let mut response = http::Response::builder();
    for (name, value) in headers {
        response = response.header(*name, *value);
    }
    response.body(()).unwrap().into_parts().0
}

#[test]
fn headers_are_set_added_and_removed() {
    let routes = routes(json!([
        {"type": "RequestHeaderModifier", "requestHeaderModifier": {
            "set": [{"name": "X-Set", "value": "new"}],
            "add": [{"name": "X-Add", "value": "more"}],
            "remove": ["X-Remove"],
        }},
        {"type": "ResponseHeaderModifier", "responseHeaderModifier": {
            "set": [{"name": "server", "value": "us"}], "remove": ["x-secret"],
        }},
    ]));
    let head = request("GET /", &["x-set: old", "x-set: older", "x-add: some", "x-remove: it", "x-keep: it"]);
    let head = edited(&routes, head);
    assert_eq!(values(&head.headers, "x-set"), ["new"]);
    assert_eq!(values(&head.headers, "x-add"), ["some", "more"]);
    assert_eq!(values(&head.headers, "x-remove"), Vec::<&str>::new());
    assert_eq!(values(&head.headers, "x-keep"), ["it"]);
    let Decision::Forward(forward) = routes.decide(&head, 0) else { panic!() };
    let mut answer = response(&[("server", "them"), ("x-secret", "1")]);
    forward.edit_response(&mut answer);
    assert_eq!(values(&answer.headers, "server"), ["us"]);
    assert!(!answer.headers.contains_key("x-secret"));
}

#[test]
fn a_backend_s_filters_come_after_the_rule_s_for_its_share_alone() {
    let set = |value: &str| json!([{"type": "RequestHeaderModifier", "requestHeaderModifier": {"set": [{"name": "a", "value": value}]}}]);
    let route = http_route(
        "r",
        json!([{
            "filters": set("rule"),
            "backendRefs": [{"name": "a", "port": 80, "filters": set("backend")}, {"name": "b", "port": 80}],
        }]),
    );
    let routes = cart(&table([route]), "shop").unwrap();
    for (random, wanted) in [(0, "backend"), (1, "rule")] {
        let mut head = request("GET /", &[]);
        let Decision::Forward(forward) = routes.decide(&head.clone(), random) else { panic!() };
        forward.edit_request(&mut head);
        assert_eq!(values(&head.headers, "a"), [wanted]);
    }
}

#[test]
fn the_host_is_rewritten_in_both_versions_of_http() {
    for routes in [
        routes(json!([{"type": "URLRewrite", "urlRewrite": {"hostname": "new.example"}}])),
        routes(json!([{"type": "RequestHeaderModifier", "requestHeaderModifier": {
            "set": [{"name": "Host", "value": "new.example"}],
        }}])),
    ] {
        let one = edited(&routes, request("GET /a?b", &["host: old:80"]));
        assert_eq!((values(&one.headers, "host"), one.uri.to_string()), (vec!["new.example"], "/a?b".to_owned()));
        let connect = edited(&routes, request("CONNECT old:80", &[]));
        assert_eq!(connect.uri.to_string(), "new.example");
        let two = edited(&routes, request("GET http://old:80/a?b", &[]));
        assert_eq!((values(&two.headers, "host"), two.uri.to_string()), (vec![], "http://new.example/a?b".to_owned()));
    }
}

#[test]
fn the_path_is_rewritten_and_the_query_stays() {
    for (prefix, kind, new, uri, wanted) in [
        ("/", "ReplaceFullPath", "/x/y", "/a/b?c=d", "/x/y?c=d"),
        ("/a", "ReplacePrefixMatch", "/x", "/a/b?c=d", "/x/b?c=d"),
        ("/a", "ReplacePrefixMatch", "/", "/a", "/"),
        ("/a", "ReplacePrefixMatch", "", "/a/b%20c", "/b%20c"),
        ("/a/", "ReplacePrefixMatch", "/x/", "http://cart/a/b", "http://cart/x/b"),
    ] {
        let field = if kind == "ReplaceFullPath" { "replaceFullPath" } else { "replacePrefixMatch" };
        let path = json!({"type": kind, field: new});
        let routes = routes_at(prefix, json!([{"type": "URLRewrite", "urlRewrite": {"path": path}}]));
        assert_eq!(edited(&routes, request(&format!("GET {uri}"), &[])).uri.to_string(), wanted, "{new} {uri}");
    }
}

/// HTTPRequestRedirectFilter, field by field.
#[test]
fn redirects_say_where_to_go() {
    for (redirect, line, host, status, wanted) in [
        (json!({}), "GET /a?b=c", "cart", 302, "http://cart/a?b=c"),
        (json!({"statusCode": 301}), "GET /a", "cart:80", 301, "http://cart/a"),
        (json!({"statusCode": 303}), "GET /a", "cart", 303, "http://cart/a"),
        (json!({"statusCode": 307}), "POST /a", "cart", 307, "http://cart/a"),
        (json!({"statusCode": 308}), "POST /a", "cart", 308, "http://cart/a"),
        (json!({"hostname": "new.example"}), "GET /a", "cart", 302, "http://new.example/a"),
        (json!({"scheme": "https"}), "GET /a", "cart:80", 302, "https://cart/a"),
        (json!({"scheme": "http"}), "GET /a", "cart:80", 302, "http://cart/a"),
        (json!({"scheme": "https", "port": 8443}), "GET /a", "cart", 302, "https://cart:8443/a"),
        (json!({"scheme": "https", "port": 443}), "GET /a", "cart", 302, "https://cart/a"),
        (json!({"scheme": "http", "port": 443}), "GET /a", "cart", 302, "http://cart:443/a"),
        (json!({"port": 8080}), "GET /a", "cart", 302, "http://cart:8080/a"),
        (
            json!({"path": {"type": "ReplaceFullPath", "replaceFullPath": "/x"}}),
            "GET /a/b?c",
            "cart",
            302,
            "http://cart/x?c",
        ),
        (
            json!({"path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/x"}}),
            "GET /a",
            "cart",
            302,
            "http://cart/x/a",
        ),
        (json!({}), "GET http://two/a", "", 302, "http://two/a"),
        (json!({}), "GET /a", "[fd00::1]:80", 302, "http://[fd00::1]/a"),
        (json!({"scheme": "https"}), "GET /a", "", 302, "/a"),
    ] {
        let routes = routes(json!([{"type": "RequestRedirect", "requestRedirect": redirect}]));
        let host = if host.is_empty() { vec![] } else { vec![format!("host: {host}")] };
        let answer = answer(&routes, &request(line, &host.iter().map(String::as_str).collect::<Vec<_>>()));
        assert_eq!((answer.status.as_u16(), answer.because), (status, Because::Redirect), "{redirect}");
        assert_eq!(values(&answer.headers, "location"), [wanted], "{redirect}");
        assert_eq!(answer.route.unwrap().name.to_string(), "shop/r");
    }
}

#[test]
fn a_redirect_without_a_scheme_stays_on_the_port_that_was_dialled() {
    let route = http_route("r", json!([{"filters": [{"type": "RequestRedirect", "requestRedirect": {}}]}]));
    let routes = table([route]).routes(&NamespacedName::new("shop", "cart"), &port(8080, ""), &"web".into()).unwrap();
    let answer = answer(&routes, &request("GET /", &["host: cart:8080"]));
    assert_eq!(values(&answer.headers, "location"), ["http://cart:8080/"]);
}

#[test]
fn a_filter_that_cannot_be_honoured_answers_500() {
    let rules = json!([{"filters": [{"type": "ExtensionRef"}], "backendRefs": [{"name": "a", "port": 80}]}]);
    let routes = cart(&table([route_of(RouteKind::Http, "r", json!({"name": "cart"}), rules)]), "shop").unwrap();
    let plain = answer(&routes, &request("GET /", &[]));
    assert_eq!((plain.status.as_u16(), plain.because), (500, Because::Filter));
    let grpc = answer(&routes, &request("POST /a.B/C", &["content-type: application/grpc"]));
    assert_eq!(grpc.grpc, Some(GrpcStatus::Unavailable));
}

#[test]
fn requests_are_mirrored_in_their_shares() {
    let mirror = |name: &str, percent: u32| {
        let backend = json!({"name": name, "port": 80});
        json!({"type": "RequestMirror", "requestMirror": {"backendRef": backend, "percent": percent}})
    };
    let routes = routes(json!([mirror("all", 100), mirror("none", 0), mirror("half", 50), mirror("other", 50)]));
    let head = request("GET /", &[]);
    let mut counts = std::collections::BTreeMap::new();
    for random in 0..10_000u64 {
        let Decision::Forward(forward) = routes.decide(&head, random) else { panic!() };
        let names: Vec<_> = forward.mirrors().map(|to| to.service.name.to_string()).collect();
        *counts.entry(names.join("+")).or_insert(0) += 1;
    }
    // Each is drawn by itself: a quarter of the requests goes to both halves.
    assert_eq!(counts.keys().collect::<Vec<_>>(), ["all", "all+half", "all+half+other", "all+other"]);
    assert!(counts.values().all(|count| (2_200..2_800).contains(count)), "{counts:?}");
}

#[test]
fn a_preflight_request_is_answered_by_the_rule_that_it_asks_about() {
    let route = http_route(
        "r",
        json!([
            {
                "matches": [{"method": "PUT"}],
                "filters": [{"type": "CORS", "cors": {
                    "allowOrigins": ["https://*.example.com"], "allowMethods": ["PUT", "GET"], "allowHeaders": ["X-A", "X-B"],
                    "allowCredentials": true, "maxAge": 60,
                }}],
            },
            {"matches": [{"method": "GET"}]},
        ]),
    );
    let routes = cart(&table([route]), "shop").unwrap();
    let ask = |origin: &str, method: &str| {
        let (origin, method) = (format!("origin: {origin}"), format!("access-control-request-method: {method}"));
        request("OPTIONS /", &[&origin, &method, "access-control-request-headers: x-a"])
    };
    let yes = answer(&routes, &ask("https://a.example.com", "PUT"));
    assert_eq!((yes.status.as_u16(), yes.because), (204, Because::Preflight));
    for (name, value) in [
        ("access-control-allow-origin", "https://a.example.com"),
        ("access-control-allow-credentials", "true"),
        ("access-control-allow-methods", "PUT, GET"),
        ("access-control-allow-headers", "x-a, x-b"),
        ("access-control-max-age", "60"),
    ] {
        assert_eq!(values(&yes.headers, name), [value]);
    }
    let no = answer(&routes, &ask("https://evil.com", "PUT"));
    assert_eq!((no.status.as_u16(), no.headers.len()), (204, 0));
    assert_eq!(met(&routes, &ask("https://a.example.com", "GET")), "404", "its rule says nothing of CORS");
}

#[test]
fn what_a_wildcard_allows_is_told_by_name_where_credentials_are() {
    let cors = |credentials: bool| {
        routes(json!([{"type": "CORS", "cors": {
            "allowOrigins": ["*"], "allowMethods": ["*"], "allowHeaders": ["*"], "exposeHeaders": ["*"],
            "allowCredentials": credentials,
        }}]))
    };
    for (credentials, exposed) in
        [(false, "*"), (true, "x-a, access-control-allow-origin, access-control-allow-credentials, vary")]
    {
        let routes = cors(credentials);
        let asked =
            ["origin: https://a", "access-control-request-method: PATCH", "access-control-request-headers: x, y"];
        let told = answer(&routes, &request("OPTIONS /", &asked)).headers;
        assert_eq!(values(&told, "access-control-allow-methods"), ["PATCH"]);
        assert_eq!(values(&told, "access-control-allow-headers"), ["x, y"]);
        assert_eq!(values(&told, "access-control-max-age"), ["5"]);
        let head = request("GET /", &["origin: https://a"]);
        let Decision::Forward(forward) = routes.decide(&head, 0) else { panic!() };
        let mut answer = response(&[("x-a", "1")]);
        forward.edit_response(&mut answer);
        assert_eq!(values(&answer.headers, "access-control-allow-origin"), ["https://a"]);
        assert_eq!(values(&answer.headers, "access-control-expose-headers"), [exposed]);
    }
}

#[test]
fn requests_of_no_browser_are_told_nothing_of_origins() {
    let routes = routes(json!([{"type": "CORS", "cors": {"allowOrigins": ["*"]}}]));
    let Decision::Forward(forward) = routes.decide(&request("GET /", &[]), 0).clone() else { panic!() };
    let mut answer = response(&[]);
    forward.edit_response(&mut answer);
    assert!(answer.headers.is_empty());
}
