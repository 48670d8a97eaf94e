//! What applications see when the agent, or a part of it, is killed.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use selvedge_lab::{Agent, AgentOptions, BOUND, Conversation, End, Lab, Pod, PodSpec, Server, eventually, trial_with};

use crate::lab;

pub fn trials() -> Vec<Trial> {
    vec![
        trial_with("crash::the_clients_worker_killed_under_load_resets_and_truncates_nothing", lab(), |lab| {
            a_worker_killed_under_load(lab, 0)
        }),
        trial_with("crash::the_servers_worker_killed_under_load_resets_and_truncates_nothing", lab(), |lab| {
            a_worker_killed_under_load(lab, 1)
        }),
        trial_with("crash::a_killed_agent_leaves_nothing_in_clear_and_the_next_takes_over", lab(), |lab| {
            a_killed_agent_is_followed_by_another(lab, Agent::crash)
        }),
        trial_with("crash::a_killed_parent_takes_its_worker_along_and_leaves_nothing_in_clear", lab(), |lab| {
            a_killed_agent_is_followed_by_another(lab, kill_the_parent_alone)
        }),
    ]
}

fn a_worker_killed_under_load(lab: &Lab, victim: usize) -> Result<()> {
    let (web, cart) = pods(lab)?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let link = lab.link()?;
    let at_server: Arc<Mutex<Vec<Outcome>>> = Arc::default();
    let outcomes = at_server.clone();
    let _server = Server::start(cart.listen(LOAD)?, move |stream| {
        let outcome = swap(&stream);
        outcomes.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(outcome);
    });
    let (held, sockets) = mpsc::channel();
    let _holder = Server::start(cart.listen(HELD)?, move |stream| drop(held.send(stream)));
    let halfway = Halfway::open(&web, &cart, &sockets)?;

    let (stop, finished) = (AtomicBool::new(false), AtomicUsize::new(0));
    let to = SocketAddr::from((cart.ip(), LOAD));
    thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(|| keep_swapping(&web, to, &stop, &finished))).collect();
        let killed = kill_amid(&agents[victim], &finished);
        let checked = killed.and_then(|replaced| {
            halfway.are_all_reset()?;
            // Everybody who comes now waits for the new worker, and succeeds.
            let fresh: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(|| swap_once(&web, to))).collect();
            for fresh in fresh {
                let outcome = fresh.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
                ensure!(outcome == Outcome::Complete, "a connection made after the kill: {outcome:?}");
            }
            Ok(replaced)
        });
        stop.store(true, Ordering::Relaxed);
        let replaced = checked?;
        let mut resets = 0;
        for client in clients {
            for (began, outcome) in client.join().map_err(|_| anyhow::anyhow!("a client panicked"))?? {
                match outcome {
                    Outcome::Complete => {}
                    Outcome::Reset if began < replaced => resets += 1,
                    outcome => {
                        bail!("a client saw {outcome:?}, {:?} after the kill", began.checked_duration_since(replaced))
                    }
                }
            }
        }
        ensure!(resets > 0, "the kill met no connection of the load");
        Ok(())
    })?;
    for outcome in at_server.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).iter() {
        ensure!(matches!(outcome, Outcome::Complete | Outcome::Reset), "the server saw {outcome:?}");
    }
    agents[victim].wait_ready()?;
    let restarts = agents[victim].metrics()?.sum("selvedge_worker_restarts_total", &[]);
    ensure!(restarts == 1.0, "selvedge_worker_restarts_total is {restarts}");
    ensure!(!link.find(NEEDLE)?.is_found(), "something was readable on the link");
    ensure!(link.tcp_packets(TUNNEL)? > 0, "nothing went through the tunnel");
    Ok(())
}

/// Kills the worker while the load runs; returns when the old worker was gone for certain.
fn kill_amid(agent: &Agent, finished: &AtomicUsize) -> Result<Instant> {
    eventually("the load runs", BOUND, || (finished.load(Ordering::Relaxed) > CLIENTS).then_some(()))?;
    let killed = agent.kill_worker()?;
    eventually("the worker is gone", BOUND, || (agent.worker() != Some(killed)).then_some(()))?;
    Ok(Instant::now())
}

