//! The same policies and the same requests in both places.

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::{AgentOptions, BOUND, Lab, Request, Response, ServiceSpec, eventually, trial_with};
use serde_json::{Value, json};

use super::{Place, Shop, vip};
use crate::http::Keeping;
use crate::http::l7_policy::{TRICKS, rules, table};
use crate::lab;

pub fn trials() -> Vec<Trial> {
    vec![trial_with("waypoints::judging_ends_as_it_does_on_the_node", lab(), as_on_the_node)]
}

fn as_on_the_node(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    rules().iter().try_for_each(|policy| lab.put(policy))?;
    let (agents, waypoint) = shop.run(lab, &AgentOptions::default(), &[])?;
    let mut requests = table();
    requests.extend(TRICKS.map(|(path, status, _)| (Request::get(path), status)));
    let judged = || -> Result<Vec<Told>> {
        requests.iter().map(|(request, _)| told(&Keeping::connect(&shop.web, shop.vip())?.send(request)?)).collect()
    };
    let apart = judged()?;
    for ((request, status), (told, ..)) in requests.iter().zip(&apart) {
        ensure!(told == status, "{request:?}: {told}, and not {status}");
    }
    eventually("all of them went through the waypoint", BOUND, || {
        let counted = waypoint.metrics().ok()?.sum("selvedge_http_requests_total", &[]);
        (counted >= requests.len() as f64).then_some(())
    })?;
    for (name, number) in [("cart", 1), ("near", 11), ("far", 12)] {
        let service = ServiceSpec::new(&format!("shop/{name}")).cluster_ip(vip(number)).port("http", 80, 8080);
        let pods = shop.pods.iter().filter(|pod| name == "cart" || name == pod.name());
        let service = pods.fold(service, |service, pod| service.endpoint(pod));
        lab.service(&service.field("/metadata/annotations", json!({"selvedge.dev/waypoint": Place::Node.key()})))?;
    }
    lab.settle(&agents)?;
    let inbound = |line: &Value| line["direction"] == "inbound" && line["path"] == "/moved";
    eventually("the agents judge", BOUND, || {
        shop.web.http_get(shop.vip(), "/moved").ok()?;
        agents.iter().any(|agent| agent.access_log().is_ok_and(|lines| lines.iter().any(inbound))).then_some(())
    })?;
    // Nothing goes that way any more.
    drop(waypoint);
    let node = judged()?;
    for ((request, _), (apart, node)) in requests.iter().zip(apart.iter().zip(&node)) {
        ensure!(apart == node, "{request:?}: {apart:?} in the waypoint, and {node:?} on the node");
    }
    Ok(())
}

/// The status, the reason, and what the application heard but for whom it is.
type Told = (u16, Option<String>, Value);

fn told(answer: &Response) -> Result<Told> {
    let reason = answer.header("selvedge-reason").map(str::to_owned);
    let mut heard = if answer.status == 200 { answer.json()? } else { Value::Null };
    if let Some(heard) = heard.as_object_mut() {
        heard.remove("pod");
    }
    Ok((answer.status, reason, heard))
}
