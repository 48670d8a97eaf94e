//! The admin endpoints of a running agent, and its end by SIGTERM.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::Signal;
use selvedge_lab::{
    AgentOptions, BOUND, Lab, Namespace, PodSpec, Request, Response, authorization, eventually, trial_with,
};
use serde_json::{Value, json};

use crate::lab;

pub fn trials() -> Vec<Trial> {
    vec![
        trial_with("admin::ready_names_what_speaks_against_it", lab(), ready_names_what_speaks_against_it),
        trial_with("admin::the_dump_shows_everything_but_keys", lab(), the_dump_shows_everything_but_keys),
        trial_with("admin::the_log_level_changes_while_the_agent_runs", lab(), the_log_level_changes),
        trial_with("admin::nobody_but_the_node_reaches_the_admin_port", lab(), nobody_but_the_node_reaches_it),
        trial_with("admin::sigterm_drains", lab(), sigterm_drains),
        trial_with("admin::a_port_that_is_taken_ends_the_agent_with_its_name", lab(), a_port_that_is_taken),
    ]
}

fn ready_names_what_speaks_against_it(lab: &Lab) -> Result<()> {
    lab.namespace("shop", true)?;
    let node = lab.node("node-a");
    let ghost = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"namespace": "shop", "name": "ghost"},
        "spec": {"nodeName": "node-a", "serviceAccountName": "ghost", "containers": []},
        "status": {"podIPs": [{"ip": "10.244.1.200"}]},
    });
    lab.put(&ghost)?;
    let agent = node.spawn_agent(&AgentOptions::default())?;
    let ready = || readiness(node, 15021);
    let waits = eventually("/ready names the pod that is not there", BOUND, || {
        let answer = ready().ok()?;
        let reasons = answer.json().ok()?["reasons"].to_string();
        (answer.status == 503 && reasons.contains("pod shop/ghost")).then_some(answer)
    });
    waits.with_context(|| format!("{:?}", ready().map(|answer| answer.text())))?;
    ensure!(node.http_get(loopback(15021), "/live")?.status == 200, "an agent that waits is alive");
    ensure!(readiness(node, 15000)?.status == 503, "the admin port says the same");
    lab.remove("pod-shop-ghost.yaml")?;
    agent.wait_ready()?;
    ensure!(ready()?.json()? == json!({"ready": true, "reasons": []}));
    Ok(())
}

fn the_dump_shows_everything_but_keys(lab: &Lab) -> Result<()> {
    lab.namespace("shop", true)?;
    let web = lab.pod(PodSpec::new("shop/web", "node-a").service_account("web"))?;
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b").service_account("cart"))?;
    lab.service(&selvedge_lab::ServiceSpec::new("shop/cart").port("echo", 7000, 7000).endpoint(&cart))?;
    lab.put(&allow_web())?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let _echo = cart.serve_echo(7000)?;
    let mut held = web.connect((cart.ip(), 7000))?;
    held.write_all(b"held")?;
    held.read_exact(&mut [0; 4])?;

    for (agent, own, direction) in [(&agents[0], "shop/web", "outbound"), (&agents[1], "shop/cart", "inbound")] {
        let dump = agent.dump()?;
        let names = |list: &str| -> Vec<&str> {
            dump[list].as_array().into_iter().flatten().filter_map(|entry| entry["name"].as_str()).collect()
        };
        ensure!(names("workloads") == ["shop/cart", "shop/web"], "{dump:#}");
        ensure!(names("services") == ["shop/cart"], "{dump:#}");
        ensure!(names("policies").iter().any(|name| name.ends_with("shop/allow-web")), "{dump:#}");
        ensure!(dump["capture"]["pods"][0]["pod"] == own && dump["capture"]["pods"][0]["state"] == "captured");
        let connection = &dump["connections"][0];
        ensure!(connection["direction"] == direction && connection["pod"] == own, "{dump:#}");
        ensure!(connection["bytes_sent"] == 4 && connection["bytes_received"] == 4, "{connection}");
        let certificates = dump["certificates"].to_string();
        ensure!(certificates.contains(&format!("spiffe://cluster.local/ns/shop/sa/{}", &own[5..])), "{dump:#}");
        ensure!(dump["trustAnchors"] == 1 && dump["synced"] == true, "{dump:#}");
        ensure!(dump["manifestProblems"] == json!([]), "{dump:#}");
    }
    ensure!(agents[0].dump()?["pools"].as_array().is_some_and(|pools| pools.len() == 1), "one tunnel is pooled");

    let key = fs::read_to_string(lab.ca().join("ca.key"))?;
    let secrets: Vec<&str> = key.lines().filter(|line| !line.starts_with("-----")).collect();
    for node in lab.nodes() {
        let text = node.http_get(loopback(15000), "/dump")?.text();
        ensure!(!text.contains("PRIVATE") && !text.contains("-----BEGIN"), "{text}");
        ensure!(!secrets.iter().any(|line| text.contains(line)), "the CA's key is in the dump");
    }
    Ok(())
}

