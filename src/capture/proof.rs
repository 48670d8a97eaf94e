//! Which namespace is a pod's: proven, never claimed (design, section 3).
//!
//! An address alone proves nothing, for any process can make a namespace that holds a neighbour's. A namespace is a
//! pod's if the runtime handed it over with the pod's UID ([`super::handed`]), if it is named in the runtime's root-only
//! directory, or if the oldest process whose cgroup carries the pod's UID is in it; and its addresses must be the pod's.
//! Whatever else holds a pod's address is an impostor.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::address;
use super::netns::{NetNs, NetNsId};
use crate::mesh::PodUid;

/// A pod whose namespace is wanted.
#[derive(Clone, Debug)]
pub struct Wanted {
    pub uid: PodUid,
    pub ips: Vec<IpAddr>,
    /// `hostUsers`: whether the pod shares the node's user namespace.
    pub host_users: bool,
}

/// What one look over the node has shown.
#[derive(Debug, Default)]
pub struct Evidence {
    /// Every namespace seen but the node's own, by its number.
    seen: HashMap<NetNsId, Seen>,
    /// The oldest process of a pod, by UID: its namespace.
    by_cgroup: HashMap<String, (u64, NetNsId)>,
    /// Why the runtime's directory proves nothing, if so.
    pub directory_problem: Option<String>,
}

#[derive(Debug)]
struct Seen {
    netns: NetNs,
    cookie: Option<u64>,
    addresses: HashSet<IpAddr>,
    /// Named in the runtime's root-only directory.
    named: bool,
    /// Owned by the user namespace that owns the node's network.
    of_the_node: bool,
    /// Where it was found, for people.
    place: PathBuf,
}

/// A namespace that holds a pod's address and is not proven to be the pod's.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Impostor {
    pub netns: NetNsId,
    pub place: PathBuf,
    pub ip: IpAddr,
}

/// Which namespaces are already proven to be a pod's, the present ones and those of pods that are gone.
#[derive(Clone, Debug, Default)]
pub struct Held {
    pub present: HashMap<NetNsId, PodUid>,
    /// By the kernel's cookie, which unlike a number is never given again.
    pub former: HashMap<u64, PodUid>,
}

/// Why a pod's namespace is not known, in words.
pub type Unproven = String;

impl Evidence {
    /// Looks over the runtime's directory and every process. Costs two small reads a process, and one visit to each
    /// namespace, of which at most [`MAX_NAMESPACES`] are looked into.
    pub fn gather(directory: &Path, node: &NetNs) -> io::Result<Self> {
        let owner = node.owner()?;
        let mut evidence = Self::default();
        match named(directory) {
            Ok(paths) => paths.into_iter().for_each(|path| evidence.look(path, true, node, owner)),
            Err(problem) => evidence.directory_problem = Some(problem),
        }
        let mut processes = HashMap::new();
        for entry in std::fs::read_dir("/proc")?.flatten() {
            if !entry.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit) {
                continue;
            }
            let process = entry.path();
            // A process may end while it is looked at; what is gone proves nothing.
            let path = process.join("ns/net");
            let Ok(id) = NetNsId::of_path(&path) else { continue };
            if id == node.id() {
                continue;
            }
            processes.entry(id).or_insert(path);
            let Ok(cgroup) = std::fs::read_to_string(process.join("cgroup")) else { continue };
            let mut uids = pod_uids(&cgroup).peekable();
            if uids.peek().is_none() {
                continue;
            }
            let Some(started) = start_time(&process) else { continue };
            for uid in uids {
                let oldest = evidence.by_cgroup.entry(uid).or_insert((started, id));
                if started < oldest.0 {
                    *oldest = (started, id);
                }
            }
        }
        for (id, path) in processes {
            if !evidence.seen.contains_key(&id) && evidence.seen.len() < MAX_NAMESPACES {
                evidence.look(path, false, node, owner);
            }
        }
        Ok(evidence)
    }

    fn look(&mut self, place: PathBuf, named: bool, node: &NetNs, owner: NetNsId) {
        let Ok(netns) = NetNs::open(&place) else { return };
        if netns.id() == node.id() || self.seen.contains_key(&netns.id()) {
            return;
        }
        let Ok((addresses, cookie)) = netns.enter(|| Ok((address::addresses()?, address::namespace_cookie()))) else {
            return;
        };
        let of_the_node = netns.owner().is_ok_and(|of| of == owner);
        self.seen.insert(netns.id(), Seen { netns, cookie, addresses, named, of_the_node, place });
    }

    /// The pod's namespace. A namespace that is held for another pod is not this one's while it has the address.
    pub fn prove(&self, pod: &Wanted, held: &Held) -> Result<NetNs, Unproven> {
        let free = |seen: &Seen| held.holder(seen).is_none_or(|holder| *holder == pod.uid);
        let counts = |seen: &&Seen| free(seen) && seen.holds(pod) && (seen.of_the_node || !pod.host_users);
        // The cgroup names the pod itself, so it comes before the directory, which names only that the runtime made it.
        let oldest = self.by_cgroup.get(&normal(pod.uid.as_str()));
        if let Some(seen) = oldest.and_then(|(_, id)| self.seen.get(id)).filter(counts) {
            return Ok(seen.netns.clone());
        }
        let mut named = self.seen.values().filter(|seen| seen.named).filter(counts);
        match (named.next(), named.next()) {
            (Some(seen), None) => return Ok(seen.netns.clone()),
            (Some(one), Some(other)) => {
                return Err(format!(
                    "{} and {} both hold its address; remove the one that is not the pod's",
                    one.place.display(),
                    other.place.display()
                ));
            }
            (None, _) => {}
        }
        if let Some(problem) = &self.directory_problem {
            return Err(format!("its network namespace is not found: {problem}"));
        }
        // The one that the runtime made says most.
        if let Some(seen) = self.seen.values().filter(|seen| seen.holds(pod)).max_by_key(|seen| seen.named) {
            let why = if !free(seen) {
                "is still the namespace of an earlier pod"
            } else if seen.named {
                "belongs to another user namespace, and the pod has hostUsers: true"
            } else {
                "is not proven to be the pod's, by the runtime's directory or by a cgroup"
            };
            return Err(format!("{} holds its address but {why}", seen.place.display()));
        }
        Err("no network namespace on this node holds its address yet".to_owned())
    }

    /// Who else holds the pod's address, beside the namespace proven to be its own and those held for an earlier pod.
    pub fn impostors(&self, pod: &Wanted, proven: Option<NetNsId>, held: &Held) -> Vec<Impostor> {
        let others = self.seen.values().filter(|seen| {
            let legitimate = seen.named && proven.is_none();
            Some(seen.netns.id()) != proven && !legitimate && held.holder(seen).is_none()
        });
        let mut impostors: Vec<Impostor> = others
            .filter_map(|seen| {
                let ip = *pod.ips.iter().find(|ip| seen.addresses.contains(ip))?;
                Some(Impostor { netns: seen.netns.id(), place: seen.place.clone(), ip })
            })
            .collect();
        impostors.sort_by_key(|impostor| impostor.netns);
        impostors
    }

    /// Whether a namespace is still there and still holds one of these addresses.
    pub fn still_holds(&self, netns: NetNsId, ips: &[IpAddr]) -> bool {
        self.seen.get(&netns).is_some_and(|seen| ips.iter().any(|ip| seen.addresses.contains(ip)))
    }
}

