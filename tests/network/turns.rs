//! Agents of one node that follow each other, as at an upgrade.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::Signal;
use selvedge_lab::{Agent, AgentOptions, BOUND, Conversation, Lab, Node, Pod, PodSpec, eventually, trial_with};

use crate::crash::{Outcome, keep_swapping, serve_swaps};
use crate::lab;

pub fn trials() -> Vec<Trial> {
    vec![
        trial_with("turns::the_clients_agent_is_replaced_under_load_and_no_connection_is_lost", lab(), |lab| {
            replaced_under_load(lab, 0, "eager")
        }),
        trial_with("turns::the_servers_agent_is_replaced_under_load_and_no_connection_is_lost", lab(), |lab| {
            replaced_under_load(lab, 1, "eager")
        }),
        trial_with("turns::where_connect_tells_the_truth_no_connection_is_lost_either", lab(), |lab| {
            replaced_under_load(lab, 0, "truthful")
        }),
        trial_with("turns::an_agent_whose_successor_dies_goes_on_and_gives_way_to_another", lab(), taken_back),
        trial_with("turns::without_a_successor_an_agent_that_drains_goes_on_accepting", lab(), alone),
        trial_with("turns::a_pod_that_leaves_is_let_go_by_every_agent_of_its_node", lab(), let_go),
    ]
}

fn replaced_under_load(lab: &Lab, side: usize, connect: &str) -> Result<()> {
    let (web, cart) = pods(lab)?;
    let mut agents = start(lab, connect)?;
    let link = lab.link()?;
    let _server = serve_swaps(&cart, LOAD)?;
    let _echo = cart.serve_echo(ECHO)?;
    let captured = [&web, &cart][side].networking()?;
    let (stop, finished) = (AtomicBool::new(false), AtomicUsize::new(0));
    let to = SocketAddr::from((cart.ip(), LOAD));
    thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(|| keep_swapping(&web, to, &stop, &finished))).collect();
        let replaced = (1..=3).try_for_each(|turn| {
            let more = finished.load(Ordering::Relaxed) + CLIENTS;
            eventually("the load runs", BOUND, || (finished.load(Ordering::Relaxed) > more).then_some(()))?;
            let mut long = web.converse((cart.ip(), ECHO))?;
            long.exchange("before the next agent")?;
            let node = &lab.nodes()[side];
            let next = node.start_agent(&options(node, connect).beside(turn * 100))?;
            let old = std::mem::replace(&mut agents[side], next);
            long.exchange("while both are there")?;
            old.kill(Signal::SIGTERM)?;
            let mut late = web.converse((cart.ip(), ECHO))?;
            late.exchange("by the next agent")?;
            long.exchange("while the old one drains")?;
            ensure!(old.worker().is_some(), "the old agent has ended with a connection open");
            long.finish_speaking()?;
            long.end()?;
            let status = old.wait(BOUND)?;
            ensure!(status.code() == Some(0), "it ended with {status}:\n{}", old.log_tail());
            late.exchange("and after the old one has ended")
        });
        stop.store(true, Ordering::Relaxed);
        let mut count = 0;
        for client in clients {
            for (_, outcome) in client.join().map_err(|_| anyhow::anyhow!("a client panicked"))?? {
                ensure!(outcome == Outcome::Complete, "a client saw {outcome:?}");
                count += 1;
            }
        }
        replaced.with_context(|| format!("{count} connections were whole"))
    })?;
    let after = [&web, &cart][side].networking()?;
    ensure!(after == captured, "not the same rules and marks: {:?}", captured.difference(&after));
    ensure!(link.tcp_packets(LOAD)? == 0, "something went past the mesh");
    Ok(())
}

