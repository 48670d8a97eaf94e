//! Selvedge on the cluster, as its users install it.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use selvedge_lab::eventually;
use serde_json::Value;

use crate::cluster::{apply, get, kubectl, nodes, selvedge};
use crate::policies::install_kinds;
use crate::scene::{BOUND, Scene};

/// Installs it, unless it is there; returns once every node's agent is ready.
pub fn install() -> Result<()> {
    let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
    if !*installed {
        install_kinds()?;
        let base = kubectl(&["kustomize", &folder("daemonset/base")])?;
        // Nobody waits five minutes for a connection of a test.
        let base =
            base.replace("value: 300s", "value: 30s").replace("GracePeriodSeconds: 330", "GracePeriodSeconds: 60");
        apply(SYSTEM, &base)?;
        roll_out()?;
        *installed = true;
    }
    Ok(())
}

/// To be called by whoever takes it away.
pub fn is_uninstalled() {
    *INSTALLED.lock().unwrap_or_else(PoisonError::into_inner) = false;
}

/// Takes it away, if it is there, for a test that alone speaks for all nodes. The kinds stay, and what guards them.
pub fn uninstall() -> Result<()> {
    if !kubectl(&["get", "daemonsets", "--namespace", SYSTEM, "--output", "name"])?.is_empty() {
        selvedge(&["uninstall"])?;
        is_uninstalled();
        kubectl(&["wait", "namespace", SYSTEM, "--for=delete", "--timeout=60s"])?;
        install_kinds()?;
    }
    Ok(())
}

/// Waits until every agent and every controller is there and ready.
pub fn roll_out() -> Result<()> {
    let bound = format!("--timeout={}s", BOUND.as_secs());
    for what in ["deployment/selvedge-controller", "daemonset/selvedge-agent"] {
        kubectl(&["rollout", "status", "--namespace", SYSTEM, what, &bound])?;
    }
    Ok(())
}

/// How long the controllers' certificates live: `=30s`, or `-` for as long as they do by default.
pub fn set_lifetime(lifetime: &str) -> Result<()> {
    let variable = format!("SELVEDGE_CERTIFICATE_LIFETIME{lifetime}");
    kubectl(&["set", "env", "--namespace", SYSTEM, "deployment/selvedge-controller", &variable]).map(drop)
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

/// Waits until the agent of a pod's node has nothing to do with it any more.
pub fn wait_left(scene: &Scene, pod: &str) -> Result<()> {
    let node = node_of(scene, pod)?;
    let left = format!("{}/{pod}", scene.namespace);
    eventually(&format!("{left} has left"), BOUND, || {
        let shown: Value = serde_json::from_str(&ask_agent(&node, &["capture", "show", "--output=json"]).ok()?).ok()?;
        shown["pods"].as_array()?.iter().all(|shown| shown["pod"] != *left).then_some(())
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
    let pods = get(&["--namespace", SYSTEM, "pods", "--selector", AGENTS])?;
    let mut here = pods["items"]
        .as_array()
        .context("no list of pods")?
        .iter()
        .filter(|pod| pod["spec"]["nodeName"] == node && pod["metadata"]["deletionTimestamp"].is_null());
    let name = here.next().and_then(|pod| pod["metadata"]["name"].as_str());
    name.map(str::to_owned).with_context(|| format!("{node} has no agent"))
}

/// What a node's agent wrote of the connections that have ended, and of itself.
pub fn agent_logs(node: &str) -> Result<String> {
    kubectl(&["logs", "--namespace", SYSTEM, &agent_of(node)?, "--container=agent"])
}

/// The first node's name, and the second's.
pub fn two_nodes() -> Result<(String, String)> {
    let mut nodes = nodes()?.into_iter();
    nodes.next().zip(nodes.next()).context("this needs two nodes")
}

fn node_of(scene: &Scene, pod: &str) -> Result<String> {
    let pod = get(&["--namespace", &scene.namespace, "pod", pod])?;
    pod["spec"]["nodeName"].as_str().map(str::to_owned).context("a pod without a node")
}

pub fn folder(path: &str) -> String {
    root().join(path).to_string_lossy().into_owned()
}

/// The project's folder.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

pub const SYSTEM: &str = "selvedge-system";
/// Selects the agents' pods.
pub const AGENTS: &str = "app.kubernetes.io/name=selvedge-agent";
static INSTALLED: Mutex<bool> = Mutex::new(false);

/// Denies everybody, in the namespace that it is in.
pub const DENY_ALL: &str = "apiVersion: selvedge.dev/v1alpha1\n\
                            kind: AuthorizationPolicy\n\
                            metadata: {name: deny-all}\n\
                            spec: {}\n";
/// Takes mutual TLS only.
pub const STRICT: &str = "apiVersion: selvedge.dev/v1alpha1\n\
                          kind: PeerAuthentication\n\
                          metadata: {name: strict}\n\
                          spec: {mtls: {mode: STRICT}}\n";
