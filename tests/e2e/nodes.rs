//! The cluster is a whole one: its nodes are Ready, run pods, and survive their programs' restarts.

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::eventually;

use crate::cluster::{get, nodes, order, run_on};
use crate::scene::{BOUND, Scene, trial, trial_alone};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("every node is Ready", |_| nodes()?.iter().try_for_each(|node| wait_until_ready(node))),
        trial("a node sees its own processes and pods, and no other's", sees_its_own),
        trial_alone("a pod outlives a restart of its kubelet", outlives_kubelet),
        trial("a pod's cgroup carries its UID", cgroup_carries_uid),
    ]
}

pub fn wait_until_ready(name: &str) -> Result<()> {
    eventually(&format!("{name} is Ready"), BOUND, || {
        let node = get(&["node", name]).ok()?;
        let mut conditions = node["status"]["conditions"].as_array()?.iter();
        conditions.any(|condition| condition["type"] == "Ready" && condition["status"] == "True").then_some(())
    })
}

fn sees_its_own(_: &Scene) -> Result<()> {
    for node in nodes()? {
        let kubelets = run_on(&node, &["pgrep", "-c", "-x", "kubelet"])?;
        ensure!(kubelets.trim() == "1", "{node} sees {} kubelets", kubelets.trim());
        let name = run_on(&node, &["uname", "-n"])?;
        ensure!(name.trim() == node, "{node} is called {}", name.trim());
    }
    Ok(())
}

fn outlives_kubelet(scene: &Scene) -> Result<()> {
    let node = nodes()?.into_iter().next().context("no node")?;
    scene.pod("stays", &node, &["serve", "http:8080"])?;
    let of_pod = || -> Result<(String, u64)> {
        let pod = get(&["--namespace", &scene.namespace, "pod", "stays"])?;
        let status = &pod["status"]["containerStatuses"][0];
        Ok((status["containerID"].to_string(), status["restartCount"].as_u64().unwrap_or_default()))
    };
    let (before, kubelet) = (of_pod()?, run_on(&node, &["pgrep", "-x", "kubelet"])?);
    order("restart", &node, "kubelet")?;
    let after = run_on(&node, &["pgrep", "-x", "kubelet"])?;
    ensure!(kubelet != after, "the kubelet was not restarted");
    wait_until_ready(&node)?;
    // exec goes through the new kubelet.
    let answered = || scene.run("stays", &["get", "127.0.0.1:8080", "/"]).ok();
    eventually("the kubelet serves again", BOUND, answered)?;
    let now = of_pod()?;
    ensure!(before == now, "the pod was {before:?} and is {now:?}");
    Ok(())
}

fn cgroup_carries_uid(scene: &Scene) -> Result<()> {
    let node = nodes()?.into_iter().next().context("no node")?;
    scene.pod("named", &node, &["serve", "http:8080"])?;
    let pod = get(&["--namespace", &scene.namespace, "pod", "named"])?;
    let uid = pod["metadata"]["uid"].as_str().context("a pod without a UID")?;
    // A process may end while it is looked at.
    let groups = run_on(&node, &["sh", "-c", "cat /proc/[0-9]*/cgroup || true"])?;
    ensure!(groups.contains(uid), "no process of {node} is in a control group of {uid}");
    Ok(())
}
