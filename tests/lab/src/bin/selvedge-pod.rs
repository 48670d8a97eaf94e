//! What runs in the pods of a test cluster: servers, clients, and a program that waits.

use std::env;
use std::io::{BufReader, Read, Write};
use std::net::{Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use selvedge_lab::Server;
use serde_json::json;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words[..] {
        ["pause"] => until_told(&[]),
        ["serve", ref servers @ ..] if !servers.is_empty() => serve(servers),
        ["get", address, path] => get(address, path).map(|body| println!("{body}")),
        ["tcp", address, text] => tcp(address, text).map(|said| println!("{said}")),
        ["resolve", name] => resolve(name),
        ["load", address, seconds] => load(address, seconds),
        _ => Err(anyhow::anyhow!("{USAGE}")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// `KIND:PORT`, with `http`, `echo`, `greeting` and `sink` for the kinds.
fn serve(servers: &[&str]) -> Result<()> {
    let name = env::var("HOSTNAME").unwrap_or_default();
    let start = |server: &&str| {
        let (kind, port) = server.split_once(':').with_context(|| format!("{server}: not KIND:PORT"))?;
        let port: u16 = port.parse().with_context(|| format!("{server}: no such port"))?;
        let listener =
            TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).or_else(|_| TcpListener::bind(("0.0.0.0", port)));
        let listener = listener.with_context(|| format!("cannot listen on {port}"))?;
        Ok(match kind {
            "http" => Server::http(listener, &name),
            "echo" => Server::echo(listener),
            "greeting" => Server::greeting(listener, &format!("{name}\n")),
            "sink" => Server::sink(listener),
            _ => bail!("{kind}: no such kind of server"),
        })
    };
    let running: Vec<Server> = servers.iter().map(start).collect::<Result<_>>()?;
    until_told(&running)
}

/// Waits for a signal to end. As the first process of a pod it buries orphans meanwhile.
fn until_told(_running: &[Server]) -> Result<()> {
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGCHLD].into_iter().collect();
    signals.thread_block()?;
    while signals.wait()? == Signal::SIGCHLD {
        while matches!(waitpid(None, Some(WaitPidFlag::WNOHANG)), Ok(status) if status != WaitStatus::StillAlive) {}
    }
    Ok(())
}

/// One request over a connection of its own; fails unless the answer is 200.
fn get(address: &str, path: &str) -> Result<String> {
    let mut stream = connect(address)?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n")?;
    let mut answer = String::new();
    BufReader::new(stream).read_to_string(&mut answer).with_context(|| format!("no answer from {address}"))?;
    let (head, body) = answer.split_once("\r\n\r\n").with_context(|| format!("not HTTP: {answer:?}"))?;
    let status = head.split(' ').nth(1).unwrap_or_default();
    ensure!(status == "200", "status {status}: {body}");
    Ok(body.to_owned())
}

/// Sends a text, closes that side, and reads what comes back.
fn tcp(address: &str, text: &str) -> Result<String> {
    let mut stream = connect(address)?;
    stream.write_all(text.as_bytes())?;
    stream.shutdown(Shutdown::Write)?;
    let mut said = String::new();
    stream.read_to_string(&mut said).with_context(|| format!("no answer from {address}"))?;
    Ok(said)
}

fn resolve(name: &str) -> Result<()> {
    let addresses = (name, 0).to_socket_addrs().with_context(|| format!("cannot resolve {name}"))?;
    let mut addresses: Vec<_> = addresses.map(|address| address.ip()).collect();
    addresses.dedup();
    addresses.iter().for_each(|address| println!("{address}"));
    Ok(())
}

/// Requests without a pause, each over a connection of its own; prints how many were answered and what failed.
fn load(address: &str, seconds: &str) -> Result<()> {
    let lasts = Duration::from_secs(seconds.parse().context("how many seconds?")?);
    let (began, mut answered, mut failures) = (Instant::now(), 0_u64, Vec::new());
    while began.elapsed() < lasts {
        match get(address, "/") {
            Ok(_) => answered += 1,
            Err(error) => {
                failures.push(format!("{error:#}"));
                // A server that is gone is not asked as fast as can be.
                thread::sleep(Duration::from_millis(50));
            }
        }
    }
    println!("{}", json!({"answered": answered, "failed": failures.len(), "failures": failures}));
    Ok(())
}

fn connect(address: &str) -> Result<TcpStream> {
    let addresses = address.to_socket_addrs().with_context(|| format!("cannot resolve {address}"))?;
    let mut last = None;
    for candidate in addresses {
        match TcpStream::connect_timeout(&candidate, PATIENCE) {
            Ok(stream) => return patient(stream),
            Err(error) => last = Some(failed(candidate, &error)),
        }
    }
    Err(last.unwrap_or_else(|| anyhow::anyhow!("{address} has no address")))
}

fn patient(stream: TcpStream) -> Result<TcpStream> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn failed(address: SocketAddr, error: &std::io::Error) -> anyhow::Error {
    anyhow::anyhow!("cannot connect to {address}: {error}")
}

const PATIENCE: Duration = Duration::from_secs(10);
const USAGE: &str = "\
usage: selvedge-pod pause
       selvedge-pod serve http:8080 echo:9000 greeting:9001 sink:9002
       selvedge-pod get HOST:PORT PATH
       selvedge-pod tcp HOST:PORT TEXT
       selvedge-pod resolve NAME
       selvedge-pod load HOST:PORT SECONDS";
