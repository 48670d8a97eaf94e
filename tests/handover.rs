//! The parent and its worker as real processes. This program plays all three parts: the test, the parent (started
//! with `parent`), and the worker (what the parent starts).

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::process::{Child, ChildStdout, Command, ExitCode, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Trial};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use selvedge::handover::{self, EXIT_CONFIG, EXIT_USAGE, Family, Keeper, ListenerKey, Role};
use selvedge::mesh::PodUid;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().map(String::as_str) == Some("parent") {
        if handover::is_worker() {
            return worker(&args[1..]);
        }
        return handover::supervise(std::env::args_os().skip(1));
    }
    let tests: Vec<(&str, fn())> = vec![
        ("a_killed_worker_leaves_its_listener_open_and_the_next_one_accepts", kept_listener_survives_sigkill),
        ("a_forgotten_listener_is_not_handed_to_the_next_worker", forgotten_listener_is_closed),
        ("the_exit_codes_of_an_orderly_end_pass_through", orderly_codes_pass_through),
        ("a_crash_loop_backs_off_and_still_stops_when_asked", crash_loop_backs_off),
        ("sigterm_reaches_the_worker_and_its_code_passes_through", sigterm_is_forwarded),
        ("a_worker_that_is_killed_while_stopping_is_not_started_again", killed_while_stopping),
        ("other_signals_reach_the_worker_and_stop_nothing", other_signals_are_forwarded),
        ("a_worker_dies_with_its_parent", worker_ends_with_its_parent),
    ];
    let trials = tests
        .into_iter()
        .map(|(name, test)| {
            Trial::test(name, move || {
                test();
                Ok(())
            })
        })
        .collect();
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

fn kept_listener_survives_sigkill() {
    let mut agent = Agent::start(&["serve"]);
    let first = agent.next_worker();
    let address = first.address.expect("the first worker listens");
    assert_eq!(first.restarts, 0);
    assert_eq!(ask(address), first.pid);

    // Nobody answers while the worker is stopped, and it dies so: the connection waits in the backlog.
    signal(first.pid, Signal::SIGSTOP);
    stopped(first.pid);
    let mut waiting = TcpStream::connect(address).unwrap();
    signal(first.pid, Signal::SIGKILL);
    let second = agent.next_worker();
    assert_eq!(second.address, Some(address));
    assert_eq!(second.restarts, 1);
    let mut answer = String::new();
    waiting.set_read_timeout(Some(PATIENCE)).unwrap();
    waiting.read_to_string(&mut answer).unwrap();
    assert_eq!(answer.trim().parse::<i32>().unwrap(), second.pid);
}

fn forgotten_listener_is_closed() {
    let mut agent = Agent::start(&["serve-and-forget"]);
    let first = agent.next_worker();
    let address = first.address.expect("the first worker listens");
    signal(first.pid, Signal::SIGKILL);
    let second = agent.next_worker();
    assert_ne!(second.address, Some(address), "the next worker was given what was forgotten");
    assert!(TcpStream::connect(address).is_err(), "a forgotten listener is still open");
}

fn orderly_codes_pass_through() {
    for code in [0, EXIT_USAGE, EXIT_CONFIG] {
        let mut agent = Agent::start(&["exit", &code.to_string()]);
        assert_eq!(agent.exit_code(), Some(i32::from(code)));
        assert_eq!(agent.workers(), 1, "a worker that ended with {code} was started again");
    }
}

fn crash_loop_backs_off() {
    let started = Instant::now();
    let mut agent = Agent::start(&["exit", "1"]);
    for expected in 0..7 {
        assert_eq!(agent.next_worker().restarts, expected);
    }
    // Three starts without delay, then after 100, 200 and 400 ms.
    assert!(started.elapsed() >= Duration::from_millis(700), "seven workers in {:?}", started.elapsed());
    signal(agent.pid(), Signal::SIGTERM);
    assert!(agent.exit_code().is_some());
}

fn sigterm_is_forwarded() {
    let mut agent = Agent::start(&["serve", "7"]);
    agent.next_worker();
    signal(agent.pid(), Signal::SIGTERM);
    assert_eq!(agent.exit_code(), Some(7));
    assert_eq!(agent.workers(), 0);
}

fn killed_while_stopping() {
    let mut agent = Agent::start(&["stubborn"]);
    let worker = agent.next_worker();
    signal(agent.pid(), Signal::SIGTERM);
    agent.expect_line("caught SIGTERM");
    signal(worker.pid, Signal::SIGKILL);
    assert_eq!(agent.exit_code(), Some(128 + 9));
}

fn other_signals_are_forwarded() {
    let mut agent = Agent::start(&["stubborn"]);
    let worker = agent.next_worker();
    signal(agent.pid(), Signal::SIGUSR1);
    agent.expect_line("caught SIGUSR1");
    signal(agent.pid(), Signal::SIGHUP);
    agent.expect_line("caught SIGHUP");
    signal(worker.pid, Signal::SIGKILL);
    assert_eq!(agent.next_worker().restarts, 1);
}

