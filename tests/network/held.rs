//! What nobody knows yet is held, not guessed.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use libtest_mimic::Trial;
use selvedge_lab::{AgentOptions, End, Lab, PodSpec, ServiceSpec, authorization, trial_with};
use serde_json::json;

use crate::lab;

pub fn trials() -> Vec<Trial> {
    vec![
        trial_with("held::an_unknown_address_of_the_cluster_is_held_and_then_refused", lab(), unknown_is_refused),
        trial_with("held::an_object_that_appears_meanwhile_is_connected_to", lab(), appears_meanwhile),
        trial_with("held::nothing_is_decided_before_every_file_has_been_read", lab(), not_before_synced),
    ]
}

fn unknown_is_refused(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
    let agent = lab.node("node-a").start_agent(&AgentOptions::default().arg("--cluster-cidr").arg(SERVICES))?;
    let link = lab.link()?;
    let mut nowhere = vec![IpAddr::from([10, 244, 2, 200]), SERVICE.into()];
    if web.ip_v6().is_some() {
        nowhere.push("fd00:10:244:2::200".parse()?);
    }
    for (number, ip) in nowhere.iter().enumerate() {
        let began = Instant::now();
        let mut refused = web.converse((*ip, PORT))?;
        refused.say("needle for nobody")?;
        ensure!(refused.end()? == End::Reset(0), "{ip} did not end by a reset");
        ensure!(began.elapsed() >= Duration::from_millis(900), "{ip} was not held: {:?}", began.elapsed());
        let destination = SocketAddr::from((*ip, PORT)).to_string();
        let line = agent.access_line("the refusal", |line| line["destination_addr"] == destination)?;
        ensure!(line["reason"] == "unknown-destination", "{line}");
        let failed = agent.metrics()?.sum("selvedge_connections_failed_total", &[("reason", "unknown-destination")]);
        ensure!(failed == (number + 1) as f64, "counted {failed} failures");
    }
    ensure!(!link.find(b"needle for nobody")?.is_found(), "it left in plaintext");
    ensure!(link.tcp_packets(PORT)? == 0, "a packet went past the mesh");
    Ok(())
}

fn appears_meanwhile(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b"))?;
    // Eager, so that a client is there before its server is known.
    let options = AgentOptions::default().arg("--cluster-cidr").arg(SERVICES).arg("--connect=eager");
    let _agents = lab.start_agents(&options)?;
    let _server = cart.serve_echo(PORT)?;
    // A machine that is busy enough may take more than the second; but not each time.
    for number in 1..6 {
        let ip = IpAddr::from(Ipv4Addr::from(u32::from(SERVICE) + number));
        let mut held = web.converse((ip, PORT))?;
        held.say("held until it is known")?;
        let service = ServiceSpec::new(&format!("shop/cart-{number}")).cluster_ip(ip).port("tcp", PORT, PORT);
        lab.service(&service.endpoint(&cart))?;
        if held.hear("held until it is known").is_ok() {
            return held.exchange("and goes on");
        }
    }
    bail!("no connection lived to see its Service")
}

fn not_before_synced(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a").service_account("web"))?;
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b").service_account("cart"))?;
    // Eager, so that a client is there before it is decided.
    let agents = lab.start_agents(&AgentOptions::default().arg("--connect=eager"))?;
    let server = cart.serve_echo(PORT)?;
    let link = lab.link()?;
    web.converse((cart.ip(), PORT))?.exchange("allowed as yet")?;
    let seen = server.peers().len();

    let file = lab.manifests().join("denial.yaml");
    // JSON is YAML, and on one line, so that a comment may follow.
    let denial = authorization("shop/nobody", json!({"action": "DENY", "rules": [{}]}));
    let settled = AtomicBool::new(false);
    thread::scope(|scope| {
        let writer = scope.spawn(|| -> Result<()> {
            for count in 0.. {
                let settles = settled.load(Ordering::Relaxed);
                fs::write(&file, format!("{denial}\n# {count}\n"))?;
                if settles {
                    return Ok(());
                }
                // Sooner than a file counts as left alone.
                thread::sleep(Duration::from_millis(5));
            }
            Ok(())
        });
        let observed = || -> Result<()> {
            // The policy is there for a worker that starts now, but its file is never at rest.
            agents[1].kill_worker()?;
            let mut waiting = web.converse((cart.ip(), PORT))?;
            waiting.say("needle of one who waits")?;
            ensure!(waiting.is_silent_for(Duration::from_secs(2))?, "it was decided before the policy was read");
            ensure!(!agents[1].is_ready(), "ready, though not everything has been read");
            ensure!(server.peers().len() == seen, "the server was reached");
            settled.store(true, Ordering::Relaxed);
            ensure!(waiting.end()? == End::Reset(0), "the policy was not asked");
            Ok(())
        };
        let observed = observed();
        settled.store(true, Ordering::Relaxed);
        writer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))??;
        observed
    })?;
    agents[1].access_line("the denial", |line| line["reason"] == "policy:shop/nobody")?;
    ensure!(server.peers().len() == seen, "the server was reached");
    ensure!(!link.find(b"needle of one who waits")?.is_found(), "it was readable on the link");
    Ok(())
}

const PORT: u16 = 9000;
const SERVICES: &str = "10.96.0.0/16";
const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 100);
