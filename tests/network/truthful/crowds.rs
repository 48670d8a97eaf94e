//! Many clients at once.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use selvedge_lab::{
    AgentOptions, BOUND, Lab, LabOptions, Namespace, NodeSpec, PodSpec, Server, eventually, trial_with,
};
use socket2::{Domain, Socket, Type};

use super::{DEAD, HOLE, LIVE, Scene, Told, answers, held, told};
use crate::lab;

pub fn trials() -> Vec<Trial> {
    vec![
        trial_with("truthful::ten_thousand_that_connect_at_once_are_told_the_truth_one_by_one", four_nodes(), a_crowd),
        trial_with("truthful::crowds_of_every_direction_are_told_the_truth", lab(), crowds_of_every_direction),
        trial_with("truthful::a_silent_server_holds_up_nobody_else", lab(), a_silent_server_holds_up_nobody_else),
    ]
}

/// Ten thousand at once, half of them to a dead port: from two nodes to two others, for no agent may have descriptors
/// for all.
fn a_crowd(lab: &Lab) -> Result<()> {
    let hard = raise_descriptors()?;
    let pod = |name: &str, node: &str| lab.pod(PodSpec::new(name, node));
    let servers = [pod("shop/cart", "node-c")?, pod("shop/stock", "node-d")?];
    let mut clients = Vec::new();
    for node in ["node-a", "node-b"] {
        for number in 0..2 {
            clients.push(pod(&format!("shop/{node}-{number}"), node)?);
        }
    }
    let agents = lab.start_agents(&AgentOptions::default())?;
    let _kept = [keep(&servers[0])?, keep(&servers[1])?];
    // Client and server are one process here, and one waiting connection has a passing third descriptor.
    let most = usize::try_from(hard.saturating_sub(4096) * 2 / 3).unwrap_or(usize::MAX).min(CROWD);
    let each = most / clients.len() / 4 * 4;
    let to = |number: usize| {
        let server = &servers[number / 2 % 2];
        SocketAddr::from((server.ip(), if number.is_multiple_of(2) { KEEPING } else { DEAD }))
    };
    let began = Instant::now();
    thread::scope(|scope| {
        let rushing: Vec<_> =
            clients.iter().map(|client| (client, scope.spawn(move || rush(client, each, to)))).collect();
        for (client, rushing) in rushing {
            let told = rushing.join().map_err(|_| anyhow::anyhow!("the clients panicked"))??;
            let wanted = BTreeMap::from([("connected", each / 2), ("refused", each / 2)]);
            ensure!(told == wanted, "{}: {told:?}, wanted {wanted:?}", client.full_name());
        }
        anyhow::Ok(())
    })?;
    println!("{} of {CROWD} at once in {:?}", each * clients.len(), began.elapsed());
    for agent in &agents {
        eventually("nobody waits any more", BOUND, || (held(agent).ok()? == 0.0).then_some(()))?;
    }
    Ok(())
}

fn crowds_of_every_direction(lab: &Lab) -> Result<()> {
    raise_descriptors()?;
    let scene = Scene::new(lab)?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let _servers = [keep(&scene.cart)?, keep(&scene.near)?];
    for (client, server) in [(&scene.web, &scene.cart), (&scene.stranger, &scene.cart), (&scene.web, &scene.near)] {
        let (live, dead) = ((server.ip(), KEEPING).into(), (server.ip(), DEAD).into());
        let told = rush(client, SMALL_CROWD, |number| if number % 2 == 0 { live } else { dead })?;
        let wanted = BTreeMap::from([("connected", SMALL_CROWD / 2), ("refused", SMALL_CROWD / 2)]);
        ensure!(told == wanted, "{} to {}: {told:?}, wanted {wanted:?}", client.full_name(), server.full_name());
    }
    for agent in &agents {
        eventually("nobody waits any more", BOUND, || (held(agent).ok()? == 0.0).then_some(()))?;
    }
    Ok(())
}

/// Of this process, and of the agents, which inherit it. Returns how many there may be.
fn raise_descriptors() -> Result<u64> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(hard)
}

