//! The cluster under test: kubectl, its machines and their programs.

use std::env;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// Runs kubectl, and returns what it prints.
pub fn kubectl(arguments: &[&str]) -> Result<String> {
    succeed(xtask("kubectl")?.args(arguments))
}

/// Runs helm, and returns what it prints.
pub fn helm(arguments: &[&str]) -> Result<String> {
    succeed(xtask("helm")?.args(arguments))
}

/// Runs kubectl with a folder of plugins, whatever comes of it.
pub fn kubectl_with_plugins(folder: &Path, arguments: &[&str]) -> Result<Output> {
    let mut path = folder.as_os_str().to_owned();
    path.push(":");
    path.push(env::var_os("PATH").unwrap_or_default());
    let mut command = xtask("kubectl")?;
    command.args(arguments).env("PATH", path).stdin(Stdio::null()).output().context("cannot run kubectl")
}

/// Objects as kubectl tells them.
pub fn get(arguments: &[&str]) -> Result<Value> {
    let text = kubectl(&[&["get", "--output", "json"], arguments].concat())?;
    serde_json::from_str(&text).with_context(|| format!("kubectl get {}: not JSON: {text}", arguments.join(" ")))
}

/// Makes or changes objects, given as YAML, in a namespace.
pub fn apply(namespace: &str, manifest: &str) -> Result<()> {
    let mut command = xtask("kubectl")?;
    command.args(["apply", "--namespace", namespace, "--filename", "-"]).stdin(Stdio::piped());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().context("cannot run kubectl")?;
    let mut input = child.stdin.take().context("no standard input")?;
    input.write_all(manifest.as_bytes())?;
    drop(input);
    check("kubectl apply", child.wait_with_output()?).map(drop)
}

/// Runs a command on a node, or on the machine `control`.
pub fn run_on(machine: &str, command: &[&str]) -> Result<String> {
    succeed(xtask("shell")?.arg(machine).args(command))
}

/// The names of the nodes.
pub fn nodes() -> Result<Vec<String>> {
    let nodes = get(&["nodes"])?;
    let items = nodes["items"].as_array().context("no list of nodes")?;
    Ok(items.iter().filter_map(|node| node["metadata"]["name"].as_str().map(str::to_owned)).collect())
}

/// `start`, `stop` or `restart` of one program of a machine: `order("restart", "node-1", "kubelet")`.
pub fn order(order: &str, machine: &str, program: &str) -> Result<()> {
    succeed(xtask(order)?.args([machine, program])).map(drop)
}

/// The image of the agent and the controller.
pub fn agent_image() -> Result<String> {
    variable("SELVEDGE_IMAGE")
}

/// The binary that is in that image, for use from outside of the cluster.
pub fn program() -> Result<PathBuf> {
    variable("SELVEDGE_PROGRAM").map(PathBuf::from)
}

/// The image of servers and clients.
pub fn test_image() -> Result<String> {
    variable("SELVEDGE_TEST_IMAGE")
}

fn xtask(verb: &str) -> Result<Command> {
    let mut command = Command::new(variable("SELVEDGE_XTASK")?);
    command.args(["cluster", verb]);
    Ok(command)
}

fn variable(name: &str) -> Result<String> {
    env::var(name).with_context(|| format!("{name} is not set: these tests run as cargo xtask e2e"))
}

fn succeed(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().context("cannot run cargo xtask cluster")?;
    let arguments: Vec<_> = command.get_args().skip(1).map(|word| word.to_string_lossy()).collect();
    check(&arguments.join(" "), output)
}

fn check(what: &str, output: Output) -> Result<String> {
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{what}: {}", said.trim());
    }
    String::from_utf8(output.stdout).with_context(|| format!("{what} printed no text"))
}
