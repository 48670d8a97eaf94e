//! Ten thousand connections at once, or as many as descriptors allow: opened, used, closed, forgotten.
//!
//! Descriptors are counted by process, so the client and the server are this program run again, each inside its pod.

use std::io::{self, BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use libtest_mimic::Trial;
use nix::sys::resource::{Resource, getrlimit};
use selvedge_lab::{Agent, AgentOptions, Lab, Namespace, PodSpec, eventually, trial_with};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::lab;

pub fn trials() -> Vec<Trial> {
    vec![
        trial_with("load::ten_thousand_connections_at_once_leave_nothing_behind", lab(), |lab| {
            ten_thousand_at_once(lab, "node-b")
        }),
        trial_with("load::thousands_on_one_node_leave_nothing_behind", lab(), |lab| {
            ten_thousand_at_once(lab, "node-a")
        }),
    ]
}

/// From a pod of `node-a` to one of a node.
fn ten_thousand_at_once(lab: &Lab, node: &str) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a").service_account("web"))?;
    let cart = lab.pod(PodSpec::new("shop/cart", node).service_account("cart"))?;
    let (descriptors, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
    // Who carries both sides counts each connection twice, and holds four descriptors for it where it tunnels to itself.
    let (sides, held) = if node == "node-a" { (2, 4) } else { (1, 1) };
    // One for each application's end in the agents and in the applications; some for everything else.
    let count = usize::try_from(descriptors.saturating_sub(1000))?.min(10_000) / held;
    println!("load: {count} connections at once, as {descriptors} descriptors a process allow");
    // Not one connection more than is asked for may count: a SYN that waits and is given up would, for a moment.
    let options =
        AgentOptions::default().arg("--max-connections").arg(&(count * sides).to_string()).arg("--connect=eager");
    let agents = lab.start_agents(&options)?;

    let mut server = Application::start(&cart, "server", &["8080".into()])?;
    server.expect("listening")?;
    let to = SocketAddr::new(cart.ip(), 8080).to_string();
    // A first one warms what stays: pools, the keepers' sockets, buffers.
    let mut first = Application::start(&web, "client", &[to.clone(), "1".into()])?;
    first.expect("open 1")?;
    first.close()?;
    let baseline = agents.iter().map(settled).collect::<Result<Vec<_>>>()?;

    let mut client = Application::start(&web, "client", &[to, count.to_string()])?;
    client.expect(&format!("open {count}"))?;
    for agent in agents.iter().filter(|agent| sides == 1 || agent.node() == node) {
        let open = agent.metrics()?.sum("selvedge_connections_open", &[]);
        ensure!(open as usize == count * sides, "{} carries {open}", agent.node());
    }
    client.close()?;
    for (agent, baseline) in agents.iter().zip(baseline) {
        // Tunnels without a flow stay in the pool for a while: of HBONE's a hundred streams share one, of the fast ones
        // each thread keeps 64.
        let tunnels = sides * (count.div_ceil(100) * 2 + 64 * std::thread::available_parallelism()?.get());
        eventually(&format!("{} has let everything go", agent.node()), Duration::from_secs(30), || {
            let (metrics, dump) = (agent.metrics().ok()?, agent.dump().ok()?);
            let open = metrics.sum("selvedge_connections_open", &[]) + metrics.sum("selvedge_hbone_streams", &[]);
            let listed = dump["connections"].as_array()?.len();
            (open == 0.0 && listed == 0 && descriptors_of(agent).ok()? <= baseline + tunnels).then_some(())
        })
        .with_context(|| format!("{:?} descriptors, {baseline} before", descriptors_of(agent)))?;
        let failed = agent.metrics()?.sum("selvedge_connections_failed_total", &[]);
        ensure!(failed == 0.0, "{failed} connections failed at {}", agent.node());
    }
    // With the pod its tunnels go too.
    lab.remove("pod-shop-web.yaml")?;
    eventually("no tunnel is left", Duration::from_secs(30), || {
        let tunnels = |agent: &Agent| -> Result<f64> {
            let metrics = agent.metrics()?;
            Ok(metrics.sum("selvedge_hbone_connections", &[]) + metrics.sum("selvedge_fast_connections", &[]))
        };
        agents.iter().all(|agent| tunnels(agent).is_ok_and(|count| count == 0.0)).then_some(())
    })?;
    server.close()
}

/// The worker's descriptors once no connection is open.
fn settled(agent: &Agent) -> Result<usize> {
    eventually("the first connection has gone", Duration::from_secs(30), || {
        (agent.metrics().ok()?.sum("selvedge_connections_open", &[]) == 0.0).then_some(())
    })?;
    descriptors_of(agent)
}

fn descriptors_of(agent: &Agent) -> Result<usize> {
    let worker = agent.worker().context("no worker")?;
    Ok(std::fs::read_dir(format!("/proc/{worker}/fd"))?.count())
}

/// This program, run again as an application inside a pod. It ends when its standard input does.
struct Application {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Application {
    fn start(pod: &Namespace, role: &str, words: &[String]) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.env(ROLE, role).args(words).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = pod.spawn(&mut command)?;
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().context("no standard output")?);
        Ok(Self { child, input, output })
    }

    fn expect(&mut self, wanted: &str) -> Result<()> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        ensure!(line.trim() == wanted, "wanted {wanted:?}, got {line:?}");
        Ok(())
    }

    fn close(&mut self) -> Result<()> {
        drop(self.input.take());
        let status = self.child.wait()?;
        ensure!(status.success(), "an application ended with {status}");
        Ok(())
    }
}

