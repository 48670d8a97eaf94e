//! More clients than may wait.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use selvedge_lab::{Agent, AgentOptions, BOUND, Lab, Pod, PodSpec, eventually, trial_with};
use socket2::{Domain, Protocol, Socket, Type};

use super::crowds::{begin, rush};
use super::{DEAD, HOLE, LIVE, Scene, Told, answers, held, told};
use crate::lab;

pub fn trials() -> Vec<Trial> {
    vec![
        trial_with("truthful::beyond_a_pods_bound_connect_is_eager_and_nobody_is_refused", lab(), beyond_a_pods_bound),
        trial_with("truthful::beyond_the_nodes_bound_connect_is_eager_and_nobody_is_refused", lab(), beyond_the_bound),
        trial_with("truthful::an_overrun_queue_loses_no_connection", lab(), an_overrun_queue_loses_nobody),
    ]
}

fn beyond_a_pods_bound(lab: &Lab) -> Result<()> {
    let scene = Scene::new(lab)?;
    let agents = lab.start_agents(&few())?;
    let refused = Told::Error(ErrorKind::ConnectionRefused);
    let dead = SocketAddr::new(scene.cart.ip(), DEAD);
    for (client, agent, direction) in [(&scene.stranger, &agents[1], "inbound"), (&scene.web, &agents[0], "outbound")] {
        again_and_again(&agents, || {
            let _waiting = wait_there(client, scene.cart.ip(), OF_A_POD, agent, OF_A_POD)?;
            scene.cart.ips().iter().try_for_each(|ip| is_eager(client, *ip))
        })?;
        ensure!(answers(agent, direction, "eager")? >= 4.0, "they were not counted");
        nobody_is_there(&agents)?;
        ensure!(told(client, dead, BOUND) == refused, "{} is not told the truth any more", client.full_name());
    }
    Ok(())
}

fn beyond_the_bound(lab: &Lab) -> Result<()> {
    let scene = Scene::new(lab)?;
    let (other, third) =
        (lab.pod(PodSpec::new("shop/other", "node-a"))?, lab.pod(PodSpec::new("shop/third", "node-a"))?);
    let agents = lab.start_agents(&few())?;
    agents[0].wait_pod(&other)?;
    agents[0].wait_pod(&third)?;
    let refused = Told::Error(ErrorKind::ConnectionRefused);
    let ip = scene.cart.ip();
    let dead = SocketAddr::new(ip, DEAD);
    again_and_again(&agents, || {
        let _first = wait_there(&scene.web, ip, OF_A_POD, &agents[0], OF_A_POD)?;
        ensure!(told(&third, dead, BOUND) == refused, "there is room for others");
        let _second = wait_there(&other, ip, IN_ALL - OF_A_POD, &agents[0], IN_ALL)?;
        is_eager(&third, ip)
    })?;
    ensure!(answers(&agents[0], "outbound", "eager")? >= 2.0, "they were not counted");
    nobody_is_there(&agents)?;
    ensure!(told(&third, dead, BOUND) == refused, "it is not told the truth any more");
    Ok(())
}

/// Who waits for a silent server does so for ten seconds; on a busy machine they may be over too soon.
fn again_and_again(agents: &[Agent], attempt: impl Fn() -> Result<()>) -> Result<()> {
    for _ in 0..4 {
        if attempt().is_ok() {
            return Ok(());
        }
        nobody_is_there(agents)?;
    }
    attempt()
}

fn nobody_is_there(agents: &[Agent]) -> Result<()> {
    agents.iter().try_for_each(|agent| {
        eventually("no connection is left", BOUND, || {
            let dump = agent.dump().ok()?;
            dump["connections"].as_array()?.is_empty().then_some(())
        })
    })
}

/// So many clients whose server is silent, and who wait for it.
fn wait_there(client: &Pod, ip: IpAddr, count: usize, agent: &Agent, held_then: usize) -> Result<Vec<Socket>> {
    let sockets = begin(client, count, |_| (ip, HOLE).into())?;
    eventually("they wait", BOUND, || (held(agent).ok()? == held_then as f64).then_some(()))?;
    Ok(sockets)
}

