//! What policy says of requests: which field reads what, and what is thought of a connection before any has come.

use http::{HeaderMap, HeaderName, HeaderValue};

use super::*;

/// One request to `shop/cart`.
#[derive(Clone, Debug)]
pub(super) struct Ask {
    pub method: &'static str,
    pub host: String,
    pub path: String,
    pub headers: HeaderMap,
    pub principal: Option<Principal>,
}

impl Ask {
    pub fn get(path: &str) -> Self {
        Self { method: "GET", host: "cart.shop".into(), path: path.into(), headers: HeaderMap::new(), principal: None }
    }

    fn by(self, method: &'static str) -> Self {
        Self { method, ..self }
    }

    fn of(self, host: &str) -> Self {
        Self { host: host.into(), ..self }
    }

    pub fn with(mut self, name: &'static str, value: &'static str) -> Self {
        self.headers.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        self
    }

    pub fn from(self, claims: Value) -> Self {
        let text = |name: &str| claims[name].as_str().unwrap_or_default().into();
        let claims_of = claims.as_object().unwrap().clone();
        let principal = Principal { issuer: text("iss"), subject: text("sub"), claims: claims_of };
        Self { principal: Some(principal), ..self }
    }

    pub fn head(&self) -> RequestHead<'_> {
        RequestHead {
            method: self.method,
            host: &self.host,
            path: &self.path,
            headers: &self.headers,
            principal: self.principal.as_ref(),
        }
    }
}

fn rule(to: Value) -> Value {
    json!({ "to": [{ "operation": to }] })
}

fn when(key: &str, values: &[&str]) -> Value {
    json!({ "when": [{ "key": key, "values": values }] })
}

/// Whether the rule matches, as an ALLOW rule and as a DENY rule see it.
fn matched(rule: &Value, ask: &Ask) -> [bool; 2] {
    let cart = workload();
    let case = from("shop/web@10.0.0.1").read();
    ["ALLOW", "DENY"].map(|action| {
        let policy = authorization("shop", "p", json!({ "action": action, "rules": [rule] }));
        let decision = store(&[policy]).decide_request(&case.query(&cart), &ask.head());
        (decision.verdict == Verdict::Allow) == (action == "ALLOW")
    })
}

