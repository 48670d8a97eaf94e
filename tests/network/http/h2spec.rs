//! [h2spec](https://github.com/summerwind/h2spec) asks the agent what RFC 9113 and RFC 7541 leave no choice in.

use std::env;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::{AgentOptions, Lab, trial_with};

use super::Shop;
use crate::lab;

pub fn trials() -> Vec<Trial> {
    let trial = trial_with("http::the_letter_of_http2_is_kept", lab(), the_letter_of_http2);
    vec![trial.with_ignored_flag(env::var_os(PROGRAM).is_none())]
}

fn the_letter_of_http2(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    let _agents = lab.start_agents(&AgentOptions::default())?;
    shop.web.http_get(shop.vip(), "/warm")?;
    let program = env::var_os(PROGRAM).context("SELVEDGE_H2SPEC does not say where h2spec is")?;
    let mut command = Command::new(program);
    // Ten seconds: a machine that is busy is not a server that is silent.
    command.args(["--host", &shop.vip().0.to_string(), "--port", "80", "--path", "/bytes/100", "--timeout", "10"]);
    let output = shop.web.output(&mut command)?;
    let text = String::from_utf8_lossy(&output.stdout);
    let summary = text.lines().rev().find(|line| line.contains(" tests, ")).context("h2spec counted nothing")?;
    let (_, failures) = text.split_once("Failures:").unwrap_or_default();
    let failed: Vec<_> = failures.lines().filter_map(|line| line.trim().strip_prefix("\u{d7} ")).collect();
    ensure!(failed.iter().all(|title| *title == RESET), "{text}");
    ensure!(failed.is_empty() || failures.contains("connection reset by peer"), "{failures}");
    let run: usize = summary.split(' ').next().unwrap_or_default().parse()?;
    ensure!(run >= LEAST, "h2spec asked {run} questions only: {summary}");
    Ok(())
}

/// Where the program is; `cargo xtask test` builds it.
const PROGRAM: &str = "SELVEDGE_H2SPEC";
/// What is no HTTP is reset, as on any port that declares it; h2spec would have it closed in order.
const RESET: &str = "2: Sends invalid connection preface";
/// Of the version that is pinned.
const LEAST: usize = 140;
