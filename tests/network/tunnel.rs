//! Two joined pods on two nodes: captured, identified, encrypted.

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::{AgentOptions, Lab, PodSpec, trial_with};

use crate::lab;

pub fn trials() -> Vec<Trial> {
    vec![trial_with("tunnel::two_joined_pods_talk_over_mutual_tls", lab(), two_joined_pods_talk_over_mutual_tls)]
}

fn two_joined_pods_talk_over_mutual_tls(lab: &Lab) -> Result<()> {
    lab.namespace("shop", true)?;
    let web = lab.pod(PodSpec::new("shop/web", "node-a").service_account("web"))?;
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b").service_account("cart").port("http", 8080))?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let _server = cart.serve_http(8080, "cart")?;
    let link = lab.link()?;
    for (number, ip) in cart.ips().iter().enumerate() {
        let needle = format!("needle-{number}");
        let answer = web.http_get((*ip, 8080), &format!("/{needle}"))?;
        let mine = web.ips()[number];
        ensure!(answer.json()?["peer"] == mine.to_string(), "the server saw another client: {}", answer.text());
        ensure!(!link.find(needle.as_bytes())?.is_found(), "the request was readable on the link");
    }
    ensure!(link.tcp_packets(15008)? > 0, "nothing went through the tunnel");
    ensure!(link.tcp_packets(8080)? == 0, "something went beside the tunnel");
    let line = agents[1].access_line("an inbound connection", |line| line["direction"] == "inbound")?;
    ensure!(line["source_identity"] == "spiffe://cluster.local/ns/shop/sa/web", "{line}");
    ensure!(line["destination_identity"] == "spiffe://cluster.local/ns/shop/sa/cart", "{line}");
    ensure!(line["key_exchange"] == "X25519MLKEM768", "{line}");
    Ok(())
}
