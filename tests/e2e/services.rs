//! Names and Services work as in any cluster: what a mesh must not break.

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::eventually;
use serde_json::Value;

use crate::cluster::{get, nodes};
use crate::scene::{BOUND, Scene, trial};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("names resolve", names_resolve),
        trial("a Service is reached across nodes", reached_across_nodes),
        trial("a pod reaches the API server", reaches_api_server),
    ]
}

fn names_resolve(scene: &Scene) -> Result<()> {
    for (number, node) in (1..).zip(nodes()?) {
        let pod = format!("asks-{number}");
        scene.pod(&pod, &node, &["pause"])?;
        let ask = || scene.run(&pod, &["resolve", "kubernetes.default.svc.cluster.local"]).ok();
        // A cluster that just came up may not lead to its DNS yet.
        let address = eventually(&format!("names resolve on {node}"), BOUND, ask)?;
        let service = get(&["--namespace", "default", "service", "kubernetes"])?;
        ensure!(service["spec"]["clusterIP"] == address.as_str(), "on {node} it resolves to {address}");
        // By the search list of its resolv.conf.
        let short = scene.run(&pod, &["resolve", "kubernetes.default"])?;
        ensure!(short == address, "on {node} the short name resolves to {short}");
    }
    Ok(())
}

fn reached_across_nodes(scene: &Scene) -> Result<()> {
    let nodes = nodes()?;
    let [first, second, ..] = &nodes[..] else { anyhow::bail!("this needs two nodes") };
    scene.pod("server", first, &["serve", "http:8080", "echo:9000"])?;
    scene.pod("client", second, &["pause"])?;
    scene.apply(
        "apiVersion: v1\n\
         kind: Service\n\
         metadata: {name: server}\n\
         spec:\n  \
           selector: {app: server}\n  \
           ports:\n  \
           - {name: http, port: 80, targetPort: 8080}\n  \
           - {name: tcp, port: 9000}\n",
    )?;
    let ask = || scene.run("client", &["get", "server:80", "/across"]).ok();
    let answer: Value = serde_json::from_str(&eventually("the Service answers", BOUND, ask)?)?;
    ensure!(answer["pod"] == "server" && answer["path"] == "/across", "an answer of something else: {answer}");
    let client = scene.pod_ip("client")?;
    ensure!(answer["peer"] == client.as_str(), "the server saw {} and not the client's {client}", answer["peer"]);
    let echo = scene.run("client", &["tcp", "server:9000", "there and back"])?;
    ensure!(echo == "there and back", "the server sent back {echo:?}");
    Ok(())
}

fn reaches_api_server(scene: &Scene) -> Result<()> {
    let node = nodes()?.pop().context("no node")?;
    scene.pod("client", &node, &["pause"])?;
    // TLS wants a greeting first; that it is open and stays open is enough.
    let ask = || scene.run("client", &["tcp", "kubernetes.default:443", ""]).ok();
    let said = eventually("the API server takes a connection", BOUND, ask)?;
    ensure!(said.is_empty(), "the API server said {said:?} before it was asked");
    Ok(())
}
