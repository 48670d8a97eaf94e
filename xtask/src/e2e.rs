//! `cargo xtask e2e`: the tests of `tests/e2e` on a real cluster, brought up once for all of them.

use std::env;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use clap::Args;

use crate::build::{cargo, release_path};
use crate::cluster::{Cluster, gateway_api, kwok, up};
use crate::image;
use crate::style::dim;
use crate::test::{Tally, count_tests};

/// What `cargo xtask e2e` takes.
#[derive(Args)]
pub struct Options {
    /// Runs only the tests whose name contains this.
    filter: Option<String>,
    /// Leaves the cluster as it is afterwards; the next run takes it as it is.
    #[arg(long)]
    keep: bool,
    /// Instead of the tests, measures one agent among ten thousand pods. Takes minutes.
    #[arg(long)]
    scale: bool,
    /// The cluster's name; one of this name that is up is used, and then stays up.
    #[arg(long, default_value = "e2e", env = "SELVEDGE_CLUSTER")]
    name: String,
}

pub fn run(options: &Options) -> Result<ExitCode> {
    let tally = tests(options)?;
    println!("\n{} passed, {} failed", tally.passed, tally.failed);
    Ok(if tally.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The tests, as a section of `cargo xtask test`: on a cluster of their own, which does not outlive them.
pub fn section() -> Result<Tally> {
    tests(&Options { filter: None, keep: false, scale: false, name: "test".to_owned() })
}

fn tests(options: &Options) -> Result<Tally> {
    crate::cluster::check_rights()?;
    let images = image::for_tests()?;
    let was_up = Cluster::look(&options.name)?.is_some();
    let result = on_cluster(options, &images);
    // A failure to clean up is one more failure, and hides none.
    if !was_up && !options.keep {
        match (Cluster::remove(&options.name), &result) {
            (Err(error), Err(_)) => eprintln!("{error:#}"),
            (removed, _) => removed?,
        }
    }
    result
}

fn on_cluster(options: &Options, images: &[std::path::PathBuf]) -> Result<Tally> {
    let cluster = up(&options.name, NODES)?;
    let began = Instant::now();
    cluster.load(images)?;
    eprintln!("  images of the tests {}", dim(format!("{:.1} s", began.elapsed().as_secs_f64())));
    let mut command = cargo();
    command.args(["test", "--workspace", "--test", "e2e", "--locked", "--"]).args(&options.filter);
    command.env("SELVEDGE_XTASK", env::current_exe()?).env("SELVEDGE_CLUSTER", &options.name);
    if options.scale {
        command.arg("--nocapture").env("SELVEDGE_KWOK", kwok()?);
    }
    count_tests(
        command
            .env("SELVEDGE_IMAGE", image::AGENT)
            .env("SELVEDGE_TEST_IMAGE", image::TEST)
            .env("SELVEDGE_GATEWAY_API", gateway_api()?.kinds)
            .env("SELVEDGE_PROGRAM", release_path()?),
    )
}

const NODES: u8 = 2;
