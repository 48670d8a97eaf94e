//! Tokens of requests, on real traffic.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use aws_lc_rs::signature::Ed25519KeyPair;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use libtest_mimic::Trial;
use selvedge_lab::{AgentOptions, BOUND, Lab, Request, Response, eventually, trial_with};
use serde_json::{Value, json};

use super::{Shop, curl};
use crate::lab;

pub fn trials() -> Vec<Trial> {
    vec![
        trial_with("tokens::are_judged_where_a_request_arrives_and_become_headers", lab(), as_documented),
        trial_with("tokens::that_are_forwarded_stay", lab(), forwarded),
    ]
}

/// Signs with the key that the page publishes: RFC 8037, appendix A.1.
fn token(algorithm: &str, change: impl FnOnce(&mut Value)) -> Result<String> {
    let (seed, public) = ("nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A", "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo");
    let (seed, public) = (URL_SAFE_NO_PAD.decode(seed)?, URL_SAFE_NO_PAD.decode(public)?);
    let pair = Ed25519KeyPair::from_seed_and_public_key(&seed, &public)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let mut claims = json!({
        "iss": "https://login.example.com", "sub": "alice", "aud": "cart", "exp": now + 600, "account": {"level": 7},
    });
    change(&mut claims);
    let header = json!({"alg": algorithm, "kid": "one"}).to_string();
    let signed = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims.to_string()));
    let signature = match algorithm {
        "none" => Vec::new(),
        // With the public key for a secret.
        "HS256" => {
            let key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, &public);
            aws_lc_rs::hmac::sign(&key, signed.as_bytes()).as_ref().to_vec()
        }
        _ => pair.sign(signed.as_bytes()).as_ref().to_vec(),
    };
    Ok(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature)))
}

fn good() -> Result<String> {
    token("EdDSA", |_| {})
}

pub fn document(page: &str) -> Result<String> {
    let path = format!("{}/docs/{page}", env!("CARGO_MANIFEST_DIR"));
    let page = std::fs::read_to_string(path)?;
    let example = page.split("```yaml\n").nth(1).and_then(|rest| rest.split("```").next()).context("no example")?;
    Ok(example.to_owned())
}

fn ask(shop: &Shop, path: &str, token: Option<&str>) -> Result<Response> {
    let mut request = Request::get(path).header("x-user", "root").header("x_user", "root").header("x-level", "9");
    if let Some(token) = token {
        request = request.header("authorization", &format!("Bearer {token}"));
    }
    shop.web.http(shop.vip(), &request)
}

fn as_documented(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    lab.write("example.yaml", &document("request-authentication.md")?)?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    // To either endpoint, same-node and by the tunnel.
    for pod in ["near", "far"] {
        eventually(&format!("an answer of {pod}"), BOUND, || {
            let answer = ask(&shop, "/x?q=1", Some(&good().ok()?)).ok()?;
            let answer = answer.json().ok().filter(|_| answer.status == 200)?;
            let headers = &answer["headers"];
            let verified = headers["x-user"] == "alice" && headers["x-level"] == "7";
            let stripped = headers["authorization"].is_null() && headers["x_user"].is_null();
            (answer["pod"] == pod && verified && stripped).then_some(())
        })?;
    }
    let free = ask(&shop, "/healthz", None)?;
    let heard = free.json()?;
    ensure!(
        free.status == 200 && heard["headers"]["x-user"].is_null() && heard["headers"]["x_user"].is_null(),
        "{heard}"
    );
    ensure!(heard["headers"]["x-level"].is_null(), "{heard}");
    let none = ask(&shop, "/x", None)?;
    ensure!(none.status == 403 && none.header("selvedge-reason") == Some("policy"), "{none:?}");
    let by_query = ask(&shop, &format!("/x?access_token={}&q=1", good()?), None)?;
    ensure!(by_query.status == 200 && by_query.json()?["path"] == "/x?q=1", "{by_query:?}");
    let forged = {
        let good = good()?;
        let (_, signature) = good.rsplit_once('.').context("no signature")?;
        let other = token("EdDSA", |claims| claims["sub"] = "mallory".into())?;
        format!("{}.{signature}", other.rsplit_once('.').context("no signature")?.0)
    };
    for (what, token, fault) in [
        ("expired", token("EdDSA", |claims| claims["exp"] = 1_000_000_000.into())?, "expired"),
        ("not yet", token("EdDSA", |claims| claims["nbf"] = 100_000_000_000_u64.into())?, "not-yet"),
        ("without an end", token("EdDSA", |claims| drop(claims.as_object_mut().unwrap().remove("exp")))?, "expired"),
        ("another audience", token("EdDSA", |claims| claims["aud"] = "bank".into())?, "audience"),
        ("another issuer", token("EdDSA", |claims| claims["iss"] = "https://evil.example".into())?, "issuer"),
        ("none", token("none", |_| {})?, "algorithm"),
        ("a shared secret", token("HS256", |_| {})?, "algorithm"),
        ("another key type", token("RS256", |_| {})?, "unknown-key"),
        ("forged", forged, "signature"),
        ("no token", "abc".to_owned(), "malformed"),
    ] {
        let answer = ask(&shop, "/healthz", Some(&token)).with_context(|| what.to_owned())?;
        ensure!(answer.status == 401 && answer.header("selvedge-reason") == Some("token"), "{what}: {answer:?}");
        let challenge = answer.header("www-authenticate").unwrap_or_default();
        ensure!(challenge.starts_with("Bearer realm=") && challenge.contains("invalid_token"), "{what}: {challenge}");
        let wanted = format!("token:{fault}");
        eventually(&format!("a line of {what}"), BOUND, || {
            let said = |line: &Value| line["reason"] == wanted.as_str() && line["status"] == 401;
            let told = agents.iter().any(|agent| agent.access_log().is_ok_and(|lines| lines.iter().any(said)));
            told.then_some(())
        })?;
    }
    let two = curl(
        &shop.web,
        &[
            "-o",
            "/dev/null",
            "-w",
            "%{http_code}",
            "-H",
            &format!("Authorization: Bearer {}", good()?),
            &shop.url(&format!("/x?access_token={}", token("EdDSA", |claims| claims["sub"] = "bob".into())?)),
        ],
    )?;
    ensure!(two == "400", "two tokens: {two}");
    let grpc = curl(
        &shop.web,
        &[
            "--http2-prior-knowledge",
            "-i",
            "-X",
            "POST",
            "-H",
            "content-type: application/grpc",
            "-H",
            "authorization: Bearer x",
            &shop.url("/a.B/C"),
        ],
    )?;
    ensure!(grpc.contains("HTTP/2 200") && grpc.contains("grpc-status: 16"), "{grpc}");
    eventually("tokens are counted", BOUND, || {
        let sum: f64 = agents
            .iter()
            .filter_map(|agent| agent.metrics().ok())
            .map(|metrics| metrics.sum("selvedge_http_tokens_total", &[("result", "ok")]))
            .sum();
        (sum >= 3.0).then_some(())
    })
}

fn forwarded(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    let yaml = document("request-authentication.md")?
        .replace("      audiences: [cart]\n", "      forwardOriginalToken: true\n");
    lab.write("example.yaml", &yaml)?;
    let _agents = lab.start_agents(&AgentOptions::default())?;
    let token = token("EdDSA", |claims| claims["aud"] = "anybody".into())?;
    let answer = ask(&shop, "/x", Some(&token))?;
    let heard = answer.json()?;
    ensure!(
        heard["headers"]["authorization"] == format!("Bearer {token}") && heard["headers"]["x-user"] == "alice",
        "{heard}"
    );
    Ok(())
}
