//! Random policies, good and bad.

use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use serde_json::{Value, json};

pub fn policy(random: &mut StdRng, name: &str) -> Value {
    let namespace = *pick(random, &["shop", "shop", "bank", "selvedge-system"]);
    let scope = match random.random_range(0..4) {
        0 => json!({"selector": {"matchLabels": {"tier": pick(random, &TIERS)}}}),
        1 => json!({"targetRefs": [{"kind": "Service", "name": format!("service-{}", random.random_range(1..=3))}]}),
        _ => json!({}),
    };
    let (kind, mut spec) = match random.random_range(0..5) {
        0 => {
            let mut spec = json!({"mtls": {"mode": pick(random, &["STRICT", "PERMISSIVE", "UNSET"])}});
            if random.random_bool(0.4) {
                spec["portLevelMtls"] = json!({"9090": {"mode": pick(random, &["STRICT", "PERMISSIVE"])}});
            }
            ("PeerAuthentication", spec)
        }
        _ => {
            let rules: Vec<Value> = (0..random.random_range(0..3)).map(|_| rule(random)).collect();
            let action = *pick(random, &["ALLOW", "ALLOW", "DENY", "DENY", "DENY", "AUDIT", "CUSTOM", "PERMIT"]);
            ("AuthorizationPolicy", json!({"action": action, "rules": rules}))
        }
    };
    if kind == "AuthorizationPolicy" || scope.get("selector").is_some() {
        merge(&mut spec, scope);
    }
    json!({
        "apiVersion": "selvedge.dev/v1alpha1", "kind": kind,
        "metadata": {
            "namespace": namespace, "name": name,
            "annotations": {"selvedge.dev/dry-run": random.random_bool(0.1).to_string()},
        },
        "spec": spec,
    })
}

fn rule(random: &mut StdRng) -> Value {
    let mut rule = json!({});
    if random.random_bool(0.7) {
        let sources: Vec<Value> = (0..random.random_range(1..3))
            .map(|_| match random.random_range(0..8) {
                0 => json!({"principals": ["cluster.local/ns/shop/*"]}),
                1 => json!({"principals": ["*"]}),
                2 => json!({"notPrincipals": ["*/sa/web"]}),
                3 => json!({"namespaces": [pick(random, &["shop", "bank"])]}),
                4 => json!({"serviceAccounts": ["shop/web", "bank/teller"]}),
                5 => json!({"ipBlocks": [pick(random, &["10.244.1.0/24", "10.244.2.0/24", "fd00:10:244:1::/64"])]}),
                6 => json!({"notIpBlocks": [pick(random, &["10.244.1.0/24", "fd00:10:244:2::/64"])]}),
                _ => json!({"notNamespaces": ["bank"], "requestPrincipals": ["*"]}),
            })
            .map(|source| json!({"source": source}))
            .collect();
        rule["from"] = sources.into();
    }
    if random.random_bool(0.5) {
        let operation = match random.random_range(0..5) {
            0 | 1 => json!({"ports": ["8080"]}),
            2 | 3 => json!({"notPorts": ["8080"]}),
            _ => json!({"methods": ["GET"], "ports": ["9090"]}),
        };
        rule["to"] = json!([{"operation": operation}]);
    }
    if random.random_bool(0.2) {
        let key = *pick(random, &["source.namespace", "source.principal", "request.headers[x]", "source.nmespace"]);
        rule["when"] = json!([{"key": key, "values": ["shop", "*/sa/web"]}]);
    }
    rule
}

pub fn pick<'a, T>(random: &mut StdRng, all: &'a [T]) -> &'a T {
    all.choose(random).unwrap_or_else(|| panic!("nothing to pick from"))
}

fn merge(one: &mut Value, other: Value) {
    if let (Some(fields), Value::Object(more)) = (one.as_object_mut(), other) {
        fields.extend(more);
    }
}

pub const TIERS: [&str; 2] = ["front", "back"];
