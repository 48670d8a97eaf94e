//! What cannot be enforced fails closed, and what is malformed is refused by field.

use super::*;

#[test]
fn what_cannot_be_enforced_allows_nothing_and_denies_as_if_it_were_not_there() {
    // Rules that match the connection, but for one part that cannot be enforced.
    let unknown = [
        (json!({ "to": [{ "operation": { "port": ["80"] } }] }), "spec.rules[0].to[0].operation.port"),
        (json!({ "to": [{ "operations": { "ports": ["80"] } }] }), "spec.rules[0].to[0].operations"),
        (json!({ "from": [{ "source": { "principal": ["a"] } }] }), "spec.rules[0].from[0].source.principal"),
        (json!({ "form": [{ "source": { "namespaces": ["x"] } }] }), "spec.rules[0].form"),
        (json!({ "when": [{ "key": "source.ips", "notValues": ["a"] }] }), "spec.rules[0].when[0].key"),
        (json!({ "when": [{ "key": "source.ip", "value": ["a"] }] }), "spec.rules[0].when[0].value"),
        (json!({ "when": [{ "key": "connection.sni", "values": ["a"] }] }), "spec.rules[0].when[0].key"),
        (json!({ "when": [{ "key": "request.headers[]", "values": ["a"] }] }), "spec.rules[0].when[0].key"),
        (json!({ "when": [{ "key": "request.headers[:path]", "values": ["a"] }] }), "spec.rules[0].when[0].key"),
        (json!({ "when": [{ "key": "request.auth.claims[]", "values": ["a"] }] }), "spec.rules[0].when[0].key"),
        (json!({ "when": [{ "key": "request.auth.claims[a]b", "values": ["a"] }] }), "spec.rules[0].when[0].key"),
        (json!({ "when": [{ "key": "request.path", "values": ["/a"] }] }), "spec.rules[0].when[0].key"),
    ];
    // What speaks of requests can be told only where somebody reads them.
    let of_requests = [
        json!({ "to": [{ "operation": { "methods": ["GET"] } }] }),
        json!({ "to": [{ "operation": { "notPaths": ["/a"] } }] }),
        json!({ "to": [{ "operation": { "hosts": ["a"], "ports": ["8080"] } }] }),
        json!({ "from": [{ "source": { "requestPrincipals": ["a"] } }] }),
        json!({ "from": [{ "source": { "notRemoteIpBlocks": ["1.1.1.1"] } }] }),
        json!({ "when": [{ "key": "request.headers[x]", "values": ["a"] }] }),
    ];
    let known = of_requests.map(|rule| (rule, ""));
    for (rule, field) in unknown.into_iter().chain(known) {
        for (action, allowed) in [("ALLOW", false), ("DENY", false), ("AUDIT", true)] {
            let policies = [authorization("shop", "p", json!({ "action": action, "rules": [rule.clone()] }))];
            let decision = from("shop/web@10.0.0.1").decide(&policies);
            assert_eq!(decision.verdict == Verdict::Allow, allowed, "{action} {rule}");
            assert!(decision.observed.is_empty(), "{action} {rule}");
            let store = store(&policies);
            let fields: Vec<&str> = store.problems().map(|problem| problem.field.as_str()).collect();
            assert_eq!(fields, [field].into_iter().filter(|field| !field.is_empty()).collect::<Vec<_>>(), "{rule}");
        }
    }
}

#[test]
fn a_deny_rule_keeps_the_parts_that_can_be_enforced() {
    let rule = json!({ "to": [{ "operation": { "methods": ["GET"], "ports": ["80"] } }] });
    let policies = [authorization("shop", "p", json!({ "action": "DENY", "rules": [rule] }))];
    assert!(from("10.0.0.1").allowed(&policies));
    assert!(!from("10.0.0.1").to("10.0.0.9:80").allowed(&policies));
}

#[test]
fn an_allow_rule_that_can_be_enforced_holds_beside_one_that_cannot() {
    let rules = json!([{ "to": [{ "operation": { "methods": ["GET"] } }] }, { "to": [{ "operation": { "ports": ["8080"] } }] }]);
    assert!(from("10.0.0.1").allowed(&[authorization("shop", "p", json!({ "rules": rules }))]));
}

