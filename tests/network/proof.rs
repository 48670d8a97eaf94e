//! Which namespace is a pod's is proven, never claimed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use selvedge_lab::{AgentOptions, BOUND, Lab, Pod, PodSpec, eventually, trial_with};
use serde_json::json;

use crate::lab;

pub fn trials() -> Vec<Trial> {
    vec![
        trial_with("proof::a_namespace_that_nobody_names_is_proven_by_its_processes_cgroup", lab(), by_cgroup),
        trial_with("proof::another_user_namespaces_network_counts_where_host_users_is_false", lab(), |lab| {
            of_another_user_namespace(lab, true)
        }),
        trial_with("proof::another_user_namespaces_network_counts_for_no_ordinary_pod", lab(), |lab| {
            of_another_user_namespace(lab, false)
        }),
    ]
}

fn by_cgroup(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
    forget(web.path())?;
    let stranger = Process(web.spawn(Command::new("sleep").arg("1000"))?);
    let agent = lab.node("node-a").spawn_agent(&AgentOptions::default())?;
    agent.wait_pods("pending", 1)?;
    let reason = agent.dump()?["capture"]["pods"][0]["reason"].to_string();
    ensure!(reason.contains("not proven to be the pod's"), "{reason}");
    ensure!(web.networking()?.count("SELVEDGE") == 0, "a namespace without proof was captured");

    // Made before the process is, and so removed after it.
    let cgroup = Cgroup::of_pod(web.uid());
    let process = Process(web.spawn(Command::new("sleep").arg("1000"))?);
    cgroup.take(process.0.id())?;
    agent.wait_pod(&web)?;
    ensure!(web.networking()?.count("SELVEDGE") > 0, "captured, but not here");
    drop(stranger);
    agent.wait_ready()
}

fn of_another_user_namespace(lab: &Lab, declared: bool) -> Result<()> {
    let mut spec = PodSpec::new("shop/web", "node-a");
    if declared {
        spec = spec.field("/spec/hostUsers", json!(false));
    }
    let web = lab.pod(spec)?;
    let _owner = moved_into_a_user_namespace(&web)?;
    let agent = lab.node("node-a").spawn_agent(&AgentOptions::default())?;
    if declared {
        return agent.wait_pod(&web);
    }
    let reason = eventually("it says why it does not capture the pod", BOUND, || {
        let pods = agent.dump().ok()?["capture"]["pods"].take();
        pods.as_array()?
            .iter()
            .find_map(|pod| pod["reason"].as_str().filter(|_| pod["state"] == "pending").map(str::to_owned))
    })?;
    ensure!(reason.contains("another user namespace"), "{reason}");
    Ok(())
}

/// Gives the pod a network of a user namespace of its own, as `hostUsers: false` does, in the place of the one it had.
fn moved_into_a_user_namespace(pod: &Pod) -> Result<Process> {
    let owner = Process(Command::new("unshare").args(["-Urn", "sleep", "1000"]).spawn()?);
    let pid = owner.0.id();
    let network = PathBuf::from(format!("/proc/{pid}/ns/net"));
    let own = fs::read_link("/proc/self/ns/net")?;
    eventually("the namespace is there", BOUND, || {
        let comm = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
        (comm.trim() == "sleep" && fs::read_link(&network).is_ok_and(|other| other != own)).then_some(())
    })?;
    pod.sh(&format!("ip link set eth0 netns {pid}"))?;
    let addresses = pod.ips().iter().map(|ip| format!("ip addr add {ip} dev eth0"));
    let script = ["ip link set lo up".to_owned()].into_iter().chain(addresses).collect::<Vec<_>>().join("; ");
    let entered =
        Command::new("nsenter").arg(format!("--net={}", network.display())).args(["sh", "-ec", &script]).output()?;
    ensure!(entered.status.success(), "{}", String::from_utf8_lossy(&entered.stderr));
    umount2(pod.path(), MntFlags::MNT_DETACH)?;
    mount(Some(&network), pod.path(), None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    Ok(owner)
}

/// Takes a namespace's name away, as where the runtime keeps none.
fn forget(pin: &Path) -> Result<()> {
    umount2(pin, MntFlags::MNT_DETACH)?;
    Ok(fs::remove_file(pin)?)
}

/// A cgroup that carries a pod's UID.
struct Cgroup {
    uid: String,
    /// From the innermost outwards; none without the right to make cgroups.
    folders: Vec<PathBuf>,
}

impl Cgroup {
    fn of_pod(uid: &str) -> Self {
        let mut cgroup = Self { uid: uid.to_owned(), folders: Vec::new() };
        let hierarchies = ["/sys/fs/cgroup/pids", "/sys/fs/cgroup"].map(Path::new);
        let Some(hierarchy) = hierarchies.into_iter().find(|path| path.join("cgroup.procs").exists()) else {
            return cgroup;
        };
        let pod = hierarchy.join(format!("pod{uid}"));
        for folder in [pod.clone(), pod.join("container")] {
            if fs::create_dir(&folder).is_ok() {
                cgroup.folders.insert(0, folder);
            }
        }
        cgroup
    }

    /// Puts a process into it; where that is not allowed, covers the file that tells of it.
    fn take(&self, process: u32) -> Result<()> {
        if let [container, _] = &self.folders[..]
            && fs::write(container.join("cgroup.procs"), process.to_string()).is_ok()
        {
            return Ok(());
        }
        let file = PathBuf::from(format!("/run/cgroup-of-{process}"));
        fs::write(&file, format!("0::/kubepods/pod{}/container\n", self.uid))?;
        let none = None::<&str>;
        mount(Some(&file), Path::new(&format!("/proc/{process}/cgroup")), none, MsFlags::MS_BIND, none)
            .context("a cgroup can be neither made nor shown")
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for folder in &self.folders {
            // A process that has ended leaves it a moment later.
            let _ = eventually("the cgroup is empty", BOUND, || fs::remove_dir(folder).ok());
        }
    }
}

/// A process that ends with the test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
