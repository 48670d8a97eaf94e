//! The first process of a machine: keeps its services running, takes orders on a socket, and buries orphans.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{Pid, sethostname};

use crate::cluster::machine::{Machine, Service, read};
use crate::cluster::rootfs;

/// Never returns while the machine lives.
pub fn run(spec: &Path) -> Result<ExitCode> {
    let machine = read(spec)?;
    let listener = TcpListener::from(io::stdin().as_fd().try_clone_to_owned()?);
    let logs: Vec<_> = machine.services.iter().map(|service| open_log(&machine, service)).collect::<Result<_>>()?;
    let socket = machine.socket();
    let _ = fs::remove_file(&socket);
    let orders = UnixListener::bind(&socket).with_context(|| format!("cannot listen at {}", socket.display()))?;
    rootfs::enter(&machine.root(), &machine.programs)?;
    sethostname(&machine.name).context("cannot set the host's name")?;
    set_up_network()?;
    let services = machine.services.iter().cloned().zip(logs);
    let services = services.map(|(service, log)| (service.name.clone(), Running::new(service, log))).collect();
    let table = Arc::new(Table { services: Mutex::new(services), ended: Condvar::new() });
    if let Some(port) = machine.forward {
        thread::spawn(move || forward(&listener, port));
    }
    let ordered = table.clone();
    thread::spawn(move || {
        for stream in orders.incoming().flatten() {
            let table = ordered.clone();
            // One that says nothing keeps nobody else waiting.
            thread::spawn(move || answer(&table, stream));
        }
    });
    loop {
        match waitpid(None, None) {
            Ok(status) => {
                if let Some(pid) = status.pid() {
                    table.buried(pid);
                }
            }
            // No child yet, or none any more.
            Err(Errno::ECHILD) => thread::sleep(IDLE),
            Err(Errno::EINTR) => {}
            Err(error) => bail!("cannot wait for children: {error}"),
        }
    }
}

/// All services of the machine.
struct Table {
    services: Mutex<BTreeMap<String, Running>>,
    ended: Condvar,
}

/// One service, and whether it runs.
struct Running {
    service: Service,
    log: File,
    wanted: bool,
    pid: Option<Pid>,
}

impl Running {
    fn new(service: Service, log: File) -> Self {
        Self { service, log, wanted: false, pid: None }
    }

    fn start(&mut self) -> Result<()> {
        self.wanted = true;
        if self.pid.is_some() {
            return Ok(());
        }
        let (program, arguments) = self.service.command.split_first().context("a service without a command")?;
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).stdout(self.log.try_clone()?).stderr(self.log.try_clone()?);
        let child = command.spawn().with_context(|| format!("cannot run {program}"))?;
        // The loop above waits for it, as for every child.
        self.pid = Some(Pid::from_raw(child.id().cast_signed()));
        Ok(())
    }
}

impl Table {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Running>> {
        self.services.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn start(&self, name: &str) -> Result<()> {
        self.lock().get_mut(name).with_context(|| unknown(name))?.start()
    }

    fn stop(&self, name: &str) -> Result<()> {
        let mut services = self.lock();
        for signal in [Signal::SIGTERM, Signal::SIGKILL] {
            let running = services.get_mut(name).with_context(|| unknown(name))?;
            running.wanted = false;
            let Some(pid) = running.pid else { return Ok(()) };
            kill(pid, signal).with_context(|| format!("cannot end {name}"))?;
            let alive =
                |services: &mut BTreeMap<String, Running>| services.get(name).is_some_and(|at| at.pid.is_some());
            let waited = self.ended.wait_timeout_while(services, PATIENCE, alive);
            services = waited.unwrap_or_else(|poisoned| poisoned.into_inner()).0;
        }
        ensure!(services.get(name).is_none_or(|running| running.pid.is_none()), "{name} does not end");
        Ok(())
    }

    /// A child has ended: a service that should run is started again after a moment.
    fn buried(self: &Arc<Self>, pid: Pid) {
        let mut services = self.lock();
        let Some((name, running)) = services.iter_mut().find(|(_, running)| running.pid == Some(pid)) else { return };
        running.pid = None;
        self.ended.notify_all();
        if !running.wanted {
            return;
        }
        eprintln!("{name} ended and is started again");
        let (table, name) = (self.clone(), name.clone());
        thread::spawn(move || {
            thread::sleep(BEFORE_RESTART);
            let mut services = table.lock();
            if let Some(running) = services.get_mut(&name).filter(|running| running.wanted)
                && let Err(error) = running.start()
            {
                eprintln!("{name}: {error:#}");
            }
        });
    }
}

fn unknown(name: &str) -> String {
    format!("there is no {name} on this machine")
}

fn answer(table: &Table, stream: UnixStream) {
    let mut order = String::new();
    let mut writer = &stream;
    if BufReader::new(&stream).read_line(&mut order).is_err() {
        return;
    }
    let done = match order.trim().split_once(' ') {
        Some(("start", name)) => table.start(name),
        Some(("stop", name)) => table.stop(name),
        Some(("restart", name)) => table.stop(name).and_then(|()| table.start(name)),
        None if order.trim() == "ping" => Ok(()),
        _ => Err(anyhow::anyhow!("not an order: {}", order.trim())),
    };
    let words = done.map_or_else(|error| format!("{error:#}").replace('\n', " "), |()| "ok".to_owned());
    // Whoever asked may be gone.
    let _ = writeln!(writer, "{words}");
}

/// Leads connections to the host's loopback to a port of this machine: the listener was made outside.
fn forward(listener: &TcpListener, port: u16) {
    for client in listener.incoming().flatten() {
        let Ok(server) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) else { continue };
        let (Ok(client_writer), Ok(server_writer)) = (client.try_clone(), server.try_clone()) else { continue };
        thread::spawn(move || relay(client, server_writer));
        thread::spawn(move || relay(server, client_writer));
    }
}

fn relay(mut from: impl Read, mut to: TcpStream) {
    // However it ends, the other side learns that no more comes.
    let _ = io::copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Write);
}

fn set_up_network() -> Result<()> {
    let status = Command::new("ip").args(["link", "set", "lo", "up"]).status().context("cannot run ip")?;
    ensure!(status.success(), "cannot set lo up");
    for (key, value) in [("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")] {
        let path = Path::new("/proc/sys/net").join(key);
        // A kernel may lack IPv6.
        if path.exists() {
            fs::write(&path, value).with_context(|| format!("cannot set {}", path.display()))?;
        }
    }
    Ok(())
}

fn open_log(machine: &Machine, service: &Service) -> Result<File> {
    let path = machine.log(&service.name);
    let log = OpenOptions::new().create(true).append(true).open(&path);
    log.with_context(|| format!("cannot write {}", path.display()))
}

const IDLE: Duration = Duration::from_millis(100);
const PATIENCE: Duration = Duration::from_secs(10);
const BEFORE_RESTART: Duration = Duration::from_secs(1);
