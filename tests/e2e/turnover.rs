//! Pods come and go: their kubelet restarts, they are deleted by force, and their addresses are taken by others.

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::eventually;
use serde_json::Value;

use crate::cluster::{get, kubectl, order, run_on};
use crate::mesh::{agent_logs, ask_agent, install, join, two_nodes, wait_captured};
use crate::nodes::wait_until_ready;
use crate::scene::{BOUND, Scene, trial, trial_alone};

pub fn trials() -> Vec<Trial> {
    vec![
        trial_alone("joined pods outlive a restart of their kubelet with their connections", kubelet_restarted),
        trial("a pod deleted by force is forgotten, and its name taken again", deleted_by_force),
        trial_alone("an address that another identity takes over brings no rights along", address_reused),
    ]
}

fn kubelet_restarted(scene: &Scene) -> Result<()> {
    install()?;
    join(scene, true)?;
    let (client, server) = two_nodes()?;
    scene.pod("server", &server, &["serve", "http:8080", "echo:9000"])?;
    scene.pod("client", &client, &["pause"])?;
    wait_captured(scene, "server")?;
    wait_captured(scene, "client")?;
    let ip = scene.pod_ip("server")?;
    let container = || -> Result<String> {
        let pod = get(&["--namespace", &scene.namespace, "pod", "server"])?;
        Ok(pod["status"]["containerStatuses"][0]["containerID"].to_string())
    };
    let before = container()?;
    let talk = scene.talk("client", &format!("{ip}:9000"))?;
    let load = scene.start("client", &["load", &format!("{ip}:8080")])?;
    let kubelet = run_on(&server, &["pgrep", "-x", "kubelet"])?;
    order("restart", &server, "kubelet")?;
    ensure!(run_on(&server, &["pgrep", "-x", "kubelet"])? != kubelet, "the kubelet was not restarted");
    wait_until_ready(&server)?;
    // exec goes through the new kubelet.
    let answered = || scene.run("server", &["get", "127.0.0.1:8080", "/"]).ok();
    eventually("the kubelet serves again", BOUND, answered)?;
    scene.pod("later", &server, &["pause"])?;
    wait_captured(scene, "later")?;
    wait_captured(scene, "server")?;
    let talk: Value = serde_json::from_str(&talk.end()?)?;
    ensure!(talk["broken"].is_null() && talk["heard"].as_u64() > Some(10), "a connection was lost: {talk}");
    let load: Value = serde_json::from_str(&load.end()?)?;
    ensure!(load["failed"] == 0 && load["answered"].as_u64() > Some(100), "requests failed: {load}");
    ensure!(container()? == before, "the pod was started again");
    Ok(())
}

fn deleted_by_force(scene: &Scene) -> Result<()> {
    install()?;
    join(scene, true)?;
    let (client, server) = two_nodes()?;
    scene.pod("client", &client, &["pause"])?;
    wait_captured(scene, "client")?;
    let named = format!("{}/server", scene.namespace);
    for _ in 0..3 {
        scene.pod("server", &server, &["serve", "http:8080"])?;
        wait_captured(scene, "server")?;
        let uid = get(&["--namespace", &scene.namespace, "pod", "server"])?["metadata"]["uid"].clone();
        let to = format!("{}:8080", scene.pod_ip("server")?);
        scene.run("client", &["get", &to, "/now"])?;
        let only_it = || {
            let shown: Value =
                serde_json::from_str(&ask_agent(&server, &["capture", "show", "-o", "json"]).ok()?).ok()?;
            let mut named = shown["pods"].as_array()?.iter().filter(|shown| shown["pod"] == *named);
            named.next().filter(|shown| shown["uid"] == uid)?;
            named.next().is_none().then_some(())
        };
        eventually("the agent knows this one of the name, and no other", BOUND, only_it)?;
        kubectl(&["delete", "pod", "server", "--namespace", &scene.namespace, "--grace-period=0", "--force"])?;
    }
    Ok(())
}

/// The agents go by certificates and by what the API server says of an address now, and keep nothing for its next owner.
fn address_reused(scene: &Scene) -> Result<()> {
    install()?;
    join(scene, true)?;
    let (client, server) = two_nodes()?;
    for account in ["one", "two"] {
        kubectl(&["create", "serviceaccount", account, "--namespace", &scene.namespace])?;
    }
    scene.pod("server", &server, &["serve", "http:8080"])?;
    wait_captured(scene, "server")?;
    scene.apply(&format!(
        "apiVersion: selvedge.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: only-one}}\n\
         spec: {{rules: [{{from: [{{source: {{principals: [\"cluster.local/ns/{}/sa/one\"]}}}}]}}]}}\n",
        scene.namespace
    ))?;
    let to = format!("{}:8080", scene.pod_ip("server")?);
    let mut address: Option<String> = None;
    for (pod, account) in [("first", "one"), ("second", "two"), ("third", "one")] {
        if let Some(address) = &address {
            give_next(&client, address)?;
        }
        scene.pod_with(pod, &client, &format!("serviceAccountName: {account}"), &["pause"])?;
        scene.wait_for("condition=Ready", pod)?;
        wait_captured(scene, pod)?;
        let has = scene.pod_ip(pod)?;
        let wanted = address.get_or_insert_with(|| has.clone());
        ensure!(*wanted == has, "{pod} has {has} and not {wanted}: nothing would be shown");
        // The policy, or the pod, may still be news to the server's agent.
        let answer = || scene.run(pod, &["get", &to, "/reused"]);
        match account {
            "one" => drop(eventually(&format!("{pod} is let in"), BOUND, || answer().ok())?),
            _ => drop(eventually(&format!("{pod} is refused"), BOUND, || answer().err())?),
        }
        kubectl(&["delete", "pod", pod, "--namespace", &scene.namespace])?;
    }
    let denied = || {
        let logs = agent_logs(&server).ok()?;
        let source = format!("source_identity=spiffe://cluster.local/ns/{}/sa/two", scene.namespace);
        let reason = format!("reason=policy:{}/only-one", scene.namespace);
        logs.lines().any(|line| line.contains(&source) && line.contains(&reason)).then_some(())
    };
    eventually("the server's agent has told who was refused, and by which policy", BOUND, denied)
}

/// Has the node's IPAM plugin give this address to the next pod.
fn give_next(node: &str, address: &str) -> Result<()> {
    let free = || run_on(node, &["test", "!", "-e", &format!("{LEASES}/{address}")]).ok();
    eventually(&format!("{address} is free"), BOUND, free)?;
    let (range, last) = address.rsplit_once('.').context("not an IPv4 address")?;
    let before = last.parse::<u8>()?.checked_sub(1).context("no address before it")?;
    let note = format!("printf %s {range}.{before} > {LEASES}/last_reserved_ip.0");
    run_on(node, &["sh", "-c", &note]).map(drop)
}

/// Where host-local keeps its leases, by the name of the list of plugins.
const LEASES: &str = "/var/lib/cni/networks/cluster";
