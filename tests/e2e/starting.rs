//! Pods that start: captured before their first packet, and what becomes of them while their node has no agent.

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::eventually;

use crate::cluster::{get, kubectl};
use crate::mesh::{AGENTS, STRICT, SYSTEM, agent_logs, install, join, roll_out, two_nodes, wait_captured};
use crate::scene::{BOUND, Scene, trial, trial_alone};
use crate::wire::Wire;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("a pod that connects in its first millisecond is captured", first_millisecond),
        trial_alone("without an agent joined pods wait with an event, and all others start", without_agent),
    ]
}

fn first_millisecond(scene: &Scene) -> Result<()> {
    install()?;
    join(scene, true)?;
    let (client, server) = two_nodes()?;
    scene.pod("server", &server, &["serve", "http:8080"])?;
    wait_captured(scene, "server")?;
    scene.apply(STRICT)?;
    let to = format!("{}:8080", scene.pod_ip("server")?);
    let start = |name: &str, more: &str| scene.pod_with(name, &client, more, &["get", &to, "/first"]);
    // In plaintext it is refused: without this nothing would be shown.
    let outside = scene.another("outside")?;
    let refused = || {
        kubectl(&["delete", "pod", "plain", "--namespace", &outside.namespace, "--ignore-not-found"]).ok()?;
        outside.pod_with("plain", &client, "restartPolicy: Never", &["get", &to, "/plain"]).ok()?;
        outside.wait_for("jsonpath={.status.phase}=Failed", "plain").ok()
    };
    eventually("a pod outside the mesh is refused", BOUND, refused)?;

    let quick: Vec<_> = (1..=PODS).map(|number| format!("quick-{number}")).collect();
    quick.iter().try_for_each(|name| start(name, "restartPolicy: Never"))?;
    for name in &quick {
        scene.wait_for("jsonpath={.status.phase}=Succeeded", name)?;
    }
    // The server's agent knows each by its certificate; the pod itself is news to it still.
    let sources =
        quick.iter().map(|name| Ok(format!(" source_addr={}:", scene.pod_ip(name)?))).collect::<Result<Vec<_>>>()?;
    let identity = format!(" source_identity=spiffe://cluster.local/ns/{}/sa/default ", scene.namespace);
    let all_known = || {
        let logs = agent_logs(&server).ok()?;
        let told = |source: &String| {
            let mut lines = logs.lines().filter(|line| line.contains("direction=inbound") && line.contains(source));
            lines.any(|line| line.contains(&identity) && line.contains("transport=fast verdict=allow"))
        };
        sources.iter().all(told).then_some(())
    };
    eventually("the server's agent has told of each by its identity", BOUND, all_known)
}

fn without_agent(scene: &Scene) -> Result<()> {
    install()?;
    join(scene, true)?;
    let (node, other) = two_nodes()?;
    scene.pod("first", &node, &["pause"])?;
    scene.pod("goes", &node, &["pause"])?;
    scene.pod("server", &other, &["serve", "echo:9000"])?;
    for pod in ["first", "goes", "server"] {
        wait_captured(scene, pod)?;
    }
    // A DaemonSet that wants no node has no agents, and is not deleted.
    choose_nodes(r#""true""#)?;
    let tried = while_none_is_there(scene, &node);
    // The cluster is to be whole again, whatever happened.
    join(scene, true)?;
    choose_nodes("null")?;
    roll_out()?;
    tried?;
    // It starts by itself.
    scene.wait_for("condition=Ready", "waits")?;
    wait_captured(scene, "waits")?;
    let to = format!("{}:9000", scene.pod_ip("server")?);
    let said = || scene.run("first", &["tcp", &to, "again"]).ok().filter(|said| said == "again");
    eventually("a pod that was there before is served again", BOUND, said).map(drop)
}

fn while_none_is_there(scene: &Scene, node: &str) -> Result<()> {
    let bound = format!("--timeout={}s", BOUND.as_secs());
    kubectl(&["wait", "pod", "--for=delete", "--namespace", SYSTEM, "--selector", AGENTS, &bound])?;
    scene.pod_with("waits", node, "restartPolicy: Always", &["pause"])?;
    let says = || {
        let events = get(&["--namespace", &scene.namespace, "events"]).ok()?;
        let mut messages = events["items"].as_array()?.iter().filter_map(|event| event["message"].as_str());
        let clear = "the selvedge agent of this node does not answer";
        messages
            .any(|message| message.contains(&format!("{}/waits", scene.namespace)) && message.contains(clear))
            .then_some(())
    };
    eventually("an event says what the pod waits for", BOUND, says)?;
    // What was captured is not let out in plaintext.
    let wire = Wire::tap()?;
    let to = format!("{}:9000", scene.pod_ip("server")?);
    let said = scene.run("first", &["tcp", &to, "a needle without an agent"]);
    ensure!(said.is_err(), "a captured pod spoke without its agent: {said:?}");
    ensure!(!wire.carried("a needle without an agent")?, "a captured pod spoke in plaintext without its agent");
    // Whoever is not joined starts, and whoever is may go.
    let outside = scene.another("outside")?;
    outside.pod("starts", node, &["pause"])?;
    kubectl(&["delete", "pod", "goes", "--namespace", &scene.namespace, &bound])?;
    let waits = get(&["--namespace", &scene.namespace, "pod", "waits"])?;
    let state = &waits["status"]["containerStatuses"][0]["state"]["waiting"]["reason"];
    ensure!(*state == "ContainerCreating", "the joined pod does not wait: {}", waits["status"]);
    Ok(())
}

/// On which nodes agents are: on those with a label that no node has, or on all.
fn choose_nodes(value: &str) -> Result<()> {
    let patch =
        format!(r#"{{"spec":{{"template":{{"spec":{{"nodeSelector":{{"selvedge.dev/nowhere":{value}}}}}}}}}}}"#);
    kubectl(&["patch", "daemonset", "selvedge-agent", "--namespace", SYSTEM, "--patch", &patch]).map(drop)
}

const PODS: usize = 10;