#[test]
fn every_field_of_a_request_matches_as_in_istio() {
    let table = [
        (rule(json!({ "methods": ["GET"] })), Ask::get("/"), true),
        (rule(json!({ "methods": ["PUT", "G*"] })), Ask::get("/"), true),
        (rule(json!({ "methods": ["PUT"] })), Ask::get("/"), false),
        (rule(json!({ "notMethods": ["GET"] })), Ask::get("/"), false),
        (rule(json!({ "notMethods": ["PUT"] })), Ask::get("/"), true),
        // Servers there are that take it for DELETE.
        (rule(json!({ "methods": ["DELETE"] })), Ask::get("/").by("delete"), true),
        (rule(json!({ "methods": ["get"] })), Ask::get("/"), true),
        (rule(json!({ "paths": ["/a"] })), Ask::get("/a"), true),
        (rule(json!({ "paths": ["/a"] })), Ask::get("/a/"), false),
        (rule(json!({ "paths": ["/A"] })), Ask::get("/a"), false),
        (rule(json!({ "paths": ["/a/*"] })), Ask::get("/a/b/c"), true),
        (rule(json!({ "paths": ["/a/*"] })), Ask::get("/a"), false),
        (rule(json!({ "paths": ["*.php"] })), Ask::get("/x/y.php"), true),
        (rule(json!({ "paths": ["*"] })), Ask::get("/"), true),
        (rule(json!({ "notPaths": ["/a", "/b*"] })), Ask::get("/bc"), false),
        (rule(json!({ "notPaths": ["/a", "/b*"] })), Ask::get("/c"), true),
        (rule(json!({ "hosts": ["cart.shop"] })), Ask::get("/"), true),
        (rule(json!({ "hosts": ["Cart.Shop"] })), Ask::get("/").of("CART.shop:80"), true),
        (rule(json!({ "hosts": ["cart.shop"] })), Ask::get("/").of("cart.shop.:80"), true),
        (rule(json!({ "hosts": ["cart.shop:80"] })), Ask::get("/").of("cart.shop.:80"), true),
        (rule(json!({ "hosts": ["cart.shop:80"] })), Ask::get("/").of("cart.shop:81"), false),
        (rule(json!({ "hosts": ["cart.shop:80"] })), Ask::get("/"), false),
        (rule(json!({ "hosts": ["*.shop"] })), Ask::get("/").of("cart.shop:80"), true),
        (rule(json!({ "hosts": ["cart.*"] })), Ask::get("/"), true),
        (rule(json!({ "hosts": ["[fd00::1]"] })), Ask::get("/").of("[FD00::1]:80"), true),
        (rule(json!({ "hosts": ["[fd00::1]"] })), Ask::get("/").of("[fd00::1]"), true),
        (rule(json!({ "hosts": ["*"] })), Ask::get("/").of(""), false),
        (rule(json!({ "notHosts": ["cart.shop"] })), Ask::get("/").of("other"), true),
        (rule(json!({ "methods": ["GET"], "paths": ["/a"] })), Ask::get("/b"), false),
        (when("request.headers[X-Team]", &["a", "b*"]), Ask::get("/").with("x-team", "bc"), true),
        (when("request.headers[x-team]", &["a"]), Ask::get("/").with("x-team", "A"), false),
        (when("request.headers[x-team]", &["a"]), Ask::get("/"), false),
        (when("request.headers[x-team]", &["*"]), Ask::get("/").with("x-team", ""), true),
        (when("request.headers[x-team]", &["*"]), Ask::get("/"), false),
        (when("request.headers[host]", &["cart.shop"]), Ask::get("/"), true),
        (when("remote.ip", &["10.0.0.0/8"]), Ask::get("/"), true),
        (when("remote.ip", &["11.0.0.0/8"]), Ask::get("/"), false),
        (json!({ "from": [{ "source": { "remoteIpBlocks": ["10.0.0.1"] } }] }), Ask::get("/"), true),
        (json!({ "from": [{ "source": { "notRemoteIpBlocks": ["10.0.0.1"] } }] }), Ask::get("/"), false),
        (
            json!({ "from": [{ "source": { "namespaces": ["shop"] } }], "to": [{ "operation": { "paths": ["/a"] } }] }),
            Ask::get("/a"),
            true,
        ),
        (
            json!({ "from": [{ "source": { "namespaces": ["bank"] } }], "to": [{ "operation": { "paths": ["/a"] } }] }),
            Ask::get("/a"),
            false,
        ),
    ];
    for (rule, ask, wanted) in table {
        assert_eq!(matched(&rule, &ask), [wanted; 2], "{rule} {ask:?}");
    }
}

