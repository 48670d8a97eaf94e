//! Certificates and trust that change while traffic flows.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use rcgen::date_time_ymd;
use selvedge_lab::{Agent, AgentOptions, BOUND, Lab, Pod, PodSpec, eventually, trial_with};

use crate::lab;
use crate::raw_peer::Authority;

pub fn trials() -> Vec<Trial> {
    vec![
        trial_with("rotation::certificates_of_seconds_drop_nothing", lab(), certificates_of_seconds_drop_nothing),
        trial_with("rotation::agents_of_two_cas_trust_each_other", lab(), agents_of_two_cas_trust_each_other),
        trial_with("rotation::an_intermediate_signs_for_the_agents", lab(), an_intermediate_signs_for_the_agents),
        trial_with(
            "rotation::without_a_ca_what_is_valid_stays_in_use_and_new_identities_fail",
            lab(),
            without_a_ca_what_is_valid_stays_in_use_and_new_identities_fail,
        ),
    ]
}

fn certificates_of_seconds_drop_nothing(lab: &Lab) -> Result<()> {
    let (web, cart) = pair(lab)?;
    let agents = lab.start_agents(&AgentOptions::default().arg("--certificate-lifetime").arg("4s"))?;
    let server = cart.serve_echo(8080)?;
    let mut long = web.connect((cart.ip(), 8080))?;
    let (done, made) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| -> Result<()> {
        let callers: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(|| -> Result<()> {
                    while !done.load(Ordering::Relaxed) {
                        echo(&mut web.connect((cart.ip(), 8080))?).context("a new connection was dropped")?;
                        made.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(())
                })
            })
            .collect();
        let rotated = eventually("every certificate has been renewed four times", BOUND, || {
            if let Err(error) = echo(&mut long) {
                return Some(Err(error.context("the connection that was there all along was dropped")));
            }
            let renewals = |agent: &Agent| agent.metrics().map(|m| m.sum("selvedge_certificate_renewals_total", &[]));
            agents.iter().all(|agent| renewals(agent).is_ok_and(|count| count >= 5.0)).then_some(Ok(()))
        });
        done.store(true, Ordering::Relaxed);
        for caller in callers {
            caller.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        rotated?
    })?;
    let made = made.load(Ordering::Relaxed);
    ensure!(made > 50, "only {made} connections were made");
    ensure!(server.peers().len() == made + 1, "{} of {made} arrived", server.peers().len());
    for agent in &agents {
        let failed = agent.metrics()?.sum("selvedge_connections_failed_total", &[]);
        ensure!(failed == 0.0, "{failed} connections failed at {}", agent.node());
    }
    // New connections went into new tunnels, not into those that old certificates had made.
    let tunnels = |agent: &Agent, labels: &[(&str, &str)]| -> Result<f64> {
        Ok(agent.metrics()?.sum("selvedge_tls_handshakes_total", labels))
    };
    ensure!(tunnels(&agents[0], &[("role", "client"), ("result", "ok")])? >= 4.0);
    ensure!(tunnels(&agents[0], &[("role", "client"), ("result", "ok")])? < made as f64 / 2.0, "nothing is pooled");
    Ok(())
}

fn agents_of_two_cas_trust_each_other(lab: &Lab) -> Result<()> {
    let (web, cart) = pair(lab)?;
    let _server = cart.serve_echo(8080)?;
    let roots = [Authority::root("north")?, Authority::root("south")?];
    let folders = ["north", "south"].map(|name| lab.ca().join(name));
    let start = |node: &str, folder: usize| {
        let options = AgentOptions { ca: Some(folders[folder].clone()), ..AgentOptions::default() };
        lab.node(node).start_agent(&options)
    };
    roots[0].place(&folders[0], &[&roots[1].certificate_pem])?;
    roots[1].place(&folders[1], &[])?;
    let north = start("node-a", 0)?;
    let south = start("node-b", 1)?;
    // The south does not know the north yet.
    let call = || -> Result<()> { echo(&mut web.connect((cart.ip(), 8080))?) };
    ensure!(call().is_err(), "a stranger was believed");
    south.access_line("unknown issuer", |line| detail(line).contains("no trust anchor of ours"))?;
    // From the moment that the folder says so it does, without a restart.
    roots[1].place(&folders[1], &[&roots[0].certificate_pem])?;
    eventually("both trust each other", BOUND, || call().ok())?;
    for agent in [&north, &south] {
        let dump = agent.dump()?;
        ensure!(dump["trustAnchors"] == 2, "{}", dump["trustAnchors"]);
    }
    // An anchor that is withdrawn ends that trust for whatever is new.
    roots[1].place(&folders[1], &[])?;
    eventually("the north is trusted no more", BOUND, || call().is_err().then_some(()))
}