/// Connections that hold still when the worker is killed.
struct Halfway {
    /// Who will see a reset.
    waiting: Vec<(&'static str, Conversation)>,
    /// Who has heard the end already, and may still speak.
    _others: Vec<Conversation>,
}

impl Halfway {
    fn open(web: &Pod, cart: &Pod, sockets: &mpsc::Receiver<TcpStream>) -> Result<Self> {
        let mut waiting = Vec::new();
        let pair = || -> Result<(Conversation, Conversation)> {
            let mut client = Conversation::over(web.connect((cart.ip(), HELD))?)?;
            let mut server = Conversation::over(sockets.recv_timeout(BOUND)?)?;
            client.say("a first word")?;
            server.hear("a first word")?;
            server.say("an answer")?;
            client.hear("an answer")?;
            Ok((client, server))
        };
        for _ in 0..4 {
            let (client, server) = pair()?;
            waiting.extend([("a silent client", client), ("a silent server", server)]);
        }
        let (client, mut server) = pair()?;
        client.finish_speaking()?;
        ensure!(server.end()? == End::Closed(Vec::new()), "the half-close did not arrive");
        waiting.push(("a client that has finished speaking", client));
        let mut others = vec![server];
        let (mut client, server) = pair()?;
        server.finish_speaking()?;
        ensure!(client.end()? == End::Closed(Vec::new()), "the half-close did not arrive");
        waiting.push(("a server that has finished speaking", server));
        others.push(client);
        Ok(Self { waiting, _others: others })
    }

    fn are_all_reset(self) -> Result<()> {
        for (who, mut open) in self.waiting {
            let end = open.end().with_context(|| who)?;
            ensure!(end == End::Reset(0), "{who} saw {end:?}");
        }
        Ok(())
    }
}

fn a_killed_agent_is_followed_by_another(lab: &Lab, end: fn(Agent)) -> Result<()> {
    let (web, cart) = pods(lab)?;
    let mut agents = lab.start_agents(&AgentOptions::default())?;
    let _server = cart.serve_echo(LOAD)?;
    let link = lab.link()?;
    for (index, (pod, needle)) in [(&web, "the client's agent"), (&cart, "the server's agent")].into_iter().enumerate()
    {
        let mut open = web.converse((cart.ip(), LOAD))?;
        open.exchange(&format!("before {needle} is killed"))?;
        let before = pod.networking()?;
        end(agents.remove(index));
        ensure!(open.end()? == End::Reset(0), "the open connection was not reset");
        let meanwhile = pod.networking()?;
        ensure!(meanwhile == before, "{:?}", before.difference(&meanwhile));
        // Nobody listens. Whether the connection waits or fails, nothing of it is in clear.
        let needle = format!("while {needle} is dead");
        let waiting = pod.run(|| {
            let stream = TcpStream::connect_timeout(&(cart.ip(), LOAD).into(), Duration::from_millis(300)).ok();
            stream.map(|mut stream| stream.write_all(needle.as_bytes()).map(|()| stream))
        });
        let plain = link.tcp_packets(LOAD)?;
        ensure!(index == 1 || plain == 0, "{plain} packets went past the mesh");
        ensure!(!link.find(needle.as_bytes())?.is_found(), "{needle:?} was readable on the link");
        drop(waiting);

        agents.insert(index, lab.nodes()[index].start_agent(&AgentOptions::default())?);
        let after = pod.networking()?;
        ensure!(after == before, "not the same rules and marks: {:?}", before.difference(&after));
        web.converse((cart.ip(), LOAD))?.exchange("needle after it")?;
        ensure!(!link.find(b"needle after it")?.is_found(), "a connection through the next agent was readable");
    }
    ensure!(link.tcp_packets(LOAD)? == 0, "something went past the mesh");
    Ok(())
}

fn kill_the_parent_alone(agent: Agent) {
    let worker = agent.worker();
    // What fails here shows as an agent that still answers.
    let _ = agent.kill(Signal::SIGKILL);
    let gone = || worker.is_none_or(|pid| kill(Pid::from_raw(pid), None).is_err()).then_some(());
    let _ = eventually("the worker is gone", BOUND, gone);
}

/// How one swap ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// All bytes came, each as it should be, and then the end.
    Complete,
    Reset,
    /// A clean end before all bytes had come.
    Truncated(usize),
    Corrupt(usize),
    Failed(String),
}

