//! A namespace whose pods run already joins the mesh, and leaves it; and what is outside the mesh is reached as before.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::eventually;
use serde_json::Value;

use crate::cluster::{get, netns};
use crate::mesh::{STRICT, install, join, two_nodes, wait_captured, wait_left};
use crate::scene::{BOUND, Scene, trial};
use crate::wire::Wire;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("running pods join without a restart, and leave", joins_and_leaves),
        trial("joined pods reach what is outside the mesh", reach_outside),
        trial("joined pods are reached from outside the mesh until STRICT", reached_from_outside),
    ]
}

fn joins_and_leaves(scene: &Scene) -> Result<()> {
    install()?;
    let (client, server) = two_nodes()?;
    scene.pod("server", &server, &["serve", "http:8080", "echo:9000"])?;
    scene.pod("client", &client, &["pause"])?;
    let to = format!("{}:9000", scene.pod_ip("server")?);
    let started = containers(scene)?;
    let wire = Wire::tap()?;
    // Joining and leaving touch no connection that is there.
    let talk = scene.talk("client", &to)?;
    say(scene, &to, "a needle in clear")?;
    ensure!(wire.carried("a needle in clear")?, "without the mesh nothing is readable, so nothing would be shown");

    join(scene, true)?;
    wait_captured(scene, "client")?;
    wait_captured(scene, "server")?;
    wait_tunnelled(scene, &wire, &to)?;
    wire.clear()?;
    say(scene, &to, "a needle in the mesh")?;
    ensure!(!wire.carried("a needle in the mesh")?, "what is said in the mesh is readable between the nodes");
    ensure!(wire.tunnelled()? > 0, "nothing went through a tunnel");

    join(scene, false)?;
    wait_left(scene, "client")?;
    wait_left(scene, "server")?;
    say(scene, &to, "a needle after leaving")?;
    ensure!(wire.carried("a needle after leaving")?, "the pods have not left");
    let talk: Value = serde_json::from_str(&talk.end()?)?;
    ensure!(talk["broken"].is_null() && talk["heard"].as_u64() > Some(10), "an open connection was touched: {talk}");
    ensure!(containers(scene)? == started, "something was restarted");
    Ok(())
}

/// The client's agent learns from the API server that the server is captured.
fn wait_tunnelled(scene: &Scene, wire: &Wire, to: &str) -> Result<()> {
    let mut number = 0;
    let is_hidden = || {
        number += 1;
        let text = format!("a needle of trial {number}");
        say(scene, to, &text).ok()?;
        (!wire.carried(&text).ok()?).then_some(())
    };
    eventually("nothing is readable between the nodes", BOUND, is_hidden)
}

fn say(scene: &Scene, to: &str, text: &str) -> Result<()> {
    let answer = scene.run("client", &["tcp", to, text])?;
    ensure!(answer == text, "the server sent back {answer:?}");
    Ok(())
}

/// What runs, and how often it was started.
fn containers(scene: &Scene) -> Result<Vec<String>> {
    let pods = get(&["--namespace", &scene.namespace, "pods"])?;
    let statuses = pods["items"].as_array().context("no list of pods")?.iter().map(|pod| {
        let status = &pod["status"]["containerStatuses"][0];
        format!("{} {}", status["containerID"], status["restartCount"])
    });
    Ok(statuses.collect())
}

fn reach_outside(scene: &Scene) -> Result<()> {
    install()?;
    join(scene, true)?;
    let (client, other) = two_nodes()?;
    scene.pod("client", &client, &["pause"])?;
    scene.pod_with("on-node", &other, "hostNetwork: true", &["serve", "http:18080"])?;
    wait_captured(scene, "client")?;
    scene.wait_for("condition=Ready", "on-node")?;

    let resolved = scene.run("client", &["resolve", "kubernetes.default.svc.cluster.local"])?;
    let service = get(&["--namespace", "default", "service", "kubernetes"])?;
    ensure!(service["spec"]["clusterIP"] == resolved.as_str(), "the API server's name resolves to {resolved}");
    // TLS wants a greeting first; that it is open and stays open is enough.
    let api = scene.run("client", &["tcp", "kubernetes.default:443", ""])?;
    ensure!(api.is_empty(), "the API server said {api:?} before it was asked");

    let host = scene.pod_ip("on-node")?;
    let answer = scene.run("client", &["get", &format!("{host}:18080"), "/node"])?;
    ensure!(serde_json::from_str::<Value>(&answer)?["path"] == "/node", "{answer}");

    // Beyond everything that the cluster knows of.
    let control = netns("control")?;
    control.ip_batch([format!("addr replace {OUTSIDE}/32 dev lo")])?;
    let outside = control.serve_http(SocketAddr::new(OUTSIDE.parse()?, 8080), "outside")?;
    let answer: Value = serde_json::from_str(&scene.run("client", &["get", &outside.address().to_string(), "/out"])?)?;
    let own = scene.pod_ip("client")?;
    ensure!(answer["pod"] == "outside" && answer["peer"] == own.as_str(), "the server outside says {answer}");
    Ok(())
}

fn reached_from_outside(scene: &Scene) -> Result<()> {
    install()?;
    join(scene, true)?;
    let (client, server) = two_nodes()?;
    scene.pod("server", &server, &["serve", "http:8080"])?;
    scene.pod("inside", &client, &["pause"])?;
    scene.pod_with("on-node", &client, "hostNetwork: true", &["pause"])?;
    wait_captured(scene, "server")?;
    wait_captured(scene, "inside")?;
    scene.wait_for("condition=Ready", "on-node")?;
    let to = format!("{}:8080", scene.pod_ip("server")?);
    let control = netns("control")?;
    let from_outside = || control.http_get(to.parse::<SocketAddr>()?, "/from-outside");
    scene.run("on-node", &["get", &to, "/permissive"])?;
    ensure!(from_outside()?.status == 200, "a client outside the cluster is not let in");
    scene.apply(STRICT)?;
    let refused = || scene.run("on-node", &["get", &to, "/strict"]).err();
    eventually("a pod of the node's network is refused under STRICT", BOUND, refused)?;
    ensure!(from_outside().is_err(), "a client outside the cluster is let in under STRICT");
    scene.run("inside", &["get", &to, "/strict"]).map(drop)
}

/// An address for documentation (RFC 5737).
const OUTSIDE: &str = "198.51.100.7";
