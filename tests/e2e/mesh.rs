//! Selvedge on the cluster, as its users install it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use selvedge_lab::eventually;
use serde_json::Value;

use crate::cluster::{apply, get, kubectl, nodes, run_on};
use crate::scene::{BOUND, Scene};

/// Installs it, or leaves it as it is; returns once every node's agent is ready.
pub fn install() -> Result<()> {
    kubectl(&["apply", "--server-side", "--force-conflicts", "--kustomize", &folder("crd")])?;
    let base = kubectl(&["kustomize", &folder("daemonset/base")])?;
    // Nobody waits five minutes for a connection of a test.
    let base = base.replace("value: 300s", "value: 20s").replace("GracePeriodSeconds: 330", "GracePeriodSeconds: 50");
    apply(SYSTEM, &base)?;
    roll_out()
}

/// Waits until every agent and every controller is there and ready.
pub fn roll_out() -> Result<()> {
    let bound = format!("--timeout={}s", BOUND.as_secs());
    for what in ["deployment/selvedge-controller", "daemonset/selvedge-agent"] {
        kubectl(&["rollout", "status", "--namespace", SYSTEM, what, &bound])?;
    }
    Ok(())
}

/// Removes it in the order that `docs/install.md` tells.
pub fn uninstall() -> Result<()> {
    kubectl(&["delete", "daemonset", "selvedge-agent", "--namespace", SYSTEM])?;
    let bound = format!("--timeout={}s", BOUND.as_secs());
    let agents = "app.kubernetes.io/name=selvedge-agent";
    kubectl(&["wait", "pod", "--for=delete", "--namespace", SYSTEM, "--selector", agents, &bound])?;
    kubectl(&["delete", "--kustomize", &folder("daemonset/base")]).map(drop)
}

/// Puts a namespace into the mesh, or takes it out.
pub fn join(scene: &Scene, joined: bool) -> Result<()> {
    let mode = if joined { "selvedge.dev/mesh=enabled" } else { "selvedge.dev/mesh-" };
    kubectl(&["annotate", "--overwrite", "namespace", &scene.namespace, mode]).map(drop)
}

/// Waits until the agent of a pod's node has captured it.
pub fn wait_captured(scene: &Scene, pod: &str) -> Result<()> {
    let node = node_of(scene, pod)?;
    let wanted = format!("{}/{pod}", scene.namespace);
    eventually(&format!("{wanted} is captured"), BOUND, || {
        let shown: Value = serde_json::from_str(&ask_agent(&node, &["capture", "show", "--output=json"]).ok()?).ok()?;
        let captured = |shown: &Value| shown["pod"] == *wanted && shown["state"] == "captured";
        shown["pods"].as_array()?.iter().any(captured).then_some(())
    })
}

/// Runs a verb of the binary in the agent of a node.
pub fn ask_agent(node: &str, arguments: &[&str]) -> Result<String> {
    let agent = agent_of(node)?;
    let front = ["exec", "--namespace", SYSTEM, &agent, "--container=agent", "--", "selvedge"];
    kubectl(&[&front, arguments].concat())
}

/// The name of a node's agent that is not on its way out.
pub fn agent_of(node: &str) -> Result<String> {
    let pods = get(&["--namespace", SYSTEM, "pods", "--selector", "app.kubernetes.io/name=selvedge-agent"])?;
    let mut here = pods["items"]
        .as_array()
        .context("no list of pods")?
        .iter()
        .filter(|pod| pod["spec"]["nodeName"] == node && pod["metadata"]["deletionTimestamp"].is_null());
    let name = here.next().and_then(|pod| pod["metadata"]["name"].as_str());
    name.map(str::to_owned).with_context(|| format!("{node} has no agent"))
}

/// What is left on the nodes after an uninstall must be nothing.
pub fn nothing_is_left() -> Result<()> {
    for node in nodes()? {
        let lists = run_on(&node, &["sh", "-c", "cat /etc/cni/net.d/*"])?;
        ensure!(!lists.contains("selvedge"), "{node} has the entry of the plugin still");
        let files = run_on(&node, &["sh", "-c", "ls -A /var/lib/selvedge; ls /opt/cni/bin | grep selvedge || true"])?;
        ensure!(files.trim().is_empty(), "{node} has {files} still");
        let rules = run_on(&node, &["sh", "-c", RULES_OF_PODS])?;
        ensure!(!rules.contains("SELVEDGE"), "{node} has rules in its pods still: {rules}");
    }
    Ok(())
}

fn node_of(scene: &Scene, pod: &str) -> Result<String> {
    let pod = get(&["--namespace", &scene.namespace, "pod", pod])?;
    pod["spec"]["nodeName"].as_str().map(str::to_owned).context("a pod without a node")
}

fn folder(path: &str) -> String {
    root().join(path).to_string_lossy().into_owned()
}

/// The project's folder.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

pub const SYSTEM: &str = "selvedge-system";
const RULES_OF_PODS: &str = "for netns in /run/netns/*; do nsenter --net=$netns iptables-nft-save; nsenter --net=$netns iptables-legacy-save; done";
