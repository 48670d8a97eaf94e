//! What is on the cluster beside the suite: the kinds of the Gateway API, and Selvedge as its users install it.

use std::fs;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result, bail};

use crate::build::root;
use crate::cluster::Cluster;
use crate::style::bad;

/// Makes these kinds known to the API server.
pub fn kinds(cluster: &Cluster, folder: &Path) -> Result<()> {
    // On the server's side: they are too long for the annotation that the other way needs.
    kubectl(cluster, &["apply", "--server-side", "--force-conflicts", "--filename", &folder.display().to_string()])?;
    kubectl(cluster, &["wait", "--for=condition=Established", "--timeout=60s", "customresourcedefinition", "--all"])?;
    Ok(())
}

/// Removes the namespaces of a run that was to keep them, so that none has what it asked for then.
pub fn clear(cluster: &Cluster) -> Result<()> {
    kubectl(cluster, &["delete", "namespace", "--selector", "gateway-conformance", "--timeout=120s"]).map(drop)
}

/// Installs it; returns once every node's agent is ready. One that was there runs the image anew, which may be another.
pub fn selvedge(cluster: &Cluster) -> Result<()> {
    kinds(cluster, &root().join("crd"))?;
    let there = kubectl(cluster, &["get", "daemonsets", "--namespace", SYSTEM, "--output", "name"])?;
    kubectl(cluster, &["apply", "--kustomize", &root().join("daemonset/base").display().to_string()])?;
    for what in ["deployment/selvedge-controller", "daemonset/selvedge-agent"] {
        if !there.is_empty() {
            kubectl(cluster, &["rollout", "restart", "--namespace", SYSTEM, what])?;
        }
        kubectl(cluster, &["rollout", "status", "--namespace", SYSTEM, what, "--timeout=120s"])?;
    }
    Ok(())
}

/// Has a waypoint deployed as its users do it, by a Gateway; returns once its pods are ready.
pub fn waypoint(cluster: &Cluster) -> Result<()> {
    let file = root().join("xtask/src/conformance/waypoint.yaml");
    kubectl(cluster, &["apply", "--filename", &file.display().to_string()])?;
    let (namespace, name) = WAYPOINT.split_once('/').context("a waypoint has a namespace")?;
    let gateway = format!("gateway/{name}");
    let programmed = "--for=condition=Programmed";
    kubectl(cluster, &["wait", programmed, "--timeout=120s", "--namespace", namespace, &gateway])?;
    // One that was there runs the image anew, which may be another.
    let deployment = format!("deployment/{name}-selvedge-waypoint");
    kubectl(cluster, &["rollout", "restart", "--namespace", namespace, &deployment])?;
    kubectl(cluster, &["rollout", "status", "--namespace", namespace, &deployment, "--timeout=120s"]).map(drop)
}

/// Prints the end of what the agents and the controller said, and writes the whole into files.
pub fn tell_logs(cluster: &Cluster, folder: &Path) -> Result<()> {
    for pod in kubectl(cluster, &["get", "pods", "--namespace", SYSTEM, "--output", "name"])?.lines() {
        let logs = kubectl(cluster, &["logs", pod, "--namespace", SYSTEM, "--all-containers", "--prefix"])?;
        let file = folder.join(format!("{}.log", pod.trim_start_matches("pod/")));
        fs::write(&file, &logs).with_context(|| format!("cannot write {}", file.display()))?;
        let lines: Vec<_> = logs.lines().collect();
        println!("\n{} {pod}, as a whole in {}", bad("said:"), file.display());
        lines[lines.len().saturating_sub(SHOWN_LINES)..].iter().for_each(|line| println!("    {line}"));
    }
    Ok(())
}

/// Runs kubectl, and returns what it prints.
fn kubectl(cluster: &Cluster, arguments: &[&str]) -> Result<String> {
    let output = cluster.kubectl()?.args(arguments).stdin(Stdio::null()).output().context("cannot run kubectl")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("kubectl {}: {}", arguments.join(" "), said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The Gateway of `xtask/src/conformance/waypoint.yaml`.
pub const WAYPOINT: &str = "waypoints/shared";
const SYSTEM: &str = "selvedge-system";
const SHOWN_LINES: usize = 40;