impl Drop for Application {
    fn drop(&mut self) {
        // Ended already, unless the test failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What this process is to do as an application, where it was started as one.
pub fn application() -> Option<ExitCode> {
    let role = std::env::var(ROLE).ok()?;
    let words: Vec<String> = std::env::args().skip(1).collect();
    Some(match run(&role, &words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{role}: {error:#}");
            ExitCode::FAILURE
        }
    })
}

fn run(role: &str, words: &[String]) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let until_closed = std::thread::spawn(|| io::copy(&mut io::stdin(), &mut io::sink()));
    match (role, words) {
        ("server", [port]) => {
            let port = port.parse()?;
            let listener = runtime.block_on(listen(port))?;
            say("listening")?;
            runtime.spawn(serve(listener));
            runtime.block_on(closed(until_closed))
        }
        ("client", [to, count]) => {
            let (to, count) = (to.parse()?, count.parse()?);
            let open = runtime.block_on(connect_all(to, count))?;
            say(&format!("open {}", open.len()))?;
            runtime.block_on(closed(until_closed))?;
            drop(open);
            Ok(())
        }
        _ => bail!("no such application: {words:?}"),
    }
}

async fn listen(port: u16) -> Result<TcpListener> {
    let socket = tokio::net::TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind(SocketAddr::from(([0, 0, 0, 0], port)))?;
    Ok(socket.listen(4096)?)
}

async fn serve(listener: TcpListener) {
    while let Ok((mut stream, _)) = listener.accept().await {
        tokio::spawn(async move {
            let mut buffer = [0; 64];
            while let Ok(count @ 1..) = stream.read(&mut buffer).await {
                if stream.write_all(&buffer[..count]).await.is_err() {
                    return;
                }
            }
        });
    }
}

/// Opens them all, keeps them open, and exchanges a few bytes over each.
async fn connect_all(to: SocketAddr, count: usize) -> Result<Vec<TcpStream>> {
    let mut open = Vec::with_capacity(count);
    while open.len() < count {
        // As many at a time as a listener's queue holds.
        let batch = (count - open.len()).min(250);
        let opening: Vec<_> = (0..batch).map(|_| tokio::spawn(exchange(to))).collect();
        for stream in opening {
            open.push(stream.await?.with_context(|| format!("one of {count}, about number {}", open.len()))?);
        }
    }
    Ok(open)
}

async fn exchange(to: SocketAddr) -> Result<TcpStream> {
    let mut stream = TcpStream::connect(to).await.context("connect")?;
    stream.write_all(b"a few bytes").await?;
    let mut got = [0; 11];
    tokio::time::timeout(Duration::from_secs(60), stream.read_exact(&mut got)).await.context("no answer")??;
    ensure!(&got == b"a few bytes");
    Ok(stream)
}

fn say(line: &str) -> Result<()> {
    let mut output = io::stdout();
    writeln!(output, "{line}")?;
    Ok(output.flush()?)
}

async fn closed(input: std::thread::JoinHandle<io::Result<u64>>) -> Result<()> {
    while !input.is_finished() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

const ROLE: &str = "SELVEDGE_TEST_APPLICATION";
