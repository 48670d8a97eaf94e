//! Section 7 of the design as tables: order, matching, scope.

use super::*;

fn allow(rule: Value) -> Value {
    authorization("shop", "allow", json!({ "rules": [rule] }))
}

fn deny(rule: Value) -> Value {
    authorization("shop", "deny", json!({ "action": "DENY", "rules": [rule] }))
}

#[test]
fn deny_then_none_then_allow_then_deny() {
    let everything = json!({});
    let nothing = json!({ "to": [{ "operation": { "ports": ["1"] } }] });
    let table = [
        (vec![], true, ""),
        (vec![deny(nothing.clone())], true, ""),
        (vec![deny(everything.clone())], false, "policy:shop/deny"),
        (vec![allow(everything.clone())], true, ""),
        (vec![allow(nothing.clone())], false, "policy:shop/allow"),
        (vec![allow(everything.clone()), deny(everything.clone())], false, "policy:shop/deny"),
        (vec![allow(everything.clone()), deny(nothing.clone())], true, ""),
        (vec![authorization("shop", "none", json!({}))], false, "policy:shop/none"),
        (vec![authorization("shop", "none", json!({})), allow(everything.clone())], true, ""),
        (vec![authorization("shop", "d", json!({ "action": "DENY" }))], true, ""),
        (vec![authorization("shop", "a", json!({ "action": "AUDIT", "rules": [{}] }))], true, ""),
    ];
    for (policies, allowed, why) in table {
        let decision = from("shop/web@10.0.0.1").decide(&policies);
        assert_eq!(decision.verdict == Verdict::Allow, allowed, "{policies:?}");
        assert_eq!(reason(&decision), why, "{policies:?}");
        assert_eq!(decision.reason.is_some(), !allowed);
    }
}

#[test]
fn every_field_of_a_source_and_operation_matches_as_in_istio() {
    let s = |source: Value| json!({ "from": [{ "source": source }] });
    let t = |operation: Value| json!({ "to": [{ "operation": operation }] });
    let w = |key: &str, values: &[&str]| json!({ "when": [{ "key": key, "values": values }] });
    let web = "shop/web@10.0.0.1";
    let table = [
        (s(json!({ "principals": ["cluster.local/ns/shop/sa/web"] })), web, true),
        (s(json!({ "principals": ["cluster.local/ns/shop/sa/we"] })), web, false),
        (s(json!({ "principals": ["cluster.local/ns/shop/*"] })), web, true),
        (s(json!({ "principals": ["cluster.local/ns/other/*"] })), web, false),
        (s(json!({ "principals": ["*/sa/web"] })), web, true),
        (s(json!({ "principals": ["*/sa/other", "*/sa/web"] })), web, true),
        (s(json!({ "principals": ["*"] })), web, true),
        (s(json!({ "principals": ["*"] })), "10.0.0.1", false),
        (s(json!({ "principals": ["*/sa/web"] })), "10.0.0.1", false),
        (s(json!({ "notPrincipals": ["*/sa/web"] })), web, false),
        (s(json!({ "notPrincipals": ["*/sa/other"] })), web, true),
        (s(json!({ "notPrincipals": ["*/sa/web"] })), "10.0.0.1", true),
        (s(json!({ "notPrincipals": ["*"] })), "10.0.0.1", true),
        (s(json!({ "notPrincipals": ["*"] })), web, false),
        (s(json!({ "principals": ["*"], "notPrincipals": ["*/sa/a"] })), "10.0.0.1", false),
        (s(json!({ "namespaces": ["shop"] })), web, true),
        (s(json!({ "namespaces": ["sho"] })), web, false),
        (s(json!({ "namespaces": ["sh*"] })), web, true),
        (s(json!({ "namespaces": ["*op"] })), web, true),
        (s(json!({ "namespaces": ["*"] })), "10.0.0.1", false),
        (s(json!({ "notNamespaces": ["shop"] })), web, false),
        (s(json!({ "notNamespaces": ["shop"] })), "10.0.0.1", true),
        (s(json!({ "serviceAccounts": ["web"] })), web, true),
        (s(json!({ "serviceAccounts": ["web"] })), "other/web@10.0.0.1", false),
        (s(json!({ "serviceAccounts": ["other/web"] })), "other/web@10.0.0.1", true),
        (s(json!({ "serviceAccounts": ["web"] })), "10.0.0.1", false),
        (s(json!({ "notServiceAccounts": ["web"] })), web, false),
        (s(json!({ "notServiceAccounts": ["web"] })), "10.0.0.1", true),
        (s(json!({ "ipBlocks": ["10.0.0.0/24"] })), web, true),
        (s(json!({ "ipBlocks": ["10.0.0.1"] })), web, true),
        (s(json!({ "ipBlocks": ["10.0.0.2"] })), web, false),
        (s(json!({ "ipBlocks": ["10.0.0.77/24"] })), web, true),
        (s(json!({ "ipBlocks": ["10.0.0.0/24"] })), "::ffff:10.0.0.1", true),
        (s(json!({ "ipBlocks": ["fd00::/8"] })), "fd00::1", true),
        (s(json!({ "ipBlocks": ["::/0"] })), web, false),
        (s(json!({ "notIpBlocks": ["10.0.0.0/24"] })), web, false),
        (s(json!({ "notIpBlocks": ["10.1.0.0/24"] })), web, true),
        (s(json!({ "namespaces": ["shop"], "ipBlocks": ["10.1.0.0/24"] })), web, false),
        (t(json!({ "ports": ["8080"] })), web, true),
        (t(json!({ "ports": ["80", "8080"] })), web, true),
        (t(json!({ "ports": ["80"] })), web, false),
        (t(json!({ "notPorts": ["8080"] })), web, false),
        (t(json!({ "notPorts": ["80"] })), web, true),
        (t(json!({ "ports": ["8080"], "notPorts": ["8080"] })), web, false),
        (w("source.ip", &["10.0.0.0/24"]), web, true),
        (w("source.ip", &["10.0.1.0/24"]), web, false),
        (w("source.namespace", &["shop"]), web, true),
        (w("source.namespace", &["*"]), "10.0.0.1", false),
        (w("source.principal", &["*/sa/web"]), web, true),
        (w("destination.ip", &["10.0.0.9"]), web, true),
        (w("destination.ip", &["10.0.0.8"]), web, false),
        (w("destination.port", &["8080"]), web, true),
        (w("destination.port", &["80"]), web, false),
        (json!({ "when": [{ "key": "source.ip", "notValues": ["10.0.0.1"] }] }), web, false),
        (json!({ "when": [{ "key": "source.namespace", "notValues": ["x"] }] }), "10.0.0.1", true),
        (json!({ "when": [{ "key": "source.ip", "values": ["10.0.0.0/8"], "notValues": ["10.0.0.1"] }] }), web, false),
    ];
    for (rule, source, matches) in table {
        assert_eq!(from(source).allowed(&[allow(rule.clone())]), matches, "ALLOW {rule} from {source}");
        assert_eq!(from(source).allowed(&[deny(rule.clone())]), !matches, "DENY {rule} from {source}");
    }
}

