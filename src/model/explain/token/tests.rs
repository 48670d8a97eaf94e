use serde_json::{Value, json};

use super::*;
use crate::authentication::tests::{ISSUER, NOW, Signer, claims, with};
use crate::authentication::{Algorithm, KEYS_HOLD};
use crate::mesh::NamespacedName;
use crate::model::explain::{EndpointExplanation, Party, Question, explain_request};
use crate::policy::Verdict;
use crate::source::fixture;

const CLUSTER: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop, annotations: {selvedge.dev/mesh: enabled}}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop}
spec: {nodeName: one, serviceAccountName: web}
status: {podIPs: [{ip: 10.0.1.1}], phase: Running}
---
apiVersion: v1
kind: Pod
metadata: {name: cart, namespace: shop, labels: {app: cart}}
spec: {nodeName: two, serviceAccountName: cart}
status: {podIPs: [{ip: 10.0.2.1}], phase: Running, conditions: [{type: Ready, status: 'True'}]}
---
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop, annotations: {selvedge.dev/waypoint: node}}
spec: {clusterIP: 10.96.0.10, selector: {app: cart}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: selvedge.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: users, namespace: shop}
spec: {rules: [{from: [{source: {requestPrincipals: ['*']}}]}]}
";

/// What is said of a request to the one endpoint, and all of it in words.
fn asked(rules: &Value, more: &[Value], target: &str, token: Option<&str>) -> (EndpointExplanation, String) {
    let authentication = json!({
        "apiVersion": "selvedge.dev/v1alpha1", "kind": "RequestAuthentication",
        "metadata": {"name": "issuers", "namespace": "shop"}, "spec": {"jwtRules": rules},
    });
    let objects: String = [authentication].iter().chain(more).map(|object| format!("---\n{object}\n")).collect();
    let model = fixture::model_of(fixture::load(&format!("{CLUSTER}{objects}")));
    let party = |name| Party::Named(NamespacedName::new("shop", name));
    let question = Question { from: party("web"), to: Party::Address([10, 96, 0, 10].into()), port: Some(80) };
    let request = Request::builder().uri(target);
    let request =
        token.into_iter().fold(request, |request, token| request.header(AUTHORIZATION, format!("Bearer {token}")));
    let head = request.body(()).unwrap().into_parts().0;
    let told = explain_request(&model.read(), &question, &head, NOW).unwrap();
    let mut connection = told.backends[0].connection.clone().unwrap();
    (connection.endpoints.remove(0), told.to_string())
}

fn rule(signer: &Signer) -> Value {
    json!({"issuer": ISSUER, "jwks": json!({"keys": [signer.published(None)]}).to_string()})
}

#[test]
fn a_token_that_holds_gives_its_principal_and_policy_is_asked_about_that() {
    let signer = Signer::edwards();
    let mut rule = rule(&signer);
    rule["outputClaimToHeaders"] = json!([{"header": "x-user", "claim": "sub"}]);
    let other = json!({"issuer": "https://other.example", "jwks": rule["jwks"]});
    let token = signer.token(Algorithm::EdDsa, &claims());
    let (endpoint, text) = asked(&json!([other, rule]), &[], "/", Some(&token));
    assert_eq!((endpoint.verdict, endpoint.reason), (Verdict::Allow, None), "{text}");
    let told = endpoint.token.unwrap();
    assert_eq!((told.policy.as_deref(), told.rule), (Some("RequestAuthentication shop/issuers"), Some(2)));
    assert_eq!(told.principal.as_deref(), Some("https://issuer.example/alice"));
    assert_eq!((told.answer, told.headers), (None, vec!["x-user: alice".to_owned()]));
    let line = "token   it holds, by RequestAuthentication shop/issuers, rule 2 (https://issuer.example): principal \
                https://issuer.example/alice\n            gives x-user: alice\n";
    assert!(text.contains(line), "{text}");
}

#[test]
fn a_token_is_found_where_the_rule_looks_for_it() {
    let signer = Signer::edwards();
    let mut rule = rule(&signer);
    rule["fromParams"] = json!(["access_token"]);
    let token = signer.token(Algorithm::EdDsa, &claims());
    let (endpoint, text) = asked(&json!([rule]), &[], &format!("/a/../b?access_token={token}"), None);
    assert_eq!(endpoint.verdict, Verdict::Allow, "{text}");
    let (endpoint, text) = asked(&json!([rule]), &[], "/", Some(&token));
    assert_eq!(endpoint.reason.as_deref(), Some("policy:shop/users"));
    assert!(text.contains("token   the request has none, at query parameter access_token\n"), "{text}");
}

