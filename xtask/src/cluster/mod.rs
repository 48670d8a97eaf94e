//! `cargo xtask cluster`: a real Kubernetes on one machine, whose nodes are namespaces.

mod cgroup;
mod control;
mod init;
mod machine;
mod network;
mod node;
mod pki;
mod programs;
mod rootfs;
mod running;
mod up;

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Result, ensure};
use clap::{Args, Subcommand};
use nix::unistd::geteuid;

pub use crate::cluster::pki::{Authority, Reached, Subject};
use crate::cluster::programs::Programs;
pub use crate::cluster::programs::{GatewayApi, argo_rollouts, cache, flagger, gateway_api, h2spec, kwok};
pub use crate::cluster::running::Cluster;
pub use crate::cluster::up::up;
use crate::tools;

/// What `cargo xtask cluster` takes.
#[derive(Args)]
pub struct Options {
    /// Which cluster, where there are several.
    #[arg(long, global = true, default_value = "selvedge", env = "SELVEDGE_CLUSTER", value_parser = parse_name)]
    name: String,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Brings the cluster up, or says that it is up.
    Up {
        /// How many nodes.
        #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=i64::from(network::MOST_NODES)))]
        nodes: u8,
    },
    /// Stops and removes everything, also what a crash left.
    Down,
    /// Runs kubectl against the cluster.
    #[command(disable_help_flag = true)]
    Kubectl {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Runs helm against the cluster; `helm template` needs none.
    #[command(disable_help_flag = true)]
    Helm {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Loads an image into every node.
    Load {
        /// A tar file, as `cargo xtask image` and `docker save` write them.
        #[arg(required = true, value_name = "IMAGE.tar")]
        images: Vec<PathBuf>,
    },
    /// Opens a shell, or runs a command, on a node or on the control plane's machine.
    Shell {
        /// node-1, node-2, ... or control.
        #[arg(default_value = "node-1")]
        machine: String,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<OsString>,
    },
    /// Starts, stops or restarts one program: `restart node-1 kubelet`, `stop control etcd`.
    Start(Target),
    Stop(Target),
    Restart(Target),
    /// The first process of a machine.
    #[command(hide = true)]
    Init {
        #[arg(long)]
        outside: bool,
        spec: PathBuf,
    },
}

/// One program of one machine.
#[derive(Args)]
struct Target {
    /// node-1, node-2, ... or control.
    machine: String,
    /// containerd, kubelet or kube-proxy; on control etcd, kube-apiserver, kube-controller-manager or kube-scheduler.
    program: String,
}

pub fn run(options: &Options) -> Result<ExitCode> {
    if let Verb::Init { outside, spec } = &options.verb {
        return if *outside { machine::start_inside(spec).map(|()| ExitCode::SUCCESS) } else { init::run(spec) };
    }
    check_rights()?;
    let name = &options.name;
    match &options.verb {
        Verb::Up { nodes } => up(name, *nodes)?.print(),
        Verb::Down => Cluster::remove(name)?,
        Verb::Kubectl { arguments } => return replace(Cluster::find(name)?.kubectl()?.args(arguments)),
        Verb::Helm { arguments } => return replace(Cluster::find(name)?.helm()?.args(arguments)),
        Verb::Load { images } => Cluster::find(name)?.load(images)?,
        Verb::Shell { machine, command } => return shell(&Cluster::find(name)?, machine, command),
        Verb::Start(target) => order(name, "start", target)?,
        Verb::Stop(target) => order(name, "stop", target)?,
        Verb::Restart(target) => order(name, "restart", target)?,
        Verb::Init { .. } => {}
    }
    Ok(ExitCode::SUCCESS)
}

/// Builds what a cluster and its tests run, where the cache lacks it.
pub fn build_programs() -> Result<()> {
    Programs::get()?;
    Programs::helm()?;
    gateway_api().map(drop)
}

/// Says what is missing before anything is touched.
pub fn check_rights() -> Result<()> {
    ensure!(
        geteuid().is_root(),
        "the cluster needs root, for namespaces, mounts and control groups; type:\n\n    \
         sudo env \"PATH=$PATH\" cargo xtask ...\n"
    );
    Ok(())
}

fn order(cluster: &str, order: &str, target: &Target) -> Result<()> {
    Cluster::find(cluster)?.machine(&target.machine)?.order(&format!("{order} {}", target.program))
}

fn shell(cluster: &Cluster, machine: &str, command: &[OsString]) -> Result<ExitCode> {
    let machine = cluster.machine(machine)?;
    let (program, arguments) = match command.split_first() {
        Some((program, arguments)) => (program.clone(), arguments),
        None => ("/bin/sh".into(), &[][..]),
    };
    let mut inside = machine.command(program)?;
    // ctr and crictl find their daemon and the pods' images by these.
    inside.args(arguments).env("CONTAINERD_NAMESPACE", "k8s.io").env("PS1", format!("{}# ", machine.name));
    replace(&mut inside)
}

/// Becomes the command, so that the terminal and the exit code are its own.
fn replace(command: &mut Command) -> Result<ExitCode> {
    let error = command.exec();
    Err(error).map_err(|error| anyhow::anyhow!("cannot run {}: {error}", command.get_program().display()))
}

fn parse_name(text: &str) -> Result<String, String> {
    let fits = !text.is_empty() && text.len() <= 20;
    if fits && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-') {
        return Ok(text.to_owned());
    }
    Err("a cluster's name has at most 20 lower-case letters, digits and dashes".to_owned())
}

/// Programs that the cluster takes from the system.
fn require_tools() -> Result<()> {
    tools::require(&[&tools::RUNC, &tools::CNI_PLUGINS, &tools::IPTABLES, &tools::IPROUTE2, &tools::NSENTER])
}
