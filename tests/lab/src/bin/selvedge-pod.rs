//! What runs in the pods of a test cluster: servers, clients, and a program that waits.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::io::{BufReader, Read, Write};
use std::net::{Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
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
        ["sleep", seconds] => sleep(seconds),
        ["serve", ref servers @ ..] if !servers.is_empty() => serve(servers),
        ["get", address, path] => get(address, path).map(|body| println!("{body}")),
        ["put", path, text] => put(Path::new(path), text),
        ["tcp", address, text] => tcp(address, text).map(|said| println!("{said}")),
        ["resolve", name] => resolve(name),
        ["load", address] => load(address, &until_input_ends()),
        ["load", address, seconds] => seconds_from_now(seconds).and_then(|over| load(address, &over)),
        ["talk", address] => talk(address, &until_input_ends()),
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

fn sleep(seconds: &str) -> Result<()> {
    thread::sleep(Duration::from_secs(seconds.parse().context("how many seconds?")?));
    Ok(())
}

/// `KIND:PORT`, with `http`, `failing-http`, `files`, `https-files`, `echo`, `greeting`, `grpc` and `sink` for the kinds.
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
            "failing-http" => Server::failing_http(listener, &name),
            "files" => Server::files(listener, Path::new(FILES), None)?,
            "https-files" => {
                let read = |name: &str| fs::read(Path::new(TLS).join(name)).with_context(|| format!("no {TLS}/{name}"));
                Server::files(listener, Path::new(FILES), Some((&read("tls.crt")?, &read("tls.key")?)))?
            }
            "echo" => Server::echo(listener),
            "greeting" => Server::greeting(listener, &format!("{name}\n")),
            "grpc" => Server::grpc_health(listener),
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

/// Writes a file, which nobody reads half.
fn put(path: &Path, text: &str) -> Result<()> {
    let beside = path.with_extension("new");
    fs::write(&beside, text).with_context(|| format!("cannot write {}", beside.display()))?;
    fs::rename(&beside, path).with_context(|| format!("cannot write {}", path.display()))
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

/// Requests without a pause, each over a connection of its own; prints how many were answered, and by which pods, what
/// failed, and how long the longest took.
fn load(address: &str, is_over: &(dyn Fn() -> bool + Sync)) -> Result<()> {
    let told = Mutex::new((BTreeMap::<String, u64>::new(), Vec::new(), Duration::ZERO));
    thread::scope(|scope| {
        for _ in 0..ASKERS {
            scope.spawn(|| {
                while !is_over() {
                    let began = Instant::now();
                    let answer = get(address, "/");
                    let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
                    told.2 = told.2.max(began.elapsed());
                    match answer {
                        Ok(body) => *told.0.entry(pod(&body)).or_default() += 1,
                        Err(error) => {
                            told.1.push(format!("{error:#}"));
                            drop(told);
                            // A server that is gone is not asked as fast as can be.
                            thread::sleep(Duration::from_millis(50));
                        }
                    }
                }
            });
        }
    });
    let (pods, failures, longest) = told.into_inner().unwrap_or_else(PoisonError::into_inner);
    println!(
        "{}",
        json!({
            "answered": pods.values().sum::<u64>(), "pods": pods, "failed": failures.len(), "failures": failures,
            "longestSeconds": longest.as_secs_f64()
        })
    );
    Ok(())
}

/// Who answered, where it says so.
fn pod(body: &str) -> String {
    let answer: Option<serde_json::Value> = serde_json::from_str(body).ok();
    answer.and_then(|answer| answer["pod"].as_str().map(str::to_owned)).unwrap_or_default()
}

/// One connection to an echo, over which something is said again and again; prints how often it came back, and how the
/// connection ended if it was not us who ended it.
fn talk(address: &str, is_over: &dyn Fn() -> bool) -> Result<()> {
    let mut stream = connect(address)?;
    let mut heard = 0_u64;
    let mut exchange = || -> Result<()> {
        let text = format!("{heard:08}");
        stream.write_all(text.as_bytes())?;
        let mut answer = [0; 8];
        stream.read_exact(&mut answer)?;
        ensure!(answer == text.as_bytes(), "another answer than what was said");
        if heard == 0 {
            // Whoever started this program waits for it.
            println!("under way");
        }
        heard += 1;
        Ok(())
    };
    let mut broken = None;
    while broken.is_none() && !is_over() {
        broken = exchange().err().map(|error| format!("{error:#}"));
        thread::sleep(Duration::from_millis(10));
    }
    println!("{}", json!({"heard": heard, "broken": broken}));
    Ok(())
}

/// Whoever started this program closes its standard input when it is enough.
fn until_input_ends() -> impl Fn() -> bool + Sync {
    let ended = Arc::new(AtomicBool::new(false));
    let tells = ended.clone();
    thread::spawn(move || {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        tells.store(true, Ordering::Relaxed);
    });
    move || ended.load(Ordering::Relaxed)
}

fn seconds_from_now(seconds: &str) -> Result<impl Fn() -> bool + Sync + use<>> {
    let (began, lasts) = (Instant::now(), Duration::from_secs(seconds.parse().context("how many seconds?")?));
    Ok(move || began.elapsed() >= lasts)
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

/// Requests of a load under way at a time.
const ASKERS: usize = 2;
const PATIENCE: Duration = Duration::from_secs(10);
/// What `files` and `https-files` serve, and where the latter has `tls.crt` and `tls.key`.
const FILES: &str = "/files";
const TLS: &str = "/tls";
const USAGE: &str = "\
usage: selvedge-pod pause
       selvedge-pod sleep SECONDS
       selvedge-pod serve http:8080 failing-http:8081 echo:9000 greeting:9001 grpc:9002 sink:9003
       selvedge-pod serve files:8080 https-files:8443 (the files of /files, by the certificate in /tls)
       selvedge-pod put PATH TEXT
       selvedge-pod get HOST:PORT PATH
       selvedge-pod tcp HOST:PORT TEXT
       selvedge-pod resolve NAME
       selvedge-pod load HOST:PORT [SECONDS]
       selvedge-pod talk HOST:PORT
Without SECONDS, load goes on until standard input ends, as talk does.";
