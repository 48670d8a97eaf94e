//! The private world: its own mounts, processes and network, gone when its first process is.

use std::ffi::CString;
use std::fs;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::process;
use std::sync::OnceLock;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, sigprocmask};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, getgid, getuid, pipe, read};

/// Where the process lives after [`enter`].
#[derive(Clone, Copy, Debug)]
pub struct World {
    /// The world's first process, as the outside sees it: what `nsenter --target` takes.
    pub pid: i32,
    /// Whether root here is an ordinary user outside.
    pub user_namespace: bool,
}

impl World {
    /// The world this process has entered.
    pub fn current() -> Option<Self> {
        CURRENT.get().copied()
    }
}

/// Goes on in a private world: new mount, process and network namespaces, as root or, without it, in a user namespace.
///
/// To be called first thing in `main`, while the process has one thread. The caller goes on as a child; the process
/// that was started waits for it, passes signals on and ends with its code. When any of the two ends, even by SIGKILL,
/// the kernel ends every process of the world, and with them go its namespaces and mounts.
///
/// Where no such world can be had, it says what to do and ends the process with code 1.
pub fn enter() -> World {
    match try_enter() {
        Ok(world) => world,
        Err(error) => {
            eprintln!("selvedge-lab: {error:#}");
            process::exit(1);
        }
    }
}

fn try_enter() -> Result<World> {
    let threads = fs::read_dir("/proc/self/task").context("cannot read /proc/self/task: is /proc mounted?")?.count();
    if threads != 1 {
        bail!("enter() was called with {threads} threads running; call it first thing in main()");
    }
    let user_namespace = leave_this_world()?;
    let before = block_signals()?;
    let (pid_reader, pid_writer) = pipe().context("cannot make a pipe")?;
    // SAFETY: this process has one thread (checked above), so the child may do whatever it likes.
    match unsafe { fork() }.context("cannot fork")? {
        ForkResult::Parent { child } => {
            drop(pid_reader);
            // A child that is gone already is seen by the wait below.
            let _ = fs::File::from(pid_writer).write_all(&child.as_raw().to_ne_bytes());
            process::exit(wait_outside(child))
        }
        ForkResult::Child => {
            drop(pid_writer);
            prctl::set_pdeathsig(Signal::SIGKILL).context("cannot ask to end with the parent")?;
            let world = World { pid: read_pid(&pid_reader)?, user_namespace };
            furnish()?;
            // SAFETY: as above.
            match unsafe { fork() }.context("cannot fork")? {
                ForkResult::Parent { child } => process::exit(wait_as_init(child)),
                ForkResult::Child => {
                    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&before), None)?;
                    Ok(*CURRENT.get_or_init(|| world))
                }
            }
        }
    }
}

/// Leaves the namespaces of whoever started us; returns whether that took a user namespace.
fn leave_this_world() -> Result<bool> {
    let apart = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS;
    match unshare(apart) {
        Ok(()) => return Ok(false),
        Err(Errno::EPERM) => {}
        Err(error) => bail!("the kernel made no new namespaces ({error}); it needs mount, pid and net namespaces"),
    }
    let (uid, gid) = (getuid(), getgid());
    if let Err(error) = unshare(apart | CloneFlags::CLONE_NEWUSER) {
        bail!(
            "neither root nor a user namespace is to be had ({error}). Run it as root (sudo), or let users make \
             namespaces: sysctl -w user.max_user_namespaces=10000, and on Ubuntu also \
             sysctl -w kernel.apparmor_restrict_unprivileged_userns=0. In a container, start it with --privileged"
        );
    }
    for (file, map) in
        [("setgroups", "deny".to_owned()), ("uid_map", format!("0 {uid} 1")), ("gid_map", format!("0 {gid} 1"))]
    {
        fs::write(format!("/proc/self/{file}"), map).with_context(|| format!("cannot write /proc/self/{file}"))?;
    }
    Ok(true)
}

fn block_signals() -> Result<SigSet> {
    let mut before = SigSet::empty();
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&watched_signals()), Some(&mut before))?;
    Ok(before)
}

fn watched_signals() -> SigSet {
    [Signal::SIGCHLD, Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT].into_iter().collect()
}

/// Also proves that the parent lived when we asked to end with it: it wrote after the fork.
fn read_pid(reader: &OwnedFd) -> Result<i32> {
    let mut pid = [0; 4];
    match read(reader, &mut pid)? {
        4 => Ok(i32::from_ne_bytes(pid)),
        _ => bail!("the process that started the world is gone"),
    }
}

/// Own mounts, processes and loopback.
fn furnish() -> Result<()> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("cannot make the mounts private")?;
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some("mode=0755"))
        .context("cannot mount a private /run")?;
    let apart = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), "/proc", Some("proc"), apart, none).context(
        "cannot mount /proc for the new processes: a container that hides parts of /proc forbids it; start it with \
         --privileged (or --security-opt systempaths=unconfined)",
    )?;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    loopback_up()
}

fn loopback_up() -> Result<()> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None)?;
    let name = CString::new("lo")?;
    // SAFETY: ifreq is plain data for which all zeroes are a value; both ioctls get a pointer to it that outlives them.
    let result = unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(name.as_bytes_with_nul()) {
            *to = *from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
        libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&socket), libc::SIOCSIFFLAGS as _, &request)
    };
    Errno::result(result).context("cannot bring lo up")?;
    Ok(())
}

/// The process that was started: passes signals on, ends as its child does.
fn wait_outside(child: Pid) -> i32 {
    wait_for(child, WaitFor::Child)
}

/// The world's first process: reaps whoever loses its parent, ends as the program does.
fn wait_as_init(program: Pid) -> i32 {
    wait_for(program, WaitFor::Anyone)
}

#[derive(Clone, Copy)]
enum WaitFor {
    Child,
    Anyone,
}

fn wait_for(child: Pid, who: WaitFor) -> i32 {
    let signals = watched_signals();
    loop {
        match signals.wait() {
            Ok(Signal::SIGCHLD) => loop {
                let whom = match who {
                    WaitFor::Child => child,
                    WaitFor::Anyone => Pid::from_raw(-1),
                };
                match waitpid(whom, Some(WaitPidFlag::WNOHANG)) {
                    Ok(WaitStatus::Exited(pid, code)) if pid == child => return code,
                    Ok(WaitStatus::Signaled(pid, signal, _)) if pid == child => return 128 + signal as i32,
                    Ok(WaitStatus::StillAlive) | Err(_) => break,
                    Ok(_) => {}
                }
            },
            // It may have ended meanwhile; the next SIGCHLD tells.
            Ok(signal) => drop(kill(child, signal)),
            Err(_) => {}
        }
    }
}

static CURRENT: OnceLock<World> = OnceLock::new();
