//! Tokens that a waypoint of its own judges.

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::{AgentOptions, Lab, ServiceSpec, trial_with};
use serde_json::json;

use super::{Shop, vip};
use crate::http::Application;
use crate::http::tokens::{Judge, document, forwarding, good, stays};
use crate::lab;

pub fn trials() -> Vec<Trial> {
    vec![
        trial_with("waypoints::tokens_are_judged_there_and_nowhere_else", lab(), as_documented),
        trial_with("waypoints::tokens_that_are_forwarded_stay", lab(), forwarded),
        trial_with("waypoints::tokens_for_whom_an_agent_judges_arrive_as_they_were_sent", lab(), for_an_agent),
    ]
}

fn as_documented(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    lab.write("example.yaml", &document("request-authentication.md")?)?;
    let (agents, waypoint) = shop.run(lab, &AgentOptions::default(), &[])?;
    let access_log = || waypoint.access_log();
    let held =
        || waypoint.metrics().map_or(0.0, |metrics| metrics.sum("selvedge_http_tokens_total", &[("result", "ok")]));
    Judge { web: &shop.web, to: shop.vip(), access_log: &access_log, held: &held }.is_as_documented()?;
    // Nobody gets in beside the waypoint, however good the token; and the endpoints' agents look at none.
    for pod in &shop.pods {
        let beside = Judge { web: &shop.web, to: (pod.ip(), 8080), access_log: &access_log, held: &held };
        let reached = beside.ask("/x", Some(&good()?)).is_ok_and(|answer| answer.status == 200);
        ensure!(!reached, "{} was reached beside the waypoint", pod.name());
    }
    for agent in &agents {
        ensure!(agent.metrics()?.sum("selvedge_http_tokens_total", &[]) == 0.0, "the agent of {}", agent.node());
    }
    Ok(())
}

fn forwarded(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    lab.write("example.yaml", &forwarding()?)?;
    let (_agents, _waypoint) = shop.run(lab, &AgentOptions::default(), &[])?;
    stays(&shop.web, shop.vip())
}

/// A route leads from the waypoint to a Service whose requests are read on the node: both judge the token that the client
/// sent, and the agent is who makes headers of it.
fn for_an_agent(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    let beside = ServiceSpec::new("shop/beside").cluster_ip(vip(3)).port("http", 80, 8081).endpoint(&shop.pods[1]);
    lab.service(&beside.field("/metadata/annotations", json!({"selvedge.dev/waypoint": "node"})))?;
    let application = Application::start(&shop.pods[1], 8081)?;
    let everywhere = document("request-authentication.md")?.replace("{kind: Service, name: cart}", SERVICES);
    lab.write("example.yaml", &everywhere)?;
    lab.put(&json!({
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"namespace": "shop", "name": "cart"},
        "spec": {
            "parentRefs": [{"group": "", "kind": "Service", "name": "cart"}],
            "rules": [{"backendRefs": [{"name": "beside", "port": 80}]}],
        },
    }))?;
    let (agents, waypoint) = shop.run(lab, &AgentOptions::default(), &[])?;
    let access_log = || waypoint.access_log();
    let judge = Judge { web: &shop.web, to: shop.vip(), access_log: &access_log, held: &|| 0.0 };
    let answer = judge.ask("/x?q=1", Some(&good()?))?;
    ensure!(answer.status == 200, "{answer:?}");
    let heard = answer.json()?;
    ensure!(heard["headers"]["x-user"] == "alice" && heard["headers"]["x_user"].is_null(), "{heard}");
    ensure!(heard["headers"]["authorization"].is_null() && heard["path"] == "/x?q=1", "{heard}");
    for (token, status) in [(Some("abc"), 401), (None, 403)] {
        let answer = judge.ask("/x", token)?;
        ensure!(answer.status == status, "{token:?}: {answer:?}");
    }
    ensure!(application.heard() == ["GET /x"], "{:?}", application.heard());
    ensure!(agents[1].metrics()?.sum("selvedge_http_tokens_total", &[("result", "ok")]) == 1.0);
    ensure!(waypoint.metrics()?.sum("selvedge_http_tokens_total", &[("result", "ok")]) == 1.0);
    Ok(())
}

const SERVICES: &str = "{kind: Service, name: cart}\n    - {kind: Service, name: beside}";
