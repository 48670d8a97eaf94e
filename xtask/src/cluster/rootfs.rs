//! A machine's own file system: the host's programs, and everything else of its own.
//!
//! What a pod writes through a `hostPath` stays in the cluster's folder, and goes with it.

use std::ffi::CStr;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::{chdir, pivot_root};

use crate::cluster::cgroup;

/// Makes a folder the root of this process's mount namespace, which must be its own.
pub fn enter(root: &Path, programs: &Path) -> Result<()> {
    // First of all: nothing of what follows may be seen by the host.
    set(Path::new("/"), MsFlags::MS_REC | MsFlags::MS_PRIVATE)?;
    bind(root, root)?;
    for folder in SYSTEM {
        share(Path::new(folder), root)?;
    }
    for file in SETTINGS {
        share(Path::new(file), root)?;
    }
    bind_read_only(programs, &below(root, programs))?;
    bind(Path::new("/dev"), &below(root, Path::new("/dev")))?;
    mount_new("proc", &root.join("proc"), None)?;
    mount_new("sysfs", &root.join("sys"), None)?;
    let groups = root.join("sys/fs/cgroup");
    cgroup::mount_own(&groups)?;
    for (folder, options) in [("run", "mode=755"), ("tmp", "mode=1777")] {
        mount_new("tmpfs", &root.join(folder), Some(options))?;
    }
    // As on every Linux: containerd names pods' network namespaces in /var/run/netns, others look in /run/netns.
    fs::create_dir_all(root.join("var"))?;
    match symlink("/run", root.join("var/run")) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error).context("cannot link /var/run")?,
        _ => {}
    }
    let old = root.join("mnt");
    fs::create_dir_all(&old)?;
    chdir(root)?;
    pivot_root(".", "mnt").context("cannot change the root")?;
    chdir("/")?;
    umount2("/mnt", MntFlags::MNT_DETACH).context("cannot leave the host's file system")?;
    fs::create_dir_all("/run/netns")?;
    // The kubelet and pods with mountPropagation expect it.
    set(Path::new("/"), MsFlags::MS_REC | MsFlags::MS_SHARED)
}

/// Makes the host's file or folder seen at the same path below the root: a link as a link, all else read-only.
fn share(path: &Path, root: &Path) -> Result<()> {
    let at = below(root, path);
    let metadata = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        metadata => metadata?,
    };
    if let Some(folder) = at.parent() {
        fs::create_dir_all(folder)?;
    }
    if metadata.is_symlink() {
        return match symlink(fs::read_link(path)?, &at) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error.into()),
            _ => Ok(()),
        };
    }
    if metadata.is_file() {
        // A copy, for a node may change its settings.
        fs::copy(path, &at).with_context(|| format!("cannot copy {}", path.display()))?;
        return Ok(());
    }
    bind_read_only(path, &at)
}

fn bind_read_only(from: &Path, to: &Path) -> Result<()> {
    bind(from, to)?;
    set(to, MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY)
}

fn bind(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("cannot make {}", to.display()))?;
    mount(Some(from), to, NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE)
        .with_context(|| format!("cannot show {} at {}", from.display(), to.display()))
}

fn mount_new(kind: &str, at: &Path, options: Option<&str>) -> Result<()> {
    fs::create_dir_all(at)?;
    mount(Some(kind), at, Some(kind), MsFlags::empty(), options)
        .with_context(|| format!("cannot mount {kind} at {}", at.display()))
}

fn set(at: &Path, flags: MsFlags) -> Result<()> {
    mount(NONE, at, NONE, flags, NONE).with_context(|| format!("cannot change how {} is mounted", at.display()))
}

fn below(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

const NONE: Option<&CStr> = None;

/// Where programs and their libraries are. The links of a merged /usr stay links.
const SYSTEM: [&str; 8] = ["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix"];

/// Which library is where, which iptables is meant, who root is.
const SETTINGS: [&str; 12] = [
    "/etc/alternatives",
    "/etc/ethertypes",
    "/etc/group",
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d",
    "/etc/nsswitch.conf",
    "/etc/os-release",
    "/etc/passwd",
    "/etc/protocols",
    "/etc/services",
    "/etc/ssl",
];