impl Evidence {
    /// Whether the namespace of a pod that is gone is still there with one of its addresses.
    pub fn lingers(&self, cookie: u64, ips: &[IpAddr]) -> bool {
        let seen = self.seen.values().find(|seen| seen.cookie == Some(cookie));
        seen.is_some_and(|seen| ips.iter().any(|ip| seen.addresses.contains(ip)))
    }
}

impl Held {
    fn holder(&self, seen: &Seen) -> Option<&PodUid> {
        let former = || self.former.get(&seen.cookie?);
        self.present.get(&seen.netns.id()).or_else(former)
    }
}

impl Seen {
    fn holds(&self, pod: &Wanted) -> bool {
        !pod.ips.is_empty() && pod.ips.iter().all(|ip| self.addresses.contains(ip))
    }
}

/// The entries of the runtime's directory, if it is such that only root can have put them there.
fn named(directory: &Path) -> Result<Vec<PathBuf>, String> {
    let shown = directory.display();
    let meta = std::fs::symlink_metadata(directory).map_err(|error| format!("{shown}: {error}"))?;
    if !meta.is_dir() {
        return Err(format!("{shown} is not a directory"));
    }
    if meta.uid() != nix::unistd::geteuid().as_raw() || meta.mode() & 0o022 != 0 {
        return Err(format!("{shown} is not root's alone; make it owned by root, with mode 0755"));
    }
    let entries = std::fs::read_dir(directory).map_err(|error| format!("{shown}: {error}"))?;
    Ok(entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file())).map(|e| e.path()).collect())
}

/// The UIDs that the paths of `/proc/PID/cgroup` carry, in dashes: `…/pod1234-5678/…` under cgroupfs,
/// `…-pod1234_5678.slice/…` under systemd. Only the outermost counts, and none below a login session: who may make
/// cgroups below their own can name them at will.
fn pod_uids(cgroup: &str) -> impl Iterator<Item = String> + '_ {
    let paths = cgroup.lines().filter_map(|line| line.splitn(3, ':').nth(2));
    paths.filter(|path| !path.contains("user.slice")).filter_map(|path| path.split('/').find_map(pod_uid))
}

fn pod_uid(segment: &str) -> Option<String> {
    let uid = match segment.strip_suffix(".slice") {
        Some(slice) => slice.rsplit_once("-pod")?.1,
        None => segment.strip_prefix("pod")?,
    };
    let plausible = !uid.is_empty() && uid.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_');
    plausible.then(|| normal(uid))
}

fn normal(uid: &str) -> String {
    uid.replace('_', "-")
}

/// Field 22 of `/proc/PID/stat`, after the name, which may hold anything.
fn start_time(process: &Path) -> Option<u64> {
    let stat = std::fs::read_to_string(process.join("stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

const MAX_NAMESPACES: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_path_carries_the_pods_uid_in_dashes_or_underscores() {
        let read = |text: &str| pod_uids(text).collect::<Vec<_>>();
        assert_eq!(read("0::/kubepods/burstable/pod12ab-34cd/deadbeef\n"), ["12ab-34cd"]);
        assert_eq!(
            read("0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod12ab_34cd.slice/cri.scope"),
            ["12ab-34cd"]
        );
        assert_eq!(read("11:memory:/kubepods/pod1-2/x\n10:pids:/kubepods/pod1-2/x\n"), ["1-2", "1-2"]);
        assert!(read("0::/system.slice/podman-1.scope\n0::/system.slice/podcast.service").is_empty());
        assert_eq!(read("0::/kubepods/pod1-2/ctr/pod3-4"), ["1-2"], "a cgroup made inside a pod's own");
        assert!(read("0::/user.slice/user-1000.slice/pod3-4").is_empty());
        assert!(read("garbage").is_empty());
    }
}
