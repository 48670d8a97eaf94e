use super::*;
use crate::authentication::{KEYS_HOLD, KeySource, Rule};

const KEYS: &str = r#"{"keys":[{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}"#;

fn tokens(namespace: &str, name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "selvedge.dev/v1alpha1", "kind": "RequestAuthentication",
        "metadata": { "namespace": namespace, "name": name }, "spec": spec,
    })
}

fn rule(issuer: &str) -> Value {
    json!({"issuer": issuer, "jwks": KEYS})
}

fn over(policies: &Policies, workload: &Workload, services: &[NamespacedName]) -> Vec<Arc<Rule>> {
    policies.token_rules(&Query {
        source_ip: "10.0.0.1".parse().unwrap(),
        source_identity: None,
        destination: workload,
        destination_addr: "10.0.0.9:80".parse().unwrap(),
        services,
        requests: false,
    })
}

fn issuers(policies: &Policies, workload: &Workload, services: &[NamespacedName]) -> Vec<String> {
    over(policies, workload, services).iter().map(|rule| rule.issuer.to_string()).collect()
}

#[test]
fn rules_stand_over_pods_as_every_policys_do_and_add_up() {
    let policies = store(&[
        tokens("shop", "all", json!({"jwtRules": [rule("all")]})),
        tokens(
            "shop",
            "cart",
            json!({"selector": {"matchLabels": {"app": "cart"}}, "jwtRules": [rule("cart"), rule("cart2")]}),
        ),
        tokens("shop", "other", json!({"selector": {"matchLabels": {"app": "other"}}, "jwtRules": [rule("other")]})),
        tokens("shop", "at", json!({"targetRefs": [{"kind": "Service", "name": "cart"}], "jwtRules": [rule("at")]})),
        tokens("bank", "all", json!({"jwtRules": [rule("bank")]})),
        tokens(ROOT_NAMESPACE, "all", json!({"jwtRules": [rule("mesh")]})),
    ]);
    let cart = NamespacedName::new("shop", "cart");
    assert_eq!(issuers(&policies, &workload(), &[]), ["mesh", "all", "cart", "cart2"]);
    assert_eq!(issuers(&policies, &workload(), &[cart]), ["mesh", "all", "at", "cart", "cart2"]);
    let elsewhere = workload_of("bank", "teller", &[]);
    assert_eq!(issuers(&policies, &elsewhere, &[NamespacedName::new("shop", "cart")]), ["bank", "mesh"]);
}

#[test]
fn a_policy_that_goes_takes_its_rules_with_it() {
    let mut policies = store(&[tokens(
        "shop",
        "at",
        json!({"targetRefs": [{"kind": "Service", "name": "cart"}], "jwtRules": [rule("at")]}),
    )]);
    let services = [NamespacedName::new("shop", "cart")];
    assert_eq!(issuers(&policies, &workload(), &services), ["at"]);
    let name = NamespacedName::new("shop", "at");
    policies.apply(Delta::Delete(PolicyRef { kind: PolicyKind::RequestAuthentication, name }));
    assert!(issuers(&policies, &workload(), &services).is_empty());
}

#[test]
fn an_unknown_field_takes_no_token_where_it_stands() {
    for (spec, opaque) in [
        (json!({"jwtRules": [{"issuer": "a", "jwks": KEYS, "audience": ["x"]}, rule("b")]}), [true, false]),
        (json!({"jwtRules": [rule("a"), rule("b")], "slector": {}}), [true, true]),
        (
            json!({"jwtRules": [rule("a"), {"issuer": "b", "jwks": KEYS, "fromHeaders": [{"name": "x", "prefx": "y"}]}]}),
            [false, true],
        ),
    ] {
        let policies = store(&[tokens("shop", "all", spec.clone())]);
        let found: Vec<bool> = over(&policies, &workload(), &[]).iter().map(|rule| rule.opaque).collect();
        assert_eq!(found, opaque, "{spec}");
        assert_eq!(policies.problems().count(), 1, "{spec}");
    }
}

#[test]
fn a_malformed_policy_names_its_field_and_denies_all_in_its_scope() {
    let bad = |rule: Value| tokens("shop", "bad", json!({"jwtRules": [rule]}));
    for (value, field) in [
        (bad(json!({"jwks": KEYS})), "spec.jwtRules[0].issuer"),
        (bad(json!({"issuer": "a"})), "spec.jwtRules[0]"),
        (bad(json!({"issuer": "a", "jwks": KEYS, "jwksUri": "https://a/"})), "spec.jwtRules[0]"),
        (bad(json!({"issuer": "a", "jwks": "{}"})), "spec.jwtRules[0].jwks"),
        (bad(json!({"issuer": "a", "jwksUri": "http://issuer.example/keys"})), "spec.jwtRules[0].jwksUri"),
        (bad(json!({"issuer": "a", "jwksUri": "http://issuer.auth/keys"})), "spec.jwtRules[0].jwksUri"),
        (bad(json!({"issuer": "a", "jwksUri": "https://user@issuer.example/"})), "spec.jwtRules[0].jwksUri"),
        (bad(json!({"issuer": "a", "jwksUri": "file:///etc/passwd"})), "spec.jwtRules[0].jwksUri"),
        (bad(json!({"issuer": "a", "jwksUri": "https://a/", "jwksCaBundle": "x"})), "spec.jwtRules[0].jwksCaBundle"),
        (bad(json!({"issuer": "a", "jwksConfigMap": {"key": "x"}})), "spec.jwtRules[0].jwksConfigMap.name"),
        (
            bad(json!({"issuer": "a", "jwks": KEYS, "fromHeaders": [{"name": "a b"}]})),
            "spec.jwtRules[0].fromHeaders[0].name",
        ),
        (
            bad(json!({"issuer": "a", "jwks": KEYS, "outputClaimToHeaders": [{"header": "host", "claim": "sub"}]})),
            "spec.jwtRules[0].outputClaimToHeaders[0].header",
        ),
        (bad(json!({"issuer": "a", "jwks": KEYS, "audiences": []})), "spec.jwtRules[0].audiences"),
        (
            bad(json!({"issuer": "a", "jwks": KEYS, "forwardOriginalToken": "yes"})),
            "spec.jwtRules[0].forwardOriginalToken",
        ),
    ] {
        let error = decode(PolicyKind::RequestAuthentication, &value).unwrap_err();
        assert_eq!(error.field, field, "{error}");
        let policies = store(&[value]);
        let decision = policies.decide(&Query {
            source_ip: "10.0.0.1".parse().unwrap(),
            source_identity: None,
            destination: &workload(),
            destination_addr: "10.0.0.9:80".parse().unwrap(),
            services: &[],
            requests: false,
        });
        assert_eq!(decision.reason, Some(Reason::Policy(NamespacedName::new("shop", "bad"))));
    }
}

