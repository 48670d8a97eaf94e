//! The control groups of a cluster: one for each machine of it, in every hierarchy that the host has.
//!
//! They hold every process of the cluster, whoever started it, so that taking the cluster down needs no other record.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use selvedge_lab::eventually;

/// The group of one cluster, or of one of its machines.
pub struct Group {
    /// Below a hierarchy's root.
    path: PathBuf,
    hierarchies: Vec<Hierarchy>,
}

impl Group {
    pub fn of_cluster(cluster: &str) -> Result<Self> {
        Ok(Self { path: Path::new(PARENT).join(cluster), hierarchies: hierarchies()? })
    }

    pub fn of_machine(cluster: &str, machine: &str) -> Result<Self> {
        let cluster = Self::of_cluster(cluster)?;
        Ok(Self { path: cluster.path.join(machine), ..cluster })
    }

    /// Makes the group where it is absent, and moves this process into it.
    pub fn enter(&self) -> Result<()> {
        for hierarchy in &self.hierarchies {
            let mut folder = hierarchy.mounted.clone();
            for part in &self.path {
                hierarchy.delegate(&folder);
                folder.push(part);
                match fs::create_dir(&folder) {
                    Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                        return Err(error)
                            .with_context(|| format!("cannot make the control group {}", folder.display()));
                    }
                    _ => hierarchy.inherit(&folder),
                }
            }
            let moved = fs::write(folder.join("cgroup.procs"), "0");
            moved.with_context(|| format!("cannot enter the control group {}", folder.display()))?;
        }
        Ok(())
    }

    /// Every process in the group and below.
    pub fn processes(&self) -> Vec<Pid> {
        let mut found = Vec::new();
        for folder in self.folders() {
            let text = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
            // A process that this one cannot see is listed as 0, which kill(2) takes for something else.
            let numbers = text.lines().filter_map(|line| line.parse().ok()).filter(|number| *number > 0);
            found.extend(numbers.map(Pid::from_raw));
        }
        found.sort();
        found.dedup();
        found
    }

    /// Ends every process of the group, then removes it.
    pub fn end(&self) -> Result<()> {
        let began = Instant::now();
        loop {
            let left = self.processes();
            if left.is_empty() {
                break;
            }
            if began.elapsed() > PATIENCE {
                bail!("processes do not end: {left:?}; cluster down again may help, else the kernel's log tells why");
            }
            // The first process of a PID namespace takes all others along.
            for process in left {
                match kill(process, Signal::SIGKILL) {
                    Ok(()) | Err(Errno::ESRCH) => {}
                    Err(error) => return Err(error).with_context(|| format!("cannot end process {process}")),
                }
            }
            thread::sleep(Duration::from_millis(20));
        }
        // Deepest first.
        for folder in self.folders() {
            remove(&folder)?;
        }
        for hierarchy in &self.hierarchies {
            // Other clusters may have theirs in it.
            let _ = fs::remove_dir(hierarchy.mounted.join(PARENT));
        }
        Ok(())
    }

    /// All folders of the group in all hierarchies, the deepest first.
    fn folders(&self) -> Vec<PathBuf> {
        fn below(folder: PathBuf, found: &mut Vec<PathBuf>) {
            for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    below(entry.path(), found);
                }
            }
            found.push(folder);
        }
        let mut found = Vec::new();
        for hierarchy in &self.hierarchies {
            let folder = hierarchy.mounted.join(&self.path);
            if folder.is_dir() {
                below(folder, &mut found);
            }
        }
        found
    }
}

/// Mounts the hierarchies as this process's cgroup namespace shows them: its own group is their root.
pub fn mount_own(at: &Path) -> Result<()> {
    let hierarchies = hierarchies()?;
    let only_v2 = hierarchies.iter().all(|hierarchy| hierarchy.version == Version::Two);
    if !only_v2 {
        mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), Some("mode=755")).context("cannot mount a tmpfs")?;
    }
    for hierarchy in hierarchies {
        let place = if only_v2 { at.to_owned() } else { at.join(hierarchy.mounted.file_name().unwrap_or_default()) };
        fs::create_dir_all(&place)?;
        let (kind, options) = match &hierarchy.version {
            Version::One(options) => ("cgroup", Some(options.as_str())),
            Version::Two => ("cgroup2", None),
        };
        mount(Some(kind), &place, Some(kind), MsFlags::empty(), options)
            .with_context(|| format!("cannot mount the control groups at {}", place.display()))?;
        if only_v2 {
            // A group that delegates may hold no process itself.
            fs::create_dir_all(place.join("init"))?;
            fs::write(place.join("init/cgroup.procs"), "0").context("cannot enter the group of the first process")?;
            // The process that started this one is about to leave.
            let delegated = || {
                hierarchy.delegate(&place);
                let handed_down = fs::read_to_string(place.join("cgroup.subtree_control"));
                handed_down.is_ok_and(|controllers| !controllers.trim().is_empty()).then_some(())
            };
            eventually("the machine hands down controllers of its control group", PATIENCE, delegated)?;
        }
    }
    Ok(())
}