#[test]
fn every_field_of_a_token_matches_as_in_istio() {
    let claims = json!({
        "iss": "https://id", "sub": "ann", "aud": ["shop", "bank"], "azp": "app", "scope": "read write",
        "groups": ["staff", "admin"], "realm": { "roles": ["r1"], "deep": { "x": "y" } }, "verified": true, "level": 3,
    });
    let someone = || Ask::get("/").from(claims.clone());
    let principals = |field: &str, values: &[&str]| json!({ "from": [{ "source": { field: values } }] });
    let table = [
        (principals("requestPrincipals", &["https://id/ann"]), someone(), true),
        (principals("requestPrincipals", &["https://id/*"]), someone(), true),
        (principals("requestPrincipals", &["*/ben"]), someone(), false),
        (principals("requestPrincipals", &["*"]), someone(), true),
        (principals("requestPrincipals", &["*"]), Ask::get("/"), false),
        (principals("requestPrincipals", &["*"]), Ask::get("/").from(json!({ "iss": "https://id" })), false),
        (principals("notRequestPrincipals", &["*"]), Ask::get("/"), true),
        (principals("notRequestPrincipals", &["*"]), someone(), false),
        (when("request.auth.principal", &["https://id/ann"]), someone(), true),
        (when("request.auth.audiences", &["bank"]), someone(), true),
        (when("request.auth.audiences", &["mill"]), someone(), false),
        (when("request.auth.presenter", &["app"]), someone(), true),
        (when("request.auth.claims[groups]", &["admin"]), someone(), true),
        (when("request.auth.claims[groups]", &["guest"]), someone(), false),
        (when("request.auth.claims[realm][roles]", &["r1"]), someone(), true),
        (when("request.auth.claims[realm][deep][x]", &["y"]), someone(), true),
        (when("request.auth.claims[realm][deep]", &["*"]), someone(), false),
        (when("request.auth.claims[scope]", &["write"]), someone(), true),
        (when("request.auth.claims[scope]", &["read write"]), someone(), true),
        (when("request.auth.claims[verified]", &["true"]), someone(), true),
        (when("request.auth.claims[level]", &["3"]), someone(), true),
        (when("request.auth.claims[none]", &["*"]), someone(), false),
        (when("request.auth.claims[groups]", &["*"]), Ask::get("/"), false),
    ];
    for (rule, ask, wanted) in table {
        assert_eq!(matched(&rule, &ask), [wanted; 2], "{rule} {ask:?}");
    }
}

/// Which of the two the application takes nobody knows.
#[test]
fn of_a_header_that_comes_twice_both_must_allow_and_either_denies() {
    let twice = Ask::get("/").with("x-team", "a").with("x-team", "b");
    assert_eq!(matched(&when("request.headers[x-team]", &["a"]), &twice), [false, true]);
    assert_eq!(matched(&when("request.headers[x-team]", &["a", "b"]), &twice), [true, true]);
    let not = |values: &[&str]| json!({ "when": [{ "key": "request.headers[x-team]", "notValues": values }] });
    assert_eq!(matched(&not(&["a"]), &twice), [false, true]);
    assert_eq!(matched(&not(&["c"]), &twice), [true, true]);
    assert_eq!(matched(&not(&["a", "b"]), &twice), [false, false]);
}

#[test]
fn a_connection_is_let_in_where_some_request_may_be() {
    let paths = rule(json!({ "paths": ["/a"] }));
    let of_shop =
        json!({ "from": [{ "source": { "namespaces": ["shop"] } }], "to": [{ "operation": { "paths": ["/a"] } }] });
    let all_of_shop = json!({ "from": [{ "source": { "namespaces": ["shop"] } }] });
    let allow = |rule: &Value| authorization("shop", "a", json!({ "rules": [rule] }));
    let deny = |rule: &Value| authorization("shop", "d", json!({ "action": "DENY", "rules": [rule] }));
    let (shop, bank) = ("shop/web@10.0.0.1", "bank/web@10.0.0.2");
    let table = [
        (vec![allow(&paths)], shop, true, false),
        (vec![allow(&of_shop)], shop, true, false),
        (vec![allow(&of_shop)], bank, false, false),
        (vec![deny(&paths)], shop, true, false),
        (vec![deny(&of_shop)], bank, true, true),
        (vec![deny(&of_shop), deny(&all_of_shop)], shop, false, false),
        (vec![deny(&paths), allow(&all_of_shop)], shop, true, false),
        (vec![deny(&paths), allow(&all_of_shop)], bank, false, false),
        (vec![authorization("shop", "x", json!({ "action": "AUDIT", "rules": [paths] }))], shop, true, true),
    ];
    for (policies, source, read, unread) in table {
        assert_eq!(from(source).read().allowed(&policies), read, "{source} {policies:?}");
        assert_eq!(from(source).allowed(&policies), unread, "{source} {policies:?}, where nobody reads requests");
    }
}

