//! The access log: one line a connection, on both agents, whatever became of it.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::Signal;
use selvedge_lab::{Agent, AgentOptions, BOUND, Lab, Pod, PodSpec, authorization, eventually, trial_with};
use serde_json::{Value, json};

use crate::lab;

pub fn trials() -> Vec<Trial> {
    vec![
        trial_with("access_log::each_connection_has_one_line_on_each_agent", lab(), each_connection_has_one_line),
        trial_with("access_log::text_says_the_same_as_json", lab(), text_says_the_same_as_json),
        trial_with("access_log::a_probe_is_counted_and_not_judged", lab(), a_probe_is_counted_and_not_judged),
    ]
}

fn each_connection_has_one_line(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab)?;
    let guest = lab.pod(PodSpec::new("shop/guest", "node-a").outside())?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let _server = shop.cart.serve_http(8080, "cart")?;
    let _strict = shop.cart.serve_http(8443, "cart")?;
    let _outside = lab.outside().serve_http(8081, "outside")?;
    let [client, server] = &agents[..] else { unreachable!("a lab has two nodes") };
    let cart = shop.cart.ip();

    shop.web.http_get((cart, 8080), "/")?;
    for agent in &agents {
        let line = line_to(agent, cart, 8080, "web")?;
        says(&line, &SHOP_IDENTITIES)?;
        says(&line, &[("verdict", "allow"), ("transport", crate::tunnel()), ("key_exchange", "X25519MLKEM768")])?;
        says(&line, &[("source_pod", "shop/web"), ("destination_pod", "shop/cart")])?;
        ensure!(line["reason"].is_null() && line["policy"].is_null(), "{line}");
        ensure!(line["bytes_sent"].as_u64() > Some(20) && line["bytes_received"].as_u64() > Some(100), "{line}");
        ensure!(line["duration_ms"].is_u64() && line["time"].is_string(), "{line}");
        ensure!(line["source_addr"].as_str().is_some_and(|a| a.starts_with(&shop.web.ip().to_string())), "{line}");
    }

    ensure!(shop.thief.http_get((cart, 8080), "/").is_err());
    for agent in &agents {
        let line = line_to(agent, cart, 8080, "thief")?;
        says(&line, &[("verdict", "deny"), ("reason", "policy:shop/no-thieves"), ("policy", "shop/no-thieves")])?;
        says(&line, &[("source_identity", "spiffe://cluster.local/ns/shop/sa/thief"), SHOP_IDENTITIES[1]])?;
        ensure!(line["bytes_received"] == 0, "{line}");
    }

    ensure!(shop.web.http_get((cart, 9), "/").is_err());
    for agent in &agents {
        let line = line_to(agent, cart, 9, "web")?;
        says(&line, &[("reason", "connect")])?;
        says(&line, &SHOP_IDENTITIES)?;
        ensure!(line["detail"].is_string(), "{line}");
    }

    let outside = lab.families().outside()[0];
    shop.web.http_get((outside, 8081), "/")?;
    let line = line_to(client, outside, 8081, "web")?;
    says(&line, &[("direction", "passthrough"), ("transport", "plaintext"), SHOP_IDENTITIES[0]])?;
    ensure!(line["destination_identity"].is_null() && line["verdict"].is_null(), "the mesh has no say: {line}");

    guest.http_get((cart, 8080), "/")?;
    let line = line_to(server, cart, 8080, "guest")?;
    says(&line, &[("direction", "inbound"), ("transport", "plaintext"), ("verdict", "allow"), SHOP_IDENTITIES[1]])?;
    ensure!(line["source_identity"].is_null(), "nothing proved it: {line}");

    ensure!(guest.http_get((cart, 8443), "/").is_err());
    let line = line_to(server, cart, 8443, "guest")?;
    says(&line, &[("verdict", "deny"), ("reason", "plaintext:shop/strict"), ("policy", "shop/strict")])?;

    for (agent, lines) in agents.iter().zip([4, 5]) {
        agent.kill(Signal::SIGTERM)?;
        agent.wait(BOUND)?;
        let log = agent.access_log()?;
        ensure!(log.len() == lines, "{} lines on {}:\n{}", log.len(), agent.node(), agent.access_log_text());
    }
    Ok(())
}

