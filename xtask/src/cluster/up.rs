//! Bringing a cluster up: programs, machines, control plane, nodes, DNS.

use std::fs;
use std::net::{IpAddr, TcpListener};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use selvedge_lab::eventually;

use crate::build::root;
use crate::cluster::control::{self, API_PORT, API_SERVER, CONTROLLERS, ETCD};
use crate::cluster::machine::{Machine, Service};
use crate::cluster::network::{self, CONTROL, node_ip};
use crate::cluster::node::{self, CONTAINERD, CONTAINERD_SOCKET, KUBE_PROXY, KUBELET};
use crate::cluster::pki::{Authority, Subject};
use crate::cluster::programs::{self, Programs};
use crate::cluster::running::{Cluster, kubeconfig, lock, logs, machines_folder, ready_mark};
use crate::cluster::{check_rights, require_tools};
use crate::image;
use crate::style::dim;

/// Brings a cluster up, unless it is up. What a crash left of it is removed first.
pub fn up(name: &str, nodes: u8) -> Result<Cluster> {
    check_rights()?;
    require_tools()?;
    let _lock = lock(name)?;
    if let Some(cluster) = Cluster::look(name)? {
        let have = cluster.nodes.len();
        ensure!(
            have == usize::from(nodes),
            "the cluster {name} is up with {have} nodes; take it down first: cargo xtask cluster down"
        );
        return Ok(cluster);
    }
    let programs = Programs::get()?;
    let images = step("images of pause and CoreDNS", || image::for_cluster(&programs.coredns()))?;
    Cluster::remove_locked(name)?;
    fs::create_dir_all(logs(name)).with_context(|| format!("cannot make {}", logs(name).display()))?;
    let cluster = Cluster {
        name: name.to_owned(),
        control: machine(name, "control", CONTROL.into(), Some(API_PORT), &programs, |_| control::services(&programs)),
        nodes: (1..=nodes)
            .map(|number| {
                let services = |node: &Machine| node::services(&programs, node);
                machine(name, &format!("node-{number}"), node_ip(number), None, &programs, services)
            })
            .collect(),
        programs: Programs::get()?,
    };
    match build(&cluster, &images) {
        Ok(()) => Ok(cluster),
        // It stays as it is, for whoever wants to see why.
        Err(error) => Err(error.context(format!(
            "the cluster does not come up; its logs are in {}; cargo xtask cluster down removes it",
            logs(name).display()
        ))),
    }
}

fn build(cluster: &Cluster, images: &[std::path::PathBuf]) -> Result<()> {
    let (control, nodes) = (&cluster.control, &cluster.nodes);
    step("machines", || {
        let listener = TcpListener::bind("127.0.0.1:0").context("cannot listen on the loopback")?;
        let server = format!("https://{}", listener.local_addr()?);
        furnish(cluster, &server)?;
        control.boot(Some(listener))?;
        nodes.iter().try_for_each(|node| node.boot(None))?;
        network::connect(control, nodes)
    })?;
    step("control plane", || {
        control.order(&format!("start {ETCD}"))?;
        control.order(&format!("start {API_SERVER}"))?;
        wait(cluster, control, API_SERVER, "the API server is ready", &["get", "--raw", "/readyz"], |_| true)?;
        CONTROLLERS.iter().try_for_each(|name| control.order(&format!("start {name}")))?;
        apply(cluster)
    })?;
    step("nodes", || {
        nodes.iter().try_for_each(|node| node.order(&format!("start {CONTAINERD}")))?;
        for node in nodes {
            let socket = || {
                let test = node
                    .command("test")
                    .and_then(|mut command| Ok(command.args(["-S", CONTAINERD_SOCKET]).status()?));
                test.is_ok_and(|status| status.success()).then_some(())
            };
            eventually("containerd listens", PATIENCE, socket).with_context(|| tail(&node.log(CONTAINERD)))?;
        }
        cluster.load(images)?;
        for node in nodes {
            node.order(&format!("start {KUBELET}"))?;
            node.order(&format!("start {KUBE_PROXY}"))?;
        }
        for node in nodes {
            let what = format!("{} is Ready", node.name);
            let condition = "jsonpath={.status.conditions[?(@.type=='Ready')].status}";
            wait(cluster, node, KUBELET, &what, &["get", "node", &node.name, "-o", condition], |said| said == "True")?;
        }
        Ok(())
    })?;
    step("DNS", || {
        let arguments =
            ["get", "deployment", "coredns", "-n", "kube-system", "-o", "jsonpath={.status.availableReplicas}"];
        wait(cluster, &cluster.nodes[0], KUBELET, "CoreDNS is available", &arguments, |said| !matches!(said, "" | "0"))
    })?;
    fs::write(ready_mark(&cluster.name), "").context("cannot note that the cluster is up")
}