fn an_intermediate_signs_for_the_agents(lab: &Lab) -> Result<()> {
    let (web, cart) = pair(lab)?;
    let _server = cart.serve_echo(8080)?;
    let root = Authority::root("the company's root")?;
    // Each node has an intermediate of its own; the root's key is nowhere.
    for node in ["node-a", "node-b"] {
        root.intermediate(node, |_| ())?.place(&lab.ca().join(node), &[&root.certificate_pem])?;
    }
    let start = |node: &str| {
        lab.node(node).start_agent(&AgentOptions { ca: Some(lab.ca().join(node)), ..AgentOptions::default() })
    };
    let _agents = [start("node-a")?, start("node-b")?];
    echo(&mut web.connect((cart.ip(), 8080))?)
}

fn without_a_ca_what_is_valid_stays_in_use_and_new_identities_fail(lab: &Lab) -> Result<()> {
    let (web, cart) = pair(lab)?;
    let _server = cart.serve_echo(8080)?;
    // Eager, so that a client is there before its certificate.
    let agents = lab.start_agents(&AgentOptions::default().arg("--connect=eager"))?;
    let mut open = web.connect((cart.ip(), 8080))?;
    echo(&mut open)?;

    // The CA that signs has expired; the anchor of what was signed before stays.
    let own = Authority::of(&lab.ca())?;
    let expired = own.intermediate("expired", |params| {
        (params.not_before, params.not_after) = (date_time_ymd(2001, 1, 1), date_time_ymd(2002, 1, 1));
    })?;
    expired.place(&lab.ca(), &[&own.certificate_pem])?;
    for agent in &agents {
        eventually("the new CA folder is in force", BOUND, || (agent.dump().ok()?["trustAnchors"] == 2).then_some(()))?;
    }
    let late = lab.pod(PodSpec::new("shop/late", "node-a").service_account("late"))?;
    eventually("the new pod is captured", BOUND, || {
        let captured = agents[0].metrics().ok()?.sum("selvedge_pods", &[("state", "captured")]);
        (captured == 2.0).then_some(())
    })?;
    let refused = echo(&mut late.connect((cart.ip(), 8080))?);
    ensure!(refused.is_err(), "it was let through without a certificate");
    let line = agents[0].access_line("no certificate", |line| line["reason"] == "identity")?;
    ensure!(line["source_pod"] == "shop/late" && detail(&line).contains("expired"), "{line}");
    ensure!(agents[0].metrics()?.sum("selvedge_connections_failed_total", &[("reason", "identity")]) >= 1.0);
    ensure!(agents[0].metrics()?.sum("selvedge_certificate_failures_total", &[]) >= 1.0);
    // Others go on, old connections and new.
    echo(&mut open)?;
    echo(&mut web.connect((cart.ip(), 8080))?)?;

    // A connection waits a moment for its certificate: a CA that comes back in time costs nothing.
    let mut waiting = late.connect((cart.ip(), 8080))?;
    own.place(&lab.ca(), &[])?;
    echo(&mut waiting).context("a connection that could have waited for the CA was reset")
}

fn pair(lab: &Lab) -> Result<(Pod, Pod)> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a").service_account("web"))?;
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b").service_account("cart"))?;
    Ok((web, cart))
}

fn echo(stream: &mut TcpStream) -> Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    stream.write_all(b"hello")?;
    let mut got = [0; 5];
    stream.read_exact(&mut got)?;
    ensure!(&got == b"hello");
    Ok(())
}

fn detail(line: &serde_json::Value) -> &str {
    line["detail"].as_str().unwrap_or_default()
}
