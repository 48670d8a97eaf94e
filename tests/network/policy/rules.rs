//! What policies say, case by case.

use selvedge_lab::authorization;
use serde_json::{Value, json};

use super::{Case, Shop, peer};

pub fn sources(shop: &Shop) -> Vec<Case> {
    let web = shop.callers[0].ip().to_string();
    let from = |what, source: Value, allowed| allow(what, json!({"rules": [{"from": [{"source": source}]}]}), allowed);
    vec![
        Case { what: "no policy", policies: vec![], allowed: "web teller stranger" },
        from("an exact principal", json!({"principals": ["cluster.local/ns/shop/sa/web"]}), "web"),
        from("a principal's prefix", json!({"principals": ["cluster.local/ns/bank/*"]}), "teller"),
        from("a principal's suffix", json!({"principals": ["*/sa/web"]}), "web"),
        from("any principal", json!({"principals": ["*"]}), "web teller"),
        from("not a principal", json!({"notPrincipals": ["cluster.local/ns/shop/sa/web"]}), "teller stranger"),
        from("a namespace", json!({"namespaces": ["bank"]}), "teller"),
        from("not a namespace", json!({"notNamespaces": ["ba*"]}), "web stranger"),
        from("service accounts", json!({"serviceAccounts": ["web", "bank/teller"]}), "web teller"),
        from("not a service account", json!({"notServiceAccounts": ["bank/teller"]}), "web stranger"),
        from("an address", json!({"ipBlocks": [web]}), "web"),
        from("a range", json!({"ipBlocks": ["10.244.0.0/16"]}), "web teller stranger"),
        from("not an address", json!({"notIpBlocks": [format!("{web}/32")]}), "teller stranger"),
        from("two fields of one source", json!({"namespaces": ["*"], "notNamespaces": ["bank"]}), "web"),
    ]
}

pub fn operations_and_conditions(shop: &Shop) -> Vec<Case> {
    let (web, cart) = (shop.callers[0].ip().to_string(), shop.cart.ip().to_string());
    let when = |what, key: &str, field: &str, value: &str, allowed| {
        allow(what, json!({"rules": [{"when": [{"key": key, field: [value]}]}]}), allowed)
    };
    let to =
        |what, operation: Value, allowed| allow(what, json!({"rules": [{"to": [{"operation": operation}]}]}), allowed);
    vec![
        to("a port", json!({"ports": ["8080"]}), "web:8080 teller:8080 stranger:8080"),
        to("not a port", json!({"notPorts": ["8080"]}), "web:9090 teller:9090 stranger:9090"),
        when("source.ip", "source.ip", "values", &web, "web"),
        when("not source.ip", "source.ip", "notValues", &web, "teller stranger"),
        when("source.namespace", "source.namespace", "values", "b*", "teller"),
        when("not source.namespace", "source.namespace", "notValues", "bank", "web stranger"),
        when("source.principal", "source.principal", "values", "*", "web teller"),
        when("not source.principal", "source.principal", "notValues", "*", "stranger"),
        when("destination.ip", "destination.ip", "values", &cart, "web teller stranger"),
        when("not destination.ip", "destination.ip", "notValues", &cart, ""),
        when("destination.port", "destination.port", "values", "9090", "web:9090 teller:9090 stranger:9090"),
        allow(
            "from, to and when together",
            json!({"rules": [{
                "from": [{"source": {"namespaces": ["shop"]}}, {"source": {"namespaces": ["bank"]}}],
                "to": [{"operation": {"ports": ["8080"]}}],
                "when": [{"key": "source.namespace", "notValues": ["bank"]}],
            }]}),
            "web:8080",
        ),
    ]
}

pub fn actions(_shop: &Shop) -> Vec<Case> {
    let bank = || json!({"rules": [{"from": [{"source": {"namespaces": ["bank"]}}]}]});
    let dry = |mut policy: Value| {
        policy["metadata"]["annotations"] = json!({"selvedge.dev/dry-run": "true"});
        policy
    };
    vec![
        one("DENY", deny(bank()), "web stranger"),
        Case {
            what: "DENY and ALLOW",
            policies: vec![deny(bank()), authorization("shop/allow", json!({"rules": [{}]}))],
            allowed: "web stranger",
        },
        Case {
            what: "two ALLOW",
            policies: vec![
                authorization("shop/bank", bank()),
                authorization("shop/admin", json!({"rules": [{"to": [{"operation": {"ports": ["9090"]}}]}]})),
            ],
            allowed: "web:9090 teller stranger:9090",
        },
        allow("ALLOW without a rule", json!({}), ""),
        one("DENY without a rule", deny(json!({})), "web teller stranger"),
        one("DENY of everything", deny(json!({"rules": [{}]})), ""),
        one("AUDIT", authorization("shop/audit", with(json!({"action": "AUDIT"}), bank())), "web teller stranger"),
        one("a dry run of DENY", dry(deny(bank())), "web teller stranger"),
        one("a dry run of ALLOW", dry(authorization("shop/allow", bank())), "web teller stranger"),
        one("CUSTOM", authorization("shop/ask", with(json!({"action": "CUSTOM"}), bank())), "web stranger"),
    ]
}

