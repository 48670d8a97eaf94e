//! `--against`: another node proxy in the agents' place.

use std::fmt::Write;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use selvedge_lab::{BOUND, Node, eventually};

use crate::bench::stage::{FOLDER, Stage};
use crate::bench::variants::Place;

/// The start-up script of a node, and all that it started.
pub struct Other {
    child: Child,
    node: String,
}

impl Other {
    /// Runs the command in the node's network namespace, and waits until it makes the file of `BENCH_READY`.
    pub fn start(command: &str, node: &Node, stage: &Stage, place: Place) -> Result<Self> {
        let folder = Path::new(FOLDER);
        let (ready, log) = (folder.join(format!("{}.ready", node.name())), folder.join(format!("{}.log", node.name())));
        let _ = fs::remove_file(&ready);
        let mut script = Command::new("sh");
        script.args(["-c", command]).process_group(0).stdin(Stdio::null());
        script.stdout(File::create(&log)?).stderr(File::options().append(true).open(&log)?);
        script.env("BENCH_NODE", node.name()).env("BENCH_NODE_IP", node.ip().to_string());
        script.env("BENCH_PODS", pods(stage, place)).env("BENCH_MANIFESTS", stage.lab.manifests());
        script.env("BENCH_NETNS_DIR", node.netns_dir()).env("BENCH_CA_DIR", stage.lab.ca()).env("BENCH_READY", &ready);
        let child = node.spawn(&mut script).with_context(|| format!("cannot run {command}"))?;
        let mut other = Self { child, node: node.name().to_owned() };
        other.wait_ready(&ready).with_context(|| fs::read_to_string(&log).unwrap_or_default())?;
        Ok(other)
    }

    fn wait_ready(&mut self, ready: &Path) -> Result<()> {
        let what = format!("the script on {} makes the file that BENCH_READY names", self.node);
        let status = eventually(&what, BOUND, || match (ready.exists(), self.child.try_wait()) {
            (true, _) => Some(None),
            (false, Ok(Some(status))) if !status.success() => Some(Some(status)),
            _ => None,
        })?;
        match status {
            None => Ok(()),
            Some(status) => bail!("the script on {} ended with {status}", self.node),
        }
    }

    /// SIGTERM to all that the script started, and SIGKILL to what does not go.
    pub fn stop(mut self) -> Result<()> {
        let group = Pid::from_raw(self.child.id() as i32);
        // Nobody may be left in it.
        let _ = killpg(group, Signal::SIGTERM);
        let gone = || killpg(group, None).is_err();
        let _ = eventually("the script's processes end", Duration::from_secs(10), || {
            let _ = self.child.try_wait();
            gone().then_some(())
        });
        Ok(())
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = killpg(Pid::from_raw(self.child.id() as i32), Signal::SIGKILL);
        let _ = self.child.wait();
    }
}

/// A line a pod: name, node, address, namespace's path, UID, service account, and whether it is in the mesh.
fn pods(stage: &Stage, place: Place) -> String {
    let mut lines = String::new();
    for pod in stage.pods() {
        let outside = place == Place::Outside && pod.uid() == stage.server(place).uid();
        let (name, node, ip, path) = (pod.full_name(), pod.node_name(), pod.ip(), pod.network().path().display());
        let state = if outside { "outside" } else { "joined" };
        // Writing into a string cannot fail.
        let _ = writeln!(lines, "{name} {node} {ip} {path} {} {} {state}", pod.uid(), pod.service_account());
    }
    lines
}