fn four_nodes() -> LabOptions {
    let nodes = ["node-a", "node-b", "node-c", "node-d"];
    let nodes = nodes.iter().zip(1..).map(|(name, number)| NodeSpec::numbered(name, number)).collect();
    LabOptions { nodes, ..lab() }
}

fn a_silent_server_holds_up_nobody_else(lab: &Lab) -> Result<()> {
    let scene = Scene::new(lab)?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let sockets = begin(&scene.web, 200, |_| (scene.cart.ip(), HOLE).into())?;
    eventually("they wait", BOUND, || (held(&agents[0]).ok()? >= 200.0).then_some(()))?;
    for _ in 0..20 {
        let (live, dead) = ((scene.cart.ip(), LIVE).into(), (scene.cart.ip(), DEAD).into());
        // Less than a dial takes that nobody answers.
        let soon = Duration::from_secs(8);
        ensure!(told(&scene.web, live, soon) == Told::Connected, "a live port beside a silent one");
        ensure!(told(&scene.web, dead, soon) == Told::Error(ErrorKind::ConnectionRefused), "a dead one");
    }
    // Clients that give up leave nothing behind, before their server's time is up.
    drop(sockets);
    eventually("nobody waits any more", BOUND, || (held(&agents[0]).ok()? == 0.0).then_some(()))?;
    agents[0].access_line("a client gave up", |line| {
        line["detail"].as_str().is_some_and(|detail| detail.contains("the client gave it up"))
    })?;
    ensure!(answers(&agents[0], "outbound", "connected")? >= 20.0);
    Ok(())
}

/// Accepts, and keeps what it accepted.
fn keep(pod: &Namespace) -> Result<Server> {
    let kept = Mutex::new(Vec::new());
    Ok(Server::start(pod.listen(KEEPING)?, move |stream| {
        kept.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(stream);
    }))
}

/// Connects so many times at once, and counts what each was told.
pub fn rush(
    client: &Namespace,
    count: usize,
    to: impl Fn(usize) -> SocketAddr + Sync,
) -> Result<BTreeMap<&'static str, usize>> {
    let mut waiting = begin(client, count, to)?;
    let mut told = BTreeMap::new();
    let mut connected = Vec::new();
    let deadline = Instant::now() + Duration::from_secs(150);
    while !waiting.is_empty() {
        ensure!(Instant::now() < deadline, "{} were told nothing; told: {told:?}", waiting.len());
        let mut ready: Vec<PollFd<'_>> =
            waiting.iter().map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLOUT)).collect();
        poll(&mut ready, PollTimeout::from(1000_u16))?;
        let done: Vec<bool> = ready.iter().map(|ready| ready.any().unwrap_or(false)).collect();
        drop(ready);
        let mut done = done.into_iter();
        let (ready, rest): (Vec<Socket>, Vec<Socket>) = waiting.into_iter().partition(|_| done.next().unwrap_or(false));
        waiting = rest;
        for socket in ready {
            let word = match socket.take_error()? {
                None => "connected",
                Some(error) if error.kind() == ErrorKind::ConnectionRefused => "refused",
                Some(error) if error.kind() == ErrorKind::ConnectionReset => "reset",
                Some(error) if error.kind() == ErrorKind::TimedOut => "timed out",
                Some(error) if error.kind() == ErrorKind::HostUnreachable => "unreachable",
                Some(_) => "something else",
            };
            *told.entry(word).or_default() += 1;
            // Kept, so that all are there at once.
            connected.push(socket);
        }
    }
    Ok(told)
}

/// Begins so many connections, without waiting for any.
pub fn begin(client: &Namespace, count: usize, to: impl Fn(usize) -> SocketAddr + Sync) -> Result<Vec<Socket>> {
    client.run(|| {
        (0..count)
            .map(|number| {
                let to = to(number);
                let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).context("a socket")?;
                socket.set_nonblocking(true)?;
                match socket.connect(&to.into()) {
                    Err(error) if error.raw_os_error() != Some(nix::errno::Errno::EINPROGRESS as i32) => {
                        Err(error).with_context(|| format!("connection {number} to {to}"))
                    }
                    _ => Ok(socket),
                }
            })
            .collect()
    })
}

const CROWD: usize = 10_000;
const SMALL_CROWD: usize = 500;
const KEEPING: u16 = 8282;
