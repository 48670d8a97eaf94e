//! An open loop: requests leave on a timetable, whether or not the ones before were answered.
//!
//! A closed loop (wrk) sends the next request once it has the last answer, and so takes fewer samples just while the
//! server is slow: coordinated omission. Here a latency counts from the moment a request was due, also where it had to
//! wait for a free connection.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use serde_json::{Value, json};

/// What to send.
pub struct Load {
    pub to: SocketAddr,
    /// Requests a second.
    pub rate: f64,
    pub connections: usize,
    /// Requests due in this first time are sent, and not counted.
    pub warm_up: Duration,
    pub time: Duration,
}

impl Load {
    pub fn run(&self) -> Result<Latencies> {
        ensure!(self.rate > 0.0 && self.connections > 0, "neither rate nor connections may be 0");
        let request = format!("GET / HTTP/1.1\r\nHost: {}\r\n\r\n", self.to);
        let mut connections: Vec<Connection> =
            (0..self.connections).map(|_| Connection::open(self.to)).collect::<Result<_>>()?;
        let total = ((self.warm_up + self.time).as_secs_f64() * self.rate) as u64;
        let began = Instant::now();
        let due = |number: u64| began + Duration::from_secs_f64(number as f64 / self.rate);
        let counts_from = began + self.warm_up;
        let deadline = began + self.warm_up + self.time + PATIENCE;
        let (mut next, mut waiting, mut latencies) = (0, VecDeque::new(), Latencies::default());
        loop {
            let now = Instant::now();
            while next < total && due(next) <= now {
                waiting.push_back(due(next));
                next += 1;
            }
            for connection in connections.iter_mut().filter(|connection| connection.asked.is_none()) {
                let Some(due) = waiting.pop_front() else { break };
                connection.ask(&request, due)?;
            }
            let busy: Vec<usize> = (0..connections.len()).filter(|at| connections[*at].asked.is_some()).collect();
            if next == total && waiting.is_empty() && busy.is_empty() {
                return Ok(latencies.closed(self));
            }
            if now > deadline {
                latencies.unanswered = busy.len() + waiting.len();
                return Ok(latencies.closed(self));
            }
            let until = if next < total { due(next) } else { deadline };
            for at in wait(&connections, &busy, until)? {
                if let Some(asked) = connections[at].hear()?
                    && asked >= counts_from
                {
                    latencies.micros.push(asked.elapsed().as_micros() as u64);
                }
            }
        }
    }
}

/// How long after its due time each request was answered.
#[derive(Default)]
pub struct Latencies {
    micros: Vec<u64>,
    /// Requests that had no answer long after the end.
    unanswered: usize,
    /// Answers a second.
    rate: f64,
}

impl Latencies {
    fn closed(mut self, load: &Load) -> Self {
        self.micros.sort_unstable();
        self.rate = self.micros.len() as f64 / load.time.as_secs_f64();
        self
    }

    /// In microseconds; of 0 answers, 0.
    fn percentile(&self, percent: f64) -> u64 {
        let rank = (self.micros.len() as f64 * percent / 100.0).ceil() as usize;
        self.micros.get(rank.max(1) - 1).copied().unwrap_or_default()
    }

    pub fn to_json(&self) -> Value {
        json!({
            "answered": self.micros.len(),
            "unanswered": self.unanswered,
            "rate": self.rate,
            "p50": self.percentile(50.0),
            "p99": self.percentile(99.0),
            "p999": self.percentile(99.9),
            "max": self.percentile(100.0),
        })
    }
}

struct Connection {
    stream: TcpStream,
    /// When the request was due that is on its way.
    asked: Option<Instant>,
    heard: Vec<u8>,
}

