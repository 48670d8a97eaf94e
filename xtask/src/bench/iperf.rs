//! Bytes, by iperf3.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use selvedge_lab::{BOUND, Namespace, eventually};
use serde_json::Value;

/// What one run moved.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Moved {
    pub gigabits_a_second: f64,
    pub gigabytes: f64,
}

/// How much is sent before a sample, so that connections, windows and pages are warm.
const WARM_UP: [&str; 2] = ["--bytes", "64M"];

/// Sends on some streams to `iperf3 --server`, or has it send back.
pub fn run(client: &Namespace, to: (&str, u16), streams: u32, back: bool, seconds: u32) -> Result<Moved> {
    talk(client, to, streams, back, &["--time", &seconds.to_string()])
}

pub fn warm_up(client: &Namespace, to: (&str, u16), streams: u32, back: bool) -> Result<()> {
    talk(client, to, streams, back, &WARM_UP).map(drop)
}

fn talk(client: &Namespace, to: (&str, u16), streams: u32, back: bool, length: &[&str]) -> Result<Moved> {
    let mut command = Command::new("iperf3");
    command.args(["--json", "--client", to.0, "--port", &to.1.to_string(), "--parallel", &streams.to_string()]);
    command.args(["--connect-timeout", "10000"]).args(length);
    if back {
        command.arg("--reverse");
    }
    // The server ends one test before it takes another, a moment after the client has; between two it does not listen.
    let mut said = String::new();
    let free = eventually("iperf3's server is free", BOUND, || {
        let output = client.output(&mut command);
        said = output.map_or_else(|error| error.to_string(), |output| String::from_utf8_lossy(&output.stdout).into());
        (!["server is busy", "Connection refused"].iter().any(|busy| said.contains(busy))).then_some(())
    });
    free.with_context(|| said.clone())?;
    parse(&said)
}

fn parse(text: &str) -> Result<Moved> {
    let said: Value = serde_json::from_str(text).with_context(|| format!("iperf3 printed no JSON: {text}"))?;
    let error = said["error"].as_str();
    ensure!(error.is_none(), "iperf3: {}", error.unwrap_or_default());
    // What arrived, not what was handed to the kernel.
    let sum = &said["end"]["sum_received"];
    let number = |name: &str| sum[name].as_f64().with_context(|| format!("iperf3 told no end.sum_received.{name}"));
    Ok(Moved { gigabits_a_second: number("bits_per_second")? / 1e9, gigabytes: number("bytes")? / 1e9 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_arrived_counts() {
        let text = r#"{"start": {}, "intervals": [], "end": {
            "sum_sent": {"seconds": 1.0, "bytes": 2600000000, "bits_per_second": 20800000000.0},
            "sum_received": {"seconds": 1.0, "bytes": 2500000000, "bits_per_second": 20000000000.0}}}"#;
        assert_eq!(parse(text).unwrap(), Moved { gigabits_a_second: 20.0, gigabytes: 2.5 });
    }

    #[test]
    fn an_error_is_told_in_its_words() {
        let text = r#"{"start": {}, "end": {}, "error": "unable to connect to server: Connection refused"}"#;
        assert!(parse(text).unwrap_err().to_string().contains("Connection refused"));
        assert!(parse("").unwrap_err().to_string().contains("no JSON"));
    }
}
