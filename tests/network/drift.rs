//! What stands in the pods' namespaces is kept true, and goes without a trace.

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::Signal;
use selvedge_lab::{AgentOptions, BOUND, Lab, PodSpec, eventually, trial_with};

use crate::lab;

pub fn trials() -> Vec<Trial> {
    vec![
        trial_with("drift::nft_rules_flushed_by_hand_come_back_and_are_counted", lab(), |lab| flushed(lab, "nft")),
        trial_with("drift::legacy_rules_flushed_by_hand_come_back_and_are_counted", lab(), |lab| {
            flushed(lab, "legacy")
        }),
        trial_with("drift::an_agent_that_ends_leaves_no_rule_route_or_setting", lab(), ends_without_a_trace),
        trial_with("drift::rules_of_another_mesh_are_refused_and_the_others_are_fine", lab(), another_mesh),
    ]
}

fn flushed(lab: &Lab, back_end: &str) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a").service_account("web"))?;
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b").service_account("cart"))?;
    let agents = lab.start_agents(&AgentOptions::default().arg("--iptables").arg(back_end))?;
    let _server = cart.serve_echo(PORT)?;
    let link = lab.link()?;
    let wanted = web.networking()?;
    let rule = r"sed -n 's/^[0-9]*:\t//p' | sed 's/\[detached\] //' | grep fwmark | head -n1";
    let harms = [
        ("rules", format!("iptables-{back_end} -t mangle -F")),
        ("rules", format!("ip6tables-{back_end} -t mangle -F; ip6tables-{back_end} -t mangle -X")),
        ("rules", format!("iptables-{back_end} -t mangle -D OUTPUT 1")),
        ("rules", format!("iptables-{back_end} -t mangle -I PREROUTING 1 -j ACCEPT")),
        ("rules", format!("iptables-{back_end} -t mangle -F SELVEDGE_IN")),
        // As large as the rule that it replaces, so that no table changes its size.
        ("rules", replaced("iptables", back_end, "127.0.0.1")),
        ("rules", replaced("ip6tables", back_end, "::1")),
        ("routes", format!("ip rule del $(ip rule | {rule})")),
        ("routes", format!("ip -6 rule del $(ip -6 rule | {rule})")),
        ("routes", "ip route flush table 15001".to_owned()),
        ("routes", "ip -6 route flush table 15001".to_owned()),
    ];
    for (what, harm) in harms {
        let repaired = || Ok::<_, anyhow::Error>(agents[0].metrics()?.sum(REPAIRED, &[("what", what)]));
        let before = repaired()?;
        web.sh(&harm)?;
        eventually(&format!("what `{harm}` did is counted"), BOUND, || {
            (repaired().ok()? == before + 1.0).then_some(())
        })?;
        // A rule of somebody else's may stay: it has only to come after ours.
        web.sh(&format!("iptables-{back_end} -t mangle -D PREROUTING -j ACCEPT || true"))?;
        let now = web.networking()?;
        ensure!(now == wanted, "after `{harm}`: {:?}", wanted.difference(&now));
        for ip in cart.ips() {
            web.converse((*ip, PORT))?.exchange(&format!("needle after {harm}"))?;
        }
        ensure!(!link.find(b"needle after")?.is_found(), "after `{harm}` a connection was readable on the link");
    }
    Ok(())
}

/// Sends what arrives in plaintext to a port where nobody listens.
fn replaced(iptables: &str, back_end: &str, loopback: &str) -> String {
    let table = format!("{iptables}-{back_end} -t mangle");
    let last = format!("$({table} -S SELVEDGE_IN | grep -c '^-A')");
    format!("{table} -R SELVEDGE_IN {last} -p tcp -j TPROXY --on-port 15007 --on-ip {loopback}")
}

fn ends_without_a_trace(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a").tcp_probe(PORT))?;
    let cart = lab.pod(PodSpec::new("shop/cart", "node-a"))?;
    let _server = cart.serve_echo(PORT)?;
    // Of the packet filter's own tables, empty ones stay once they have been used.
    let clean = [web.networking()?, cart.networking()?];
    for back_end in ["nft", "legacy"] {
        for mode in ["tproxy", "redirect"] {
            let options = AgentOptions::default().arg("--iptables").arg(back_end).arg("--capture").arg(mode);
            let agent = lab.node("node-a").start_agent(&options)?;
            web.converse((cart.ip(), PORT))?.exchange("something to track")?;
            for pod in [&web, &cart] {
                let captured = pod.networking()?;
                ensure!(captured.count("SELVEDGE_OUT") > 0, "nothing to remove: {captured:?}");
            }
            let signal = if mode == "tproxy" { Signal::SIGTERM } else { Signal::SIGINT };
            agent.kill(signal)?;
            let status = agent.wait(BOUND)?;
            ensure!(status.success(), "after {signal} it ended with {status}");
            for (pod, clean) in [&web, &cart].into_iter().zip(&clean) {
                let left = pod.networking()?;
                ensure!(left == *clean, "{back_end}, {mode}: {:?}", clean.difference(&left));
            }
        }
    }
    Ok(())
}

fn another_mesh(lab: &Lab) -> Result<()> {
    let taken = [("shop/nft", "iptables-nft"), ("shop/legacy", "ip6tables-legacy")];
    let taken: Vec<_> = taken
        .into_iter()
        .map(|(name, iptables)| {
            let pod = lab.pod(PodSpec::new(name, "node-a"))?;
            pod.sh(&format!("{iptables} -t nat -N ISTIO_OUTPUT; {iptables} -t nat -A OUTPUT -p tcp -j ISTIO_OUTPUT"))?;
            Ok((pod, iptables))
        })
        .collect::<Result<_>>()?;
    let web = lab.pod(PodSpec::new("shop/web", "node-a").service_account("web"))?;
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b").service_account("cart"))?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let metrics = agents[0].metrics()?;
    for (state, count) in [("failed", 2.0), ("captured", 1.0), ("pending", 0.0)] {
        let said = metrics.sum("selvedge_pods", &[("state", state)]);
        ensure!(said == count, "selvedge_pods says {said} {state}");
    }
    let dump = agents[0].dump()?;
    for (pod, _) in &taken {
        let shown = dump["capture"]["pods"].as_array().into_iter().flatten().find(|shown| shown["uid"] == pod.uid());
        let reason = shown.and_then(|shown| shown["reason"].as_str()).unwrap_or_default();
        ensure!(reason.contains("Istio") && reason.contains("ISTIO_OUTPUT"), "{reason:?}");
        ensure!(agents[0].log().contains(&pod.full_name()), "the log does not name it");
        let rules = pod.networking()?;
        ensure!(rules.count("SELVEDGE") == 0 && rules.count("fwmark") == 0, "captured twice: {rules:?}");
    }
    let _server = cart.serve_echo(PORT)?;
    let link = lab.link()?;
    web.converse((cart.ip(), PORT))?.exchange("needle of a pod that is fine")?;
    ensure!(!link.find(b"needle of a pod that is fine")?.is_found(), "it was readable on the link");
    for (pod, iptables) in &taken {
        pod.sh(&format!("{iptables} -t nat -F; {iptables} -t nat -X"))?;
    }
    agents[0].wait_pods("captured", 3)
}

const PORT: u16 = 9000;
const REPAIRED: &str = "selvedge_capture_drift_repaired_total";