fn is_eager(client: &Pod, ip: IpAddr) -> Result<()> {
    let connected = told(client, (ip, LIVE).into(), BOUND);
    ensure!(connected == Told::Connected, "{} to a live port: {connected:?}", client.full_name());
    let deceived = told(client, (ip, DEAD).into(), BOUND);
    let reset = Told::Error(ErrorKind::ConnectionReset);
    ensure!(deceived == reset, "{} to a dead port: {deceived:?}, which is not eager", client.full_name());
    Ok(())
}

/// More SYNs than the queue takes while nobody reads it; then somebody does.
fn an_overrun_queue_loses_nobody(lab: &Lab) -> Result<()> {
    let scene = Scene::new(lab)?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let worker = Pid::from_raw(agents[0].worker().context("no worker")?);
    let (live, dead) = (SocketAddr::from((scene.cart.ip(), LIVE)), SocketAddr::from((scene.cart.ip(), DEAD)));
    kill(worker, Signal::SIGSTOP)?;
    let full = eventually("the queue is full", BOUND, || {
        // One and the same, so that in the end it is one connection that nobody wants.
        repeat_syn(&scene.web, dead, 4096).ok()?;
        queue_dropped(&scene.web).ok().filter(|dropped| *dropped > 0)
    });
    let told = full.and_then(|full| {
        thread::scope(|scope| {
            let rushing = scope.spawn(|| rush(&scene.web, CLIENTS, |number| if number % 2 == 0 { live } else { dead }));
            let all = full + CLIENTS as u64;
            let dropped =
                eventually("nobody has room", BOUND, || (queue_dropped(&scene.web).ok()? >= all).then_some(()));
            kill(worker, Signal::SIGCONT)?;
            dropped?;
            rushing.join().map_err(|_| anyhow::anyhow!("the clients panicked"))?
        })
    });
    kill(worker, Signal::SIGCONT)?;
    let told = told?;
    let wanted = BTreeMap::from([("connected", CLIENTS / 2), ("refused", CLIENTS / 2)]);
    ensure!(told == wanted, "{told:?}");
    eventually("nobody waits any more", BOUND, || (held(&agents[0]).ok()? == 0.0).then_some(()))
}

/// Sends a SYN of no socket's, many times over (RFC 791, RFC 9293; the kernel fills in the IP header's checksum).
fn repeat_syn(pod: &Pod, to: SocketAddr, times: usize) -> Result<()> {
    let (IpAddr::V4(source), IpAddr::V4(destination)) = (pod.ip(), to.ip()) else { bail!("the pod has no IPv4") };
    let mut packet = vec![0x45, 0, 0, 40, 0, 1, 0x40, 0, 64, 6, 0, 0];
    packet.extend(source.octets().into_iter().chain(destination.octets()));
    packet.extend([1000_u16.to_be_bytes(), to.port().to_be_bytes()].concat());
    packet.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x02, 0xff, 0xff, 0, 0, 0, 0]);
    pod.run(|| {
        for _ in 0..times.div_ceil(OF_A_SOCKET) {
            // What waits counts as unsent to the socket that sent it.
            let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))?;
            for _ in 0..OF_A_SOCKET {
                socket.send_to(&packet, &SocketAddr::new(to.ip(), 0).into())?;
            }
        }
        io::Result::Ok(())
    })
    .context("a raw SYN")
}

/// How many packets a pod's queues had no room for (`/proc/net/netfilter/nfnetlink_queue`: in the queue, and on its socket).
fn queue_dropped(pod: &Pod) -> Result<u64> {
    let text = pod.run(|| std::fs::read_to_string("/proc/thread-self/net/netfilter/nfnetlink_queue"))?;
    let dropped =
        |line: &str| line.split_whitespace().skip(5).take(2).filter_map(|word| word.parse::<u64>().ok()).sum::<u64>();
    Ok(text.lines().map(dropped).sum())
}

/// Of forty connections half may wait for one pod, and four fifths in all.
fn few() -> AgentOptions {
    AgentOptions::default().arg("--max-connections=40")
}

const OF_A_POD: usize = 20;
const IN_ALL: usize = 32;
const CLIENTS: usize = 200;
/// What a send buffer of the usual size has room for.
const OF_A_SOCKET: usize = 64;
