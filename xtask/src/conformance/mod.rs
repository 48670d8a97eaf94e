//! `cargo xtask conformance`: the Gateway API's own tests for meshes, on a real cluster with Selvedge on it.

mod installed;
mod suite;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};

use crate::build::target_directory;
use crate::cluster::{Cluster, GatewayApi, check_rights, gateway_api, up};
use crate::image;
use crate::style::dim;
use crate::test::Tally;

/// What `cargo xtask conformance` takes.
#[derive(Args)]
pub struct Options {
    /// Runs only the suite's tests whose name contains this.
    filter: Option<String>,
    /// Leaves the cluster and the suite's application as they are afterwards.
    #[arg(long)]
    keep: bool,
    /// Where requests of the suite's application are routed.
    #[arg(long, value_enum, default_value_t = Place::Node)]
    place: Place,
    /// The cluster's name; one of this name that is up is used, and then stays up.
    #[arg(long, default_value = "conformance", env = "SELVEDGE_CLUSTER")]
    name: String,
}

#[derive(Clone, Copy, PartialEq, Debug, ValueEnum)]
enum Place {
    /// By the agents of the nodes.
    Node,
    /// By a waypoint in a process of its own.
    Waypoint,
    /// Nowhere: pods are in the mesh, and connections are not looked into. Most tests must fail.
    None,
    /// Nowhere, without Selvedge: tells what the suite asks of a cluster alone. Most tests must fail.
    Outside,
}

impl Place {
    /// What the namespaces of the suite's application ask for, as annotations.
    fn asked(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Node => &[("selvedge.dev/mesh", "enabled"), ("selvedge.dev/waypoint", "node")],
            Self::Waypoint => &[("selvedge.dev/mesh", "enabled"), ("selvedge.dev/waypoint", installed::WAYPOINT)],
            Self::None => &[("selvedge.dev/mesh", "enabled")],
            Self::Outside => &[],
        }
    }
}

pub fn run(options: &Options) -> Result<ExitCode> {
    let tally = tests(options)?;
    println!("\n{}", tally.words());
    Ok(if tally.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// All of them, as a section of `cargo xtask test`: on a cluster of their own, which does not outlive them.
pub fn section() -> Result<Tally> {
    tests(&Options { filter: None, keep: false, place: Place::Node, name: "test".to_owned() })
}

fn tests(options: &Options) -> Result<Tally> {
    check_rights()?;
    let gateway_api = gateway_api()?;
    let images = image::for_conformance(&application_image(&gateway_api.application)?)?;
    let was_up = Cluster::look(&options.name)?.is_some();
    let result = on_cluster(options, &gateway_api, &images);
    // A failure to clean up is one more failure, and hides none.
    if !was_up && !options.keep {
        match (Cluster::remove(&options.name), &result) {
            (Err(error), Err(_)) => eprintln!("{error:#}"),
            (removed, _) => removed?,
        }
    }
    result
}

fn on_cluster(options: &Options, gateway_api: &GatewayApi, images: &[PathBuf]) -> Result<Tally> {
    let cluster = up(&options.name, NODES)?;
    step("images", || cluster.load(images))?;
    step("kinds of the Gateway API", || installed::kinds(&cluster, &gateway_api.kinds))?;
    step("what an earlier run left", || installed::clear(&cluster))?;
    if options.place != Place::Outside {
        step("Selvedge", || installed::selvedge(&cluster))?;
    }
    if options.place == Place::Waypoint {
        step("waypoint", || installed::waypoint(&cluster))?;
    }
    let folder = target_directory().join("conformance").join(&options.name);
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let run = suite::Run {
        program: &gateway_api.suite,
        kubeconfig: &cluster.kubeconfig(),
        annotations: options.place.asked(),
        filter: options.filter.as_deref().unwrap_or_default(),
        keep: options.keep,
        folder: &folder,
    };
    let tally = run.run()?;
    if tally.failed > 0 {
        tally.failures.iter().for_each(|failure| failure.print("failed:"));
        if options.place != Place::Outside {
            installed::tell_logs(&cluster, &folder)?;
        }
    }
    Ok(tally)
}

/// The one image that the suite's application runs. Nothing pulls it: ours is loaded under its name.
fn application_image(manifests: &Path) -> Result<String> {
    let text = fs::read_to_string(manifests).with_context(|| format!("cannot read {}", manifests.display()))?;
    let mut images: Vec<_> = text.lines().filter_map(|line| line.trim().strip_prefix("image: ")).collect();
    images.dedup();
    match images[..] {
        [image] => Ok(image.to_owned()),
        _ => bail!("{} names {} images, and one is made: {images:?}", manifests.display(), images.len()),
    }
}

/// One step, with how long it took.
fn step<T>(name: &str, run: impl FnOnce() -> Result<T>) -> Result<T> {
    let began = Instant::now();
    let done = run().with_context(|| name.to_owned())?;
    eprintln!("  {name} {}", dim(format!("{:.1} s", began.elapsed().as_secs_f64())));
    Ok(done)
}

const NODES: u8 = 2;
