//! The start of a pod: the container runtime hands a pod's network namespace over before anything runs in it, so that
//! a joined pod's first packet is already captured.
//!
//! | part | what it knows |
//! | --- | --- |
//! | `spec` | what a runtime asks of a plugin, and what it is answered (CNI specification 1.1) |
//! | `plugin` | `selvedge cni`: runs for a moment on the node for each pod, and asks the agent |
//! | `wire` | what plugin and agent say to each other |
//! | `server` | the agent's end: waits until the pod is captured |
//! | `roster` | the joined namespaces, kept on the node's disk for when no agent is there |
//! | `conflist` | the node's list of plugins with our entry, or without |
//! | `installer` | puts plugin and entry on the node, mends them, takes them away |
//!
//! Without an agent the plugin fails pods that are to join, so that the kubelet tries them again, and lets all others
//! start as ever. It never fails `DEL`: a pod must be able to go.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

mod conflist;
mod installer;
mod plugin;
mod roster;
mod server;
mod spec;
mod wire;

pub use installer::{Installer, InstallerError, Places, say_farewell};
pub use plugin::{is_called, run};
pub use roster::{keep_roster, roster_path};
pub use server::{CniServer, ServerSettings};

/// The plugin's name: of its file, and in the list of plugins.
pub const PLUGIN: &str = "selvedge";

pub fn describe_metrics() {
    metrics::describe_counter!(
        "selvedge_cni_requests_total",
        metrics::Unit::Count,
        "Pods that the container runtime handed over as they started, by outcome: captured, outside or refused."
    );
}

/// Makes the folder that agents and plugin share, root's alone: who may write there says which namespace is a pod's.
///
/// # Errors
/// It cannot be made, or belongs to somebody else.
pub fn prepare_shared(dir: &Path) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    let meta = fs::metadata(dir)?;
    if meta.uid() != nix::unistd::geteuid().as_raw() {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "it belongs to another user; make it root's"));
    }
    fs::set_permissions(dir, fs::Permissions::from_mode(0o700))
}

/// Removes what agents and plugin have in the folder that they share, once the installer has done its part.
pub async fn clear_shared(dir: &Path) {
    let began = std::time::Instant::now();
    while installer::farewell_stands(dir) && began.elapsed() < INSTALLER {
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    for file in fs::read_dir(dir).into_iter().flatten().flatten() {
        if let Err(error) = fs::remove_file(file.path()) {
            tracing::warn!(file = %file.path().display(), %error, "A file of the shared folder cannot be removed.");
        }
    }
}

const INSTALLER: std::time::Duration = std::time::Duration::from_secs(10);
/// The agent's socket in the folder that it shares with the plugin.
const SOCKET: &str = "cni.sock";
