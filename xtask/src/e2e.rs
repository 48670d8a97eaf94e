//! `cargo xtask e2e`: the tests of `tests/e2e` on a real cluster, brought up once for all of them.

use std::env;
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::Instant;

use anyhow::{Result, ensure};
use clap::Args;

use crate::build::{cargo, release_path};
use crate::cluster::{Cluster, argo_rollouts, flagger, gateway_api, kwok, up};
use crate::image;
use crate::style::dim;
use crate::test::{Tally, count_labelled};

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
    /// Instead of the tests, lets Argo Rollouts and Flagger release an application step by step. Takes minutes, and the
    /// first time minutes more to build them.
    #[arg(long, conflicts_with_all = ["scale", "clusters"])]
    canaries: bool,
    /// The cluster's name; one of this name that is up is used, and then stays up.
    #[arg(long, default_value = "e2e", env = "SELVEDGE_CLUSTER")]
    name: String,
    /// Deals the tests to this many clusters, NAME, NAME-2 and so on, which work at the same time: most tests want a
    /// cluster to themselves, and wait. Each takes about 2 GB.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=4), conflicts_with = "scale")]
    clusters: u8,
}

pub fn run(options: &Options) -> Result<ExitCode> {
    let tally = tests(options, 0)?;
    println!("\n{} passed, {} failed", tally.passed, tally.failed);
    Ok(if tally.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The tests, as a section of `cargo xtask test`: on clusters of their own, which do not outlive them.
pub fn section(retries: u32) -> Result<Tally> {
    let name = "test".to_owned();
    let options = Options { filter: None, keep: false, scale: false, canaries: false, name, clusters: CLUSTERS };
    tests(&options, retries)
}

fn tests(options: &Options, retries: u32) -> Result<Tally> {
    crate::cluster::check_rights()?;
    let mut images = image::for_tests()?;
    if options.canaries {
        images.extend(image::for_canaries(&argo_rollouts()?, &flagger()?)?);
    }
    // Built before several would build it.
    let built = cargo().args(["test", "--workspace", "--test", "e2e", "--locked", "--no-run"]).status()?;
    ensure!(built.success(), "cargo could not build the tests");
    thread::scope(|scope| {
        let mut shares = Vec::new();
        for number in 1..=options.clusters {
            let share = Share { number, of: options.clusters, options, images: &images, retries };
            // One after the other comes up, and each starts with its tests while the next does.
            let came_up = share.up();
            shares.push(scope.spawn(move || match came_up {
                Ok(was_up) => share.end(was_up, share.run()),
                Err(error) => share.end(false, Err(error)),
            }));
        }
        let results =
            shares.into_iter().map(|share| share.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        // Every cluster is waited for, and taken down, before the first error is told.
        results.collect::<Vec<_>>().into_iter().try_fold(Tally::default(), |all, tally| Ok(all + &tally?))
    })
}

/// The tests that one cluster gets.
struct Share<'a> {
    number: u8,
    of: u8,
    options: &'a Options,
    images: &'a [PathBuf],
    retries: u32,
}

impl Share<'_> {
    fn cluster(&self) -> String {
        let name = &self.options.name;
        if self.number == 1 { name.clone() } else { format!("{name}-{}", self.number) }
    }

    /// Brings its cluster up, and says whether it was.
    fn up(&self) -> Result<bool> {
        let was_up = Cluster::look(&self.cluster())?.is_some();
        let cluster = up(&self.cluster(), NODES)?;
        let began = Instant::now();
        cluster.load(self.images)?;
        eprintln!("  images of the tests {}", dim(format!("{:.1} s", began.elapsed().as_secs_f64())));
        Ok(was_up)
    }

    fn run(&self) -> Result<Tally> {
        let mut command = cargo();
        command.args(["test", "--workspace", "--test", "e2e", "--locked", "--"]).args(&self.options.filter);
        command.env("SELVEDGE_XTASK", env::current_exe()?).env("SELVEDGE_CLUSTER", self.cluster());
        command.env("SELVEDGE_SHARE", format!("{}/{}", self.number, self.of));
        if self.options.scale {
            command.arg("--nocapture").env("SELVEDGE_KWOK", kwok()?);
        }
        if self.options.canaries {
            command.env("SELVEDGE_ARGO_ROLLOUTS", argo_rollouts()?).env("SELVEDGE_FLAGGER", flagger()?);
        }
        command.env("SELVEDGE_IMAGE", image::AGENT).env("SELVEDGE_TEST_IMAGE", image::TEST);
        command.env("SELVEDGE_GATEWAY_API", gateway_api()?.kinds);
        let label = if self.of == 1 { String::new() } else { format!("{}: ", self.cluster()) };
        count_labelled(command.env("SELVEDGE_PROGRAM", release_path()?), self.retries, &label)
    }

    /// Takes the cluster down, if it is to go. A failure to clean up is one more failure, and hides none.
    fn end(&self, was_up: bool, result: Result<Tally>) -> Result<Tally> {
        if !was_up && !self.options.keep {
            match (Cluster::remove(&self.cluster()), &result) {
                (Err(error), Err(_)) => eprintln!("{error:#}"),
                (removed, _) => removed?,
            }
        }
        result
    }
}

const NODES: u8 = 2;
/// How many clusters share the tests in `cargo xtask test`.
const CLUSTERS: u8 = 3;