/// A machine of the cluster, before it is there.
fn machine(
    cluster: &str,
    name: &str,
    ip: IpAddr,
    forward: Option<u16>,
    programs: &Programs,
    services: impl FnOnce(&Machine) -> Vec<Service>,
) -> Machine {
    let mut machine = Machine {
        cluster: cluster.to_owned(),
        name: name.to_owned(),
        ip,
        folder: machines_folder(cluster).join(name),
        logs: logs(cluster),
        programs: programs::cache(),
        path: programs.path(),
        forward,
        services: Vec::new(),
    };
    machine.services = services(&machine);
    machine
}

/// Writes what the machines' programs read.
fn furnish(cluster: &Cluster, server: &str) -> Result<()> {
    let authority = Authority::new(&cluster.control.root().join(control::PKI.trim_start_matches('/')))?;
    control::furnish(&cluster.control, &authority)?;
    for (number, node) in (1_u8..).zip(&cluster.nodes) {
        node::furnish(node, number, &authority)?;
    }
    let admin = authority.issue("admin", &Subject::of("system:masters", "admin"), &[])?;
    authority.kubeconfig(&kubeconfig(&cluster.name), server, &admin)
}

/// The objects that every cluster has: who kube-proxy is, and CoreDNS.
fn apply(cluster: &Cluster) -> Result<()> {
    let folder = root().join("xtask/cluster/manifests");
    let mut said = String::new();
    let applied = eventually("the cluster's own objects are applied", PATIENCE, || {
        let output = cluster.kubectl().ok()?.args(["apply", "-f"]).arg(&folder).output().ok()?;
        // A new API server makes kube-system a moment after it is ready.
        said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        output.status.success().then_some(())
    });
    applied.with_context(|| format!("{}: {said}", folder.display()))
}

/// Waits until kubectl says what is awaited; else shows what the program behind it said last.
fn wait(
    cluster: &Cluster,
    machine: &Machine,
    service: &str,
    what: &str,
    arguments: &[&str],
    awaited: impl Fn(&str) -> bool,
) -> Result<()> {
    let ask = || {
        let output = cluster.kubectl().ok()?.args(arguments).output().ok()?;
        let said = String::from_utf8_lossy(&output.stdout);
        (output.status.success() && awaited(said.trim())).then_some(())
    };
    eventually(what, PATIENCE, ask).with_context(|| tail(&machine.log(service)))
}

/// The last lines of a log.
fn tail(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    let last = lines[lines.len().saturating_sub(SHOWN_LINES)..].join("\n");
    format!("{} ends:\n{last}", log.display())
}

/// One step, with how long it took.
fn step<T>(name: &str, run: impl FnOnce() -> Result<T>) -> Result<T> {
    let began = Instant::now();
    let done = run().with_context(|| name.to_owned())?;
    eprintln!("  {name} {}", dim(format!("{:.1} s", began.elapsed().as_secs_f64())));
    Ok(done)
}

const PATIENCE: Duration = Duration::from_secs(120);
const SHOWN_LINES: usize = 15;
