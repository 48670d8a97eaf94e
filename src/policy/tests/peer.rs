//! PeerAuthentication: who decides, and what fails closed.

use super::*;

fn selected(app: &str, mut spec: Value) -> Value {
    spec["selector"] = json!({ "matchLabels": { "app": app } });
    spec
}

fn mode(mode: &str) -> Value {
    json!({ "mtls": { "mode": mode } })
}

#[test]
fn the_narrowest_policy_decides() {
    let table = [
        (vec![], None),
        (vec![peer(ROOT_NAMESPACE, "mesh", mode("STRICT"))], Some("mesh")),
        (vec![peer(ROOT_NAMESPACE, "mesh", mode("STRICT")), peer("shop", "ns", mode("PERMISSIVE"))], None),
        (vec![peer("shop", "ns", mode("STRICT")), peer(ROOT_NAMESPACE, "mesh", mode("PERMISSIVE"))], Some("ns")),
        (vec![peer("shop", "ns", mode("STRICT")), peer("shop", "w", selected("cart", mode("PERMISSIVE")))], None),
        (vec![peer("shop", "ns", mode("STRICT")), peer("shop", "w", selected("web", mode("PERMISSIVE")))], Some("ns")),
        (vec![peer("shop", "ns", mode("STRICT")), peer("shop", "w", selected("cart", mode("UNSET")))], Some("ns")),
        (vec![peer("shop", "ns", mode("STRICT")), peer("shop", "w", selected("cart", json!({})))], Some("ns")),
        (vec![peer("bank", "ns", mode("STRICT"))], None),
        (vec![peer(ROOT_NAMESPACE, "w", selected("cart", mode("STRICT")))], Some("w")),
        (
            vec![
                peer(ROOT_NAMESPACE, "w", selected("cart", mode("STRICT"))),
                peer(ROOT_NAMESPACE, "mesh", mode("PERMISSIVE")),
            ],
            Some("w"),
        ),
        (
            vec![peer("shop", "ns", mode("PERMISSIVE")), peer(ROOT_NAMESPACE, "w", selected("cart", mode("STRICT")))],
            None,
        ),
    ];
    for (policies, strict) in table {
        let decision = from("10.0.0.1").decide(&policies);
        match strict {
            Some(name) => {
                assert!(
                    matches!(&decision.reason, Some(Reason::Plaintext(Some(by))) if &*by.name == name),
                    "{policies:?}"
                )
            }
            None => assert_eq!(decision.verdict, Verdict::Allow, "{policies:?}"),
        }
        assert!(from("shop/web@10.0.0.1").allowed(&policies), "a proven identity is never plaintext");
    }
}

#[test]
fn a_port_comes_before_its_pod() {
    let policy = |rest: &str, port: &str| {
        json!({ "mtls": { "mode": rest }, "portLevelMtls": { "8080": { "mode": port } },
                "selector": { "matchLabels": { "app": "cart" } } })
    };
    let table = [
        ("STRICT", "PERMISSIVE", true, false),
        ("PERMISSIVE", "STRICT", false, true),
        ("STRICT", "UNSET", false, false),
    ];
    for (rest, port, at_8080, at_80) in table {
        let policies = [peer("shop", "p", policy(rest, port))];
        assert_eq!(from("10.0.0.1").allowed(&policies), at_8080, "{rest} {port} at 8080");
        assert_eq!(from("10.0.0.1").to("10.0.0.9:80").allowed(&policies), at_80, "{rest} {port} at 80");
    }
}

#[test]
fn the_oldest_decides_among_equals() {
    let at = |name: &str, time: Option<&str>, spec: Value| {
        let mut policy = peer("shop", name, spec);
        if let Some(time) = time {
            policy["metadata"]["creationTimestamp"] = time.into();
        }
        policy
    };
    let old = Some("2026-01-01T00:00:00Z");
    let new = Some("2026-02-01T00:00:00Z");
    let table = [
        (at("a", new, mode("STRICT")), at("b", old, mode("PERMISSIVE")), true),
        (at("a", old, mode("STRICT")), at("b", new, mode("PERMISSIVE")), false),
        (at("a", old, mode("STRICT")), at("b", old, mode("PERMISSIVE")), false),
        (at("b", old, mode("STRICT")), at("a", old, mode("PERMISSIVE")), true),
        (at("a", old, mode("STRICT")), at("b", None, mode("PERMISSIVE")), true),
    ];
    for (one, two, allowed) in table {
        assert_eq!(from("10.0.0.1").allowed(&[one.clone(), two.clone()]), allowed, "{one} {two}");
        assert_eq!(from("10.0.0.1").allowed(&[two.clone(), one.clone()]), allowed, "{two} {one}");
    }
}

#[test]
fn an_unknown_field_means_strict_whatever_others_say() {
    let policies = [
        peer("shop", "odd", json!({ "mtls": { "mod": "STRICT" } })),
        peer("shop", "w", selected("cart", mode("PERMISSIVE"))),
    ];
    let decision = from("10.0.0.1").decide(&policies);
    assert_eq!(reason(&decision), "plaintext:shop/odd");
    assert!(from("shop/web@10.0.0.1").allowed(&policies));
    assert_eq!(store(&policies).problems().next().unwrap().field, "spec.mtls.mod");
}

#[test]
fn what_is_malformed_denies_its_scope() {
    for spec in [
        mode("DISABLE"),
        mode("strict"),
        json!({ "mtls": "STRICT" }),
        json!({ "mtls": null }),
        json!({ "portLevelMtls": {} }),
        json!({ "portLevelMtls": { "http": { "mode": "STRICT" } } }),
        json!({ "portLevelMtls": { "0": { "mode": "STRICT" } } }),
        json!({ "portLevelMtls": { "65536": { "mode": "STRICT" } } }),
    ] {
        let policies = [peer("shop", "bad", spec.clone())];
        assert!(!from("shop/web@10.0.0.1").allowed(&policies), "{spec}");
        let policies = [peer("shop", "bad", selected("web", spec.clone()))];
        assert!(from("shop/web@10.0.0.1").allowed(&policies), "{spec} on other pods");
    }
}