#[test]
fn one_of_from_one_of_to_and_all_of_when() {
    let rule = json!({
        "from": [{ "source": { "namespaces": ["a"] } }, { "source": { "namespaces": ["b"] } }],
        "to": [{ "operation": { "ports": ["80"] } }, { "operation": { "ports": ["81"] } }],
        "when": [{ "key": "source.ip", "values": ["10.0.0.0/8"] }, { "key": "destination.port", "notValues": ["81"] }],
    });
    let table = [
        ("a/x@10.0.0.1", "10.0.0.9:80", true),
        ("b/x@10.0.0.1", "10.0.0.9:80", true),
        ("c/x@10.0.0.1", "10.0.0.9:80", false),
        ("a/x@10.0.0.1", "10.0.0.9:81", false),
        ("a/x@11.0.0.1", "10.0.0.9:80", false),
        ("a/x@10.0.0.1", "10.0.0.9:82", false),
    ];
    for (source, to, matches) in table {
        assert_eq!(from(source).to(to).allowed(&[allow(rule.clone())]), matches, "{source} {to}");
    }
}

#[test]
fn cluster_local_names_the_trust_domain_of_the_mesh() {
    let policy = allow(json!({ "from": [{ "source": { "principals": ["cluster.local/ns/shop/sa/web"] } }] }));
    let identity: Identity = "spiffe://mesh.example/ns/shop/sa/web".parse().unwrap();
    let mut policies = Policies::new("mesh.example".parse().unwrap());
    policies.apply(Delta::Apply(read(&policy)));
    let case = from("10.0.0.1");
    let cart = workload();
    let query = Query { source_identity: Some(&identity), ..case.query(&cart) };
    assert_eq!(policies.decide(&query).verdict, Verdict::Allow);
}

#[test]
fn selectors_target_refs_and_the_root_namespace_say_what_a_policy_stands_over() {
    let cart = workload();
    let other = workload_of("bank", "teller", &[("app", "cart")]);
    let none = |namespace: &str, mut spec: Value| {
        spec["action"] = "DENY".into();
        spec["rules"] = json!([{}]);
        authorization(namespace, "p", spec)
    };
    let labels = |app: &str| json!({ "selector": { "matchLabels": { "app": app } } });
    let service = |name: &str| json!({ "targetRefs": [{ "group": "", "kind": "Service", "name": name }] });
    let table = [
        (none("shop", json!({})), true, false),
        (none("bank", json!({})), false, true),
        (none(ROOT_NAMESPACE, json!({})), true, true),
        (none("shop", labels("cart")), true, false),
        (none("shop", labels("web")), false, false),
        (none(ROOT_NAMESPACE, labels("cart")), true, true),
        (none(ROOT_NAMESPACE, labels("web")), false, false),
        (none("shop", json!({ "selector": {} })), true, false),
        (none("shop", json!({ "selector": { "matchLabels": {} } })), true, false),
        (none("shop", service("cart")), true, false),
        (none("shop", service("web")), false, false),
        (none("bank", service("cart")), false, false),
    ];
    for (policy, over_cart, over_other) in table {
        let to_cart = from("10.0.0.1").by("shop/cart");
        assert_eq!(!to_cart.allowed_to(&cart, std::slice::from_ref(&policy)), over_cart, "{policy}");
        assert_eq!(!from("10.0.0.1").allowed_to(&other, std::slice::from_ref(&policy)), over_other, "{policy}");
    }
}

