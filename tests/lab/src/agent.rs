//! One `selvedge agent`, run on a node as a person would run it.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::lab::Node;
use crate::metrics::Metrics;
use crate::namespace::Namespace;
use crate::pod::Pod;
use crate::wait::{BOUND, eventually};

/// A running agent; dropping it ends it by SIGKILL, parent and worker.
#[derive(Debug)]
pub struct Agent {
    node: String,
    network: Namespace,
    child: Mutex<Child>,
    beside: u16,
    log: PathBuf,
    access_log: PathBuf,
}

impl Agent {
    pub(crate) fn spawn(
        node: &Node,
        binary: &Path,
        manifests: &Path,
        lab_directory: &Path,
        options: &AgentOptions,
    ) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(1);
        let name = format!("{}-{}", node.name(), COUNT.fetch_add(1, Ordering::Relaxed));
        let logs = lab_directory.join("logs");
        let (log, access_log) = (logs.join(format!("{name}.log")), logs.join(format!("{name}.access.jsonl")));
        let mut command = Command::new(binary);
        command.args(["agent", "--node", node.name()]);
        command.arg("--manifests").arg(options.manifests.as_deref().unwrap_or(manifests));
        command.arg("--ca-dir").arg(options.ca.clone().unwrap_or_else(|| lab_directory.join("ca")));
        command.arg("--netns-dir").arg(node.netns_dir()).args(ACCESS_LOG).args(&options.args);
        command.envs(options.env.iter().map(|(key, value)| (key, value)));
        let told: Stdio = match options.keep_no_access_log {
            true => Stdio::null(),
            false => File::create(&access_log)?.into(),
        };
        command.stdin(Stdio::null()).stdout(told).stderr(File::create(&log)?);
        let child = node.spawn(&mut command).with_context(|| format!("cannot run {}", binary.display()))?;
        let network = Namespace::clone(node);
        Ok(Self {
            node: node.name().to_owned(),
            network,
            child: Mutex::new(child),
            beside: options.beside,
            log,
            access_log,
        })
    }

    pub fn node(&self) -> &str {
        &self.node
    }

    /// Waits until `/ready` says so.
    pub fn wait_ready(&self) -> Result<()> {
        let what = format!("the agent of {} is ready", self.node);
        let ready = eventually(&what, BOUND, || {
            if let Ok(Some(status)) = self.lock().try_wait() {
                return Some(Err(status));
            }
            self.is_ready().then_some(Ok(()))
        });
        match ready {
            Ok(Ok(())) => Ok(()),
            Ok(Err(status)) => bail!("the agent of {} ended with {status}:\n{}", self.node, self.log_tail()),
            Err(error) => Err(error.context(self.log_tail())),
        }
    }

    pub fn is_ready(&self) -> bool {
        self.network.http_get(self.port(15021), "/ready").is_ok_and(|answer| answer.status == 200)
    }

    /// What `/metrics` says now.
    pub fn metrics(&self) -> Result<Metrics> {
        Metrics::parse(&self.network.http_get(self.port(15020), "/metrics")?.text())
    }

    /// What `/dump` says now.
    pub fn dump(&self) -> Result<Value> {
        self.network.http_get(self.port(15000), "/dump")?.json()
    }

    /// The access log so far, a JSON object a line.
    pub fn access_log(&self) -> Result<Vec<Value>> {
        let text = self.access_log_text();
        // A last line without its end is being written.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().map(|line| serde_json::from_str(line).with_context(|| format!("not JSON: {line}"))).collect()
    }

    /// The access log so far, as it was written.
    pub fn access_log_text(&self) -> String {
        fs::read_to_string(&self.access_log).unwrap_or_default()
    }

    /// Waits for an access log line.
    pub fn access_line(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        let found = eventually(&format!("an access log line of {}: {what}", self.node), BOUND, || {
            self.access_log().ok()?.into_iter().find(|line| wanted(line))
        });
        found.with_context(|| self.access_log_text())
    }

    /// Everything it logged to people.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub fn log_tail(&self) -> String {
        tail(&self.log)
    }

    /// The process that was started: the parent that keeps the listeners.
    pub fn pid(&self) -> i32 {
        self.lock().id() as i32
    }

    /// The worker, a child of the parent.
    pub fn worker(&self) -> Option<i32> {
        children(self.pid()).first().copied()
    }

    /// Sends a signal to the parent.
    pub fn kill(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.pid()), signal)?)
    }

    /// Kills the worker with SIGKILL, and returns the pid it had, once it is gone with all its sockets.
    pub fn kill_worker(&self) -> Result<i32> {
        let worker = self.worker().with_context(|| format!("the agent of {} has no worker", self.node))?;
        kill(Pid::from_raw(worker), Signal::SIGKILL)?;
        eventually("the worker is gone", BOUND, || (self.worker() != Some(worker)).then_some(()))?;
        Ok(worker)
    }

    /// Kills parent and worker with SIGKILL, as the end of its container would.
    pub fn crash(self) {
        drop(self);
    }

    /// How many of its pods are in a state: captured, pending, failed or leaving.
    pub fn pods(&self, state: &str) -> Result<usize> {
        let dump = self.dump()?;
        let pods = dump["capture"]["pods"].as_array().into_iter().flatten();
        Ok(pods.filter(|pod| pod["state"] == state).count())
    }

    /// Waits until so many of its pods are in a state.
    pub fn wait_pods(&self, state: &str, count: usize) -> Result<()> {
        let what = format!("{count} pods of {} are {state}", self.node);
        let reached = eventually(&what, BOUND, || (self.pods(state).ok()? == count).then_some(()));
        reached.with_context(|| format!("{:?}", self.dump().map(|dump| dump["capture"]["pods"].clone())))
    }

    /// Waits until it knows a pod as the one that has its addresses, and has captured it if it is its own.
    pub fn wait_pod(&self, pod: &Pod) -> Result<()> {
        eventually(&format!("{} knows {}", self.node, pod.full_name()), BOUND, || {
            let dump = self.dump().ok()?;
            let known = dump["workloads"].as_array()?.iter().filter(|known| {
                let ips = known["ips"].as_array().into_iter().flatten();
                ips.filter_map(Value::as_str).any(|ip| *ip == pod.ip().to_string())
            });
            let alone = known.map(|known| &known["uid"]).eq([pod.uid()]);
            let captured = dump["capture"]["pods"]
                .as_array()?
                .iter()
                .any(|captured| captured["uid"] == pod.uid() && captured["state"] == "captured");
            (alone && (captured || pod.node_name() != self.node)).then_some(())
        })
    }

    /// Ends it in order (SIGTERM) and waits for that.
    pub fn stop(self) -> Result<ExitStatus> {
        self.kill(Signal::SIGTERM)?;
        self.wait(BOUND)
    }

    /// Waits for its end.
    pub fn wait(&self, bound: Duration) -> Result<ExitStatus> {
        eventually(&format!("the agent of {} ends", self.node), bound, || self.lock().try_wait().ok().flatten())
    }

    fn port(&self, usual: u16) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, usual + self.beside).into()
    }

    fn lock(&self) -> MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let pid = self.pid();
        if self.lock().try_wait().is_ok_and(|status| status.is_some()) {
            return;
        }
        let workers = children(pid);
        // The parent first, for it would start another worker.
        for pid in [pid].into_iter().chain(workers) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        let _ = self.lock().wait();
    }
}