#[test]
fn what_stands_over_a_destination_says_whether_requests_are_read() {
    let paths = json!({ "rules": [{ "to": [{ "operation": { "paths": ["/a"] } }] }] });
    let mut dry = authorization("shop", "p", paths.clone());
    dry["metadata"]["annotations"] = json!({ "selvedge.dev/dry-run": "true" });
    let with = |fields: Value| {
        let mut spec = paths.clone();
        spec.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        authorization("shop", "p", spec)
    };
    let table = [
        (vec![], Reads::Nothing),
        (vec![authorization("shop", "p", json!({ "rules": [{}] }))], Reads::Nothing),
        (vec![with(json!({}))], Reads::ToDecide),
        (vec![with(json!({ "action": "DENY" }))], Reads::ToDecide),
        (vec![with(json!({ "action": "AUDIT" }))], Reads::ToObserve),
        (vec![dry.clone()], Reads::ToObserve),
        (vec![dry, authorization("shop", "q", paths.clone())], Reads::ToDecide),
        (vec![with(json!({ "selector": { "matchLabels": { "app": "web" } } }))], Reads::Nothing),
        (vec![with(json!({ "targetRefs": [{ "kind": "Service", "name": "cart" }] }))], Reads::ToDecide),
        (vec![with(json!({ "targetRefs": [{ "kind": "Service", "name": "web" }] }))], Reads::Nothing),
        (vec![authorization("bank", "p", paths.clone())], Reads::Nothing),
    ];
    for (policies, wanted) in table {
        let case = from("10.0.0.1").by("shop/cart");
        assert_eq!(store(&policies).reads(&case.query(&workload())), wanted, "{policies:?}");
    }
}

#[test]
fn what_is_observed_of_requests_is_observed_of_each_and_of_no_connection() {
    let rule = rule(json!({ "paths": ["/a"] }));
    let policies = [authorization("shop", "x", json!({ "action": "AUDIT", "rules": [rule] }))];
    let (cart, case, store) = (workload(), from("10.0.0.1").read(), store(&policies));
    assert!(store.decide(&case.query(&cart)).observed.is_empty());
    let observed = |path: &str| store.decide_request(&case.query(&cart), &Ask::get(path).head()).observed.len();
    assert_eq!((observed("/a"), observed("/b")), (1, 0));
}

#[test]
fn a_value_that_could_never_match_is_refused_with_its_cure() {
    let table = [
        (json!({ "paths": ["/a//b"] }), "paths[0]", "write \"/a/b\""),
        (json!({ "paths": ["/%61dmin"] }), "paths[0]", "write \"/admin\""),
        (json!({ "paths": ["/caf%c3%a9*"] }), "paths[0]", "write \"/caf%C3%A9\""),
        (json!({ "paths": ["/a/../b"] }), "paths[0]", "write \"/b\""),
        (json!({ "paths": ["/a\\b"] }), "paths[0]", "write \"/a/b\""),
        (json!({ "notPaths": ["/a%2fb"] }), "notPaths[0]", "encoded slash"),
        (json!({ "paths": ["admin"] }), "paths[0]", "begins with '/'"),
        (json!({ "paths": ["/a?b=c"] }), "paths[0]", "without its query"),
        (json!({ "paths": ["/a/*/b"] }), "paths[0]", "first or last"),
        (json!({ "hosts": ["http://a/"] }), "hosts[0]", "is no host"),
        (json!({ "methods": ["GET POST"] }), "methods[0]", "is no method"),
    ];
    for (operation, field, cure) in table {
        let policy = authorization("shop", "bad", json!({ "rules": [rule(operation.clone())] }));
        let error = decode(PolicyKind::AuthorizationPolicy, &policy).unwrap_err();
        assert_eq!(error.field, format!("spec.rules[0].to[0].operation.{field}"), "{error}");
        assert!(error.cause.contains(cure), "{error}");
    }
    for fine in ["/", "/a/", "/a/*", "/.well-known/*", "*.php", "*/admin", "/a%20b", "/pkg.Cart/*", "*"] {
        let policy = authorization("shop", "p", json!({ "rules": [rule(json!({ "paths": [fine] }))] }));
        assert!(decode(PolicyKind::AuthorizationPolicy, &policy).is_ok(), "{fine}");
    }
}
