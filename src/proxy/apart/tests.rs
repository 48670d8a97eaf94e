//! One property drives both places of policy for requests: what the agent of the server decides of one that comes to it, and
//! what a waypoint of its own and the agent behind it decide of the same, each by its own way through the code; and what
//! `selvedge explain` says of both.

use std::sync::mpsc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::Request;
use http::request::Parts;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};

use crate::policy::tests::oracle::{number, policies_of_requests};

mod world;

use world::{Asked, Place, World};

/// What becomes of a request: what the application gets, or what the client is told and why.
type Outcome = Result<String, (u16, String)>;

#[test]
fn a_request_is_judged_alike_on_the_node_and_in_a_waypoint_of_its_own() {
    let (node, apart) = (World::new(Place::Node), World::new(Place::Apart));
    let (told, hear) = mpsc::channel();
    apart.on_worker(move |apart| {
        let mut runner = TestRunner::new(Config { failure_persistence: None, ..Config::with_cases(CASES) });
        let tally = std::cell::Cell::new((0, 0));
        let outcome = runner.run(&case(), |(policies, tokens, asked)| {
            let policies: Vec<Value> = number(policies).into_iter().chain(tokens).collect();
            node.enforce(&policies);
            apart.enforce(&policies);
            let (here, there) = (node.judge(&asked), apart.judge(&asked));
            let (passed, refused) = tally.get();
            tally.set(if here.is_ok() { (passed + 1, refused) } else { (passed, refused + 1) });
            prop_assert_eq!(&here, &there);
            for world in [&node, apart] {
                let told = world.explain(&asked);
                prop_assert_eq!(&told.ended(), &here.clone().err(), "{:?}", told.connection);
            }
            Ok(())
        });
        drop(told.send(outcome.map(|()| tally.get()).map_err(|error| error.to_string())));
    });
    let (passed, refused) =
        hear.recv_timeout(BOUND).expect("the worker has ended").unwrap_or_else(|error| panic!("{error}"));
    // A property over cases that all end alike says nothing.
    assert!(passed > CASES / 10 && refused > CASES / 10, "{passed} passed and {refused} were refused");
}

#[test]
fn who_comes_beside_a_waypoint_is_refused_whatever_policy_says_of_him() {
    let apart = World::new(Place::Apart);
    let reading = json!({ "rules": [{ "to": [{ "operation": { "methods": ["GET"] } }] }] });
    apart.enforce(&[policy("AuthorizationPolicy", "reading", reading)]);
    let asked =
        Asked { client: Some("shop/web"), ip: "10.0.0.1", port: 8080, head: head("GET", "cart", "/a", None, None) };
    assert_eq!(apart.beside(&asked), Err((503, "waypoint".to_owned())));
    // Without a policy that speaks of requests anybody may come as he likes.
    apart.enforce(&[]);
    assert!(apart.beside(&asked).is_ok());
}

fn case() -> impl Strategy<Value = (Vec<Value>, Option<Value>, Asked)> {
    (policies_of_requests(), prop::option::of(authentication()), asked())
}

fn asked() -> impl Strategy<Value = Asked> {
    let client = select(vec![
        ("shop/web", "10.0.0.1"),
        ("bank/web", "10.0.0.2"),
        ("shop/cart", "10.0.0.3"),
        ("bank/teller", "11.0.0.1"),
    ]);
    let request = (
        select(vec!["GET", "PUT", "DELETE", "get", "POST"]),
        select(vec!["cart.shop", "cart.shop:80", "CART.shop.", "other", "[fd00::9]:80"]),
        path(),
        select(vec![None, Some("a"), Some("bc")]),
        token(),
    );
    (client, select(vec![80, 8080]), request).prop_map(|((account, ip), port, (method, host, path, team, token))| {
        Asked { client: Some(account), ip, port, head: head(method, host, &path, team, token.as_deref()) }
    })
}

/// Paths as attackers write them, too.
fn path() -> impl Strategy<Value = String> {
    let segment = select(vec![
        "a",
        "b",
        "admin",
        "A",
        "",
        ".",
        "..",
        "%2e",
        "%2E%2e",
        "%61",
        "%2F",
        "%5c",
        "%00",
        "%",
        "%zz",
        "..;",
        ";x=1",
        "a%20b",
        "c%c3%a9",
        "~",
        "%7e",
        "a?q=/../b",
        "*",
    ]);
    prop::collection::vec(segment, 0..5).prop_map(|segments| format!("/{}", segments.join("/")))
}

fn head(method: &str, host: &str, path: &str, team: Option<&str>, token: Option<&str>) -> Parts {
    let request = Request::builder().method(method).header("host", host).header("x-user", "root");
    let request = team.into_iter().fold(request, |request, team| request.header("x-team", team));
    let request =
        token.into_iter().fold(request, |request, token| request.header("authorization", format!("Bearer {token}")));
    // What is no target of a request reaches neither place.
    let request = request.uri(path).body(()).or_else(|_| Request::builder().uri("/a").header("host", host).body(()));
    request.expect("it is a request").into_parts().0
}

/// Whose tokens are taken: over the namespace, by label, or at one Service.
fn authentication() -> impl Strategy<Value = Value> {
    let scope = select(vec![
        json!({}),
        json!({ "selector": { "matchLabels": { "app": "cart" } } }),
        json!({ "targetRefs": [{ "group": "", "kind": "Service", "name": "cart" }] }),
        json!({ "targetRefs": [{ "group": "", "kind": "Service", "name": "web" }] }),
    ]);
    (scope, any::<bool>()).prop_map(|(mut spec, forward)| {
        spec["jwtRules"] = json!([{
            "issuer": "https://id", "jwks": json!({ "keys": [published()] }).to_string(), "forwardOriginalToken": forward,
            "outputClaimToHeaders": [{ "header": "x-user", "claim": "sub" }, { "header": "x-team", "claim": "team" }],
        }]);
        policy("RequestAuthentication", "tokens", spec)
    })
}

fn policy(kind: &str, name: &str, spec: Value) -> Value {
    let metadata = json!({ "namespace": "shop", "name": name });
    json!({ "apiVersion": "selvedge.dev/v1alpha1", "kind": kind, "metadata": metadata, "spec": spec })
}

fn token() -> impl Strategy<Value = Option<String>> {
    let until = SystemTime::now().duration_since(UNIX_EPOCH).expect("it is later than 1970").as_secs() + 3600;
    let claims = |subject: &str, issuer: &str, until: u64| {
        let claims = json!({ "iss": issuer, "sub": subject, "exp": until, "groups": ["staff", subject], "team": "a" });
        Some(signed(&claims))
    };
    select(vec![
        None,
        None,
        claims("ann", "https://id", until),
        claims("ben", "https://id", until),
        claims("ann", "https://id", 1_000_000_000),
        claims("ann", "https://elsewhere", until),
        Some("no.token".to_owned()),
    ])
}

fn signed(claims: &Value) -> String {
    let encoded = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let text = format!("{}.{}", encoded(&json!({ "alg": "EdDSA" })), encoded(claims));
    format!("{text}.{}", URL_SAFE_NO_PAD.encode(key().sign(text.as_bytes())))
}

fn published() -> Value {
    json!({ "kty": "OKP", "crv": "Ed25519", "x": URL_SAFE_NO_PAD.encode(key().public_key()) })
}

fn key() -> Ed25519KeyPair {
    Ed25519KeyPair::from_seed_unchecked(&[7; 32]).expect("it is a seed")
}

const CASES: u32 = 3000;
const BOUND: Duration = Duration::from_secs(600);