fn the_log_level_changes(lab: &Lab) -> Result<()> {
    lab.namespace("shop", true)?;
    let node = lab.node("node-a");
    let agent = node.start_agent(&AgentOptions::default())?;
    let put = |query: &str| {
        let request = Request { method: "PUT".to_owned(), ..Request::get(&format!("/log{query}")) };
        node.http(loopback(15000), &request)
    };
    let debugs = || agent.log().lines().filter(|line| line.contains(" DEBUG ")).count();
    ensure!(debugs() == 0, "the level is info");

    let refused = put("?level=inof")?;
    ensure!(refused.status == 400 && refused.text().contains("debug"), "{refused:?}");
    ensure!(put("?level=debug")?.json()? == json!({"level": "debug"}));
    ensure!(node.http_get(loopback(15000), "/log")?.json()?["level"] == "debug");
    lab.namespace("news", true)?;
    eventually("debug lines about a change", BOUND, || (debugs() > 0).then_some(()))?;
    ensure!(put("?level=warn,selvedge::capture=info")?.status == 200);
    ensure!(node.http_get(loopback(15000), "/log")?.json()?["level"].as_str().is_some_and(|l| l.contains("warn")));
    ensure!(!agent.log().contains('\u{1b}'), "colours in a file");
    Ok(())
}

fn nobody_but_the_node_reaches_it(lab: &Lab) -> Result<()> {
    lab.namespace("shop", true)?;
    let joined = lab.pod(PodSpec::new("shop/joined", "node-a"))?;
    let other = lab.pod(PodSpec::new("shop/other", "node-a").outside())?;
    let far = lab.pod(PodSpec::new("shop/far", "node-b").outside())?;
    let _agents = lab.start_agents(&AgentOptions::default())?;
    let node = lab.node("node-a");
    ensure!(node.http_get(loopback(15000), "/live")?.status == 200);

    let from: [(&str, &Namespace); 4] = [
        ("a joined pod", &joined),
        ("a pod outside the mesh", &other),
        ("a pod of another node", &far),
        ("another node", lab.node("node-b")),
    ];
    let addresses = node.gateways().into_iter().chain([node.ip()]);
    for to in addresses {
        for (who, namespace) in from {
            let admin = namespace.http_get((to, 15000), "/live");
            ensure!(admin.is_err(), "{who} has reached the admin port at {to}: {admin:?}");
            let metrics = namespace.http_get((to, 15020), "/metrics").with_context(|| format!("{who} at {to}"))?;
            ensure!(metrics.status == 200 && metrics.text().contains("selvedge_build_info"));
            ensure!(namespace.http_get((to, 15020), "/dump")?.status == 404, "{who} has read the dump");
            ensure!(namespace.http_get((to, 15021), "/ready")?.status == 200);
            ensure!(namespace.http_get((to, 15021), "/metrics")?.status == 404);
        }
    }
    // Its own loopback is not the node's.
    ensure!(other.http_get(loopback(15000), "/live").is_err());
    Ok(())
}

fn sigterm_drains(lab: &Lab) -> Result<()> {
    lab.namespace("shop", true)?;
    let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b"))?;
    let agents = lab.start_agents(&AgentOptions::default().arg("--drain").arg("120s"))?;
    let _echo = cart.serve_echo(7000)?;
    let mut held = web.connect((cart.ip(), 7000))?;
    let mut say = |word: &[u8; 4]| -> Result<()> {
        let mut answer = [0; 4];
        held.write_all(word)?;
        held.read_exact(&mut answer)?;
        ensure!(answer == *word);
        Ok(())
    };
    say(b"one.")?;
    let client = &agents[0];
    client.kill(Signal::SIGTERM)?;
    let node = lab.node("node-a");
    eventually("/ready says that it drains", BOUND, || {
        let answer = readiness(node, 15021).ok()?;
        (answer.status == 503 && answer.text().contains("drains; 1 connections")).then_some(())
    })?;
    say(b"two.")?;
    drop(held);
    ensure!(client.wait(BOUND)?.success(), "{}", client.log_tail());
    let line = client.access_line("the one that was drained", |line| line["direction"] == "outbound")?;
    ensure!(line["reason"].is_null() && line["bytes_sent"] == 8, "{line}");
    Ok(())
}

fn a_port_that_is_taken(lab: &Lab) -> Result<()> {
    let node = lab.node("node-a");
    for (port, server) in [(15000, "admin"), (15020, "metrics"), (15021, "readiness")] {
        let taken = node.listen(loopback(port))?;
        let agent = node.spawn_agent(&AgentOptions::default())?;
        let status = agent.wait(BOUND)?;
        ensure!(status.code() == Some(78), "{status}: another start would not help\n{}", agent.log_tail());
        let log = agent.log();
        ensure!(log.contains(&format!("the {server} server cannot listen on ")), "{log}");
        ensure!(log.contains(&format!(":{port}: Address already in use")) && log.contains("free the port"), "{log}");
        drop(taken);
    }
    Ok(())
}

fn readiness(node: &Namespace, port: u16) -> Result<Response> {
    node.http_get(loopback(port), "/ready")
}

fn allow_web() -> Value {
    let web = json!({"source": {"serviceAccounts": ["shop/web"]}});
    authorization("shop/allow-web", json!({"action": "ALLOW", "rules": [{"from": [web]}]}))
}

fn loopback(port: u16) -> SocketAddr {
    (IpAddr::from(Ipv4Addr::LOCALHOST), port).into()
}