#[test]
fn an_unknown_field_beside_the_rules_closes_the_policy() {
    let table = [
        (json!({ "selectr": { "matchLabels": { "app": "web" } }, "rules": [{}] }), false),
        (json!({ "selector": { "matchLabel": { "app": "web" } }, "rules": [{}] }), false),
        (json!({ "selector": { "matchLabels": { "app": "web" }, "x": 1 }, "rules": [{}] }), true),
        (json!({ "action": "DENY", "selectr": { "matchLabels": { "app": "web" } }, "rules": [{}] }), false),
        (json!({ "action": "DENY", "rule": [{ "to": [{ "operation": { "ports": ["80"] } }] }] }), false),
        (json!({ "acton": "DENY", "rules": [{}] }), false),
        (json!({ "action": "AUDIT", "x": 1, "rules": [{}] }), true),
        (json!({ "action": "CUSTOM", "provider": { "nam": "x" }, "rules": [{}] }), false),
        (json!({ "action": "CUSTOM", "rules": [{}] }), false),
        (
            json!({ "action": "DENY", "rules": [{}], "targetRefs": [{ "kind": "Gateway", "group": "x", "name": "g" }] }),
            false,
        ),
        (json!({ "rules": [{}], "targetRefs": [{ "kind": "Gateway", "group": "x", "name": "g" }] }), false),
    ];
    for (spec, allowed) in table {
        let policies = [authorization("shop", "p", spec.clone())];
        assert_eq!(from("shop/web@10.0.0.1").allowed(&policies), allowed, "{spec}");
        assert!(store(&policies).problems().next().is_some(), "{spec}");
    }
    let mut policy = authorization("shop", "p", json!({ "rules": [{}] }));
    policy["sepc"] = json!({});
    assert!(!from("shop/web@10.0.0.1").allowed(&[policy]));
}

#[test]
fn what_is_malformed_is_refused_by_field_and_denies_its_scope() {
    let from_ = |source: Value| json!({ "rules": [{ "from": [{ "source": source }] }] });
    let to_ = |operation: Value| json!({ "rules": [{ "to": [{ "operation": operation }] }] });
    let when = |condition: Value| json!({ "rules": [{ "when": [condition] }] });
    let table = [
        (json!({ "action": "allow" }), "spec.action"),
        (json!({ "action": 1 }), "spec.action"),
        (json!({ "action": null }), "spec.action"),
        (json!({ "rules": {} }), "spec.rules"),
        (json!({ "rules": null }), "spec.rules"),
        (json!({ "rules": [null] }), "spec.rules[0]"),
        (json!({ "rules": [{ "from": [] }] }), "spec.rules[0].from"),
        (json!({ "rules": [{ "from": null }] }), "spec.rules[0].from"),
        (json!({ "rules": [{ "from": [{}] }] }), "spec.rules[0].from[0]"),
        (from_(json!({})), "spec.rules[0].from[0].source"),
        (from_(json!(null)), "spec.rules[0].from[0].source"),
        (from_(json!({ "principals": [] })), "spec.rules[0].from[0].source.principals"),
        (from_(json!({ "principals": "a" })), "spec.rules[0].from[0].source.principals"),
        (from_(json!({ "principals": [""] })), "spec.rules[0].from[0].source.principals[0]"),
        (from_(json!({ "principals": ["a*b"] })), "spec.rules[0].from[0].source.principals[0]"),
        (from_(json!({ "principals": ["*a*"] })), "spec.rules[0].from[0].source.principals[0]"),
        (from_(json!({ "principals": ["spiffe://a/ns/b/sa/c"] })), "spec.rules[0].from[0].source.principals[0]"),
        (from_(json!({ "serviceAccounts": ["a/b/c"] })), "spec.rules[0].from[0].source.serviceAccounts[0]"),
        (from_(json!({ "serviceAccounts": ["a/*"] })), "spec.rules[0].from[0].source.serviceAccounts[0]"),
        (from_(json!({ "serviceAccounts": ["/a"] })), "spec.rules[0].from[0].source.serviceAccounts[0]"),
        (from_(json!({ "ipBlocks": ["10.0.0.0/33"] })), "spec.rules[0].from[0].source.ipBlocks[0]"),
        (from_(json!({ "notIpBlocks": ["a"] })), "spec.rules[0].from[0].source.notIpBlocks[0]"),
        (json!({ "rules": [{ "to": [] }] }), "spec.rules[0].to"),
        (to_(json!({})), "spec.rules[0].to[0].operation"),
        (to_(json!({ "ports": ["0"] })), "spec.rules[0].to[0].operation.ports[0]"),
        (to_(json!({ "ports": ["65536"] })), "spec.rules[0].to[0].operation.ports[0]"),
        (to_(json!({ "ports": ["http"] })), "spec.rules[0].to[0].operation.ports[0]"),
        (to_(json!({ "ports": ["+80"] })), "spec.rules[0].to[0].operation.ports[0]"),
        (to_(json!({ "ports": [8080] })), "spec.rules[0].to[0].operation.ports[0]"),
        (to_(json!({ "methods": [] })), "spec.rules[0].to[0].operation.methods"),
        (when(json!({ "key": "source.ip" })), "spec.rules[0].when[0]"),
        (when(json!({ "values": ["a"] })), "spec.rules[0].when[0].key"),
        (when(json!({ "key": "source.ip", "values": [] })), "spec.rules[0].when[0].values"),
        (when(json!({ "key": "source.ip", "values": ["x"] })), "spec.rules[0].when[0].values[0]"),
        (when(json!({ "key": "destination.port", "notValues": ["x"] })), "spec.rules[0].when[0].notValues[0]"),
        (json!({ "selector": [] }), "spec.selector"),
        (json!({ "selector": { "matchLabels": { "app": 1 } } }), "spec.selector.matchLabels[app]"),
        (json!({ "targetRefs": [] }), "spec.targetRefs"),
        (json!({ "targetRefs": [{ "kind": "Service" }] }), "spec.targetRefs[0].name"),
        (
            json!({ "targetRefs": [{ "kind": "Service", "name": "a", "namespace": "b" }] }),
            "spec.targetRefs[0].namespace",
        ),
        (json!({ "selector": {}, "targetRefs": [{ "kind": "Service", "name": "a" }] }), "spec.targetRefs"),
    ];
    for (spec, field) in table {
        let policy = authorization("shop", "bad", spec);
        let error = decode(PolicyKind::AuthorizationPolicy, &policy).unwrap_err();
        assert_eq!(error.field, field, "{error}");
        let decision = from("shop/web@10.0.0.1").decide(std::slice::from_ref(&policy));
        assert_eq!(reason(&decision), "policy:shop/bad", "{policy}");
        assert!(from("10.0.0.1").allowed_to(&workload_of("bank", "teller", &[]), &[policy]));
    }
}

