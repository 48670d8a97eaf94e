use std::collections::VecDeque;
use std::ffi::OsString;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getpid, getppid};

use super::restart::Restarts;
use super::shelf::Shelf;
use super::wire::{self, Request, Word};
use super::{EXIT_CONFIG, EXIT_USAGE, FD_VARIABLE, RESTARTS_VARIABLE};
use crate::memory;

/// Runs the parent: starts this same program as a worker, with these arguments (without the program's name) and this
/// environment, keeps its listeners, and starts it again when it dies. Returns when a worker has ended in order, or
/// after it was asked to stop; the module tells the exit codes.
///
/// To be called from a process with one thread and no runtime; its log goes wherever `tracing` was told to send it.
pub fn supervise(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let parent = Parent::new(args.into_iter().collect());
    match parent.and_then(|mut parent| parent.run()) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            tracing::error!(%error, "The parent process cannot go on; its worker ends with it.");
            ExitCode::FAILURE
        }
    }
}

#[derive(Debug)]
struct Parent {
    args: Vec<OsString>,
    signals: SignalFd,
    shelf: Shelf,
    restarts: Restarts,
    stopping: bool,
}

impl Parent {
    fn new(args: Vec<OsString>) -> io::Result<Self> {
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGCHLD);
        for signal in FORWARDED {
            mask.add(signal);
        }
        mask.thread_block()?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        let shelf = Shelf::new(room_for_listeners());
        Ok(Self { args, signals, shelf, restarts: Restarts::default(), stopping: false })
    }

    fn run(&mut self) -> io::Result<u8> {
        loop {
            let started = Instant::now();
            let end = match Worker::start(&self.args, &self.shelf, self.restarts.total()) {
                Ok(worker) => self.attend(worker)?,
                Err(error) => End::NotStarted(error),
            };
            if let Some(code) = end.final_code(self.stopping) {
                return Ok(code);
            }
            let delay = self.restarts.after(started.elapsed());
            tracing::error!(
                lived = ?started.elapsed(),
                listeners = self.shelf.len(),
                restarts = self.restarts.total(),
                ?delay,
                "The worker {end}; its connections are reset, new ones wait, and it is started again."
            );
            if self.pause(delay)? == Pause::AskedToStop {
                return Ok(0);
            }
        }
    }

    /// Serves one worker until it has ended.
    fn attend(&mut self, mut worker: Worker) -> io::Result<End> {
        // All that is left to do is to wait.
        memory::give_back();
        loop {
            let interest = if worker.outbox.is_empty() { PollFlags::POLLIN } else { PollFlags::POLLOUT };
            let mut fds = vec![PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
            fds.extend(worker.socket.as_ref().map(|socket| PollFd::new(socket.as_fd(), interest)));
            wait(&mut fds, PollTimeout::NONE)?;
            let spoken_to = fds.get(1).is_some_and(|fd| fd.any() == Some(true));

            if spoken_to {
                worker.converse(&mut self.shelf);
            }
            for signal in self.caught()? {
                if signal != Signal::SIGCHLD {
                    worker.signal(signal);
                } else if let Some(end) = reap(Some(worker.pid))? {
                    worker.hear_out(&mut self.shelf);
                    return Ok(end);
                }
            }
        }
    }

    /// Waits before the next worker.
    fn pause(&mut self, delay: Duration) -> io::Result<Pause> {
        let until = Instant::now() + delay;
        loop {
            let caught = self.caught()?;
            if caught.contains(&Signal::SIGCHLD) {
                reap(None)?;
            }
            if self.stopping {
                return Ok(Pause::AskedToStop);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(Pause::Over);
            }
            // Rounded up, so as not to spin through the last millisecond.
            let left = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
            wait(&mut [PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)], left)?;
        }
    }

    fn caught(&mut self) -> io::Result<Vec<Signal>> {
        let mut caught = Vec::new();
        while let Some(info) = self.signals.read_signal()? {
            let Some(signal) = i32::try_from(info.ssi_signo).ok().and_then(|n| Signal::try_from(n).ok()) else {
                continue;
            };
            self.stopping |= STOPPING.contains(&signal);
            caught.push(signal);
        }
        Ok(caught)
    }
}

#[derive(PartialEq, Eq)]
enum Pause {
    Over,
    AskedToStop,
}

#[derive(Debug)]
struct Worker {
    pid: Pid,
    /// `None` once the worker has closed its end.
    socket: Option<OwnedFd>,
    /// What it is still to be told. Nothing more is read from it meanwhile, so this stays small.
    outbox: VecDeque<Word>,
}

