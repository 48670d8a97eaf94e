//! Which connections share a tunnel, and for how long.

use std::collections::BTreeSet;
use std::io::{Read, Write};

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::{Agent, AgentOptions, BOUND, Lab, Pod, PodSpec, eventually, trial_with};

use crate::lab;

pub fn trials() -> Vec<Trial> {
    vec![
        trial_with("pool::a_tunnel_is_shared_by_one_pod_only_and_goes_with_it", lab(), one_pod_only),
        trial_with("pool::a_fast_tunnel_carries_flow_after_flow_of_one_pod_and_goes_with_it", lab(), flow_after_flow),
    ]
}

fn one_pod_only(lab: &Lab) -> Result<()> {
    let client = |name: &str, account: &str| lab.pod(PodSpec::new(name, "node-a").service_account(account));
    let clients = [client("shop/web", "web")?, client("shop/web-twin", "web")?, client("shop/admin", "admin")?];
    let server = |name: &str| lab.pod(PodSpec::new(name, "node-b").service_account("cart"));
    let servers = [server("shop/cart")?, server("shop/cart-twin")?];
    // One thread, so that there is one pool.
    let agents = lab.start_agents(&AgentOptions::default().hbone().arg("--workers").arg("1"))?;
    let _echoes = [servers[0].serve_echo(8080)?, servers[1].serve_echo(8080)?];
    for _ in 0..10 {
        for client in &clients {
            for server in &servers {
                echo(client, server)?;
            }
        }
    }
    let labels = [("role", "client"), ("result", "ok")];
    let handshakes = agents[0].metrics()?.sum("selvedge_tls_handshakes_total", &labels);
    ensure!(handshakes == 6.0, "{handshakes} tunnels for 3 clients and 2 servers");
    let tunnels = pooled(&agents[0])?;
    ensure!(tunnels.len() == 6, "{tunnels:#?}");
    for client in &clients {
        let account = format!("spiffe://cluster.local/ns/shop/sa/{}", client.service_account());
        let own = tunnels.iter().filter(|(uid, identity)| uid.starts_with(client.uid()) && *identity == account);
        ensure!(own.count() == 2, "{} has others: {tunnels:#?}", client.full_name());
    }
    // Each flow was decided by the identity of its own tunnel.
    for account in ["web", "admin"] {
        let identity = format!("spiffe://cluster.local/ns/shop/sa/{account}");
        agents[1].access_line(account, |line| line["source_identity"] == identity.as_str())?;
    }
    for (what, gone, left) in [("a client", "pod-shop-web-twin.yaml", 4), ("a server", "pod-shop-cart-twin.yaml", 2)] {
        lab.remove(gone)?;
        eventually(&format!("the tunnels of {what} that left are gone"), BOUND, || {
            (pooled(&agents[0]).ok()?.len() == left).then_some(())
        })?;
    }
    echo(&clients[0], &servers[0])?;
    let after = agents[0].metrics()?.sum("selvedge_tls_handshakes_total", &labels);
    ensure!(after == handshakes, "the tunnels of those who stayed were not kept");
    Ok(())
}

fn flow_after_flow(lab: &Lab) -> Result<()> {
    let client = |name: &str, account: &str| lab.pod(PodSpec::new(name, "node-a").service_account(account));
    let clients = [client("shop/web", "web")?, client("shop/web-twin", "web")?, client("shop/admin", "admin")?];
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b").service_account("cart"))?;
    let options = AgentOptions::default().arg("--workers").arg("1").arg("--tunnel").arg("auto");
    let agents = lab.start_agents(&options)?;
    let _echo = cart.serve_echo(8080)?;
    const ROUNDS: usize = 20;
    for _ in 0..ROUNDS {
        for client in &clients {
            echo(client, &cart)?;
        }
    }
    let flows = |result: &str| -> Result<f64> {
        Ok(agents[0].metrics()?.sum("selvedge_fast_pool_opens_total", &[("result", result)]))
    };
    let (hits, misses) = (flows("hit")?, flows("miss")?);
    ensure!(hits + misses == (ROUNDS * clients.len()) as f64, "{hits} flows on waiting tunnels, {misses} on new ones");
    // Each client's first flow has to wait for a handshake, and a second may come before the first has gone.
    ensure!(misses <= 3.0 * clients.len() as f64, "{misses} of {} flows waited for a handshake", hits + misses);
    for client in &clients {
        let account = format!("spiffe://cluster.local/ns/shop/sa/{}", client.service_account());
        let tunnels = pooled(&agents[0])?;
        let own = |(uid, identity): &&(String, String)| uid.starts_with(client.uid()) && *identity == account;
        ensure!(tunnels.iter().any(|tunnel| own(&tunnel)), "{} has none: {tunnels:#?}", client.full_name());
    }
    for account in ["web", "admin"] {
        let identity = format!("spiffe://cluster.local/ns/shop/sa/{account}");
        agents[1]
            .access_line(account, |line| line["source_identity"] == identity.as_str() && line["transport"] == "fast")?;
    }
    lab.remove("pod-shop-web-twin.yaml")?;
    eventually("the tunnels of a client that left are gone", BOUND, || {
        let left = pooled(&agents[0]).ok()?;
        (!left.iter().any(|(uid, _)| uid.starts_with(clients[1].uid()))).then_some(())
    })?;
    lab.remove("pod-shop-cart.yaml")?;
    eventually("no tunnel to a server that left is there", BOUND, || {
        let open = |agent: &Agent| Some(agent.metrics().ok()?.sum("selvedge_fast_connections", &[]));
        (open(&agents[0])? == 0.0 && open(&agents[1])? == 0.0).then_some(())
    })
}

/// Of each pooled tunnel the source (and destination, to tell them apart) and the identity that it shows.
fn pooled(agent: &Agent) -> Result<BTreeSet<(String, String)>> {
    let dump = agent.dump()?;
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let pools = dump["pools"].as_array().context("no pools")?;
    let tunnels = pools.iter().map(|pool| {
        (format!("{} -> {}", text(&pool["source_pod"]), text(&pool["destination_pod"])), text(&pool["source"]))
    });
    Ok(tunnels.collect())
}

fn echo(client: &Pod, server: &Pod) -> Result<()> {
    let mut stream = client.connect((server.ip(), 8080))?;
    stream.set_read_timeout(Some(BOUND))?;
    stream.write_all(b"hello")?;
    let mut got = [0; 5];
    stream.read_exact(&mut got)?;
    ensure!(&got == b"hello");
    Ok(())
}
