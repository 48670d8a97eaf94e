//! The node's probes pass whatever policy says, and nothing else does in their name.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::{AgentOptions, BOUND, Lab, Node, Pod, PodSpec, trial_with};
use serde_json::json;

use crate::capture_modes::iptables_without;
use crate::lab;

pub fn trials() -> Vec<Trial> {
    vec![
        trial_with(
            "probes::probes_of_the_node_work_under_default_deny_and_strict",
            lab(),
            probes_of_the_node_work_under_default_deny_and_strict,
        ),
        trial_with(
            "probes::a_client_masqueraded_to_the_nodes_address_is_plaintext_under_policy",
            lab(),
            a_client_masqueraded_to_the_nodes_address_is_plaintext_under_policy,
        ),
        trial_with(
            "probes::without_nfqueue_a_probe_still_passes_and_a_masqueraded_client_does_not",
            lab(),
            without_nfqueue_a_probe_still_passes_and_a_masqueraded_client_does_not,
        ),
        trial_with(
            "probes::in_redirect_mode_probes_pass_and_dead_ports_refuse",
            lab(),
            in_redirect_mode_probes_pass_and_dead_ports_refuse,
        ),
    ]
}

fn probes_of_the_node_work_under_default_deny_and_strict(lab: &Lab) -> Result<()> {
    probes_work(lab, &AgentOptions::default())
}

fn in_redirect_mode_probes_pass_and_dead_ports_refuse(lab: &Lab) -> Result<()> {
    probes_work(lab, &AgentOptions::default().arg("--capture=redirect"))
}

fn probes_work(lab: &Lab, options: &AgentOptions) -> Result<()> {
    lab.deny_all("shop")?;
    lab.strict("selvedge-system")?;
    let cart = probed(lab)?;
    let node = lab.node("node-b");
    let agent = node.start_agent(options)?;
    let _servers = [cart.serve_http(8080, "cart")?, cart.serve_http(9090, "cart")?];
    for ip in cart.ips() {
        for from in addresses(node, *ip) {
            let answer = get_from(node, from, (*ip, 8080).into());
            let answer = answer.with_context(|| format!("an HTTP probe of {ip} from {from}"))?;
            ensure!(answer.contains(&format!("\"peer\":\"{from}\"")), "{answer}");
            let connect = node.connect_from((from, 0).into(), (*ip, 7070));
            let error = connect.err().context("a TCP probe of a dead port connected")?;
            ensure!(error.kind() == ErrorKind::ConnectionRefused, "a TCP probe of a dead port: {error}");
            let unprobed = get_from(node, from, (*ip, 9090).into());
            ensure!(unprobed.is_err(), "a port that nobody probes is under policy: {unprobed:?}");
        }
    }
    let metrics = agent.metrics()?;
    let probes = metrics.sum("selvedge_capture_probes_total", &[("verdict", "probe")]);
    ensure!(probes >= 4.0, "{probes} probes were counted");
    agent.access_line("the unprobed port was denied", |line| {
        line["verdict"] == "deny" && line["destination_addr"].as_str().is_some_and(|to| to.ends_with(":9090"))
    })?;
    // A live TCP probe is a connection and nothing more.
    let _late = cart.serve_sink(7070)?;
    for ip in cart.ips() {
        node.connect((*ip, 7070)).context("a TCP probe of a live port")?;
    }
    Ok(())
}

fn a_client_masqueraded_to_the_nodes_address_is_plaintext_under_policy(lab: &Lab) -> Result<()> {
    let cart = probed(lab)?;
    let stranger = lab.pod(PodSpec::new("away/stranger", "node-b").outside())?;
    masquerade(lab.node("node-b"), &stranger, &cart)?;
    let agent = lab.node("node-b").start_agent(&AgentOptions::default())?;
    let _server = cart.serve_http(8080, "cart")?;
    for (ip, gateway) in cart.ips().iter().zip(lab.node("node-b").gateways()) {
        let answer = stranger.http_get((*ip, 8080), "/").context("PERMISSIVE lets plaintext in")?;
        ensure!(answer.json()?["peer"] == gateway.to_string(), "not masqueraded: {}", answer.text());
    }
    lab.strict("shop")?;
    agent.access_line("STRICT refuses it", |line| {
        let _ = stranger.http_get((cart.ip(), 8080), "/");
        line["reason"].as_str().is_some_and(|reason| reason.starts_with("plaintext"))
    })?;
    for ip in cart.ips() {
        let answer = stranger.http_get((*ip, 8080), "/");
        ensure!(answer.is_err(), "it passed for a probe: {answer:?}");
        lab.node("node-b").http_get((*ip, 8080), "/").context("the node's own probe")?;
    }
    Ok(())
}

