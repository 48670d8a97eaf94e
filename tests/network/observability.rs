//! What `/metrics` says after real traffic.

use std::io::{Read, Write};
use std::net::Ipv4Addr;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::{
    Agent, AgentOptions, BOUND, Lab, Metrics, Node, Pod, PodSpec, authorization, eventually, trial_with,
};
use serde_json::json;

use crate::exposition::Exposition;
use crate::lab;

pub fn trials() -> Vec<Trial> {
    vec![
        trial_with("observability::metrics_tell_of_real_traffic", lab(), metrics_tell_of_real_traffic),
        trial_with("observability::an_agent_tells_of_itself_in_metrics", lab(), an_agent_tells_of_itself_in_metrics),
        trial_with("observability::labels_hold_nothing_that_grows", lab(), labels_hold_nothing_that_grows),
        trial_with(
            "observability::series_that_rest_expire_and_come_back",
            lab(),
            series_that_rest_expire_and_come_back,
        ),
    ]
}

fn metrics_tell_of_real_traffic(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, &AgentOptions::default())?;
    let _server = shop.cart.serve_http(8080, "cart")?;
    let _echo = shop.cart.serve_echo(7000)?;
    let _outside = lab.outside().serve_http(8081, "outside")?;

    ensure!(shop.web.http_get((shop.cart.ip(), 8080), "/")?.status == 200);
    ensure!(shop.thief.http_get((shop.cart.ip(), 8080), "/").is_err(), "policy let the thief in");
    ensure!(shop.web.http_get((shop.cart.ip(), 9), "/").is_err(), "somebody answered at port 9");
    ensure!(shop.web.http_get((lab.families().outside()[0], 8081), "/")?.status == 200);
    let mut held = shop.web.connect((shop.cart.ip(), 7000))?;
    held.write_all(&[7; 5000])?;
    held.read_exact(&mut [0; 5000])?;

    let to_cart = [("source_workload", "web"), ("destination_workload", "cart")];
    let to_cart = |more: &[(&'static str, &'static str)]| [&to_cart[..], more].concat();
    let [client, server] = &shop.agents[..] else { unreachable!("a lab has two nodes") };
    for (agent, direction, reporter, role) in
        [(client, "outbound", "source", "client"), (server, "inbound", "destination", "server")]
    {
        let way = [("direction", direction), ("reporter", reporter), ("connection_security_policy", "mutual_tls")];
        let principals = [
            ("source_principal", "spiffe://cluster.local/ns/shop/sa/web"),
            ("destination_principal", "spiffe://cluster.local/ns/shop/sa/cart"),
        ];
        let labels = to_cart(&[&way[..], &principals].concat());
        until(agent, "both connections opened, one closed", |metrics| {
            metrics.sum("selvedge_tcp_connections_opened_total", &labels) == 2.0
                && metrics.sum("selvedge_tcp_connections_closed_total", &labels) == 1.0
        })?;
        until(agent, "one connection is open", |metrics| {
            metrics.sum("selvedge_connections_open", &way[..2]) == 1.0
                && match crate::tunnel() {
                    "hbone" => metrics.sum("selvedge_hbone_streams", &[("role", role)]) == 1.0,
                    // And one or two that wait.
                    _ => metrics.sum("selvedge_fast_connections", &[("role", role)]) >= 1.0,
                }
        })?;
        until(agent, "bytes of a connection that lives", |metrics| {
            metrics.sum("selvedge_tcp_sent_bytes_total", &labels) > 5000.0
                && metrics.sum("selvedge_tcp_received_bytes_total", &labels) > 5000.0
        })?;
        let metrics = agent.metrics()?;
        let count = |name: &str, labels: &[(&str, &str)]| metrics.sum(name, labels);
        ensure!(count("selvedge_connections_failed_total", &to_cart(&[("reason", "connect")])) == 1.0, "{metrics:?}");
        ensure!(
            count("selvedge_connections_failed_total", &[("source_workload", "thief"), ("reason", "policy")]) == 1.0
        );
        ensure!(count("selvedge_connect_duration_seconds_count", &way[..1]) == 2.0, "{metrics:?}");
        ensure!(count("selvedge_tls_handshake_duration_seconds_count", &[("role", role)]) >= 2.0, "{metrics:?}");
        ensure!(
            count("selvedge_tls_handshakes_total", &[("role", role), ("key_exchange", "X25519MLKEM768")])
                == count("selvedge_tls_handshake_duration_seconds_count", &[("role", role)])
        );
        ensure!(count("selvedge_tls_key_exchanges_total", &[("direction", direction)]) == 2.0, "{metrics:?}");
    }
    let metrics = server.metrics()?;
    let decided =
        |verdict, policy| metrics.sum("selvedge_policy_decisions_total", &[("verdict", verdict), ("policy", policy)]);
    ensure!(decided("deny", "shop/no-thieves") == 1.0 && decided("allow", "none") == 3.0, "{metrics:?}");
    let passed = [("direction", "passthrough"), ("connection_security_policy", "none"), ("source_workload", "web")];
    ensure!(client.metrics()?.sum("selvedge_tcp_connections_opened_total", &passed) == 1.0);

    drop(held);
    for agent in &shop.agents {
        until(agent, "nothing is open", |metrics| metrics.sum("selvedge_connections_open", &[]) == 0.0)?;
    }
    Ok(())
}

