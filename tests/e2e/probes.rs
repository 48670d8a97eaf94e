//! Probes pass under default-deny, stay honest, and open no door.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::eventually;
use serde_json::Value;

use crate::cluster::{get, netns, nodes, test_image};
use crate::mesh::{DENY_ALL, install, join, two_nodes, wait_captured};
use crate::scene::{BOUND, Scene, trial};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("probes of every kind pass under default-deny", every_kind_passes),
        trial("a probe of a dead port fails", dead_port_fails),
        trial("a NodePort leads to no probed port under default-deny", no_door),
    ]
}

fn every_kind_passes(scene: &Scene) -> Result<()> {
    install()?;
    join(scene, true)?;
    scene.apply(DENY_ALL)?;
    let (client, server) = two_nodes()?;
    let image = test_image()?;
    let container = |name: &str, serves: &str, probe: &str| {
        let kinds = ["startupProbe", "readinessProbe", "livenessProbe"].map(|kind| format!("{kind}: {probe}"));
        let front = format!("name: {name}, image: \"{image}\", imagePullPolicy: Never, args: [serve, \"{serves}\"]");
        format!("  - {{{front}, {}}}\n", kinds.join(", "))
    };
    let containers = [
        container("http", "http:8080", "{httpGet: {port: 8080, path: /well}, periodSeconds: 1}"),
        container("tcp", "echo:9000", "{tcpSocket: {port: 9000}, periodSeconds: 1}"),
        container("grpc", "grpc:9001", "{grpc: {port: 9001}, periodSeconds: 1}"),
        container(
            "exec",
            "http:8081",
            "{exec: {command: [selvedge-pod, get, \"127.0.0.1:8081\", /]}, periodSeconds: 1}",
        ),
    ];
    scene.apply(&format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: server}}\nspec:\n  nodeName: {server}\n  \
         terminationGracePeriodSeconds: 1\n  containers:\n{}",
        containers.concat()
    ))?;
    scene.wait_for("condition=Ready", "server")?;
    wait_captured(scene, "server")?;
    // Its own ports are no door for anybody else, probed or not.
    scene.pod("client", &client, &["pause"])?;
    wait_captured(scene, "client")?;
    let ip = scene.pod_ip("server")?;
    for port in [8080, 9000, 9001, 8081] {
        let refused = scene.run("client", &["tcp", &format!("{ip}:{port}"), ""]);
        ensure!(refused.is_err(), "default-deny let a client in at {port}: {refused:?}");
    }
    let pod = get(&["--namespace", &scene.namespace, "pod", "server"])?;
    let statuses = pod["status"]["containerStatuses"].as_array().context("no container")?;
    ensure!(statuses.len() == containers.len(), "{statuses:?}");
    let well = statuses.iter().all(|status| status["ready"] == true && status["restartCount"] == 0);
    ensure!(well, "the pod is not well: {statuses:?}");
    Ok(())
}

/// In a mesh whose agents accept before the application does, such a probe would succeed.
fn dead_port_fails(scene: &Scene) -> Result<()> {
    install()?;
    join(scene, true)?;
    let node = nodes()?.into_iter().next().context("no node")?;
    scene.apply(&format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: dead}}\nspec:\n  nodeName: {node}\n  \
         terminationGracePeriodSeconds: 1\n  containers:\n  - name: main\n    image: \"{}\"\n    \
         imagePullPolicy: Never\n    args: [serve, \"http:8080\"]\n    \
         readinessProbe: {{tcpSocket: {{port: 9}}, periodSeconds: 1}}\n",
        test_image()?
    ))?;
    let said = || -> Option<String> {
        let events = get(&["--namespace", &scene.namespace, "events"]).ok()?;
        let mut messages = events["items"].as_array()?.iter().filter_map(|event| event["message"].as_str());
        messages.find(|message| message.starts_with("Readiness probe failed")).map(str::to_owned)
    };
    let said = eventually("the probe fails", BOUND, said)?;
    ensure!(said.contains("connection refused"), "the probe of a dead port says {said:?}");
    wait_captured(scene, "dead")
}

/// What comes from outside through a node is masqueraded to the address that probes come from.
fn no_door(scene: &Scene) -> Result<()> {
    install()?;
    join(scene, true)?;
    let (first, second) = two_nodes()?;
    scene.apply(&format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: server, labels: {{app: server}}}}\nspec:\n  nodeName: {first}\n  \
         terminationGracePeriodSeconds: 1\n  containers:\n  - name: main\n    image: \"{}\"\n    \
         imagePullPolicy: Never\n    args: [serve, \"http:8080\"]\n    \
         readinessProbe: {{httpGet: {{port: 8080, path: /well}}, periodSeconds: 1}}\n\
         ---\n\
         apiVersion: v1\nkind: Service\nmetadata: {{name: server}}\nspec:\n  type: NodePort\n  selector: {{app: server}}\n  \
         ports: [{{port: 80, targetPort: 8080}}]\n",
        test_image()?
    ))?;
    scene.wait_for("condition=Ready", "server")?;
    wait_captured(scene, "server")?;
    let service = get(&["--namespace", &scene.namespace, "service", "server"])?;
    let port = service["spec"]["ports"][0]["nodePort"].as_u64().context("no port of the nodes")?;
    let outside = netns("control")?;
    let ask = |node: &str| -> Result<Value> {
        let node = get(&["node", node])?;
        let address = node["status"]["addresses"][0]["address"].as_str().context("a node without an address")?;
        outside.http_get(SocketAddr::new(address.parse()?, u16::try_from(port)?), "/outside")?.json()
    };
    // It leads there, through either node, as long as policy lets it.
    for node in [&first, &second] {
        eventually(&format!("the port of {node} leads to the pod"), BOUND, || ask(node).ok())?;
    }
    scene.apply(DENY_ALL)?;
    for node in [&first, &second] {
        let refused = || ask(node).err();
        eventually(&format!("a client from outside is refused through {node}"), BOUND, refused)?;
    }
    // The probes go on passing: its condition is as old as it was.
    let pod = get(&["--namespace", &scene.namespace, "pod", "server"])?;
    ensure!(pod["status"]["containerStatuses"][0]["ready"] == true, "{}", pod["status"]);
    Ok(())
}
