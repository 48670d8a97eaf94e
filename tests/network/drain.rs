//! An agent that is asked to end.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::Signal;
use selvedge_lab::{Agent, AgentOptions, BOUND, Conversation, End, Lab, Pod, PodSpec, Server, eventually, trial_with};

use crate::lab;

pub fn trials() -> Vec<Trial> {
    vec![
        trial_with("drain::open_connections_go_on_till_they_are_done_and_then_it_exits", lab(), |lab| {
            goes_on_till_done(lab, false)
        }),
        trial_with("drain::with_keep_capture_open_connections_go_on_too_and_the_rules_stay", lab(), |lab| {
            goes_on_till_done(lab, true)
        }),
        trial_with("drain::what_outlives_the_limit_is_reset_and_it_exits", lab(), |lab| limited(lab, false)),
        trial_with("drain::with_keep_capture_the_limit_holds_too", lab(), |lab| limited(lab, true)),
    ]
}

fn goes_on_till_done(lab: &Lab, keeps: bool) -> Result<()> {
    let Shop { web, cart, mut agents, _server } = Shop::new(lab, &options("60s", keeps))?;
    let link = lab.link()?;
    for (index, pod) in [&web, &cart].into_iter().enumerate() {
        let captured = pod.networking()?;
        let mut open = web.converse((cart.ip(), PORT))?;
        open.exchange("needle before")?;
        let agent = agents.remove(index);
        agent.kill(Signal::SIGTERM)?;
        eventually("it says that it is not ready", BOUND, || (!agent.is_ready()).then_some(()))?;
        let ready = agent.metrics().is_ok();
        ensure!(ready, "metrics are gone while it drains");
        for round in 0..3 {
            open.exchange(&format!("needle while it drains {round}"))?;
        }
        ensure!(agent.worker().is_some(), "it has ended with a connection open");
        open.finish_speaking()?;
        ensure!(open.end()? == End::Closed(Vec::new()), "it did not end in order");
        let status = agent.wait(BOUND)?;
        ensure!(status.code() == Some(0), "it ended with {status}");
        let left = pod.networking()?;
        if keeps {
            ensure!(left == captured, "{:?}", captured.difference(&left));
            stays_out_of_sight(&web, &cart, index)?;
        } else {
            ensure!(left.count("SELVEDGE") == 0, "something is left: {left:?}");
        }
        ensure!(!link.find(b"needle")?.is_found(), "something was readable on the link");
        agents.insert(index, lab.nodes()[index].start_agent(&options("60s", keeps))?);
        let mut next = Conversation::over(web.connect((cart.ip(), PORT))?)?;
        next.exchange("needle of the next agent")?;
        ensure!(!link.find(b"needle")?.is_found(), "something was readable on the link");
    }
    Ok(())
}

/// With rules and without an agent, whatever a client tries fails or waits.
fn stays_out_of_sight(web: &Pod, cart: &Pod, index: usize) -> Result<()> {
    let to = (cart.ip(), PORT).into();
    let tried = web.run(|| std::net::TcpStream::connect_timeout(&to, Duration::from_millis(300)));
    let Ok(mut stream) = tried else { return Ok(()) };
    ensure!(index == 1, "a connection came about without an agent");
    stream.set_read_timeout(Some(Duration::from_millis(300)))?;
    let heard = stream.write_all(b"needle with no agent there").and_then(|()| stream.read(&mut [0]));
    ensure!(heard.is_err(), "somebody answered or hung up in order: {heard:?}");
    Ok(())
}

fn limited(lab: &Lab, keeps: bool) -> Result<()> {
    let Shop { web, cart, mut agents, _server } = Shop::new(lab, &options("1s", keeps))?;
    let mut open = web.converse((cart.ip(), PORT))?;
    open.exchange("and then nothing")?;
    let agent = agents.remove(0);
    let began = Instant::now();
    agent.kill(Signal::SIGTERM)?;
    ensure!(open.end()? == End::Reset(0), "what outlives the limit is to be reset");
    ensure!(began.elapsed() >= Duration::from_secs(1), "reset after {:?}, before the limit", began.elapsed());
    let status = agent.wait(BOUND)?;
    ensure!(status.code() == Some(0), "it ended with {status}");
    ensure!((web.networking()?.count("SELVEDGE") > 0) == keeps, "{:?}", web.networking()?);
    Ok(())
}

fn options(drain: &str, keeps: bool) -> AgentOptions {
    let options = AgentOptions::default().arg("--drain").arg(drain);
    if keeps { options.arg("--keep-capture") } else { options }
}

/// A client on one node, an echo server on the other, and their agents.
struct Shop {
    web: Pod,
    cart: Pod,
    agents: Vec<Agent>,
    _server: Server,
}

impl Shop {
    fn new(lab: &Lab, options: &AgentOptions) -> Result<Self> {
        let web = lab.pod(PodSpec::new("shop/web", "node-a").service_account("web"))?;
        let cart = lab.pod(PodSpec::new("shop/cart", "node-b").service_account("cart"))?;
        let server = cart.serve_echo(PORT)?;
        Ok(Self { agents: lab.start_agents(options)?, web, cart, _server: server })
    }
}

const PORT: u16 = 9000;