fn an_agent_tells_of_itself_in_metrics(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, &AgentOptions::default())?;
    let agent = &shop.agents[0];
    until(agent, "two pods are captured", |metrics| {
        let pods = |state| metrics.sum("selvedge_pods", &[("state", state)]);
        pods("captured") == 2.0 && pods("pending") == 0.0 && pods("failed") == 0.0
    })?;
    until(agent, "the model has an age", |metrics| {
        metrics.series("selvedge_model_age_seconds", &[]).any(|(_, age)| (0.0..60.0).contains(&age))
    })?;
    let metrics = agent.metrics()?;
    let version = metrics.series("selvedge_build_info", &[]).next().and_then(|(labels, _)| labels.get("version"));
    ensure!(version.is_some_and(|version| version == env!("CARGO_PKG_VERSION")), "{version:?}");
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs_f64();
    for account in ["web", "thief"] {
        let identity = format!("spiffe://cluster.local/ns/shop/sa/{account}");
        until(agent, "the certificate's end", |metrics| {
            let expiry = metrics.sum("selvedge_certificate_expiry_timestamp_seconds", &[("identity", &identity)]);
            expiry > now + 3600.0 && expiry < now + 25.0 * 3600.0
        })?;
    }
    ensure!(metrics.sum("selvedge_process_resident_memory_bytes", &[]) > 1e6);
    ensure!(metrics.sum("selvedge_process_open_fds", &[]) > 3.0);

    let mut flush = std::process::Command::new("iptables");
    ensure!(shop.web.output(flush.args(["-t", "mangle", "-F"]))?.status.success());
    until(agent, "the flushed rules were put back and counted", |metrics| {
        metrics.sum("selvedge_capture_drift_repaired_total", &[]) > 0.0
    })?;

    let Shop { thief, agents, .. } = shop;
    lab.delete(thief)?;
    until(&agents[0], "a pod that left takes its certificate's series along", |metrics| {
        metrics.series("selvedge_certificate_expiry_timestamp_seconds", &[]).count() == 1
            && metrics.sum("selvedge_pods", &[("state", "captured")]) == 1.0
    })?;
    for node in lab.nodes() {
        exposition(node)?;
    }
    Ok(())
}

