//! `cargo xtask bench` in a few seconds: that it measures and tells, not what.

use std::env;
use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::build::{load, release};
use crate::test::runner::{Excerpt, Tally};

/// What every run must have a value of.
const EXPECTED: [(&str, &str); 6] = [
    ("relay, 2 hops", "requests, 64 connections"),
    ("relay, 2 hops", "requests, 64 connections: CPU"),
    ("HBONE", "requests, 64 connections"),
    ("HBONE", "requests, 64 connections: p99.9"),
    ("HBONE", "memory of one agent, after load"),
    ("against", "requests, 64 connections"),
];

pub fn check() -> Result<Tally> {
    let binary = release()?;
    load()?;
    let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
    let file = folder.path().join("bench.json");
    let mut command = Command::new(env::current_exe()?);
    command.args(["bench", "--quick", "--skip-build", "--only", "two nodes", "--only", "hbone|against"]);
    command.args(["--only", "requests, 64", "--against", AGAINST, "--json"]).arg(&file);
    let output =
        command.env("SELVEDGE_BIN", binary).stderr(Stdio::inherit()).output().context("cannot run the bench")?;
    ensure!(output.status.success(), "the bench ended with {}", output.status);
    let text = fs::read_to_string(&file).context("the bench wrote no JSON")?;
    let report: Value = serde_json::from_str(&text).with_context(|| format!("the bench wrote no JSON: {text}"))?;
    let results = report["results"].as_array().context("the bench told no results")?;
    let mut tally = Tally::default();
    for (variant, measurement) in EXPECTED {
        let of = |result: &&Value| result["variant"] == variant && result["measurement"] == measurement;
        match results.iter().find(of).and_then(|result| result["value"]["median"].as_f64()) {
            Some(value) if value > 0.0 => tally.passed += 1,
            other => tally.fail(format!("{variant}, {measurement}"), Excerpt::of(&format!("{other:?}"))),
        }
    }
    println!("{} values told, {} not", tally.passed, tally.failed);
    Ok(tally)
}

/// No proxy at all: the script only has to be told what it needs, and to be ended.
const AGAINST: &str = r#"test -d "$BENCH_NETNS_DIR" && test -n "$BENCH_NODE_IP" && echo "$BENCH_PODS" | grep -q joined &&
    touch "$BENCH_READY" && exec sleep 600"#;