fn without_nfqueue_a_probe_still_passes_and_a_masqueraded_client_does_not(lab: &Lab) -> Result<()> {
    lab.deny_all("shop")?;
    let cart = probed(lab)?;
    let stranger = lab.pod(PodSpec::new("away/stranger", "node-b").outside())?;
    let node = lab.node("node-b");
    masquerade(node, &stranger, &cart)?;
    let agent = node.start_agent(&iptables_without(lab, "NFQUEUE")?)?;
    ensure!(agent.dump()?["capture"]["honest_probes"] == false, "{}", agent.dump()?["capture"]);
    let _servers = [cart.serve_http(8080, "cart")?, cart.serve_http(9090, "cart")?];
    for ip in cart.ips() {
        for from in addresses(node, *ip) {
            get_from(node, from, (*ip, 8080).into()).context("the node's own probe")?;
            ensure!(get_from(node, from, (*ip, 9090).into()).is_err(), "a port that nobody probes is under policy");
        }
        ensure!(stranger.http_get((*ip, 8080), "/").is_err(), "it passed for a probe");
        // Nothing listens there, which shows only behind the connection: no refusal, as it would be with the queue.
        let dead = node.connect((*ip, 7070)).and_then(|mut stream| stream.read(&mut [0]));
        let kind = dead.as_ref().map_err(std::io::Error::kind);
        ensure!(kind == Err(ErrorKind::ConnectionReset), "{dead:?}");
    }
    let shown = lab.selvedge("node-b", &["capture", "show"])?;
    ensure!(shown.contains("succeeds, and is reset after that"), "{shown}");
    ensure!(agent.log().contains("cannot see dead ports"), "{}", agent.log_tail());
    Ok(())
}

/// A pod with an HTTP probe of a named port, 8080, and a TCP probe of 7070.
fn probed(lab: &Lab) -> Result<Pod> {
    let mut cart = PodSpec::new("shop/cart", "node-b").port("web", 8080).tcp_probe(7070);
    cart.container["readinessProbe"] = json!({"httpGet": {"port": "web", "path": "/ready"}});
    lab.pod(cart)
}

/// Where the node's probes may come from: its end of the pod's link, and its own address.
fn addresses(node: &Node, of_family: IpAddr) -> Vec<IpAddr> {
    let mut addresses = node.gateways();
    addresses.push(node.ip());
    addresses.retain(|ip| ip.is_ipv4() == of_family.is_ipv4());
    addresses
}

fn get_from(node: &Node, from: IpAddr, to: SocketAddr) -> Result<String> {
    let mut stream = node.connect_from((from, 0).into(), to)?;
    stream.set_read_timeout(Some(BOUND))?;
    stream.write_all(b"GET /ready HTTP/1.1\r\nconnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer.starts_with("HTTP/1.1 200"), "no answer: {answer:?}");
    Ok(answer)
}

/// What kube-proxy does to NodePort clients: they come from the node's own address.
pub fn masquerade(node: &Node, client: &Pod, to: &Pod) -> Result<()> {
    for ip in client.ips() {
        let (iptables, ip) = (if ip.is_ipv4() { "iptables" } else { "ip6tables" }, ip.to_string());
        let rule = ["-w", "-t", "nat", "-A", "POSTROUTING", "-s", &ip, "-o", to.host_interface(), "-j", "MASQUERADE"];
        let output = node.output(Command::new(iptables).args(rule))?;
        ensure!(output.status.success(), "{iptables}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}