fn labels_hold_nothing_that_grows(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, &AgentOptions::default())?;
    let _server = shop.cart.serve_http(8080, "cart")?;
    let _outside = lab.outside().serve_http(8081, "outside")?;
    let guest = lab.pod(PodSpec::new("shop/guest", "node-a").outside())?;
    for round in 0..10 {
        for ip in shop.cart.ips() {
            shop.web.http_get((*ip, 8080), &format!("/{round}"))?;
            guest.http_get((*ip, 8080), &format!("/{round}"))?;
            ensure!(shop.thief.http_get((*ip, 8080), "/").is_err());
        }
        for ip in lab.families().outside() {
            shop.web.http_get((ip, 8081), "/")?;
        }
    }
    for node in lab.nodes() {
        let exposition = exposition(node)?;
        for sample in exposition.samples() {
            for (name, value) in &sample.labels {
                ensure!(value.parse::<std::net::IpAddr>().is_err(), "{name}={value} in {}", sample.name);
                ensure!(value.parse::<std::net::SocketAddr>().is_err(), "{name}={value} in {}", sample.name);
            }
        }
        // web, thief and guest to cart, web to the outside: however many connections there were.
        let series = exposition.samples().filter(|sample| sample.name == "selvedge_tcp_connections_opened_total");
        let series = series.count();
        ensure!((1..=4).contains(&series), "{series} series of opened connections on {}", node.name());
    }
    Ok(())
}

fn series_that_rest_expire_and_come_back(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, &AgentOptions::default().arg("--metrics-idle").arg("2s"))?;
    let _server = shop.cart.serve_http(8080, "cart")?;
    let name = "selvedge_tcp_connections_opened_total";
    let client = &shop.agents[0];
    for _ in 0..2 {
        shop.web.http_get((shop.cart.ip(), 8080), "/")?;
        until(client, "a series", |metrics| metrics.sum(name, &[("source_workload", "web")]) == 1.0)?;
        until(client, "it expires", |metrics| metrics.series(name, &[]).count() == 0)?;
    }
    ensure!(client.metrics()?.sum("selvedge_pods", &[("state", "captured")]) == 2.0, "a gauge has expired");
    ensure!(client.metrics()?.sum("selvedge_build_info", &[]) == 1.0);
    Ok(())
}

/// Two clients on one node, one of whom policy denies, and a server on the other.
struct Shop {
    web: Pod,
    thief: Pod,
    cart: Pod,
    agents: Vec<Agent>,
}

impl Shop {
    fn open(lab: &Lab, options: &AgentOptions) -> Result<Self> {
        lab.namespace("shop", true)?;
        let thieves = json!({"source": {"serviceAccounts": ["shop/thief"]}});
        lab.put(&authorization("shop/no-thieves", json!({"action": "DENY", "rules": [{"from": [thieves]}]})))?;
        Ok(Self {
            web: lab.pod(PodSpec::new("shop/web", "node-a").service_account("web"))?,
            thief: lab.pod(PodSpec::new("shop/thief", "node-a").service_account("thief"))?,
            cart: lab.pod(PodSpec::new("shop/cart", "node-b").service_account("cart").port("http", 8080))?,
            agents: lab.start_agents(options)?,
        })
    }
}

fn until(agent: &Agent, what: &str, holds: impl Fn(&Metrics) -> bool) -> Result<()> {
    let reached = eventually(what, BOUND, || agent.metrics().ok().filter(&holds).map(drop));
    reached.with_context(|| format!("on {}: {:#?}", agent.node(), agent.metrics()))
}

/// What the agent of a node answers, read strictly, every name of which is documented.
fn exposition(node: &Node) -> Result<Exposition> {
    let answer = node.http_get((Ipv4Addr::LOCALHOST, 15020), "/metrics")?;
    ensure!(answer.header("content-type").is_some_and(|kind| kind.starts_with("text/plain; version=0.0.4")));
    let exposition = Exposition::parse(&answer.text())?;
    for family in exposition.families() {
        let row = format!("| `{}` | {} |", family.name, family.kind);
        ensure!(METRICS_REFERENCE.contains(&row), "docs/metrics.md lacks {row}");
    }
    Ok(exposition)
}

const METRICS_REFERENCE: &str = include_str!("../../docs/metrics.md");
