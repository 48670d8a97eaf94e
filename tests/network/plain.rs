//! The same nodes and pods without a mesh: what every other test is compared with.

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::{Lab, PodSpec, trial_with};

use crate::lab;

pub fn trials() -> Vec<Trial> {
    vec![trial_with("plain::without_a_mesh_the_link_shows_every_byte", lab(), without_a_mesh_the_link_shows_every_byte)]
}

fn without_a_mesh_the_link_shows_every_byte(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b").port("http", 8080))?;
    let _server = cart.serve_http(8080, "cart")?;
    let link = lab.link()?;
    for (number, ip) in cart.ips().iter().enumerate() {
        let needle = format!("needle-{number}");
        let answer = web.http_get((*ip, 8080), &format!("/{needle}"))?;
        let mine = web.ips()[number];
        ensure!(answer.json()?["peer"] == mine.to_string(), "the server saw another client: {}", answer.text());
        let found = link.find(needle.as_bytes())?;
        ensure!(found.packets >= 2, "once there, once back: {found:?}");
    }
    Ok(())
}