fn text_says_the_same_as_json(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab)?;
    let agents = lab.start_agents(&AgentOptions::default().arg("--access-log").arg("text"))?;
    let _server = shop.cart.serve_http(8080, "cart")?;
    shop.web.http_get((shop.cart.ip(), 8080), "/")?;
    ensure!(shop.thief.http_get((shop.cart.ip(), 8080), "/").is_err());
    for agent in &agents {
        let line = |source: &str| {
            let wanted = format!(" source_workload={source} ");
            let find = || agent.access_log_text().lines().find(|line| line.contains(&wanted)).map(str::to_owned);
            eventually(&format!("a line about {source}"), BOUND, find).with_context(|| agent.access_log_text())
        };
        let allowed = line("web")?;
        let denied = line("thief")?;
        ensure!(allowed.starts_with("time=20"), "{allowed}");
        for word in [
            " verdict=allow ",
            " source_identity=spiffe://cluster.local/ns/shop/sa/web ",
            " destination_identity=spiffe://cluster.local/ns/shop/sa/cart ",
            " key_exchange=X25519MLKEM768 ",
            " bytes_sent=",
        ] {
            ensure!(allowed.contains(word), "{word:?} is not in {allowed}");
        }
        for word in [" verdict=deny ", " reason=policy:shop/no-thieves ", " policy=shop/no-thieves ", " detail=\""] {
            ensure!(denied.contains(word), "{word:?} is not in {denied}");
        }
    }
    Ok(())
}

fn a_probe_is_counted_and_not_judged(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab)?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let server = &agents[1];
    let node = lab.node("node-b");
    let _server = shop.cart.serve_http(8443, "cart")?;
    // The port is STRICT: only a probe comes through in plaintext.
    ensure!(node.http_get((shop.cart.ip(), 8443), "/healthz")?.status == 200);
    eventually("the probe is counted", BOUND, || {
        let counted = server.metrics().ok()?.sum("selvedge_capture_probes_total", &[("verdict", "probe")]);
        (counted >= 1.0).then_some(())
    })?;
    server.kill(Signal::SIGTERM)?;
    server.wait(BOUND)?;
    // Where the kernel lets a probe through by itself there is nothing to log; else it is logged without a verdict.
    let judged: Vec<Value> = server.access_log()?.into_iter().filter(|line| !line["verdict"].is_null()).collect();
    ensure!(judged.is_empty(), "{judged:?}");
    Ok(())
}

struct Shop {
    web: Pod,
    thief: Pod,
    cart: Pod,
}

impl Shop {
    /// Two clients on one node, one of whom policy denies, and on the other a server whose port 8443 is STRICT.
    fn open(lab: &Lab) -> Result<Self> {
        lab.namespace("shop", true)?;
        let thieves = json!({"source": {"serviceAccounts": ["shop/thief"]}});
        lab.put(&authorization("shop/no-thieves", json!({"action": "DENY", "rules": [{"from": [thieves]}]})))?;
        lab.put(&json!({
            "apiVersion": "selvedge.dev/v1alpha1",
            "kind": "PeerAuthentication",
            "metadata": {"namespace": "shop", "name": "strict"},
            "spec": {
                "selector": {"matchLabels": {"app": "cart"}},
                "mtls": {"mode": "PERMISSIVE"},
                "portLevelMtls": {"8443": {"mode": "STRICT"}},
            },
        }))?;
        let cart = PodSpec::new("shop/cart", "node-b").service_account("cart").port("http", 8080);
        Ok(Self {
            web: lab.pod(PodSpec::new("shop/web", "node-a").service_account("web"))?,
            thief: lab.pod(PodSpec::new("shop/thief", "node-a").service_account("thief"))?,
            cart: lab.pod(cart.port("strict", 8443).http_probe(8443, "/healthz"))?,
        })
    }
}

fn line_to(agent: &Agent, ip: IpAddr, port: u16, source: &str) -> Result<Value> {
    let to = format!("{}", std::net::SocketAddr::new(ip, port));
    agent.access_line(&format!("{source} to {to}"), |line| {
        line["destination_addr"] == to.as_str() && line["source_workload"] == source
    })
}

fn says(line: &Value, wanted: &[(&str, &str)]) -> Result<()> {
    for (field, value) in wanted {
        ensure!(line[field] == *value, "{field} is {}, not {value}: {line}", line[field]);
    }
    Ok(())
}

const SHOP_IDENTITIES: [(&str, &str); 2] = [
    ("source_identity", "spiffe://cluster.local/ns/shop/sa/web"),
    ("destination_identity", "spiffe://cluster.local/ns/shop/sa/cart"),
];