#[test]
fn a_malformed_policy_denies_what_can_be_read_of_its_scope() {
    let cart = workload();
    let other = workload_of("bank", "teller", &[]);
    let bad = |namespace: &str, mut spec: Value| {
        spec["rules"] = "x".into();
        authorization(namespace, "bad", spec)
    };
    let table = [
        (bad("shop", json!({})), false, true),
        (bad(ROOT_NAMESPACE, json!({})), false, false),
        (bad("shop", json!({ "selector": { "matchLabels": { "app": "web" } } })), true, true),
        (bad("shop", json!({ "selector": { "matchLabels": { "app": "cart" } } })), false, true),
        (bad("shop", json!({ "targetRefs": [{ "kind": "Service", "name": "web" }] })), true, true),
        (bad("shop", json!({ "targetRefs": [{ "kind": "Service", "name": "cart" }] })), false, true),
        (bad("shop", json!({ "selector": 1 })), false, true),
        (bad("shop", json!({ "action": "AUDIT" })), true, true),
    ];
    for (policy, to_cart, to_other) in table {
        let case = from("shop/web@10.0.0.1").by("shop/cart");
        assert_eq!(case.allowed_to(&cart, std::slice::from_ref(&policy)), to_cart, "{policy}");
        assert_eq!(from("shop/web@10.0.0.1").allowed_to(&other, std::slice::from_ref(&policy)), to_other, "{policy}");
        assert!(store(&[policy]).problems().next().unwrap().cause.contains("malformed"));
    }
}

#[test]
fn every_field_of_the_definition_is_known_to_the_decoder() {
    let file =
        crate::api::crds().unwrap().into_iter().find(|file| file.name.contains("authorizationpolicies")).unwrap();
    let crd: Value = serde_yaml::from_str(&file.yaml).unwrap();
    let spec = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"];
    let rule = &spec["rules"]["items"]["properties"];
    for (list, part) in [("from", "source"), ("to", "operation")] {
        let fields = rule[list]["items"]["properties"][part]["properties"].as_object().unwrap();
        assert!(fields.len() >= 8);
        for field in fields.keys() {
            let value = match field.to_lowercase() {
                name if name.ends_with("ports") => "80",
                name if name.ends_with("blocks") => "10.0.0.0/8",
                name if name.ends_with("paths") => "/a",
                _ => "a",
            };
            let rules = json!([{ list: [{ part: { field: [value] } }] }]);
            let read = decode(PolicyKind::AuthorizationPolicy, &authorization("shop", "p", json!({ "rules": rules })));
            let notes = read.unwrap().unenforced().to_vec();
            assert!(notes.iter().all(|note| !note.cause.contains("not known")), "{part}.{field}: {notes:?}");
        }
    }
}