impl Worker {
    fn start(args: &[OsString], shelf: &Shelf, restarts: u64) -> io::Result<Self> {
        let (socket, theirs) = wire::pair()?;
        fcntl(&socket, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        let number = theirs.as_raw_fd();
        let parent = getpid();
        // Not by its path, where an upgrade may have put another version by now.
        let mut command = Command::new("/proc/self/exe");
        command
            .args(args)
            .env(FD_VARIABLE, number.to_string())
            .env(RESTARTS_VARIABLE, restarts.to_string())
            .process_group(0);
        if let Some(name) = std::env::args_os().next() {
            command.arg0(name);
        }
        // SAFETY: runs between fork and exec, and makes system calls only: no allocation, no lock.
        unsafe {
            command.pre_exec(move || {
                SigSet::empty().thread_set_mask()?;
                // Like any crash, and not in order: a worker that ends in order takes its rules away, and the pods'
                // connections would leave in plaintext.
                nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
                // The parent may have died before the line above, which then came too late.
                if getppid() != parent {
                    return Err(Errno::ESRCH.into());
                }
                let inherited = std::os::fd::BorrowedFd::borrow_raw(number);
                fcntl(inherited, FcntlArg::F_SETFD(FdFlag::empty()))?;
                Ok(())
            });
        }
        let child = command.spawn()?;
        drop(theirs);

        let mut outbox: VecDeque<Word> = shelf.keys().map(|key| Word::Offer { key: key.clone() }).collect();
        outbox.push_back(Word::Offered { count: shelf.len() });
        // A process id is positive and fits: Linux counts to 4194304.
        Ok(Self { pid: Pid::from_raw(child.id() as i32), socket: Some(socket), outbox })
    }

    /// Tells the worker what there is to tell, then hears what it asks, as far as neither makes us wait.
    fn converse(&mut self, shelf: &mut Shelf) {
        while let Some(socket) = &self.socket {
            let step = match self.outbox.front() {
                Some(word) => {
                    let fd = if let Word::Offer { key } = word { shelf.get(key) } else { None };
                    wire::send(socket.as_fd(), word, fd).map(|()| drop(self.outbox.pop_front()))
                }
                None => match wire::receive::<Request>(socket.as_fd()) {
                    Ok(Some((request, fd))) => {
                        self.outbox.push_back(shelf.answer(request, fd));
                        Ok(())
                    }
                    Ok(None) => {
                        self.socket = None;
                        Ok(())
                    }
                    Err(error) => Err(error),
                },
            };
            match step {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => self.socket = None,
                Err(error) => {
                    tracing::error!(%error, "The worker cannot be understood any more; what it held so far is kept.");
                    self.socket = None;
                }
            }
        }
    }

    /// Does what a worker had still asked when it died.
    fn hear_out(&mut self, shelf: &mut Shelf) {
        let Some(socket) = self.socket.take() else { return };
        while let Ok(Some((request, fd))) = wire::receive::<Request>(socket.as_fd()) {
            shelf.answer(request, fd);
        }
    }

    fn signal(&self, signal: Signal) {
        if let Err(error) = kill(self.pid, signal) {
            tracing::warn!(%error, %signal, "A signal could not be passed to the worker.");
        }
    }
}

/// How a worker ended.
#[derive(Debug)]
enum End {
    Exit(u8),
    Signal(Signal),
    NotStarted(io::Error),
}

impl End {
    /// The parent's own exit code, or `None` where another worker is to be started.
    fn final_code(&self, stopping: bool) -> Option<u8> {
        match self {
            Self::Exit(code @ (0 | EXIT_USAGE | EXIT_CONFIG)) => Some(*code),
            _ if !stopping => None,
            Self::Exit(code) => Some(*code),
            Self::Signal(signal) => Some(128 | *signal as i32 as u8),
            Self::NotStarted(_) => Some(1),
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exit(code) => write!(f, "ended with exit code {code}"),
            Self::Signal(signal) => write!(f, "was killed by {signal}"),
            Self::NotStarted(error) => write!(f, "could not be started ({error})"),
        }
    }
}

// Collects every child that has ended (as process 1 of a container we inherit strangers), and tells of this one.
fn reap(worker: Option<Pid>) -> io::Result<Option<End>> {
    let mut end = None;
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) if Some(pid) == worker => end = Some(End::Exit(code as u8)),
            Ok(WaitStatus::Signaled(pid, signal, _)) if Some(pid) == worker => end = Some(End::Signal(signal)),
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return Ok(end),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn wait(fds: &mut [PollFd<'_>], timeout: PollTimeout) -> io::Result<()> {
    match poll(fds, timeout) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

// Raises the limit on open files as far as we may, for the worker too, and leaves some for ourselves.
fn room_for_listeners() -> usize {
    let limit = match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((_, hard)) if setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok() => hard,
        Ok((soft, _)) => soft,
        Err(_) => 1024,
    };
    usize::try_from(limit).unwrap_or(usize::MAX).saturating_sub(OWN_DESCRIPTORS).min(MOST_LISTENERS)
}

const FORWARDED: [Signal; 6] =
    [Signal::SIGTERM, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGUSR2];
const STOPPING: [Signal; 3] = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGQUIT];
/// Standard streams, signals, the socket pair, and what starting a process takes for a moment.
const OWN_DESCRIPTORS: usize = 32;
/// Seven for each of a thousand pods, and some.
const MOST_LISTENERS: usize = 8192;