fn taken_back(lab: &Lab) -> Result<()> {
    let (web, cart) = pods(lab)?;
    let agents = start(lab, "truthful")?;
    let _echo = cart.serve_echo(ECHO)?;
    let captured = web.networking()?;
    let node = &lab.nodes()[0];
    let mut long = web.converse((cart.ip(), ECHO))?;
    long.exchange("of the first agent")?;
    for _ in 0..2 {
        let next = node.start_agent(&options(node, "truthful").beside(100))?;
        eventually("the first agent has let go", BOUND, || agents[0].log().contains("has taken over").then_some(()))?;
        exchange(&web, &cart)?;
        next.crash();
        exchange(&web, &cart)?;
        long.exchange("all the while")?;
    }
    let next = node.start_agent(&options(node, "truthful").beside(100))?;
    exchange(&web, &cart)?;
    long.exchange("to the end")?;
    agents[0].kill(Signal::SIGTERM)?;
    drop(long);
    agents[0].wait(BOUND)?;
    exchange(&web, &cart)?;
    let after = web.networking()?;
    ensure!(after == captured, "not the same rules and marks: {:?}", captured.difference(&after));
    drop(next);
    Ok(())
}

fn alone(lab: &Lab) -> Result<()> {
    let (web, cart) = pods(lab)?;
    let agents = start(lab, "eager")?;
    let _echo = cart.serve_echo(ECHO)?;
    let mut long = web.converse((cart.ip(), ECHO))?;
    long.exchange("before")?;
    agents[0].kill(Signal::SIGTERM)?;
    eventually("it drains", BOUND, || (!agents[0].is_ready()).then_some(()))?;
    exchange(&web, &cart)?;
    // One that comes now takes over from an agent that drains.
    let node = &lab.nodes()[0];
    let _next = node.start_agent(&options(node, "eager").beside(100))?;
    exchange(&web, &cart)?;
    long.exchange("and it is served to its end")?;
    drop(long);
    ensure!(agents[0].wait(BOUND)?.code() == Some(0), "{}", agents[0].log_tail());
    exchange(&web, &cart)
}

fn let_go(lab: &Lab) -> Result<()> {
    let (web, cart) = pods(lab)?;
    let agents = start(lab, "eager")?;
    let _echo = cart.serve_echo(ECHO)?;
    let other = lab.pod(PodSpec::new("shop/other", "node-b"))?;
    let _other = other.serve_echo(ECHO)?;
    agents.iter().try_for_each(|agent| agent.wait_pod(&other))?;
    // The first agent of the servers' node stays while this is open.
    let mut long = web.converse((other.ip(), ECHO))?;
    long.exchange("a long one")?;
    let node = &lab.nodes()[1];
    let next = node.start_agent(&options(node, "eager").beside(100))?;
    // From outside the mesh, where nobody says yes in the server's place.
    let outside = &lab.nodes()[0];
    ensure!(outside.connect((cart.ip(), TUNNEL)).is_ok(), "nobody listens for tunnels");
    lab.join(&cart, false)?;
    eventually("the pod has left", BOUND, || next.log().contains("The pod has left").then_some(()))?;
    let closed = || outside.connect((cart.ip(), TUNNEL)).is_err().then_some(());
    eventually("no agent keeps a listener in it", BOUND, closed)?;
    ensure!(cart.networking()?.count("SELVEDGE") == 0, "something is left: {:?}", cart.networking()?);
    long.exchange("all the while")
}

fn exchange(web: &Pod, cart: &Pod) -> Result<()> {
    let mut fresh = Conversation::over(web.connect((cart.ip(), ECHO)).context("connect itself failed")?)?;
    fresh.exchange("a fresh connection")
}

fn start(lab: &Lab, connect: &str) -> Result<Vec<Agent>> {
    // The first one to come makes the CA.
    lab.nodes().iter().map(|node| node.start_agent(&options(node, connect))).collect()
}

pub fn options(node: &Node, connect: &str) -> AgentOptions {
    let shared: PathBuf = node.shared_dir();
    let options = AgentOptions::default().arg("--shared-dir").arg(&shared.to_string_lossy());
    options.arg("--keep-capture").arg("--drain=60s").arg("--connect").arg(connect)
}

fn pods(lab: &Lab) -> Result<(Pod, Pod)> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a").service_account("web"))?;
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b").service_account("cart"))?;
    Ok((web, cart))
}

const LOAD: u16 = 9000;
const ECHO: u16 = 9001;
const TUNNEL: u16 = 15008;
const CLIENTS: usize = 8;
