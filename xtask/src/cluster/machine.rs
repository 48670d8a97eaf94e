//! One machine of the cluster: namespaces, a root of its own, and a first process that keeps its programs running.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::setsid;
use selvedge_lab::eventually;
use serde::{Deserialize, Serialize};

use crate::cluster::cgroup::Group;

/// What a machine is; its first process reads it from a file.
#[derive(Serialize, Deserialize)]
pub struct Machine {
    pub cluster: String,
    pub name: String,
    pub ip: IpAddr,
    /// The machine's folder: its root, its socket and its process number.
    pub folder: PathBuf,
    /// Where all machines' logs are.
    pub logs: PathBuf,
    /// Shown to the machine at the same path.
    pub programs: PathBuf,
    /// The PATH of its programs.
    pub path: String,
    /// A port here that the listener on standard input leads to.
    pub forward: Option<u16>,
    pub services: Vec<Service>,
}

/// A program that runs for as long as its machine.
#[derive(Clone, Serialize, Deserialize)]
pub struct Service {
    pub name: String,
    pub command: Vec<String>,
}

impl Service {
    pub fn new(name: &str, program: &Path, arguments: impl IntoIterator<Item = String>) -> Self {
        let command = [program.display().to_string()].into_iter().chain(arguments).collect();
        Self { name: name.to_owned(), command }
    }
}

impl Machine {
    /// The machine's file system, seen from the host.
    pub fn root(&self) -> PathBuf {
        self.folder.join("root")
    }

    pub fn log(&self, service: &str) -> PathBuf {
        self.logs.join(format!("{}-{service}.log", self.name))
    }

    /// Starts the machine's first process, and waits until it takes orders. None of its services runs yet.
    pub fn boot(&self, listener: Option<TcpListener>) -> Result<()> {
        fs::create_dir_all(self.root()).with_context(|| format!("cannot make {}", self.root().display()))?;
        fs::create_dir_all(&self.logs)?;
        fs::write(self.spec(), serde_json::to_vec_pretty(self)?)?;
        let log = File::create(self.log("init"))?;
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["cluster", "init", "--outside"]).arg(self.spec()).current_dir("/");
        command.stdin(listener.map_or_else(Stdio::null, |listener| OwnedFd::from(listener).into()));
        command.stdout(log.try_clone()?).stderr(log).env("PATH", &self.path);
        let status = command.status().context("cannot start the machine's first process")?;
        let about = || format!("{} does not start: see {}", self.name, self.log("init").display());
        ensure!(status.success(), "{}\n{}", about(), self.init_log());
        let up = eventually("the machine's first process takes orders", BOOT, || self.order("ping").ok());
        up.map_err(|error| error.context(format!("{}\n{}", about(), self.init_log())))?;
        Ok(())
    }

    /// The first process, as the host numbers it.
    pub fn pid(&self) -> Result<u32> {
        let text = fs::read_to_string(self.folder.join("pid"));
        let text = text.with_context(|| format!("{} is not running: cargo xtask cluster up", self.name))?;
        text.trim().parse().with_context(|| format!("the process number of {}", self.name))
    }

    /// `start`, `stop` or `restart` with a service's name, or `ping`.
    pub fn order(&self, order: &str) -> Result<()> {
        let socket = self.socket();
        let mut stream = UnixStream::connect(&socket)
            .with_context(|| format!("{} takes no orders at {}", self.name, socket.display()))?;
        stream.set_read_timeout(Some(BOOT))?;
        writeln!(stream, "{order}")?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).with_context(|| format!("{}: {order}", self.name))?;
        if answer.trim() != "ok" {
            bail!("{}: {order}: {}", self.name, answer.trim());
        }
        Ok(())
    }

    /// A command inside the machine.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Result<Command> {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.pid()?.to_string()]);
        command.args(["--net", "--mount", "--pid", "--uts", "--ipc", "--cgroup", "--root", "--wdns=/", "--"]);
        command.arg(program).env("PATH", &self.path);
        Ok(command)
    }

    /// What the first process said.
    fn init_log(&self) -> String {
        fs::read_to_string(self.log("init")).unwrap_or_default()
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.join("init.sock")
    }

    fn spec(&self) -> PathBuf {
        self.folder.join("machine.json")
    }
}

/// The way into a machine: makes its namespaces, starts its first process inside, notes its number, and ends.
pub fn start_inside(spec: &Path) -> Result<()> {
    let machine = read(spec)?;
    let program = std::env::current_exe()?;
    // Signals of the terminal are for whoever asked for the cluster.
    setsid().context("cannot leave the terminal")?;
    // Opened now, for the first process changes the root of everyone in its mount namespace.
    let mut number = File::create(machine.folder.join("pid")).context("cannot note the process number")?;
    Group::of_machine(&machine.cluster, &machine.name)?.enter()?;
    let namespaces = CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWCGROUP;
    unshare(namespaces).context("cannot make namespaces; the cluster needs root with CAP_SYS_ADMIN")?;
    let first = Command::new(program).args(["cluster", "init"]).arg(spec).spawn();
    let first = first.context("cannot start the first process of the machine")?;
    write!(number, "{}", first.id()).context("cannot note the process number")
}

pub fn read(spec: &Path) -> Result<Machine> {
    let text = fs::read(spec).with_context(|| format!("cannot read {}", spec.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{} is damaged", spec.display()))
}

const BOOT: Duration = Duration::from_secs(30);
