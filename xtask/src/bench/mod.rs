//! `cargo xtask bench`: what the mesh costs, beside no mesh and beside the least that two hops can cost.

mod goals;
mod iperf;
mod measure;
mod other;
mod proxies;
mod report;
mod scale;
mod stage;
mod stats;
mod usage;
mod variants;
mod wrk;

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::io::{IsTerminal, Write, stderr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Args;
use selvedge_lab::enter;
use serde_json::{Value, json};

use crate::bench::measure::{GROUPS, Measurement, QUICK};
use crate::bench::report::Report;
use crate::bench::scale::Scales;
use crate::bench::stage::Stage;
use crate::bench::variants::{Place, Variant};
use crate::style::{bold, dim};
use crate::{build, tools};

/// What `cargo xtask bench` takes.
#[derive(Args)]
pub struct Options {
    /// One round of the most telling measurements, in about two minutes.
    #[arg(long)]
    quick: bool,
    /// How often everything is measured; the table tells medians. Default: 5, with --quick 1.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: Option<u32>,
    /// How long each sample takes. Default: 3, with --quick 1.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    seconds: Option<u32>,
    /// On how many pods of one node joining and a policy change are measured. Default: 1000, with --quick 100.
    #[arg(long, value_name = "N")]
    pods: Option<usize>,
    /// Measures only where "PLACE, VARIANT: MEASUREMENT" contains this; `|` means or, given twice means and.
    #[arg(long, value_name = "TEXT")]
    only: Vec<String>,
    /// Writes every sample and the results into a file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Uses the binaries that are there instead of building them.
    #[arg(long)]
    skip_build: bool,
    /// Measures this binary instead of building one.
    #[arg(long, env = "SELVEDGE_BIN", value_name = "FILE")]
    binary: Option<PathBuf>,
    #[arg(long, value_name = "CMD", help = AGAINST)]
    against: Option<String>,
}

pub fn run(options: &Options) -> Result<ExitCode> {
    tools::require(&[&tools::IPTABLES, &tools::IPROUTE2, &tools::IPERF3, &tools::WRK, &tools::NGINX])?;
    let binary = match (&options.binary, options.skip_build) {
        (Some(binary), _) => binary.canonicalize().with_context(|| format!("cannot find {}", binary.display()))?,
        (None, true) => build::release_path()?,
        (None, false) => build::release()?,
    };
    let load = if options.skip_build { build::load_path() } else { build::load()? };
    let wanted = |place: Place| options.wants_of(place);
    let (all, unable) = variants::all(&binary, options.against.as_deref(), wanted)?;
    let plan = Plan::new(options, &all)?;
    // From here on everything lives in a world that ends with this process, so that nothing needs to be undone.
    enter();
    let began = Instant::now();
    let stage = Stage::set(&binary, &load)?;
    let mut report = Report::new(&all);
    let result = plan.play(&stage, &mut report).and_then(|()| plan.play_scale(&stage));
    progress("");
    println!("{}", bold(machine_words()));
    println!("{}\n", dim(format!("{}; {}", command_words(), plan.words())));
    unable.into_iter().for_each(|line| report.note(line));
    print!("{}", report.text());
    if let Ok(Some(scales)) = &result {
        print!("\n{}", scales.text());
    }
    println!("{}", dim(format!("in {:.0} s", began.elapsed().as_secs_f64())));
    if let Some(file) = &options.json {
        let mut json = report.json();
        json["scale"] = result.as_ref().ok().and_then(Option::as_ref).map_or(Value::Null, Scales::json);
        json["machine"] = machine();
        json["command"] = command_words().into();
        fs::write(file, format!("{json:#}\n")).with_context(|| format!("cannot write {}", file.display()))?;
    }
    result.map(|_| ExitCode::SUCCESS)
}

impl Options {
    /// Whether anything at all of a place may be meant.
    fn wants_of(&self, place: Place) -> bool {
        let names = GROUPS.iter().flat_map(|group| group.iter()).filter(|measurement| place.has(**measurement));
        let titles: Vec<_> = variants::titles(place).collect();
        names
            .into_iter()
            .any(|measurement| titles.iter().any(|title| self.wants(&format!("{title}: {}", measurement.name()))))
    }

    fn wants(&self, title: &str) -> bool {
        let title = title.to_lowercase();
        self.only.iter().all(|text| text.to_lowercase().split('|').any(|part| title.contains(part.trim())))
    }
}

/// What is to be measured, in which order.
struct Plan {
    rounds: u32,
    seconds: u32,
    groups: Vec<BTreeMap<usize, Vec<Measurement>>>,
    variants: Vec<Variant>,
    /// On how many pods a change is measured.
    pods: Option<usize>,
}

impl Plan {
    fn new(options: &Options, all: &[Variant]) -> Result<Self> {
        let wanted = |variant: &Variant, measurement: Measurement| {
            variant.place.has(measurement) && options.wants(&format!("{}: {}", variant.title(), measurement.name()))
        };
        let groups: &[&[Measurement]] = if options.quick { &QUICK } else { &GROUPS };
        let mut planned = Vec::new();
        for group in groups {
            let mut of_group = BTreeMap::new();
            for (at, variant) in all.iter().enumerate() {
                // The limit is measured wherever something is compared with it.
                let is_wanted = |measurement: &&Measurement| {
                    wanted(variant, **measurement)
                        || variant.is_limit()
                            && variant.place.has(**measurement)
                            && all.iter().any(|other| other.place == variant.place && wanted(other, **measurement))
                };
                let measurements: Vec<_> = group.iter().filter(is_wanted).copied().collect();
                if !measurements.is_empty() {
                    of_group.insert(at, measurements);
                }
            }
            planned.push(of_group);
        }
        let pods = options.pods.unwrap_or(if options.quick { 100 } else { 1000 });
        let pods = options.wants(scale::TITLE).then_some(pods);
        let is_empty = pods.is_none() && planned.iter().all(BTreeMap::is_empty);
        ensure!(!is_empty, "--only {:?} leaves nothing", options.only);
        Ok(Self {
            rounds: options.rounds.unwrap_or(if options.quick { 1 } else { 5 }),
            seconds: options.seconds.unwrap_or(if options.quick { 1 } else { 3 }),
            groups: planned,
            variants: all.to_vec(),
            pods,
        })
    }

    fn play(&self, stage: &Stage, report: &mut Report) -> Result<()> {
        let mut peaks = BTreeMap::new();
        for round in 1..=self.rounds {
            for group in &self.groups {
                for at in self.order(group, round) {
                    let variant = &self.variants[at];
                    self.play_variant(stage, report, &mut peaks, variant, &group[&at], round)
                        .with_context(|| variant.title())?;
                }
            }
        }
        Ok(())
    }

    fn play_scale(&self, stage: &Stage) -> Result<Option<Scales>> {
        self.pods.map(|pods| scale::measure(stage, pods, self.rounds.max(SCALE_TIMES))).transpose()
    }

    /// Each round begins with another variant, but for the first: the limits come first, for they set the pace.
    fn order(&self, group: &BTreeMap<usize, Vec<Measurement>>, round: u32) -> Vec<usize> {
        let mut order: Vec<usize> = group.keys().copied().collect();
        if order.is_empty() {
            return order;
        }
        match round {
            1 => order.sort_by_key(|at| !self.variants[*at].is_limit()),
            _ => {
                let by = round as usize % order.len();
                order.rotate_left(by);
            }
        }
        order
    }

    fn play_variant(
        &self,
        stage: &Stage,
        report: &mut Report,
        peaks: &mut BTreeMap<Place, f64>,
        variant: &Variant,
        measurements: &[Measurement],
        round: u32,
    ) -> Result<()> {
        let running = stage.start(variant)?;
        for measurement in measurements {
            let title = format!("{}: {}", variant.title(), measurement.name());
            progress(&format!("round {round} of {}: {title}", self.rounds));
            if *measurement == Measurement::OpenLoop && !peaks.contains_key(&variant.place) {
                let pace = Measurement::Requests { connections: 64 };
                let peak = match report.median(variant, &pace.name()) {
                    Some(peak) => peak,
                    None => pace.take(stage, &running, self.seconds, 0.0)?.first().map_or(0.0, |first| first.value),
                };
                // Rounded, so that its name is short.
                peaks.insert(variant.place, (peak * 5.0).round() * 200.0);
            }
            let peak = peaks.get(&variant.place).copied().unwrap_or_default();
            report.add(variant, round, measurement.take(stage, &running, self.seconds, peak)?);
        }
        if variant.place != Place::Requests && measurements.iter().any(|measurement| *measurement != Measurement::Idle)
        {
            report.add(variant, round, measure::memory_after_load(&running));
        }
        running.stop()
    }

    fn words(&self) -> String {
        let rounds = if self.rounds == 1 { "one round".into() } else { format!("medians of {} rounds", self.rounds) };
        format!("{rounds}, samples of {} s", self.seconds)
    }
}

fn progress(text: &str) {
    if stderr().is_terminal() {
        // Only for the eye.
        let _ = write!(stderr(), "\r\x1b[K{text}");
    } else if !text.is_empty() {
        eprintln!("{text}");
    }
}

fn command_words() -> String {
    let arguments: Vec<String> = env::args().skip(1).collect();
    format!("cargo xtask {}", arguments.join(" "))
}

fn machine_words() -> String {
    let machine = machine();
    let text = |field: &str| machine[field].as_str().unwrap_or_default().to_owned();
    let (cores, memory) = (&machine["cores"], &machine["memory_gb"]);
    format!("{}, {cores} cores, {memory} GB, Linux {}, TCP {}", text("processor"), text("kernel"), text("tcp"))
}

fn machine() -> Value {
    let read = |file: &str| fs::read_to_string(file).unwrap_or_default();
    let (processor, memory) = (read("/proc/cpuinfo"), read("/proc/meminfo"));
    let named = processor.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let memory =
        memory.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.parse().ok());
    json!({
        "processor": named.map_or("a processor", |(_, name)| name),
        "cores": std::thread::available_parallelism().map_or(0, |cores| cores.get()),
        "memory_gb": (memory.unwrap_or(0.0_f64) / 1e6).round() as u64,
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
        "tcp": read("/proc/sys/net/ipv4/tcp_congestion_control").trim(),
    })
}

/// Joining and a policy change take little time, and are measured at least so often.
const SCALE_TIMES: u32 = 5;
const AGAINST: &str = "Measures another node proxy too: a start-up command, run by sh once on each node. It finds \
    BENCH_NODE, BENCH_NODE_IP, BENCH_PODS (a line a pod: name, node, address, path of its network namespace, UID, \
    service account, joined or outside), BENCH_NETNS_DIR, BENCH_MANIFESTS and BENCH_CA_DIR, makes the file BENCH_READY \
    once traffic is captured, and undoes everything at SIGTERM";
