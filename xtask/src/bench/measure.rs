//! What is measured of a variant that is up.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::bench::stage::{FOLDER, HTTP, IPERF, Running, Stage};
use crate::bench::{iperf, wrk};

/// One measurement; it may tell several things.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Measurement {
    Idle,
    Bytes {
        streams: u32,
        back: bool,
    },
    Requests {
        connections: u32,
    },
    NewConnections,
    /// One connection after the other: how long until it stands, and until it is of use.
    Connect,
    OpenLoop,
}

/// What is measured after one start of a variant. More starts would cost time, fewer would compare what is far apart.
pub const GROUPS: [&[Measurement]; 2] = [
    &[
        Measurement::Idle,
        Measurement::Bytes { streams: 1, back: false },
        Measurement::Bytes { streams: 1, back: true },
        Measurement::Bytes { streams: 4, back: false },
        Measurement::Bytes { streams: 4, back: true },
        Measurement::Bytes { streams: 16, back: false },
        Measurement::Bytes { streams: 16, back: true },
    ],
    &[
        Measurement::Requests { connections: 1 },
        Measurement::Requests { connections: 64 },
        Measurement::Requests { connections: 512 },
        Measurement::NewConnections,
        Measurement::Connect,
        Measurement::OpenLoop,
    ],
];

/// All of `--quick`, after one start.
pub const QUICK: [&[Measurement]; 1] = [&[
    Measurement::Idle,
    Measurement::Bytes { streams: 1, back: false },
    Measurement::Bytes { streams: 4, back: false },
    Measurement::Requests { connections: 1 },
    Measurement::Requests { connections: 64 },
    Measurement::NewConnections,
    Measurement::Connect,
    Measurement::OpenLoop,
]];

/// One value that was read.
#[derive(Clone, Debug)]
pub struct Reading {
    pub row: Row,
    pub value: f64,
}

/// What a value is of.
#[derive(Clone, PartialEq, Debug)]
pub struct Row {
    pub name: String,
    pub unit: &'static str,
    pub better: Better,
}

impl Row {
    pub fn better(&self, one: f64, other: f64) -> f64 {
        match self.better {
            Better::More => one.max(other),
            Better::Less => one.min(other),
        }
    }