/// Swaps one after the other until told to stop: when each began, and how it ended.
pub fn keep_swapping(
    web: &Pod,
    to: SocketAddr,
    stop: &AtomicBool,
    finished: &AtomicUsize,
) -> Result<Vec<(Instant, Outcome)>> {
    let mut outcomes = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let began = Instant::now();
        outcomes.push((began, swap_once(web, to)?));
        finished.fetch_add(1, Ordering::Relaxed);
    }
    Ok(outcomes)
}

/// A server of swaps.
pub fn serve_swaps(pod: &Pod, port: u16) -> Result<Server> {
    Ok(Server::start(pod.listen(port)?, |stream| drop(swap(&stream))))
}

fn swap_once(web: &Pod, to: SocketAddr) -> Result<Outcome> {
    match web.connect(to) {
        Ok(stream) => Ok(swap(&stream)),
        // It stood already, and broke before the client came to see that.
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(Outcome::Reset),
        Err(error) => Err(error).context("connect itself failed"),
    }
}

/// Both sides send the same body, piece by piece, and each checks what it gets to the last byte.
fn swap(stream: &TcpStream) -> Outcome {
    let mut got = 0;
    match swap_pieces(stream, &mut got) {
        Ok(outcome) => outcome,
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Outcome::Reset,
        // tcp(7): a reset behind an orderly end. The end came first, and is right if the last piece lies before it.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => match read_piece(stream, &mut got) {
            Ok(Outcome::Complete) if got == BODY => Outcome::Reset,
            _ => Outcome::Truncated(got),
        },
        Err(error) => Outcome::Failed(error.to_string()),
    }
}

/// On one thread: of two, one would be told of a reset, and the other of an end.
fn swap_pieces(mut stream: &TcpStream, got: &mut usize) -> io::Result<Outcome> {
    stream.set_read_timeout(Some(BOUND))?;
    while *got < BODY {
        // Below what sockets take at once, so that both may write before either reads.
        stream.write_all(&body_at(*got, PIECE))?;
        if *got + PIECE == BODY {
            stream.shutdown(Shutdown::Write)?;
        }
        match read_piece(stream, got)? {
            Outcome::Complete => {}
            other => return Ok(other),
        }
    }
    match stream.read(&mut [0])? {
        0 => Ok(Outcome::Complete),
        _ => Ok(Outcome::Corrupt(BODY)),
    }
}

/// Reads the next piece, and checks it.
fn read_piece(mut stream: &TcpStream, got: &mut usize) -> io::Result<Outcome> {
    let (mut piece, mut filled) = (vec![0; PIECE], 0);
    while filled < PIECE {
        match stream.read(&mut piece[filled..])? {
            0 => return Ok(Outcome::Truncated(*got + filled)),
            count => filled += count,
        }
    }
    if piece != body_at(*got, PIECE) {
        return Ok(Outcome::Corrupt(*got));
    }
    *got += PIECE;
    Ok(Outcome::Complete)
}

/// A part of the body: the needle, over and over, each time with another last byte.
fn body_at(from: usize, length: usize) -> Vec<u8> {
    let byte = |at: usize| match at % (NEEDLE.len() + 1) {
        last if last == NEEDLE.len() => (at / (NEEDLE.len() + 1)) as u8,
        within => NEEDLE[within],
    };
    (from..from + length).map(byte).collect()
}

fn pods(lab: &Lab) -> Result<(Pod, Pod)> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a").service_account("web"))?;
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b").service_account("cart"))?;
    Ok((web, cart))
}

const LOAD: u16 = 9000;
const HELD: u16 = 9001;
const TUNNEL: u16 = 15008;
const CLIENTS: usize = 16;
const NEEDLE: &[u8] = b"every byte of this body is known, and none may be seen";
const BODY: usize = 128 * 1024;
const PIECE: usize = 8 * 1024;
