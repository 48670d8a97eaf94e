//! Requests, by wrk.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use selvedge_lab::Namespace;
use serde::Deserialize;

/// What one run saw. Latencies are in microseconds.
#[derive(Clone, Copy, PartialEq, Debug, Deserialize)]
pub struct Answers {
    pub requests: f64,
    /// The run's length in microseconds.
    duration: f64,
    errors: f64,
    pub p50: f64,
    pub p99: f64,
    pub p999: f64,
}

impl Answers {
    pub fn a_second(&self) -> f64 {
        self.requests / (self.duration / 1e6)
    }
}

/// Asks on one thread and some connections, each request as soon as the one before is answered.
pub fn run(
    client: &Namespace,
    folder: &Path,
    to: (&str, u16),
    connections: u32,
    close: bool,
    seconds: u32,
) -> Result<Answers> {
    let script = folder.join("wrk.lua");
    fs::write(&script, SCRIPT).with_context(|| format!("cannot write {}", script.display()))?;
    let mut command = Command::new("wrk");
    command.args(["--threads", "1", "--connections", &connections.to_string()]);
    command.args(["--duration", &format!("{seconds}s"), "--timeout", "10s", "--script"]).arg(script);
    if close {
        command.args(["--header", "Connection: close"]);
    }
    command.arg(format!("http://{}:{}/", to.0, to.1));
    let output = client.output(&mut command).context("cannot run wrk")?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "wrk: {text}{}", String::from_utf8_lossy(&output.stderr));
    parse(&text)
}

fn parse(text: &str) -> Result<Answers> {
    let line = text.lines().find(|line| line.starts_with("{\"requests\""));
    let line = line.with_context(|| format!("wrk told no result: {text}"))?;
    let answers: Answers = serde_json::from_str(line).with_context(|| format!("wrk told {line:?}"))?;
    ensure!(answers.requests > 0.0, "wrk had no answer: {line}");
    // A few connections end with the run itself.
    ensure!(answers.errors <= answers.requests / 100.0, "wrk had too many errors: {line}");
    Ok(answers)
}

/// wrk's own report has no 99.9th percentile.
const SCRIPT: &str = r#"
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    '{"requests": %d, "duration": %d, "errors": %d, "p50": %d, "p99": %d, "p999": %d}\n',
    summary.requests, summary.duration, e.connect + e.read + e.write + e.status + e.timeout,
    latency:percentile(50), latency:percentile(99), latency:percentile(99.9)))
end
"#;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_result_is_found_among_what_wrk_says() {
        let text = "Running 2s test @ http://10.1.0.2:8080/\n  1 threads and 64 connections\nRequests/sec: 1.0\n\
            {\"requests\": 90000, \"duration\": 2000000, \"errors\": 3, \"p50\": 600, \"p99\": 1500, \"p999\": 4000}\n";
        let answers = parse(text).unwrap();
        assert_eq!(answers.a_second(), 45_000.0);
        assert_eq!([answers.p50, answers.p99, answers.p999], [600.0, 1500.0, 4000.0]);
    }

    #[test]
    fn a_run_of_errors_is_no_result() {
        let run = |requests, errors| {
            parse(&format!(
                "{{\"requests\": {requests}, \"duration\": 1, \"errors\": {errors}, \"p50\": 1, \"p99\": 1, \"p999\": 1}}"
            ))
        };
        assert!(run(1000, 11).unwrap_err().to_string().contains("too many errors"));
        assert!(run(0, 0).unwrap_err().to_string().contains("no answer"));
        assert!(run(1000, 10).is_ok());
        assert!(parse("unable to connect to 10.1.0.2:8080 Connection refused\n").is_err());
    }
}