    pub fn worse(&self, one: f64, other: f64) -> f64 {
        match self.better {
            Better::More => one.min(other),
            Better::Less => one.max(other),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Better {
    More,
    Less,
}

impl Measurement {
    pub fn name(self) -> String {
        match self {
            Self::Idle => "memory".into(),
            Self::Bytes { streams, back } => {
                format!("bytes{}, {streams} stream{}", if back { " back" } else { "" }, plural(streams))
            }
            Self::Requests { connections } => format!("requests, {connections} connection{}", plural(connections)),
            Self::NewConnections => "new connection a request".into(),
            Self::Connect => "connect".into(),
            Self::OpenLoop => "open loop".into(),
        }
    }

    /// Measures once, after warming up. `peak` is what an open loop takes the half of.
    pub fn take(self, stage: &Stage, running: &Running, seconds: u32, peak: f64) -> Result<Vec<Reading>> {
        let taken = match self {
            Self::Idle => idle(stage, running),
            Self::Bytes { streams, back } => bytes(self, stage, running, streams, back, seconds),
            Self::Requests { connections } => requests(self, stage, running, connections, seconds),
            Self::NewConnections => new_connections(self, stage, running, seconds),
            Self::Connect => connect(stage, running, seconds),
            Self::OpenLoop => open_loop(stage, running, seconds, peak / 2.0),
        };
        taken.with_context(|| self.name())
    }
}

/// Memory before any load, once what only starting needs has gone, and what a thousand connections that do nothing add.
fn idle(stage: &Stage, running: &Running) -> Result<Vec<Reading>> {
    if !running.is_carried() {
        return Ok(Vec::new());
    }
    thread::sleep(SETTLING);
    let (before, own) = (running.resident(), running.own_memory());
    let connections =
        stage.client.run(|| (0..IDLE_CONNECTIONS).map(|_| open_and_ask(running)).collect::<Result<Vec<_>>>())?;
    let added = running.own_memory() - own;
    drop(connections);
    Ok(vec![
        reading("memory of one agent, idle", "MB", Better::Less, largest(&before)),
        reading(
            "memory of an idle connection, both agents",
            "KB",
            Better::Less,
            added * 1000.0 / IDLE_CONNECTIONS as f64,
        ),
    ])
}

/// Memory of the larger agent after all that went before, and a moment for what has gone to be gone.
pub fn memory_after_load(running: &Running) -> Option<Reading> {
    running.is_carried().then(|| {
        thread::sleep(SETTLING);
        reading("memory of one agent, after load", "MB", Better::Less, largest(&running.resident()))
    })
}

fn open_and_ask(running: &Running) -> Result<TcpStream> {
    let mut stream = TcpStream::connect((running.to, HTTP))?;
    ask(&mut stream)?;
    Ok(stream)
}

fn ask(stream: &mut TcpStream) -> Result<()> {
    stream.write_all(b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n")?;
    ensure!(stream.read(&mut [0; 4096])? > 0, "a connection was closed without an answer");
    Ok(())
}

fn bytes(
    this: Measurement,
    stage: &Stage,
    running: &Running,
    streams: u32,
    back: bool,
    seconds: u32,
) -> Result<Vec<Reading>> {
    let to = running.to.to_string();
    let to = (to.as_str(), IPERF);
    iperf::warm_up(&stage.client, to, streams, back)?;
    let before = running.cpu();
    let moved = iperf::run(&stage.client, to, streams, back, seconds)?;
    let used = running.cpu() - before;
    let mut readings = vec![reading(&this.name(), "Gb/s", Better::More, moved.gigabits_a_second)];
    readings.extend(cpu(running, &this.name(), "s/GB", used / moved.gigabytes));
    Ok(readings)
}

fn requests(
    this: Measurement,
    stage: &Stage,
    running: &Running,
    connections: u32,
    seconds: u32,
) -> Result<Vec<Reading>> {
    warm_up(stage, running, connections)?;
    let to = running.to.to_string();
    let (before, hop_before) = (running.cpu(), running.cpu_of_hop());
    let answers = wrk::run(&stage.client, Path::new(FOLDER), (&to, HTTP), connections, false, seconds)?;
    let (used, hop) = (running.cpu() - before, running.cpu_of_hop() - hop_before);
    let name = this.name();
    let mut readings = vec![reading(&name, "1000/s", Better::More, answers.a_second() / 1000.0)];
    for (percentile, value) in [("p50", answers.p50), ("p99", answers.p99), ("p99.9", answers.p999)] {
        readings.push(reading(&format!("{name}: {percentile}"), "µs", Better::Less, value));
    }
    readings.extend(cpu(running, &name, "s/1000", used * 1000.0 / answers.requests));
    // What a proxy of one hop is compared with: the carrier on the client's node.
    let a_cpu_second =
        || reading(&format!("{name}: a CPU second of the hop"), "1000", Better::More, answers.requests / hop / 1000.0);
    readings.extend((hop > 0.0).then(a_cpu_second));
    Ok(readings)
}

fn new_connections(this: Measurement, stage: &Stage, running: &Running, seconds: u32) -> Result<Vec<Reading>> {
    warm_up(stage, running, NEW_CONNECTIONS)?;
    let to = running.to.to_string();
    let before = running.cpu();
    let answers = wrk::run(&stage.client, Path::new(FOLDER), (&to, HTTP), NEW_CONNECTIONS, true, seconds)?;
    let used = running.cpu() - before;
    let name = this.name();
    let mut readings = vec![
        reading(&name, "1000/s", Better::More, answers.a_second() / 1000.0),
        reading(&format!("{name}: p99"), "µs", Better::Less, answers.p99),
    ];
    readings.extend(cpu(running, &name, "s/1000", used * 1000.0 / answers.requests));
    Ok(readings)
}

fn connect(stage: &Stage, running: &Running, seconds: u32) -> Result<Vec<Reading>> {
    warm_up(stage, running, 1)?;
    let (mut standing, mut answered) = (Vec::new(), Vec::new());
    stage.client.run(|| -> Result<()> {
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(seconds.into()) {
            let dialled = Instant::now();
            let mut stream = TcpStream::connect((running.to, HTTP))?;
            standing.push(dialled.elapsed());
            ask(&mut stream)?;
            answered.push(dialled.elapsed());
        }
        Ok(())
    })?;
    let mut readings = Vec::new();
    for (what, mut times) in [("connect()", standing), ("connect() to first answer", answered)] {
        times.sort_unstable();
        for (percentile, part) in [("p50", 50), ("p99", 99)] {
            let time = times.get(times.len() * part / 100).context("nothing was measured")?;
            let micros = time.as_secs_f64() * 1e6;
            readings.push(reading(&format!("{what}: {percentile}"), "µs", Better::Less, micros));
        }
    }
    Ok(readings)
}

fn open_loop(stage: &Stage, running: &Running, seconds: u32, rate: f64) -> Result<Vec<Reading>> {
    let latencies = send(stage, running, rate, OPEN_LOOP_CONNECTIONS, WARM_UP_MS, seconds * 1000)?;
    let name = format!("open loop at {:.1}k/s", rate / 1000.0);
    let micros = [("p50", latencies.p50), ("p99", latencies.p99), ("p99.9", latencies.p999)];
    let mut readings: Vec<_> =
        micros.map(|(what, value)| reading(&format!("{name}: {what}"), "µs", Better::Less, value)).into();
    let kept = latencies.answered / (latencies.answered + latencies.unanswered);
    readings.push(reading(&format!("{name}: answered"), "of 1", Better::More, kept));
    Ok(readings)
}

/// What `selvedge-load open-loop` prints.
#[derive(Deserialize)]
struct Latencies {
    answered: f64,
    unanswered: f64,
    p50: f64,
    p99: f64,
    p999: f64,
}

/// A little traffic on as many connections, so that pools, pages and caches are warm.
fn warm_up(stage: &Stage, running: &Running, connections: u32) -> Result<()> {
    send(stage, running, f64::from(connections) * 5.0 + 1000.0, connections, 0, WARM_UP_MS).map(drop)
}

fn send(stage: &Stage, running: &Running, rate: f64, connections: u32, warm_up: u32, millis: u32) -> Result<Latencies> {
    let mut command = Command::new(&stage.load);
    command.args(["open-loop".into(), format!("{}:{HTTP}", running.to), rate.to_string(), connections.to_string()]);
    command.args([warm_up, millis].map(|time| time.to_string()));
    let output = stage.client.output(&mut command).context("cannot run selvedge-load")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
    serde_json::from_slice(&output.stdout).context("what selvedge-load printed")
}

/// What the carriers used, where there are any.
fn cpu(running: &Running, of: &str, unit: &'static str, value: f64) -> Option<Reading> {
    running.is_carried().then(|| reading(&format!("{of}: CPU"), unit, Better::Less, value))
}

fn reading(name: &str, unit: &'static str, better: Better, value: f64) -> Reading {
    Reading { row: Row { name: name.into(), unit, better }, value }
}

fn largest(values: &[f64]) -> f64 {
    values.iter().copied().fold(0.0, f64::max)
}

fn plural(count: u32) -> &'static str {
    if count == 1 { "" } else { "s" }
}

const IDLE_CONNECTIONS: usize = 1000;
const NEW_CONNECTIONS: u32 = 16;
const OPEN_LOOP_CONNECTIONS: u32 = 64;
const WARM_UP_MS: u32 = 300;
const SETTLING: Duration = Duration::from_millis(2500);
