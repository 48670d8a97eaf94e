//! A pod is deleted, and its address is given to another at once.

use std::fs;

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::{AgentOptions, End, Lab, Pod, PodSpec, authorization, trial_with};
use serde_json::json;

use crate::lab;

pub fn trials() -> Vec<Trial> {
    vec![
        trial_with("reuse::a_servers_address_reused_at_once_has_the_new_identity", lab(), a_servers_address),
        trial_with("reuse::a_clients_address_reused_at_once_is_judged_by_the_new_identity", lab(), a_clients_address),
        trial_with("reuse::a_peer_that_still_wants_the_old_identity_is_refused", lab(), a_peer_with_old_knowledge),
    ]
}

fn a_servers_address(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a").service_account("web"))?;
    let mut cart = lab.pod(PodSpec::new("shop/cart-0", "node-b").service_account("cart-0"))?;
    let mut server = cart.serve_echo(PORT)?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let link = lab.link()?;
    for generation in 1..4 {
        // An open connection, and an idle tunnel in the pool.
        let mut open = web.converse((cart.ip(), PORT))?;
        open.exchange("needle of the old one")?;
        web.converse((cart.ip(), PORT))?.exchange("needle of the old one")?;
        // The old application is still there, in a namespace without a link, when the new one is.
        cart = replaced(lab, cart, &format!("cart-{generation}"))?;
        let former = std::mem::replace(&mut server, cart.serve_echo(PORT)?);
        agents.iter().try_for_each(|agent| agent.wait_pod(&cart))?;
        let sees = |line: &serde_json::Value| line["destination_pod"] == cart.full_name();
        let wanted = format!("spiffe://cluster.local/ns/shop/sa/cart-{generation}");
        web.converse((cart.ip(), PORT))?.exchange("needle of the new one")?;
        for (agent, direction) in [(&agents[0], "outbound"), (&agents[1], "inbound")] {
            let line = agent
                .access_line("a connection to the new pod", |line| sees(line) && line["direction"] == direction)?;
            ensure!(line["destination_identity"] == wanted, "{line}");
        }
        // As without a mesh, its client hears of the end when it speaks.
        ensure!(
            matches!(open.end_after("needle of the old one")?, End::Reset(_)),
            "a connection to a pod that is gone ended in order"
        );
        drop(former);
    }
    for needle in ["needle of the old one", "needle of the new one"] {
        ensure!(!link.find(needle.as_bytes())?.is_found(), "{needle:?} was readable on the link");
    }
    Ok(())
}

fn a_clients_address(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a").service_account("web"))?;
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b").service_account("cart"))?;
    let web_alone = json!({"source": {"principals": ["cluster.local/ns/shop/sa/web"]}});
    lab.put(&authorization("shop/web-only", json!({"action": "ALLOW", "rules": [{"from": [web_alone]}]})))?;
    let server = cart.serve_echo(PORT)?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let link = lab.link()?;
    // Leaves an idle tunnel in the pool, made with the identity that is allowed.
    web.converse((cart.ip(), PORT))?.exchange("needle of the one allowed")?;
    let seen = server.peers().len();

    let thief = replaced(lab, web, "thief")?;
    agents.iter().try_for_each(|agent| agent.wait_pod(&thief))?;
    let mut refused = thief.converse((cart.ip(), PORT))?;
    ensure!(refused.end_after("needle of the thief")? == End::Reset(0), "the new pod was taken for the old one");
    ensure!(server.peers().len() == seen, "the server was reached: {:?}", server.peers());
    let line = agents[1].access_line("the thief's try", |line| line["verdict"] == "deny")?;
    ensure!(line["source_identity"] == "spiffe://cluster.local/ns/shop/sa/thief", "{line}");
    ensure!(line["source_pod"] == "shop/thief", "{line}");

    let web = replaced(lab, thief, "web")?;
    agents.iter().try_for_each(|agent| agent.wait_pod(&web))?;
    web.converse((cart.ip(), PORT))?.exchange("needle of the one allowed")?;
    ensure!(!link.find(b"needle of the")?.is_found(), "something was readable on the link");
    Ok(())
}

fn a_peer_with_old_knowledge(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a").service_account("web"))?;
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b").service_account("cart"))?;
    // The client's agent reads a copy, which will hear nothing of what happens.
    let copy = lab.manifests().with_file_name("copy");
    fs::create_dir(&copy)?;
    for file in fs::read_dir(lab.manifests())? {
        let file = file?;
        fs::copy(file.path(), copy.join(file.file_name()))?;
    }
    let stale = AgentOptions { manifests: Some(copy), ..AgentOptions::default() };
    let agents = [lab.node("node-a").start_agent(&stale)?, lab.node("node-b").start_agent(&AgentOptions::default())?];
    let link = lab.link()?;
    let server = cart.serve_echo(PORT)?;
    web.converse((cart.ip(), PORT))?.exchange("needle of the old one")?;

    drop(server);
    let thief = replaced(lab, cart, "thief")?;
    let server = thief.serve_echo(PORT)?;
    agents[1].wait_pod(&thief)?;
    for _ in 0..3 {
        let mut refused = web.converse((thief.ip(), PORT))?;
        ensure!(
            refused.end_after("needle for the old one alone")? == End::Reset(0),
            "another pod was taken for the one that was wanted"
        );
    }
    ensure!(server.peers().is_empty(), "the new pod was reached: {:?}", server.peers());
    let line = agents[0].access_line("the refusal", |line| line["reason"] == "tls")?;
    ensure!(line["detail"].as_str().is_some_and(|detail| detail.contains("sa/thief")), "{line}");
    ensure!(!link.find(b"needle")?.is_found(), "something was readable on the link");
    Ok(())
}

/// Deletes a pod and makes another of that name and service account at its address, with a namespace of its own.
fn replaced(lab: &Lab, pod: Pod, name: &str) -> Result<Pod> {
    let ips = pod.ips().to_vec();
    let spec = PodSpec::new(&format!("shop/{name}"), pod.node_name()).service_account(name);
    lab.delete(pod)?;
    lab.pod(ips.into_iter().fold(spec, PodSpec::ip))
}

const PORT: u16 = 9000;
