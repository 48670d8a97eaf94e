//! `selvedge cni`: what the container runtime runs for each pod, on the node, as root.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

use super::SOCKET;
use super::roster::Roster;
use super::spec::{Config, Failure, pod_of, versions};
use super::wire::{Answer, Request};
use crate::handover::wire;
use crate::mesh::NamespacedName;

/// Whether a container runtime runs this program as a plugin.
pub fn is_called() -> bool {
    std::env::var_os(COMMAND).is_some()
}

/// Serves one call: the environment and standard input say which, standard output has the answer.
pub fn run() -> ExitCode {
    let mut text = String::new();
    let mut version = String::new();
    let served = io::stdin()
        .read_to_string(&mut text)
        .map_err(|error| Failure { code: 5, message: format!("standard input cannot be read: {error}") });
    let served = served.and_then(|_| serve(&text, &mut version));
    let (said, code) = match served {
        Ok(said) => (said, ExitCode::SUCCESS),
        Err(failure) => (failure.text(&version), ExitCode::FAILURE),
    };
    match io::stdout().write_all(said.as_bytes()) {
        Ok(()) => code,
        Err(_) => ExitCode::FAILURE,
    }
}

fn serve(text: &str, version: &mut String) -> Result<String, Failure> {
    let command = variable(COMMAND).ok_or_else(|| {
        Failure::environment("CNI_COMMAND is not set: this is run by a container runtime, not by a person")
    })?;
    match command.as_str() {
        "VERSION" => return Ok(versions()),
        // A pod must be able to go, whatever else is broken.
        "DEL" => {
            let config = Config::read(text).unwrap_or_default();
            tell_of_end(&config);
            return Ok(String::new());
        }
        _ => {}
    }
    let config = Config::read(text)?;
    version.clone_from(&config.cni_version);
    match command.as_str() {
        "ADD" => add(&config),
        // The agent keeps capture true by itself. A node whose agent is away still runs every pod that is not joined: it
        // must not say that its network is not ready.
        "CHECK" | "GC" | "STATUS" => Ok(String::new()),
        other => {
            Err(Failure::environment(format!("CNI_COMMAND={other} is none of ADD, CHECK, DEL, GC, STATUS, VERSION")))
        }
    }
}

fn add(config: &Config) -> Result<String, Failure> {
    let result = config.result()?;
    let Some(names) = variable("CNI_ARGS").and_then(|arguments| pod_of(&arguments)) else { return Ok(result) };
    let pod = NamespacedName::new(&*names.namespace, &*names.name);
    let annotations = config.annotations();
    if NEVER_ASKED.contains(&&*names.namespace) {
        return Ok(result);
    }
    let shared = shared_dir(config)?;
    let path = variable("CNI_NETNS").ok_or_else(|| Failure::environment("CNI_NETNS is not set"))?;
    let netns = File::open(&path).map_err(|error| Failure::environment(format!("CNI_NETNS={path}: {error}")))?;
    let request = Request::Add { pod: names, sandbox: sandbox(), ips: config.addresses(), annotations };
    let began = Instant::now();
    loop {
        let failure = match ask(&shared, &request, netns.as_fd().try_clone_to_owned()) {
            Ok(Answer::Start) => return Ok(result),
            Ok(Answer::Refused(why)) => {
                return Err(Failure::again(format!("pod {pod} is to be captured first: {why}")));
            }
            Err(error) => error,
        };
        // An agent that goes hands over to the next one, which takes a moment.
        if began.elapsed() < WITHOUT_AGENT && joins(&shared, &pod, &request) {
            std::thread::sleep(BETWEEN);
            continue;
        }
        if !joins(&shared, &pod, &request) {
            return Ok(result);
        }
        return Err(Failure::again(format!(
            "pod {pod} joins the mesh, and the selvedge agent of this node does not answer ({failure}); the pod starts \
             once it does: kubectl get pods --namespace selvedge-system --output wide"
        )));
    }
}

/// Whether a pod is to join, as far as is known without an agent. A list that cannot be read joins everything.
fn joins(shared: &Path, pod: &NamespacedName, request: &Request) -> bool {
    let Request::Add { annotations, .. } = request else { return false };
    Roster::read(shared).map_or(true, |roster| roster.joins(pod, annotations))
}

fn ask(shared: &Path, request: &Request, netns: io::Result<OwnedFd>) -> io::Result<Answer> {
    let (socket, netns) = (call(shared, PATIENCE)?, netns?);
    wire::send(socket.as_fd(), request, Some(netns.as_fd()))?;
    match wire::receive(socket.as_fd())? {
        Some((answer, _)) => Ok(answer),
        None => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it ended")),
    }
}

fn tell_of_end(config: &Config) {
    let names = variable("CNI_ARGS").and_then(|arguments| pod_of(&arguments));
    let (Some(pod), Ok(shared)) = (names, shared_dir(config)) else { return };
    if let Ok(socket) = call(&shared, AT_END) {
        let _ = wire::send(socket.as_fd(), &Request::Del { pod, sandbox: sandbox() }, None);
    }
}

fn call(shared: &Path, patience: Duration) -> io::Result<OwnedFd> {
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    let limit = TimeVal::milliseconds(i64::try_from(patience.as_millis()).unwrap_or(i64::MAX));
    setsockopt(&socket, sockopt::ReceiveTimeout, &limit)?;
    setsockopt(&socket, sockopt::SendTimeout, &limit)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(&shared.join(SOCKET))?)?;
    Ok(socket)
}

fn shared_dir(config: &Config) -> Result<PathBuf, Failure> {
    config.shared_dir.clone().ok_or_else(|| {
        Failure::config(
            "the entry of selvedge in the list of plugins has no sharedDir; `selvedge cni-install` writes it",
        )
    })
}

fn sandbox() -> String {
    variable("CNI_CONTAINERID").unwrap_or_default()
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

const COMMAND: &str = "CNI_COMMAND";
/// What Kubernetes and the mesh themselves need in order to start. They never join.
const NEVER_ASKED: [&str; 2] = ["kube-system", "selvedge-system"];
/// Longer than the agent takes to answer at worst.
const PATIENCE: Duration = Duration::from_secs(40);
/// How long a pod that joins waits for an agent before it is failed. The kubelet tries again.
const WITHOUT_AGENT: Duration = Duration::from_secs(5);
const BETWEEN: Duration = Duration::from_millis(100);
const AT_END: Duration = Duration::from_secs(1);
