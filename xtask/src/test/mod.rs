//! `cargo xtask test`: everything that guards the project, section by section.

mod ahead;
mod bench;
mod dependencies;
mod generated;
mod runner;
mod unprivileged;

use std::env;
use std::fs;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use nix::unistd::geteuid;
use serde_json::Value;

use crate::build::{cargo, release, root};
use crate::cluster;
use crate::conformance;
use crate::e2e;
use crate::image;
use crate::style::{bad, bold, dim, mark};
use crate::test::ahead::Ahead;
pub use crate::test::ahead::prepare;
pub use crate::test::runner::{Excerpt, Tally, count_labelled};
use crate::test::runner::{check, count_tests};
use crate::tools;

/// What `cargo xtask test` takes.
#[derive(Args)]
pub struct Options {
    /// Runs only the sections whose name contains this.
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
    /// Prints the sections' names and runs none.
    #[arg(long)]
    list: bool,
    /// How often a test that failed is run again, where few failed and what else the machine does may be the cause. One
    /// that then passes is told as flaky.
    #[arg(long, value_name = "N", default_value_t = 1)]
    retries: u32,
}

pub fn run(options: &Options) -> Result<ExitCode> {
    let filter = options.filter.as_deref().unwrap_or_default();
    let sections: Vec<_> = SECTIONS.iter().filter(|section| section.is_meant(filter)).collect();
    ensure!(!sections.is_empty(), "no section's name contains {filter:?}; --list prints them");
    if options.list {
        sections.iter().for_each(|section| println!("{}", section.name));
        return Ok(ExitCode::SUCCESS);
    }
    tools::require(&[&tools::IPTABLES, &tools::IPROUTE2, &tools::CURL, &tools::H2LOAD, &tools::NETCAT, &tools::PSQL])?;
    let mut ahead =
        if sections.len() > 1 && sections.iter().any(|section| section.built) { Some(Ahead::start()?) } else { None };
    let mut results = Vec::new();
    for section in sections {
        if section.built
            && let Some(ahead) = ahead.take()
        {
            ahead.wait()?;
        }
        results.push(SectionResult::of(section, options.retries));
    }
    // Once more and last, for whoever sees no more than the end.
    results.iter().flat_map(|result| &result.tally.failures).take(SPOKEN).for_each(|failure| failure.print("failed:"));
    results.iter().flat_map(|result| &result.tally.flaky).take(SPOKEN).for_each(|failure| failure.print("flaky:"));
    println!("\n{}", bold("Summary"));
    for result in &results {
        let passed = result.tally.failed == 0;
        println!("  {} {:<34} {}", mark(passed), result.name, dim(result.words()));
    }
    for result in results.iter().filter(|result| result.tally.failed > 0) {
        println!("{} {}: cargo xtask test --filter {:?}", bad("failed:"), result.name, result.name);
        for failure in &result.tally.failures {
            println!("    {}", failure.name);
        }
    }
    for result in results.iter().filter(|result| !result.tally.flaky.is_empty()) {
        println!("{} {}: failed once and passed once", bad("flaky:"), result.name);
        for flake in &result.tally.flaky {
            println!("    {}", flake.name);
        }
    }
    let total = results.iter().fold(Tally::default(), |total, result| total + &result.tally);
    println!("\n{}", total.words());
    Ok(if total.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// One guard.
struct Section {
    name: &'static str,
    /// Whether it needs what takes long to build.
    built: bool,
    run: fn(u32) -> Result<Tally>,
}

impl Section {
    fn is_meant(&self, filter: &str) -> bool {
        self.name.contains(filter)
    }

    fn run(&self, retries: u32) -> Tally {
        (self.run)(retries).unwrap_or_else(|error| {
            println!("{error:#}");
            let mut tally = Tally::default();
            tally.fail(format!("section {:?} stopped", self.name), Excerpt::of(&format!("{error:#}")));
            tally
        })
    }
}

const SECTIONS: [Section; 17] = [
    Section { name: "formatting", built: false, run: |_| check(cargo().args(["fmt", "--all", "--check"])) },
    Section {
        name: "clippy",
        built: false,
        run: |_| check(cargo().args(["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"])),
    },
    Section {
        name: "unit and property tests",
        built: false,
        run: |retries| {
            let (what, how) = (["--workspace", "--lib", "--bins"], ["--locked", "--no-fail-fast"]);
            count_tests(cargo().arg("test").args(what).args(how), retries)
        },
    },
    Section { name: "command line and process tests", built: false, run: process_tests },
    Section {
        name: "doc tests",
        built: false,
        run: |_| count_tests(cargo().args(["test", "--workspace", "--doc", "--locked", "--no-fail-fast"]), 0),
    },
    Section {
        name: "real network",
        built: false,
        run: |retries| {
            let of = |target: &str| {
                let mut command = cargo();
                command.args(["test", "--workspace", "--test", target, "--locked"]);
                count_tests(command.env("SELVEDGE_H2SPEC", cluster::h2spec()?), retries)
            };
            Ok(of("lab")? + &of("network")?)
        },
    },
    Section { name: "real network over HBONE", built: false, run: over_hbone },
    Section { name: "real network, tunnels on one node", built: false, run: tunnels_on_one_node },
    Section { name: "real network without root", built: false, run: unprivileged::network },
    Section { name: "dependencies and licences", built: false, run: |_| dependencies::check() },
    Section { name: "generated files", built: false, run: |_| generated::check() },
    Section { name: "images", built: true, run: |_| image::check() },
    Section { name: "demo", built: true, run: |retries| again(retries, demo) },
    Section { name: "demo without root", built: true, run: |retries| again(retries, unprivileged::demo) },
    Section { name: "bench", built: true, run: |retries| again(retries, bench::check) },
    Section { name: "real cluster", built: true, run: |retries| on_cluster(|| e2e::section(retries)) },
    Section { name: "conformance", built: true, run: |retries| on_cluster(|| conformance::section(retries)) },
];

/// The network tests to repeat with HBONE between the agents, by how their names begin: what a tunnel could change.
const OVER_HBONE: [&str; 12] = [
    "access_log",
    "drain",
    "identity",
    "lifecycle",
    "load",
    "observability",
    "policy",
    "retry",
    "reuse",
    "rotation",
    "transport",
    "truthful",
];

/// Those to repeat with the tunnel also between pods of one node, which are joined directly else.
const TUNNELS_ON_ONE_NODE: [&str; 6] = ["access_log", "drain", "load", "policy", "services", "source_address"];

fn over_hbone(retries: u32) -> Result<Tally> {
    network_again(&OVER_HBONE, ("SELVEDGE_TUNNEL", "hbone"), retries)
}

fn tunnels_on_one_node(retries: u32) -> Result<Tally> {
    network_again(&TUNNELS_ON_ONE_NODE, ("SELVEDGE_SAME_NODE", "tunnel"), retries)
}

/// Repeats network tests with agents that find this in their environment.
fn network_again(beginnings: &[&str], (name, value): (&str, &str), retries: u32) -> Result<Tally> {
    beginnings.iter().try_fold(Tally::default(), |tally, beginning| {
        let mut command = cargo();
        command.args(["test", "--workspace", "--test", "network", "--locked", "--", beginning]).env(name, value);
        Ok(tally + &count_tests(&mut command, retries)?)
    })
}

/// The test targets of the main package beside `network`, one a file in `tests/`; and those of the echo program.
fn process_tests(retries: u32) -> Result<Tally> {
    let mut command = cargo();
    command.args(["test", "--workspace", "--locked", "--no-fail-fast", "--test", "echo"]);
    for entry in fs::read_dir(root().join("tests")).context("cannot read tests/")? {
        let file = entry?.path();
        if let (Some(name), Some("rs")) = (file.file_stem(), file.extension().and_then(|extension| extension.to_str()))
        {
            command.arg("--test").arg(name);
        }
    }
    count_tests(&mut command, retries)
}

struct SectionResult {
    name: &'static str,
    tally: Tally,
    took: Duration,
}

impl SectionResult {
    fn of(section: &Section, retries: u32) -> Self {
        println!("\n{}", bold(format!("== {}", section.name)));
        let began = Instant::now();
        let tally = section.run(retries);
        let result = Self { name: section.name, tally, took: began.elapsed() };
        println!("{} {}", mark(result.tally.failed == 0), dim(result.words()));
        result
    }

    fn words(&self) -> String {
        format!("{} in {:.1} s", self.tally.words(), self.took.as_secs_f64())
    }
}

fn on_cluster(run: impl FnOnce() -> Result<Tally>) -> Result<Tally> {
    if !is_root() {
        println!("left out: a cluster needs root; sudo env \"PATH=$PATH\" cargo xtask test --filter ...");
        return Ok(Tally::default());
    }
    run()
}

/// What fails in one of two runs and not in the other is flaky, where a run tells one result of many steps.
pub fn again(retries: u32, run: impl Fn() -> Result<Tally>) -> Result<Tally> {
    let mut tally = run()?;
    for _ in 0..retries {
        if tally.failed == 0 {
            break;
        }
        println!("{} {}", bad("once more:"), dim(tally.words()));
        tally = tally.and_again(run()?);
    }
    Ok(tally)
}

fn demo() -> Result<Tally> {
    let binary = release()?;
    let mut command = Command::new(env::current_exe()?);
    count_expectations(command.args(["demo", "--json"]).env("SELVEDGE_BIN", binary))
}

/// Runs `demo --json`; each expectation counts as a test.
fn count_expectations(command: &mut Command) -> Result<Tally> {
    let output = command.stderr(std::process::Stdio::inherit()).output().context("cannot run the demo")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let report: Value = serde_json::from_str(&text).with_context(|| format!("the demo printed no JSON: {text}"))?;
    let expectations = report["expectations"].as_array().context("the demo told no expectations")?;
    let mut tally = Tally::default();
    for expectation in expectations {
        let (name, detail) = (&expectation["name"], &expectation["detail"]);
        match expectation["held"] == true {
            true => tally.passed += 1,
            false => tally.fail(name.to_string(), Excerpt::of(&detail.to_string())),
        }
    }
    if let Some(error) = report["error"].as_str() {
        tally.fail("the demo stopped".to_owned(), Excerpt::of(error));
    }
    ensure!(output.status.success() || tally.failed > 0, "the demo ended with {}", output.status);
    println!("{} expectations held, {} did not", tally.passed, tally.failed);
    Ok(tally)
}

/// How many failures have their words repeated at the end: where more failed, the first tell enough.
const SPOKEN: usize = 8;

/// Whether there is root to do without.
fn is_root() -> bool {
    geteuid().is_root()
}