impl Connection {
    fn open(to: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&to, PATIENCE).with_context(|| format!("cannot connect to {to}"))?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        Ok(Self { stream, asked: None, heard: Vec::new() })
    }

    fn ask(&mut self, request: &str, due: Instant) -> Result<()> {
        // A few bytes on a connection without anything on its way always fit.
        self.stream.write_all(request.as_bytes()).context("a request could not be sent")?;
        self.asked = Some(due);
        Ok(())
    }

    /// Reads what has come; once the answer is whole, returns when it was due.
    fn hear(&mut self) -> Result<Option<Instant>> {
        let mut buffer = [0; 16 * 1024];
        match self.stream.read(&mut buffer) {
            Ok(0) => bail!("the server closed a connection before its answer was whole"),
            Ok(count) => self.heard.extend_from_slice(&buffer[..count]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => return Ok(None),
            Err(error) => return Err(error).context("a connection broke"),
        }
        if !is_whole(&self.heard)? {
            return Ok(None);
        }
        self.heard.clear();
        Ok(self.asked.take())
    }
}

/// Whether an HTTP response is all there; it must be a 200 with `content-length`.
fn is_whole(heard: &[u8]) -> Result<bool> {
    let Some(end) = heard.windows(4).position(|four| four == b"\r\n\r\n") else { return Ok(false) };
    let head = String::from_utf8_lossy(&heard[..end]);
    ensure!(head.starts_with("HTTP/1.1 200"), "an answer that is no 200: {head}");
    let lengths = head.lines().filter_map(|line| line.split_once(':'));
    let length = lengths.filter(|(name, _)| name.eq_ignore_ascii_case("content-length")).map(|(_, value)| value).next();
    let length: usize = length.context("an answer without content-length")?.trim().parse().context("content-length")?;
    Ok(heard.len() >= end + 4 + length)
}

/// Waits for answers, as long as that; returns whose.
fn wait(connections: &[Connection], busy: &[usize], until: Instant) -> Result<Vec<usize>> {
    let mut polled: Vec<_> =
        busy.iter().map(|at| PollFd::new(connections[*at].stream.as_fd(), PollFlags::POLLIN)).collect();
    // To the nanosecond: a timer of milliseconds would send in bursts.
    match ppoll(&mut polled, Some(TimeSpec::from(until.saturating_duration_since(Instant::now()))), None) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(error) => return Err(error).context("cannot wait for answers"),
    }
    let ready = |poll: &PollFd| poll.revents().is_some_and(|events| !events.is_empty());
    Ok(busy.iter().zip(&polled).filter(|(_, poll)| ready(poll)).map(|(at, _)| *at).collect())
}

const PATIENCE: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    #[test]
    fn a_stall_of_the_server_is_in_the_latencies_of_all_who_were_due_in_it() {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = server.local_addr().unwrap();
        thread::spawn(move || {
            let (mut stream, _) = server.accept().unwrap();
            let mut asked = [0; 4096];
            let mut answered = 0;
            while stream.read(&mut asked).is_ok_and(|count| count > 0) {
                answered += 1;
                if answered == 20 {
                    thread::sleep(Duration::from_millis(300));
                }
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").unwrap();
            }
        });
        let time = Duration::from_millis(500);
        let load = Load { to, rate: 200.0, connections: 1, warm_up: Duration::ZERO, time };
        let latencies = load.run().unwrap();
        assert_eq!((latencies.micros.len(), latencies.unanswered), (100, 0));
        // Of 100 requests about 60 were due while nobody answered; a closed loop would have seen one.
        assert!(latencies.percentile(80.0) > 100_000, "{}", latencies.to_json());
        assert!(latencies.percentile(100.0) >= 300_000);
    }

    #[test]
    fn an_answer_is_whole_with_its_last_byte() {
        let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
        assert!(is_whole(answer).unwrap());
        assert!(!is_whole(&answer[..answer.len() - 1]).unwrap());
        assert!(!is_whole(b"HTTP/1.1 200 OK\r\nConte").unwrap());
        assert!(is_whole(b"HTTP/1.1 502 Bad Gateway\r\n\r\n").is_err());
    }

    #[test]
    fn percentiles_are_of_the_sorted_answers() {
        let latencies = Latencies { micros: (1..=1000).collect(), ..Latencies::default() };
        assert_eq!([50.0, 99.0, 99.9, 100.0].map(|percent| latencies.percentile(percent)), [500, 990, 999, 1000]);
        assert_eq!(Latencies::default().percentile(50.0), 0);
    }
}
