//! Many clients at once.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use selvedge_lab::{AgentOptions, BOUND, Lab, Namespace, Server, eventually, trial_with};
use socket2::{Domain, Socket, Type};

use super::{DEAD, HOLE, LIVE, Scene, Told, answers, held, told};
use crate::lab;

pub fn trials() -> Vec<Trial> {
    vec![
        trial_with("truthful::a_crowd_that_connects_at_once_is_told_the_truth_one_by_one", lab(), a_crowd),
        trial_with("truthful::a_silent_server_holds_up_nobody_else", lab(), a_silent_server_holds_up_nobody_else),
    ]
}

fn a_crowd(lab: &Lab) -> Result<()> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    // For the agents too, which inherit it.
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    let scene = Scene::new(lab)?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let _servers = [keep(&scene.cart)?, keep(&scene.near)?];
    // A live connection takes two descriptors and a passing third here, where client and server are one process, and two
    // in each agent.
    let most = usize::try_from(hard.saturating_sub(2048) / 4).unwrap_or(usize::MAX).min(CROWD);
    println!("{most} clients at once of {CROWD} wanted; descriptors: {soft} soft, {hard} hard");
    for (client, server) in [(&scene.web, &scene.cart), (&scene.stranger, &scene.cart), (&scene.web, &scene.near)] {
        let (live, dead) = ((server.ip(), KEEPING).into(), (server.ip(), DEAD).into());
        let began = Instant::now();
        let told = rush(client, most, |number| if number % 2 == 0 { live } else { dead })?;
        let took = began.elapsed();
        let wanted = BTreeMap::from([("connected", most.div_ceil(2)), ("refused", most / 2)]);
        ensure!(told == wanted, "{} to {}: {told:?}, wanted {wanted:?}", client.full_name(), server.full_name());
        println!("{} to {}: {told:?} in {took:?}", client.full_name(), server.full_name());
    }
    for agent in &agents {
        eventually("nobody waits any more", BOUND, || (held(agent).ok()? == 0.0).then_some(()))?;
    }
    Ok(())
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
fn rush(
    client: &Namespace,
    count: usize,
    to: impl Fn(usize) -> SocketAddr + Sync,
) -> Result<BTreeMap<&'static str, usize>> {
    let mut waiting = begin(client, count, to)?;
    let mut told = BTreeMap::new();
    let mut connected = Vec::new();
    let deadline = Instant::now() + Duration::from_secs(60);
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
fn begin(client: &Namespace, count: usize, to: impl Fn(usize) -> SocketAddr + Sync) -> Result<Vec<Socket>> {
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
const KEEPING: u16 = 8282;
