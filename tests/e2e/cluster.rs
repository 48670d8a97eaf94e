//! The cluster under test: kubectl, its machines and their programs.

use std::env;
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use selvedge_lab::{Namespace, eventually};
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

/// Runs our own program as the cluster's administrator does, and returns what it prints.
pub fn selvedge(arguments: &[&str]) -> Result<String> {
    let folder = tempfile::tempdir()?;
    let kubeconfig = folder.path().join("kubeconfig");
    fs::write(&kubeconfig, kubectl(&["config", "view", "--raw"])?)?;
    succeed(Command::new(program()?).args(arguments).env("KUBECONFIG", kubeconfig))
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

/// A kubectl that runs beside the test. What it started in a pod ends when its input does.
pub struct Running {
    what: String,
    child: Child,
}

impl Running {
    pub fn start(arguments: &[&str]) -> Result<Self> {
        let mut command = xtask("kubectl")?;
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().context("cannot run kubectl")?;
        Ok(Self { what: arguments.join(" "), child })
    }

    /// Waits for it to print a line, which is no part of what [`Running::end`] returns then.
    pub fn line(&mut self) -> Result<String> {
        let output = self.child.stdout.as_mut().context("its output is not read")?;
        let (mut line, mut byte) = (Vec::new(), [0]);
        while output.read(&mut byte)? > 0 && byte != *b"\n" {
            line.extend(byte);
        }
        Ok(String::from_utf8(line)?)
    }

    /// Ends its input, and returns what it prints.
    pub fn end(mut self) -> Result<String> {
        drop(self.child.stdin.take());
        check(&self.what, self.child.wait_with_output()?)
    }

    /// Waits for it to end by itself, its input being open.
    pub fn wait(mut self, bound: Duration) -> Result<String> {
        let ended = || self.child.try_wait().ok().flatten();
        eventually(&format!("it ends: {}", self.what), bound, ended)?;
        self.end()
    }
}

/// The network namespace of a node, or of the machine `control`.
pub fn netns(machine: &str) -> Result<Namespace> {
    let name = run_on(machine, &["readlink", "/proc/self/ns/net"])?;
    let of_machine =
        |process: &Path| fs::read_link(process.join("ns/net")).is_ok_and(|at| at == Path::new(name.trim()));
    netns_where(of_machine)?.with_context(|| format!("no process is in the network namespace of {machine}"))
}

/// The network namespace of a running pod.
pub fn netns_of_pod(namespace: &str, pod: &str) -> Result<Namespace> {
    let pod = get(&["--namespace", namespace, "pod", pod])?;
    let uid = pod["metadata"]["uid"].as_str().context("a pod without a UID")?;
    let of_pod = |process: &Path| fs::read_to_string(process.join("cgroup")).is_ok_and(|groups| groups.contains(uid));
    netns_where(of_pod)?.with_context(|| format!("no process is in a control group of {uid}"))
}

/// Of the first process, in the numbers of the host, that is such and is still there.
fn netns_where(is_such: impl Fn(&Path) -> bool) -> Result<Option<Namespace>> {
    let processes: Vec<PathBuf> = fs::read_dir("/proc")?.flatten().map(|entry| entry.path()).collect();
    let such = processes.iter().filter(|process| is_such(process));
    Ok(such.filter_map(|process| Namespace::open(&process.join("ns/net")).ok()).next())
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