struct Hierarchy {
    mounted: PathBuf,
    version: Version,
}

#[derive(PartialEq, Eq)]
enum Version {
    /// With its mount options.
    One(String),
    Two,
}

impl Hierarchy {
    /// A child of a `cpuset` group starts without CPUs and memory, and could hold nobody.
    fn inherit(&self, folder: &Path) {
        if !matches!(&self.version, Version::One(options) if options.contains("cpuset")) {
            return;
        }
        for file in ["cpuset.cpus", "cpuset.mems"] {
            let above = folder.parent().map(|parent| fs::read_to_string(parent.join(file)).unwrap_or_default());
            let own = fs::read_to_string(folder.join(file)).unwrap_or_default();
            if let Some(above) = above.filter(|_| own.trim().is_empty()) {
                // Entering the group tells, should it have failed.
                let _ = fs::write(folder.join(file), above.trim());
            }
        }
    }

    /// Version 2 gives a child only the controllers that its parent hands down. What cannot be handed down, the kubelet
    /// names.
    fn delegate(&self, folder: &Path) {
        if self.version == Version::Two {
            let controllers = fs::read_to_string(folder.join("cgroup.controllers")).unwrap_or_default();
            for controller in controllers.split_whitespace() {
                let _ = fs::write(folder.join("cgroup.subtree_control"), format!("+{controller}"));
            }
        }
    }
}

fn hierarchies() -> Result<Vec<Hierarchy>> {
    let text = fs::read_to_string("/proc/self/mountinfo").context("cannot read /proc/self/mountinfo")?;
    let found: Vec<_> = text.lines().filter_map(parse_mount).collect();
    if found.is_empty() {
        bail!("no control groups are mounted: mount -t cgroup2 none /sys/fs/cgroup");
    }
    Ok(found)
}

/// Reads one line of mountinfo: `36 35 0:31 / /sys/fs/cgroup/cpu rw,nosuid - cgroup cgroup rw,cpu,cpuacct`.
fn parse_mount(line: &str) -> Option<Hierarchy> {
    let (front, back) = line.split_once(" - ")?;
    let mounted = PathBuf::from(front.split(' ').nth(4)?);
    let mut back = back.split(' ');
    let version = match back.next()? {
        "cgroup2" => Version::Two,
        "cgroup" => {
            let options = back.nth(1)?.split(',').filter(|option| !GENERAL.contains(option));
            // What a release agent is belongs to the host.
            let options: Vec<_> = options.filter(|option| !option.starts_with("release_agent")).collect();
            Version::One(options.join(","))
        }
        _ => return None,
    };
    Some(Hierarchy { mounted, version })
}

/// A group stays busy for a moment after its last process.
fn remove(folder: &Path) -> Result<()> {
    let removed = || fs::remove_dir(folder).err().is_none_or(|error| error.kind() == io::ErrorKind::NotFound);
    eventually(&format!("the control group {} goes", folder.display()), PATIENCE, || removed().then_some(()))
}

const PARENT: &str = "selvedge-cluster";
const GENERAL: [&str; 4] = ["rw", "ro", "relatime", "clone_children"];
const PATIENCE: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_of_both_versions_are_read() {
        let one = "36 35 0:31 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct";
        let one = parse_mount(one).unwrap();
        assert_eq!(one.mounted, Path::new("/sys/fs/cgroup/cpu,cpuacct"));
        assert!(one.version == Version::One("cpu,cpuacct".to_owned()));
        let two = "42 35 0:37 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot";
        assert!(parse_mount(two).unwrap().version == Version::Two);
        assert!(parse_mount("22 1 8:1 / / rw - ext4 /dev/vda rw").is_none());
    }
}
