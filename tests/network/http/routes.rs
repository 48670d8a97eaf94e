//! Routes on real traffic: where requests go, what becomes of them on the way, and what is answered instead.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::{AgentOptions, BOUND, Lab, Pod, PodSpec, Request, eventually, trial_with};
use serde_json::{Value, json};

use super::{Application, Keeping, curl, service, vip};
use crate::lab;

pub fn trials() -> Vec<Trial> {
    vec![
        trial_with("http::routes_share_requests_by_weight_and_by_header", lab(), by_weight_and_by_header),
        trial_with("http::routes_change_what_they_pass_on", lab(), change_what_they_pass_on),
        trial_with("http::routes_answer_in_place_of_a_backend", lab(), answer_in_place),
        trial_with("http::a_route_bounds_the_time_of_a_request", lab(), bounds_the_time),
        trial_with("http::a_mirror_gets_whole_copies_and_the_client_waits_for_none", lab(), a_mirror),
        trial_with("http::a_route_that_asks_for_it_tries_again", lab(), tries_again),
    ]
}

fn by_weight_and_by_header(lab: &Lab) -> Result<()> {
    let shop = Versions::open(lab)?;
    shop.route(
        lab,
        json!([
            {"matches": [{"headers": [{"name": "x-tester", "value": "true"}]}], "backendRefs": [{"name": "v2", "port": 80}]},
            {"backendRefs": [{"name": "v1", "port": 80, "weight": 90}, {"name": "v2", "port": 80, "weight": 10}]},
        ]),
    )?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    let mut connection = Keeping::connect(&shop.web, (vip(1), 80))?;
    for _ in 0..400 {
        let answer = connection.get("/x")?;
        *seen.entry(answer["pod"].as_str().unwrap_or_default().to_owned()).or_default() += 1;
    }
    // Of 400 draws, 40 are expected; 6 sigma to either side.
    let canary = seen.get("v2").copied().unwrap_or_default();
    ensure!((4..=76).contains(&canary), "{seen:?}");
    for _ in 0..10 {
        let answer = shop.web.http((vip(1), 80), &Request::get("/x").header("x-tester", "true"))?.json()?;
        ensure!(answer["pod"] == "v2", "{answer}");
    }
    let line = agents[0].access_line("a routed request", |line| line["service"] == "shop/v2")?;
    ensure!(line["route"] == "shop/cart", "{line}");
    eventually("requests are counted by route", BOUND, || {
        let labels = [("route", "shop/cart"), ("response_code", "200")];
        (agents[0].metrics().ok()?.sum("selvedge_http_requests_total", &labels) == 410.0).then_some(())
    })
}

fn change_what_they_pass_on(lab: &Lab) -> Result<()> {
    let shop = Versions::open(lab)?;
    shop.route(
        lab,
        json!([{
            "matches": [{"path": {"type": "PathPrefix", "value": "/api/v1"}}],
            "filters": [
                {"type": "URLRewrite", "urlRewrite": {
                    "hostname": "cart.internal", "path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/new"},
                }},
                {"type": "RequestHeaderModifier", "requestHeaderModifier": {
                    "set": [{"name": "x-route", "value": "api"}], "remove": ["x-debug"],
                }},
                {"type": "ResponseHeaderModifier", "responseHeaderModifier": {"set": [{"name": "x-seen", "value": "yes"}]}},
            ],
            "backendRefs": [{"name": "v1", "port": 80}],
        }]),
    )?;
    let _agents = lab.start_agents(&AgentOptions::default())?;
    for flag in ["--http1.1", "--http2-prior-knowledge"] {
        let url = format!("http://{}/api/v1/item?q=1", vip(1));
        let text = curl(&shop.web, &[flag, "-i", "-H", "x-debug: 1", &url])?;
        ensure!(text.to_lowercase().contains("x-seen: yes"), "{flag}: {text}");
        let body = text.split("\r\n\r\n").nth(1).unwrap_or_default();
        let answer: Value = serde_json::from_str(body)?;
        ensure!(answer["path"] == "/new/item?q=1" && answer["headers"]["x-route"] == "api", "{flag}: {answer}");
        ensure!(answer["headers"]["x-debug"].is_null(), "{flag}: {answer}");
        let host = if flag == "--http1.1" { &answer["headers"]["host"] } else { &answer["authority"] };
        ensure!(host == "cart.internal", "{flag}: {answer}");
    }
    Ok(())
}