/// How to run an agent.
#[derive(Clone, Debug, Default)]
pub struct AgentOptions {
    pub args: Vec<String>,
    pub env: Vec<(String, String)>,
    /// A CA folder of its own; by default the lab's.
    pub ca: Option<PathBuf>,
    /// A folder of manifests of its own; by default the lab's.
    pub manifests: Option<PathBuf>,
    /// How far its own ports are from the usual ones.
    pub beside: u16,
    /// The access log is written to nowhere.
    pub keep_no_access_log: bool,
}

impl AgentOptions {
    pub fn arg(mut self, arg: &str) -> Self {
        self.args.push(arg.into());
        self
    }

    /// Whatever the environment says: HBONE between the agents, and nothing else.
    pub fn hbone(self) -> Self {
        self.arg("--tunnel").arg("hbone")
    }

    /// With ports of its own, so far from the usual ones, as there is another agent on its node.
    pub fn beside(mut self, by: u16) -> Self {
        self.beside = by;
        for (flag, usual) in [("--admin-port", 15000), ("--metrics-port", 15020), ("--readiness-port", 15021)] {
            self.args.extend([flag.to_owned(), (usual + by).to_string()]);
        }
        self
    }

    pub fn env(mut self, key: &str, value: &str) -> Self {
        self.env.push((key.into(), value.into()));
        self
    }

    pub fn without_access_log(mut self) -> Self {
        self.keep_no_access_log = true;
        self
    }
}

/// The last lines of every log in a folder.
pub(crate) fn log_tails(folder: &Path) -> String {
    let mut files: Vec<_> = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    files.sort();
    let with_name = |file: &PathBuf| format!("--- {}\n{}", file.file_name().unwrap_or_default().display(), tail(file));
    files.iter().map(with_name).collect()
}

fn tail(file: &Path) -> String {
    let text = fs::read_to_string(file).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    let mut tail = String::new();
    for line in &lines[lines.len().saturating_sub(TAIL_LINES)..] {
        tail.push_str(line);
        tail.push('\n');
    }
    tail
}

fn children(parent: i32) -> Vec<i32> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| parent_of(*pid) == Some(parent)).collect()
}

/// `ppid` is the second field behind the command's closing bracket, in proc_pid_stat(5).
fn parent_of(pid: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
}

const ACCESS_LOG: [&str; 2] = ["--access-log", "json"];
const TAIL_LINES: usize = 40;