#[test]
fn a_token_that_does_not_hold_is_refused_by_name_and_cause() {
    let signer = Signer::edwards();
    let token = |claims: &Value| signer.token(Algorithm::EdDsa, claims);
    let forged = Signer::edwards().token(Algorithm::EdDsa, &claims());
    for (token, reason, cause) in [
        (token(&with("exp", json!(NOW - 61))), "token:expired", "the token expired at 1799999939"),
        (forged, "token:signature", "rule 1 (https://issuer.example): the signature of the token is not valid"),
        (
            token(&with("iss", json!("https://else.example"))),
            "token:issuer",
            "they take those of https://issuer.example, at header authorization (Bearer)",
        ),
        ("no.token".to_owned(), "token:malformed", "it is not three parts"),
    ] {
        let (endpoint, text) = asked(&json!([rule(&signer)]), &[], "/", Some(&token));
        assert_eq!((endpoint.verdict, endpoint.reason.as_deref()), (Verdict::Deny, Some(reason)), "{text}");
        let told = endpoint.token.unwrap();
        assert!(told.summary.contains("refused with 401") && told.summary.contains(cause), "{}", told.summary);
        assert_eq!(told.answer.unwrap().status, 401);
    }
}

#[test]
fn keys_that_nobody_here_has_are_not_guessed_at() {
    let signer = Signer::edwards();
    let token = signer.token(Algorithm::EdDsa, &claims());
    let url = json!([{"issuer": ISSUER, "jwksUri": "https://issuer.example/keys"}]);
    let (endpoint, text) = asked(&url, &[], "/", Some(&token));
    assert_eq!(endpoint.reason.as_deref(), Some("token:no-keys"), "{text}");
    let why =
        "spec.jwtRules[0].jwksUri: https://issuer.example/keys: its keys have not been fetched, which the controller";
    assert!(text.contains(why), "{text}");
    let of_map = json!([{"issuer": ISSUER, "jwksConfigMap": {"name": "keys"}}]);
    let (_, text) = asked(&of_map, &[], "/", Some(&token));
    assert!(text.contains("key \"jwks.json\" of ConfigMap \"keys\" is not there"), "{text}");
    let keys = json!({"keys": [signer.published(None)]}).to_string();
    let map = json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "keys", "namespace": "shop"},
        "data": {"jwks.json": keys},
    });
    let (endpoint, text) = asked(&of_map, std::slice::from_ref(&map), "/", Some(&token));
    assert_eq!(endpoint.verdict, Verdict::Allow, "{text}");
}

#[test]
fn keys_that_the_controller_fetched_hold_for_a_day() {
    let signer = Signer::edwards();
    let token = signer.token(Algorithm::EdDsa, &claims());
    let asked_at = |fetched: i64| {
        let fetched = k8s_openapi::jiff::Timestamp::from_second(fetched).unwrap().to_string();
        let keys = json!({"keys": [signer.published(None)]}).to_string();
        let (url, name) = ("https://issuer.example/keys", "fetched");
        let more = json!({
            "apiVersion": "selvedge.dev/v1alpha1", "kind": "RequestAuthentication",
            "metadata": {"name": name, "namespace": "shop"},
            "spec": {"jwtRules": [{"issuer": ISSUER, "jwksUri": url}]},
            "status": {"keys": [{"source": url, "jwks": keys, "fetchTime": fetched}]},
        });
        let other = json!([{"issuer": "https://other.example", "jwksUri": url}]);
        asked(&other, std::slice::from_ref(&more), "/", Some(&token))
    };
    let (endpoint, text) = asked_at(NOW - KEYS_HOLD + 1);
    assert_eq!(endpoint.verdict, Verdict::Allow, "{text}");
    let (endpoint, text) = asked_at(NOW - KEYS_HOLD);
    assert_eq!(endpoint.reason.as_deref(), Some("token:no-keys"), "{text}");
    assert!(text.contains("were fetched more than 24 hours ago"), "{text}");
}

#[test]
fn whom_else_a_policy_asks_is_said() {
    let signer = Signer::edwards();
    let token = signer.token(Algorithm::EdDsa, &claims());
    let custom = json!({
        "apiVersion": "selvedge.dev/v1alpha1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "ask", "namespace": "shop"},
        "spec": {"action": "CUSTOM", "provider": {"name": "oauth"}, "rules": [{}]},
    });
    let (endpoint, _) = asked(&json!([rule(&signer)]), std::slice::from_ref(&custom), "/", Some(&token));
    assert_eq!((endpoint.verdict, endpoint.reason.as_deref()), (Verdict::Deny, Some("authorizer:shop/oauth")));
    let authorizer = json!({
        "apiVersion": "selvedge.dev/v1alpha1", "kind": "ExternalAuthorizer",
        "metadata": {"name": "oauth", "namespace": "shop"},
        "spec": {"service": {"name": "cart", "port": 80}, "http": {}},
    });
    let (endpoint, text) = asked(&json!([rule(&signer)]), &[custom, authorizer], "/", Some(&token));
    assert_eq!(endpoint.verdict, Verdict::Allow, "{text}");
    assert!(endpoint.note.unwrap().contains("ExternalAuthorizer oauth (of AuthorizationPolicy shop/ask)"));
}