fn worker_ends_with_its_parent() {
    let mut agent = Agent::start(&["stubborn"]);
    agent.next_worker();
    signal(agent.pid(), Signal::SIGKILL);
    assert_eq!(agent.workers(), 0, "standard output stayed open, or another worker came up");
}

/// The worker: says who it is, then does what its first argument asks.
fn worker(args: &[String]) -> ExitCode {
    let (keeper, inherited) = Keeper::inherit().unwrap();
    let code = args.get(1).map_or(0, |code| code.parse().unwrap());
    match args[0].as_str() {
        "exit" => {
            announce("-");
            ExitCode::from(code)
        }
        "stubborn" => {
            let signals = nix::sys::signal::SigSet::from_iter([Signal::SIGTERM, Signal::SIGUSR1, Signal::SIGHUP]);
            signals.thread_block().unwrap();
            announce("-");
            loop {
                println!("caught {}", signals.wait().unwrap());
            }
        }
        mode => {
            let listener = match inherited.into_iter().next() {
                Some((held, fd)) => {
                    assert_eq!(held, key());
                    TcpListener::from(fd)
                }
                None => {
                    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
                    keeper.keep(&key(), listener.as_fd()).unwrap();
                    listener
                }
            };
            if mode == "serve-and-forget" {
                keeper.forget(&key());
            }
            let signals = nix::sys::signal::SigSet::from_iter([Signal::SIGTERM]);
            signals.thread_block().unwrap();
            announce(&listener.local_addr().unwrap().to_string());
            thread::spawn(move || {
                for stream in listener.incoming() {
                    // The asker may be gone.
                    let _ = writeln!(stream.unwrap(), "{}", std::process::id());
                }
            });
            signals.wait().unwrap();
            ExitCode::from(code)
        }
    }
}

fn announce(address: &str) {
    println!("worker {} {} {address}", std::process::id(), handover::restarts());
}

fn key() -> ListenerKey {
    ListenerKey { pod: PodUid::new("a"), role: Role::Outbound, family: Family::V4, netns: (4, 1) }
}

/// A parent process, and what its workers print.
struct Agent {
    parent: Child,
    lines: mpsc::Receiver<String>,
}

#[derive(Debug)]
struct WorkerLine {
    pid: i32,
    restarts: u64,
    address: Option<std::net::SocketAddr>,
}

impl Agent {
    fn start(args: &[&str]) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.arg("parent").args(args).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut parent = command.spawn().unwrap();
        let stdout: ChildStdout = parent.stdout.take().unwrap();
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Self { parent, lines }
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.parent.id()).unwrap()
    }

    fn next_worker(&mut self) -> WorkerLine {
        let line = self.lines.recv_timeout(PATIENCE).expect("no worker came up in time");
        parse(&line).unwrap_or_else(|| panic!("{line:?} announces no worker"))
    }

    fn expect_line(&mut self, wanted: &str) {
        assert_eq!(self.lines.recv_timeout(PATIENCE).as_deref(), Ok(wanted));
    }

    /// How many more workers have announced themselves, once the parent has ended.
    fn workers(&mut self) -> usize {
        self.lines.iter().filter_map(|line| parse(&line)).count()
    }

    fn exit_code(&mut self) -> Option<i32> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(status) = self.parent.try_wait().unwrap() {
                return status.code();
            }
            thread::sleep(Duration::from_millis(5));
        }
        panic!("the parent did not end in time");
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // A parent's death ends its worker.
        let _ = self.parent.kill();
        let _ = self.parent.wait();
    }
}

fn parse(line: &str) -> Option<WorkerLine> {
    let mut words = line.strip_prefix("worker ")?.split(' ');
    Some(WorkerLine {
        pid: words.next()?.parse().ok()?,
        restarts: words.next()?.parse().ok()?,
        address: words.next()?.parse().ok(),
    })
}

fn ask(address: std::net::SocketAddr) -> i32 {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer.trim().parse().unwrap()
}

/// Waits until every thread of a process has stopped: `kill` returns before, and one that wakes from `accept` to stop
/// takes a connection along.
fn stopped(pid: i32) {
    let deadline = Instant::now() + PATIENCE;
    let state = |task: std::path::PathBuf| {
        let stat = std::fs::read_to_string(task.join("stat")).unwrap();
        stat.rsplit_once(") ").unwrap().1.chars().next()
    };
    while !std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().all(|task| state(task.unwrap().path()) == Some('T'))
    {
        assert!(Instant::now() < deadline, "the worker did not stop in time");
        thread::sleep(Duration::from_millis(1));
    }
}

fn signal(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).unwrap();
}

const PATIENCE: Duration = Duration::from_secs(20);