#[test]
fn a_target_ref_stands_over_the_ports_that_the_service_leads_to_and_no_other() {
    let policy = authorization("shop", "p", json!({ "targetRefs": [{ "kind": "Service", "name": "cart" }] }));
    assert!(!from("10.0.0.1").by("shop/cart").allowed(std::slice::from_ref(&policy)));
    assert!(from("10.0.0.1").to("10.0.0.9:9000").allowed(&[policy]));
}

#[test]
fn a_service_of_another_namespace_gives_its_policies_no_say() {
    let policies = [
        authorization("shop", "closed", json!({})),
        authorization("bank", "open", json!({ "rules": [{}], "targetRefs": [{ "kind": "Service", "name": "cart" }] })),
    ];
    let decision = from("10.0.0.1").by("bank/cart").decide(&policies);
    assert_eq!(reason(&decision), "policy:shop/closed");
}

#[test]
fn audit_and_dry_run_are_observed_and_change_nothing() {
    let dry = |action: &str, rules: Value| {
        let mut policy = authorization("shop", "dry", json!({ "action": action, "rules": rules }));
        policy["metadata"]["annotations"] = json!({ "selvedge.dev/dry-run": "true" });
        policy
    };
    let table = [
        (dry("DENY", json!([{}])), Some((Some(1), Some(Verdict::Deny)))),
        (dry("DENY", json!([])), None),
        (dry("ALLOW", json!([{}])), Some((Some(1), Some(Verdict::Allow)))),
        (dry("ALLOW", json!([])), Some((None, Some(Verdict::Deny)))),
        (dry("AUDIT", json!([{}])), Some((Some(1), None))),
        (dry("CUSTOM", json!([{}])), Some((Some(1), Some(Verdict::Deny)))),
    ];
    for (policy, observed) in table {
        let decision = from("10.0.0.1").decide(std::slice::from_ref(&policy));
        assert_eq!(decision.verdict, Verdict::Allow, "{policy}");
        assert_eq!(decision.observed.first().map(|seen| (seen.rule, seen.would)), observed, "{policy}");
    }
}

#[test]
fn a_clause_names_policy_rule_and_words() {
    let policy = authorization(
        "shop",
        "web-only",
        json!({ "rules": [
            { "to": [{ "operation": { "ports": ["1"] } }] },
            { "from": [{ "source": { "principals": ["cluster.local/ns/shop/sa/web"] } }],
              "to": [{ "operation": { "ports": ["8080"] } }] },
        ]}),
    );
    let clause = from("shop/web@10.0.0.1").decide(&[policy]).clause.unwrap();
    assert_eq!(clause.policy.to_string(), "AuthorizationPolicy shop/web-only");
    assert_eq!(clause.rule, Some(2));
    assert_eq!(clause.words, "rule 2: from principals cluster.local/ns/shop/sa/web; to ports 8080");
}

#[test]
fn what_was_compiled_follows_policies_and_pods() {
    let cart = workload();
    let case = from("10.0.0.1");
    let mut policies = store(&[]);
    let verdict = |policies: &Policies, to: &Workload| policies.decide(&case.query(to)).verdict;
    assert_eq!(verdict(&policies, &cart), Verdict::Allow);
    let policy = read(&authorization("shop", "p", json!({ "selector": { "matchLabels": { "app": "cart" } } })));
    policies.apply(Delta::Apply(policy.clone()));
    assert_eq!(verdict(&policies, &cart), Verdict::Deny);
    let relabelled = workload_of("shop", "cart", &[("app", "other")]);
    assert_eq!(verdict(&policies, &relabelled), Verdict::Allow, "one UID, other labels");
    assert_eq!(verdict(&policies, &cart), Verdict::Deny);
    policies.apply(Delta::Apply(read(&authorization("shop", "p", json!({ "rules": [{}] })))));
    assert_eq!(verdict(&policies, &cart), Verdict::Allow);
    policies.apply(Delta::Apply(policy.clone()));
    policies.apply(Delta::Delete(policy.reference()));
    assert_eq!(verdict(&policies, &cart), Verdict::Allow);
    assert_eq!(policies.iter().count(), 0);
}