fn answer_in_place(lab: &Lab) -> Result<()> {
    let shop = Versions::open(lab)?;
    let path = |value: &str| json!([{"path": {"type": "PathPrefix", "value": value}}]);
    shop.route(
        lab,
        json!([
            {"matches": path("/moved"), "filters": [{"type": "RequestRedirect", "requestRedirect": {
                "hostname": "elsewhere.example", "statusCode": 301,
            }}]},
            {"matches": path("/missing"), "backendRefs": [{"name": "nobody", "port": 80}]},
            {"matches": path("/v1"), "backendRefs": [{"name": "v1", "port": 80}]},
        ]),
    )?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let ask = |path: &str| shop.web.http_get((vip(1), 80), path);
    let moved = ask("/moved/x?q=1")?;
    ensure!(moved.status == 301, "{moved:?}");
    ensure!(moved.header("location") == Some("http://elsewhere.example/moved/x?q=1"), "{moved:?}");
    for (path, status) in [("/missing", 500), ("/other", 404), ("/v1/x", 200)] {
        let answer = ask(path)?;
        ensure!(answer.status == status, "{path}: {answer:?}");
    }
    ensure!(shop.v1.heard() == ["GET /v1/x"], "{:?}", shop.v1.heard());
    let line = agents[0].access_line("no match", |line| line["status"] == 404)?;
    ensure!(line["transport"] == "none" && line["path"] == "/other", "{line}");
    Ok(())
}

fn bounds_the_time(lab: &Lab) -> Result<()> {
    let shop = Versions::open(lab)?;
    shop.route(lab, json!([{"timeouts": {"request": "500ms"}, "backendRefs": [{"name": "v1", "port": 80}]}]))?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let slow = shop.web.http_get((vip(1), 80), "/sleep/5000")?;
    ensure!(slow.status == 504 && slow.header("selvedge-reason") == Some("timeout"), "{slow:?}");
    shop.web.http_get((vip(1), 80), "/sleep/1").map(drop)?;
    let line = agents[0].access_line("the slow one", |line| line["status"] == 504)?;
    ensure!(line["reason"] == "timeout" && line["route"] == "shop/cart", "{line}");
    Ok(())
}

fn a_mirror(lab: &Lab) -> Result<()> {
    let shop = Versions::open(lab)?;
    shop.route(
        lab,
        json!([{
            "filters": [{"type": "RequestMirror", "requestMirror": {"backendRef": {"name": "v2", "port": 80}}}],
            "backendRefs": [{"name": "v1", "port": 80}],
        }]),
    )?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let answer = shop.web.http((vip(1), 80), &Request::post("/copied", "small"))?.json()?;
    ensure!(answer["pod"] == "v1" && answer["length"] == 5, "{answer}");
    eventually("the mirror hears of it", BOUND, || (shop.v2.heard() == ["POST /copied"]).then_some(()))?;
    let large = shop.web.http((vip(1), 80), &Request::post("/large", vec![b'x'; 100_000]))?.json()?;
    ensure!(large["length"] == 100_000, "{large}");
    eventually("the copy that is dropped is counted", BOUND, || {
        let metrics = agents[0].metrics().ok()?;
        let counted = |outcome| metrics.sum("selvedge_http_mirrored_total", &[("outcome", outcome)]);
        ((counted("sent"), counted("oversize")) == (1.0, 1.0)).then_some(())
    })?;
    ensure!(shop.v2.heard() == ["POST /copied"], "a part of a request was sent: {:?}", shop.v2.heard());
    Ok(())
}

fn tries_again(lab: &Lab) -> Result<()> {
    let shop = Versions::open(lab)?;
    shop.route(
        lab,
        json!([{
            "retry": {"codes": [503], "attempts": 2, "backoff": "10ms"},
            "backendRefs": [{"name": "v1", "port": 80}],
        }]),
    )?;
    let _agents = lab.start_agents(&AgentOptions::default())?;
    let answer = shop.web.http((vip(1), 80), &Request::post("/status/503", "body"))?;
    ensure!(answer.status == 503, "{answer:?}");
    ensure!(shop.v1.heard() == ["POST /status/503"; 3], "{:?}", shop.v1.heard());
    Ok(())
}

/// A Service with routes, and its backends.
pub struct Versions {
    pub web: Pod,
    pub v1: Application,
    pub v2: Application,
    pub pods: [Pod; 2],
}

impl Versions {
    pub fn open(lab: &Lab) -> Result<Self> {
        Self::start(lab, false)
    }

    /// With either of them behind `shop/cart`.
    pub fn both(lab: &Lab) -> Result<Self> {
        Self::start(lab, true)
    }

    fn start(lab: &Lab, both: bool) -> Result<Self> {
        let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
        let v1 = lab.pod(PodSpec::new("shop/v1", "node-b"))?;
        let v2 = lab.pod(PodSpec::new("shop/v2", "node-a"))?;
        let cart = service("shop/cart", 1).port("http", 80, 8080).endpoint(&v1);
        lab.service(&if both { cart.endpoint(&v2) } else { cart })?;
        lab.service(&service("shop/v1", 2).port("http", 80, 8080).endpoint(&v1))?;
        lab.service(&service("shop/v2", 3).port("http", 80, 8080).endpoint(&v2))?;
        Ok(Self { web, v1: Application::start(&v1, 8080)?, v2: Application::start(&v2, 8080)?, pods: [v1, v2] })
    }

    pub fn route(&self, lab: &Lab, rules: Value) -> Result<()> {
        lab.put(&json!({
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "HTTPRoute",
            "metadata": {"namespace": "shop", "name": "cart"},
            "spec": {"parentRefs": [{"group": "", "kind": "Service", "name": "cart", "port": 80}], "rules": rules},
        }))
    }
}
