use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::Failure;
use crate::cni::{self, Installer, Places};
use crate::telemetry::{LogControl, LogFormat};

/// The CNI plugin: run by the container runtime for each pod that starts or ends, never by a person.
///
/// A joined pod starts once the agent of the node has captured it, so that its first packet is already captured. Without
/// an agent such a pod is tried again by the kubelet, and all others start as ever. Speaks CNI 0.3.0 to 1.1.0: the
/// environment and standard input say what is asked.
#[derive(Args, Debug)]
pub struct CniArgs {}

pub fn plugin(_: &CniArgs) -> ExitCode {
    cni::run()
}

/// Put the CNI plugin on a node and its entry into the node's list of plugins, and mend the entry when another tool
/// rewrites the list.
///
/// Runs until SIGTERM. Both go when the agent of the node says that it is being uninstalled: the entry first.
#[derive(Args, Debug)]
pub struct CniInstallArgs {
    /// Where the container runtime of the node looks for CNI plugins.
    #[arg(long, env = "SELVEDGE_CNI_BIN_DIR", value_name = "DIR", default_value = "/opt/cni/bin")]
    bin_dir: PathBuf,

    /// Where it looks for their configuration. Of the files there, the first by name counts.
    #[arg(long, env = "SELVEDGE_CNI_CONF_DIR", value_name = "DIR", default_value = "/etc/cni/net.d")]
    conf_dir: PathBuf,

    /// The folder that plugin and agent share, by its path on the node.
    #[arg(long, env = "SELVEDGE_SHARED_DIR", value_name = "DIR", default_value = "/var/lib/selvedge")]
    shared_dir: PathBuf,

    /// Only say whether both are in their places: exit code 0, or 1 and what is missing.
    #[arg(long, conflicts_with = "remove")]
    check: bool,

    /// Take both away, and end.
    #[arg(long)]
    remove: bool,
}

pub fn install(args: &CniInstallArgs) -> Result<ExitCode, Failure> {
    let places =
        Places { bin_dir: args.bin_dir.clone(), conf_dir: args.conf_dir.clone(), shared: args.shared_dir.clone() };
    let installer = Installer::new(places);
    if args.check {
        installer.check().map_err(Failure::new)?;
        return Ok(ExitCode::SUCCESS);
    }
    LogControl::install(LogFormat::Text, "info").map_err(Failure::usage)?;
    if args.remove {
        installer.uninstall().map_err(Failure::new)?;
        return Ok(ExitCode::SUCCESS);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Failure::new)?;
    runtime.block_on(installer.run()).map_err(Failure::new)?;
    Ok(ExitCode::SUCCESS)
}
