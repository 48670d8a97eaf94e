//! External authorizers that a waypoint of its own asks.

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::{AgentOptions, BOUND, Lab, Request, Response, authorization, eventually, trial_with};
use serde_json::json;

use super::Shop;
use crate::http::authorizers::{Gate, asking_route, put};
use crate::http::tokens::document;
use crate::lab;

pub fn trials() -> Vec<Trial> {
    vec![
        trial_with("waypoints::authorizers_are_asked_by_http_as_the_waypoint", lab(), by_http),
        trial_with("waypoints::authorizers_are_told_who_the_client_is", lab(), by_grpc),
        trial_with("waypoints::authorizers_are_asked_by_a_route", lab(), by_route),
    ]
}

fn by_http(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    let gate = Gate::open(lab)?;
    only_the_waypoint_asks(lab)?;
    lab.write("example.yaml", &document("external-authorization.md")?)?;
    let (agents, waypoint) = shop.run(lab, &AgentOptions::default(), &[])?;
    let passed = ask(&shop, "/x?q=1", "yes")?;
    let heard = passed.json()?;
    ensure!(passed.status == 200 && passed.header("set-cookie") == Some("session=1"), "{passed:?}");
    ensure!(passed.header("x-else").is_none(), "{passed:?}");
    ensure!(heard["headers"]["x-user"] == "alice" && heard["headers"]["x_user"].is_null(), "{heard}");
    ensure!(heard["length"] == 5 && heard["peer"] == shop.web.ip().to_string(), "{heard}");
    let wanted = format!("POST /check/x?q=1 from {}", waypoint.pod.ip());
    ensure!(gate.heard() == [wanted], "{:?}", gate.heard());
    let denied = ask(&shop, "/x", "no")?;
    ensure!(denied.status == 302 && denied.header("location") == Some("https://login.example/"), "{denied:?}");
    ensure!(denied.body == b"please log in" && denied.header("selvedge-reason") == Some("authorizer"), "{denied:?}");
    let before = gate.heard().len();
    ensure!(ask(&shop, "/healthz", "no")?.status == 200 && gate.heard().len() == before, "{:?}", gate.heard());
    for wish in ["broken", "slow"] {
        let failed = ask(&shop, "/x", wish)?;
        ensure!(failed.status == 403 && failed.header("selvedge-reason") == Some("authorizer"), "{wish}: {failed:?}");
    }
    let line = waypoint.access_line("a refusal", |line| line["reason"] == "authorizer:shop/login")?;
    ensure!(line["direction"] == "relayed" && line["source_pod"] == "shop/web" && line["status"] == 302, "{line}");
    drop(gate);
    let away = ask(&shop, "/x", "yes")?;
    ensure!(away.status == 403 && away.header("selvedge-reason") == Some("authorizer"), "{away:?}");
    let asked = |line: &serde_json::Value| line["destination_pod"] == "auth/gate" && line["direction"] == "inbound";
    let line = agents[1].access_line("the question", asked)?;
    ensure!(line["source_identity"] == format!("spiffe://{WAYPOINT}"), "{line}");
    let counted = |verdict: &str| -> Result<f64> {
        Ok(waypoint.metrics()?.sum("selvedge_http_authorizer_checks_total", &[("verdict", verdict)]))
    };
    ensure!((counted("allow")?, counted("deny")?, counted("error")?) == (1.0, 1.0, 3.0));
    let paths = [shop.near.heard(), shop.far.heard()].concat();
    ensure!(paths.iter().all(|path| path == "POST /x" || path == "POST /healthz") && paths.len() == 2, "{paths:?}");
    Ok(())
}

fn by_grpc(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    let gate = Gate::open(lab)?;
    only_the_waypoint_asks(lab)?;
    let service = json!({"name": "gate", "namespace": "auth", "port": 90});
    put(lab, json!({"service": service, "grpc": {}, "includeRequestBodyInCheck": {"maxRequestBytes": 5}}), "gate")?;
    let (_agents, _waypoint) = shop.run(lab, &AgentOptions::default(), &[])?;
    let passed = ask(&shop, "/x?q=1", "yes")?;
    let heard = passed.json()?;
    ensure!(passed.status == 200 && passed.header("x-checked") == Some("1"), "{passed:?}");
    ensure!(heard["headers"]["x-user"] == "alice" && heard["headers"]["x-allow"].is_null(), "{heard}");
    let pod = if heard["pod"] == "near" { &shop.pods[0] } else { &shop.pods[1] };
    let of = "spiffe://cluster.local/ns/shop/sa/default";
    let wanted = format!("POST /x?q=1 \"hello\" of {of} to {}:8080", pod.ip());
    ensure!(gate.heard() == [wanted], "{:?}", gate.heard());
    let denied = ask(&shop, "/x", "no")?;
    ensure!(denied.status == 401 && denied.body == b"who are you?", "{denied:?}");
    let large = shop.web.http(shop.vip(), &Request::post("/x", "larger").header("x-allow", "yes"))?;
    ensure!(large.status == 413, "{large:?}");
    // What was made of a request for an endpoint that cannot be reached is no part of the next question.
    let Shop { near, far, web, .. } = shop;
    drop(near);
    let before = gate.heard().len();
    let asked = eventually("the dead endpoint is tried", BOUND, || {
        let request = Request::post("/y", "hello").header("x-allow", "yes");
        let answer = web.http((super::vip(1), 80), &request).ok()?;
        let asked = gate.heard()[before..].iter().filter(|line| line.starts_with("POST /y")).count();
        let answered = far.heard().iter().filter(|path| *path == "POST /y").count();
        (answer.status != 200 || asked > answered).then_some((answer, asked, answered))
    })?;
    ensure!(asked.0.status == 200, "{asked:?}");
    Ok(())
}

fn by_route(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    let gate = Gate::open(lab)?;
    only_the_waypoint_asks(lab)?;
    lab.put(&asking_route())?;
    let (_agents, _waypoint) = shop.run(lab, &AgentOptions::default(), &[])?;
    let passed = ask(&shop, "/x", "yes")?;
    ensure!(passed.status == 200 && passed.json()?["headers"]["x-user"] == "alice", "{passed:?}");
    let wanted = "POST /x \"\" of spiffe://cluster.local/ns/shop/sa/default to 10.96.0.1:80";
    ensure!(gate.heard() == [wanted], "{:?}", gate.heard());
    let denied = ask(&shop, "/x", "no")?;
    ensure!(denied.status == 401 && denied.body == b"who are you?", "{denied:?}");
    drop(gate);
    ensure!(ask(&shop, "/x", "yes")?.status == 403, "nobody could be asked");
    Ok(())
}

/// The authorizer's own policy: who asks is the waypoint, and no pod of `shop`.
fn only_the_waypoint_asks(lab: &Lab) -> Result<()> {
    lab.put(&authorization("auth/askers", json!({"rules": [{"from": [{"source": {"principals": [WAYPOINT]}}]}]})))
}

fn ask(shop: &Shop, path: &str, wish: &str) -> Result<Response> {
    let request =
        Request::post(path, "hello").header("x-allow", wish).header("x-user", "root").header("x_user", "root");
    shop.web.http(shop.vip(), &request)
}

const WAYPOINT: &str = "cluster.local/ns/infra/sa/gw-selvedge-waypoint";
