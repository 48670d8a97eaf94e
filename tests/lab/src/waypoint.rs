//! A waypoint in a process of its own: its pods, and the objects that lead to it.

use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::{BOUND, Lab, Metrics, Pod, PodSpec, ServiceSpec, eventually};

/// `selvedge waypoint` in a pod; dropped, it is killed.
pub struct Waypoint {
    pub pod: Pod,
    child: Child,
    log: PathBuf,
    access_log: PathBuf,
}

impl Waypoint {
    /// The `number`th pod of Gateway `infra/gw` ([`gateway`]). It is an endpoint only once it is said to be ([`lead_to`]).
    pub fn start(lab: &Lab, node: &str, number: usize, args: &[&str]) -> Result<Self> {
        Self::spawn(lab, node, number, args, true)
    }

    /// One whose access log is told in full, and kept nowhere.
    pub fn start_unlogged(lab: &Lab, node: &str, number: usize, args: &[&str]) -> Result<Self> {
        Self::spawn(lab, node, number, args, false)
    }

    fn spawn(lab: &Lab, node: &str, number: usize, args: &[&str], is_logged: bool) -> Result<Self> {
        let name = format!("infra/gw-{number}");
        let spec = PodSpec::new(&name, node).service_account("gw-selvedge-waypoint");
        let pod = lab.pod(spec.label("gateway.networking.k8s.io/gateway-name", "gw"))?;
        let logs = lab.manifests().parent().context("the folder of manifests is nowhere")?.join("logs");
        let (log, access_log) =
            (logs.join(format!("waypoint-{number}.log")), logs.join(format!("waypoint-{number}.jsonl")));
        fs::create_dir_all(&logs)?;
        let mut command = Command::new(lab.binary()?);
        command.args(["waypoint", "--gateway", "gw", "--pod-namespace", "infra", "--pod", pod.name()]);
        command.arg("--manifests").arg(lab.manifests()).arg("--ca-dir").arg(lab.ca());
        command.args(["--access-log", if is_logged { "json" } else { "text" }]).args(args);
        command.stdin(Stdio::null()).stderr(File::create(&log)?);
        command.stdout(if is_logged { File::create(&access_log)?.into() } else { Stdio::null() });
        let child = pod.spawn(&mut command)?;
        Ok(Self { pod, child, log, access_log })
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    pub fn wait_ready(&mut self) -> Result<()> {
        let ready = eventually("the waypoint is ready", BOUND, || {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Some(Err(anyhow::anyhow!("it ended with {status}")));
            }
            self.is_ready().then_some(Ok(()))
        });
        ready.and_then(|ready| ready).with_context(|| self.log())
    }

    pub fn is_ready(&self) -> bool {
        self.pod.http_get(local(15021), "/ready").is_ok_and(|answer| answer.status == 200)
    }

    pub fn metrics(&self) -> Result<Metrics> {
        Metrics::parse(&self.pod.http_get(local(15020), "/metrics")?.text())
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub fn access_line(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        let found = eventually(&format!("an access log line of the waypoint: {what}"), BOUND, || {
            self.access_log().into_iter().find(|line| wanted(line))
        });
        found.with_context(|| fs::read_to_string(&self.access_log).unwrap_or_default())
    }

    /// What it has written so far.
    pub fn access_log(&self) -> Vec<Value> {
        let text = fs::read_to_string(&self.access_log).unwrap_or_default();
        // A last line without its end is being written.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    pub fn terminate(&self) -> Result<()> {
        Ok(kill(Pid::from_raw(self.pid()), Signal::SIGTERM)?)
    }

    pub fn wait(&mut self) -> Result<ExitStatus> {
        let ended = eventually("the waypoint ends", BOUND, || self.child.try_wait().ok().flatten());
        ended.with_context(|| self.log())
    }
}

impl Drop for Waypoint {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Gateway `infra/gw`, which admits Services of these namespaces: `All`, `Same`.
pub fn gateway(lab: &Lab, from: &str) -> Result<()> {
    lab.namespace("infra", false)?;
    lab.put(&json!({
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "Gateway",
        "metadata": {"namespace": "infra", "name": "gw"},
        "spec": {
            "gatewayClassName": "selvedge-waypoint",
            "listeners": [{
                "name": "mesh", "port": 15008, "protocol": "HBONE", "allowedRoutes": {"namespaces": {"from": from}},
            }],
        },
    }))
}

/// Makes these pods the endpoints of the waypoint, each ready or not.
pub fn lead_to(lab: &Lab, waypoints: &[(&Waypoint, bool)]) -> Result<()> {
    let door = ServiceSpec::new("infra/gw-selvedge-waypoint").cluster_ip(Ipv4Addr::new(10, 96, 0, 200).into());
    let door = waypoints.iter().fold(door.port("tunnel", 15008, 15008), |door, (waypoint, ready)| {
        door.endpoint_with(&waypoint.pod, json!({"ready": ready, "serving": ready, "terminating": false}))
    });
    ensure!(door.ports.len() == 1);
    lab.service(&door)
}

fn local(port: u16) -> (IpAddr, u16) {
    (Ipv4Addr::LOCALHOST.into(), port)
}