pub fn scopes(_shop: &Shop) -> Vec<Case> {
    let selector = |value: &str| json!({"selector": {"matchLabels": {"app": value}}});
    let target = json!({"targetRefs": [{"kind": "Service", "name": "cart"}]});
    vec![
        allow("its own label", selector("cart"), ""),
        allow("another label", selector("other"), "web teller stranger"),
        one("another namespace", authorization("bank/none", json!({})), "web teller stranger"),
        one("the root namespace", authorization("selvedge-system/none", json!({})), ""),
        one(
            "the root namespace, by label",
            authorization("selvedge-system/none", selector("web")),
            "web teller stranger",
        ),
        // The Service leads to 8080; its policy stands over that port when the pod itself is dialled, too.
        allow("a Service", target.clone(), "web:9090 teller:9090 stranger:9090"),
        allow("a Service that is not there", json!({"targetRefs": [{"kind": "Service", "name": "no"}]}), ""),
        one(
            "a Service that is not there, in DENY",
            deny(json!({
                "targetRefs": [{"kind": "Service", "name": "no"}],
                "rules": [{"from": [{"source": {"namespaces": ["bank"]}}]}],
            })),
            "web stranger",
        ),
        one("a Service of that name elsewhere", authorization("bank/none", target), "web teller stranger"),
    ]
}

pub fn closed(_shop: &Shop) -> Vec<Case> {
    let web = || json!({"from": [{"source": {"namespaces": ["shop"]}}]});
    let l7 = || with(web(), json!({"to": [{"operation": {"methods": ["GET"], "ports": ["8080"]}}]}));
    let key = || with(web(), json!({"when": [{"key": "request.headers[x]", "values": ["y"]}]}));
    let field = || with(web(), json!({"form": []}));
    let rules = |rule: Value| json!({"rules": [rule]});
    vec![
        allow("an L7 field in ALLOW", rules(l7()), ""),
        one("an L7 field in DENY", deny(rules(l7())), "web:9090 teller stranger"),
        allow("an unknown key in ALLOW", rules(key()), ""),
        one("an unknown key in DENY", deny(rules(key())), "teller stranger"),
        allow("an unknown field in ALLOW", rules(field()), ""),
        one("an unknown field in DENY", deny(rules(field())), "teller stranger"),
        allow(
            "a rule beside the one that cannot be enforced",
            json!({"rules": [l7(), {"to": [{"operation": {"ports": ["9090"]}}]}]}),
            "web:9090 teller:9090 stranger:9090",
        ),
        one("a misspelt list of rules in DENY", deny(json!({"rulez": [{}]})), ""),
        allow("a malformed policy", json!({"rules": [{"to": [{"operation": {"ports": ["http"]}}]}]}), ""),
        one("an action that does not exist", authorization("shop/odd", json!({"action": "PERMIT", "rules": [{}]})), ""),
        allow(
            "a malformed policy over other pods",
            json!({"selector": {"matchLabels": {"app": "other"}}, "rules": [{"from": null}]}),
            "web teller stranger",
        ),
        one("a malformed PeerAuthentication", peer("shop/odd", json!({"mtls": {"mode": "LOOSE"}})), ""),
        one("an unknown field in a PeerAuthentication", peer("shop/odd", json!({"mtsl": {}})), "web teller"),
    ]
}

pub fn peers(_shop: &Shop) -> Vec<Case> {
    let mode = |mode: &str| json!({"mtls": {"mode": mode}});
    let ports = |port: &str, mode: &str| json!({"portLevelMtls": {port: {"mode": mode}}});
    let over = |app: &str, spec: Value| with(spec, json!({"selector": {"matchLabels": {"app": app}}}));
    let both = |what, wide: Value, narrow: Value, allowed| Case { what, policies: vec![wide, narrow], allowed };
    vec![
        one("PERMISSIVE", peer("shop/mode", mode("PERMISSIVE")), "web teller stranger"),
        one("STRICT in the namespace", peer("shop/mode", mode("STRICT")), "web teller"),
        one("STRICT elsewhere", peer("bank/mode", mode("STRICT")), "web teller stranger"),
        one("STRICT in the mesh", peer("selvedge-system/mode", mode("STRICT")), "web teller"),
        one("STRICT for the pod", peer("shop/mode", over("cart", mode("STRICT"))), "web teller"),
        one("STRICT for other pods", peer("shop/mode", over("other", mode("STRICT"))), "web teller stranger"),
        one("STRICT for a port", peer("shop/mode", over("cart", ports("9090", "STRICT"))), "web teller stranger:8080"),
        one(
            "PERMISSIVE for a port alone",
            peer("shop/mode", over("cart", with(mode("STRICT"), ports("9090", "PERMISSIVE")))),
            "web teller stranger:9090",
        ),
        both(
            "the namespace's word before the mesh's",
            peer("selvedge-system/mode", mode("STRICT")),
            peer("shop/mode", mode("PERMISSIVE")),
            "web teller stranger",
        ),
        both(
            "the pod's word before the namespace's",
            peer("shop/mode", mode("STRICT")),
            peer("shop/cart", over("cart", mode("PERMISSIVE"))),
            "web teller stranger",
        ),
        both(
            "UNSET leaves it to the next wider one",
            peer("shop/mode", mode("STRICT")),
            peer("shop/cart", over("cart", mode("UNSET"))),
            "web teller",
        ),
    ]
}

fn one(what: &'static str, policy: Value, allowed: &'static str) -> Case {
    Case { what, policies: vec![policy], allowed }
}

fn allow(what: &'static str, spec: Value, allowed: &'static str) -> Case {
    one(what, authorization("shop/allow", spec), allowed)
}

fn deny(spec: Value) -> Value {
    authorization("shop/deny", with(json!({"action": "DENY"}), spec))
}

fn with(mut one: Value, other: Value) -> Value {
    if let (Some(fields), Value::Object(more)) = (one.as_object_mut(), other) {
        fields.extend(more);
    }
    one
}
