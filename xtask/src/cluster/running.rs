//! A cluster that is there: found, talked to and removed.

use std::env;
use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};

use crate::cluster::cgroup::Group;
use crate::cluster::machine::{self, Machine};
use crate::cluster::node;
use crate::cluster::programs::Programs;
use crate::style::{bold, dim};

/// A cluster with its folder and its machines.
pub struct Cluster {
    pub name: String,
    pub control: Machine,
    pub nodes: Vec<Machine>,
    pub programs: Programs,
}

impl Cluster {
    /// The cluster of this name, which must be up.
    pub fn find(name: &str) -> Result<Self> {
        let cluster = Self::look(name)?;
        cluster.with_context(|| format!("no cluster {name} is up; type: cargo xtask cluster up{}", option(name)))
    }

    /// The cluster of this name, if it was brought up wholly and none of its machines has ended since.
    pub fn look(name: &str) -> Result<Option<Self>> {
        if !ready_mark(name).exists() {
            return Ok(None);
        }
        let mut machines = Vec::new();
        for entry in fs::read_dir(machines_folder(name))? {
            machines.push(machine::read(&entry?.path().join("machine.json"))?);
        }
        machines.sort_by_key(|machine| machine.ip);
        let is_up = |machine: &Machine| machine.order("ping").is_ok();
        if !machines.iter().all(is_up) {
            return Ok(None);
        }
        let mut machines = machines.into_iter();
        let control = machines.next().context("a cluster without machines")?;
        Ok(Some(Self { name: name.to_owned(), control, nodes: machines.collect(), programs: Programs::get()? }))
    }

    /// Stops and removes everything of this name: processes first, and with them their namespaces and mounts.
    pub fn remove(name: &str) -> Result<()> {
        let _lock = lock(name)?;
        Self::remove_locked(name)?;
        eprintln!("no cluster {name} is here any more");
        Ok(())
    }

    pub(super) fn remove_locked(name: &str) -> Result<()> {
        Group::of_cluster(name)?.end()?;
        let folder = folder(name);
        // Removing what lies below a mount would remove what is mounted.
        let mounts = fs::read_to_string("/proc/self/mountinfo").context("cannot read /proc/self/mountinfo")?;
        let below =
            mounts.lines().filter_map(|line| line.split(' ').nth(4)).find(|at| Path::new(at).starts_with(&folder));
        if let Some(mount) = below {
            bail!("{mount} is mounted; type: umount {mount}, then: cargo xtask cluster down{}", option(name));
        }
        match fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("cannot remove {}", folder.display()))
            }
            _ => {
                // Other clusters may have their folders in it.
                let _ = fs::remove_dir(FOLDER);
                Ok(())
            }
        }
    }

    pub fn machine(&self, name: &str) -> Result<&Machine> {
        let mut machines = self.nodes.iter().chain([&self.control]);
        machines.find(|machine| machine.name == name).with_context(|| {
            let nodes = self.nodes.iter().map(|node| node.name.as_str()).collect::<Vec<_>>().join(", ");
            format!("the cluster has no machine {name:?}; it has control, {nodes}")
        })
    }

    /// kubectl, as the cluster's administrator.
    pub fn kubectl(&self) -> Result<Command> {
        let mut command = Command::new(self.programs.kubernetes("kubectl"));
        command.env("KUBECONFIG", self.kubeconfig());
        Ok(command)
    }

    pub fn helm(&self) -> Result<Command> {
        let mut command = Command::new(Programs::helm()?);
        command.env("KUBECONFIG", self.kubeconfig());
        Ok(command)
    }

    /// Loads images into every node.
    pub fn load(&self, images: &[PathBuf]) -> Result<()> {
        images.iter().try_for_each(|image| self.nodes.iter().try_for_each(|at| node::load(&self.programs, at, image)))
    }

    pub fn kubeconfig(&self) -> PathBuf {
        kubeconfig(&self.name)
    }

    /// Says what a person may do now.
    pub fn print(&self) {
        let kubectl = self.programs.kubernetes("kubectl");
        let option = option(&self.name);
        println!("{} with {} nodes. Use it:\n", bold("The cluster is up"), self.nodes.len());
        for (what, command) in [
            ("from here", format!("cargo xtask cluster{option} kubectl get pods --all-namespaces")),
            (
                "from anywhere",
                format!("export KUBECONFIG={} && {} get nodes", self.kubeconfig().display(), kubectl.display()),
            ),
            ("on a node", format!("cargo xtask cluster{option} shell node-1")),
            ("an image for its pods", format!("cargo xtask cluster{option} load IMAGE.tar")),
            ("what its programs say", format!("ls {}", logs(&self.name).display())),
            ("and away with it", format!("cargo xtask cluster{option} down")),
        ] {
            println!("  {}\n  {command}\n", dim(format!("# {what}")));
        }
    }
}

/// One command at a time brings a cluster up or takes it down.
pub fn lock(name: &str) -> Result<Flock<File>> {
    // Not in the cluster's folder, which comes and goes.
    let path = Path::new(LOCKS).join(format!("selvedge-cluster-{name}.lock"));
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
    let file = file.with_context(|| format!("cannot open {}", path.display()))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((file, _)) => {
            eprintln!("another command works on the cluster {name}; waiting for it");
            Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| error.into())
        }
    }
}

pub fn folder(name: &str) -> PathBuf {
    Path::new(FOLDER).join(name)
}

pub fn machines_folder(name: &str) -> PathBuf {
    folder(name).join("machines")
}

pub fn logs(name: &str) -> PathBuf {
    folder(name).join("log")
}

pub fn kubeconfig(name: &str) -> PathBuf {
    folder(name).join("kubeconfig")
}

/// A file that is there once everything is.
pub fn ready_mark(name: &str) -> PathBuf {
    folder(name).join("ready")
}

/// The option that names the cluster, where it is not the usual one.
fn option(name: &str) -> String {
    if name == "selvedge" || env::var_os("SELVEDGE_CLUSTER").is_some() {
        String::new()
    } else {
        format!(" --name {name}")
    }
}

const FOLDER: &str = "/var/lib/selvedge-cluster";
const LOCKS: &str = "/run/lock";