#[test]
fn fetched_keys_are_those_of_the_source_that_is_asked_for_and_hold_for_a_day() {
    let url = "https://issuer.example/keys";
    let mut value = tokens(
        "shop",
        "all",
        json!({"jwtRules": [
            {"issuer": "a", "jwksUri": url},
            {"issuer": "b", "jwksUri": "https://issuer.example/other"},
            {"issuer": "c", "jwksConfigMap": {"name": "keys"}},
        ]}),
    );
    value["status"] = json!({"keys": [
        {"source": url, "jwks": KEYS, "fetchTime": "2027-01-15T08:00:00Z"},
        {"source": "configmap/keys/jwks.json", "jwks": KEYS, "fetchTime": "2027-01-15T08:00:00Z"},
    ]});
    let Ok(PolicyObject::RequestAuthentication(read)) = decode(PolicyKind::RequestAuthentication, &value) else {
        panic!()
    };
    let until: Vec<_> = read.rules.iter().map(|rule| rule.keys.found.as_ref().map(|found| found.until)).collect();
    assert_eq!(until, [Some(Some(1_800_000_000 + KEYS_HOLD)), None, Some(None)]);
    let lacking: Vec<&str> = read.lacking.iter().map(|one| one.field.as_str()).collect();
    assert_eq!(lacking, ["spec.jwtRules[1].jwksUri"]);
}

#[test]
fn keys_come_from_a_config_map_beside_the_policy() {
    let value = tokens(
        "shop",
        "all",
        json!({"jwtRules": [
            rule("a"), {"issuer": "b", "jwksConfigMap": {"name": "keys", "key": "k"}}, {"issuer": "c", "jwksConfigMap": {"name": "keys"}},
        ]}),
    );
    let Ok(PolicyObject::RequestAuthentication(read)) = decode(PolicyKind::RequestAuthentication, &value) else {
        panic!()
    };
    assert_eq!(read.lacking.len(), 2);
    let beside =
        read.beside_config_maps(|name, key| (name.to_string() == "shop/keys" && key == "k").then(|| KEYS.to_owned()));
    assert_eq!(beside.lacking.len(), 1);
    assert!(beside.rules[1].keys.found.is_some() && beside.rules[2].keys.found.is_none());
    assert!(matches!(beside.rules[1].keys.source, KeySource::ConfigMap { .. }));
}

#[test]
fn who_is_asked_is_said_of_requests_that_are_allowed_so_far_and_a_connection_is_denied() {
    let custom = |name: &str, provider: &str, paths: Value| {
        let rules = json!([{"to": [{"operation": {"paths": paths}}]}]);
        authorization("shop", name, json!({"action": "CUSTOM", "provider": {"name": provider}, "rules": rules}))
    };
    let policies = store(&[
        custom("a", "gate", json!(["/in/*"])),
        custom("b", "gate", json!(["/in/*"])),
        custom("c", "other", json!(["/in/deep"])),
        authorization(
            "shop",
            "d",
            json!({"action": "DENY", "rules": [{"to": [{"operation": {"paths": ["/in/no"]}}]}]}),
        ),
    ]);
    let workload = workload();
    let query = |requests: bool| Query {
        source_ip: "10.0.0.1".parse().unwrap(),
        source_identity: None,
        destination: &workload,
        destination_addr: "10.0.0.9:80".parse().unwrap(),
        services: &[],
        requests,
    };
    let headers = http::HeaderMap::new();
    let asked = |path: &str| {
        let head = RequestHead { method: "GET", host: "cart", path, headers: &headers, principal: None };
        let decision = policies.decide_request(&query(true), &head);
        let asks: Vec<String> =
            decision.asks.iter().map(|ask| format!("{}:{}", ask.policy.name, ask.provider)).collect();
        (decision.verdict, asks)
    };
    assert_eq!(asked("/out"), (Verdict::Allow, vec![]));
    assert_eq!(asked("/in/x"), (Verdict::Allow, vec!["a:gate".to_owned()]));
    assert_eq!(asked("/in/deep"), (Verdict::Allow, vec!["a:gate".to_owned(), "c:other".to_owned()]));
    assert_eq!(asked("/in/no"), (Verdict::Deny, vec![]));
    assert_eq!(policies.decide(&query(true)).verdict, Verdict::Allow, "each request will be asked about");
    assert_eq!(policies.decide(&query(false)).verdict, Verdict::Deny, "nobody can be asked");
    assert_eq!(policies.reads(&query(false)), Reads::ToDecide);
}
