//! `cargo xtask image`: container images, made without a container engine, the same bytes from the same files.

mod layer;
mod libraries;
mod oci;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;

use crate::build::{self, target_directory};
use crate::image::layer::Layer;
pub use crate::image::oci::hex as digest;
use crate::image::oci::{Start, pack};
use crate::style::dim;
use crate::test::{Excerpt, Tally};
use crate::tools;

/// What `cargo xtask image` takes.
#[derive(Args)]
pub struct Options {
    /// Where the images go.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Writes the files of the agent's image into an empty folder instead, for a Dockerfile.
    #[arg(long, value_name = "DIR", conflicts_with = "out")]
    unpacked: Option<PathBuf>,
}

pub fn run(options: &Options) -> Result<ExitCode> {
    if let Some(folder) = &options.unpacked {
        agent_layer()?.unpack(folder)?;
        return Ok(ExitCode::SUCCESS);
    }
    let folder = options.out.clone().unwrap_or_else(folder);
    for image in [agent(&folder)?, test(&folder)?, echo(&folder)?, pause(&folder)?] {
        println!("{}", image.display());
    }
    Ok(ExitCode::SUCCESS)
}

/// Builds every image twice: the bytes must be the same.
pub fn check() -> Result<Tally> {
    let mut tally = Tally::default();
    let images = [("agent", agent as fn(&Path) -> Result<PathBuf>), ("test", test), ("echo", echo), ("pause", pause)];
    for (name, build) in images {
        let (one, other) = (tempfile::tempdir()?, tempfile::tempdir()?);
        let same = fs::read(build(one.path())?)? == fs::read(build(other.path())?)?;
        println!("{name}: {}", if same { "the same bytes twice" } else { "other bytes the second time" });
        match same {
            true => tally.passed += 1,
            false => tally.fail(format!("the {name} image is not reproducible"), Excerpt::default()),
        }
    }
    Ok(tally)
}

/// The agent and the controller.
pub const AGENT: &str = concat!("localhost/selvedge:", env!("CARGO_PKG_VERSION"));
/// Servers and clients for tests.
pub const TEST: &str = concat!("localhost/selvedge-test:", env!("CARGO_PKG_VERSION"));
/// The application of the Gateway API's conformance suite.
const ECHO: &str = concat!("localhost/selvedge-echo:", env!("CARGO_PKG_VERSION"));
/// What holds a pod's namespaces.
pub const PAUSE: &str = concat!("localhost/pause:", env!("CARGO_PKG_VERSION"));
const COREDNS: &str = "localhost/coredns:1.14.7";

/// What a cluster needs before it can run any pod.
pub fn for_cluster(coredns: &Path) -> Result<Vec<PathBuf>> {
    let mut layer = Layer::default();
    layer.file("/coredns", coredns, 0o755)?;
    let start = Start { name: COREDNS, entrypoint: &["/coredns"], arguments: &[] };
    Ok(vec![pause(&folder())?, write(&folder(), "coredns", &layer, &start)?])
}

/// What the cluster's tests need beside that.
pub fn for_tests() -> Result<Vec<PathBuf>> {
    Ok(vec![agent(&folder())?, test(&folder())?])
}

/// What releases step by step in the tests of that, and what it asks how a release does.
pub fn for_canaries(argo_rollouts: &Path, flagger: &Path) -> Result<Vec<PathBuf>> {
    tools::require(&[&tools::PROMETHEUS])?;
    let mut rollouts = Layer::default();
    for program in ["rollouts-controller", "gateway-api"] {
        rollouts.file(&format!("/usr/local/bin/{program}"), &argo_rollouts.join(program), 0o755)?;
    }
    let mut canaries = Layer::default();
    canaries.file("/usr/local/bin/flagger", &flagger.join("flagger"), 0o755)?;
    let mut metrics = Layer::default();
    let program = tools::find("prometheus").context("no prometheus is here; install prometheus")?;
    metrics.file("/usr/local/bin/prometheus", &program, 0o755)?;
    add_libraries(&mut metrics, &program)?;
    let images = [
        ("argo-rollouts", "/usr/local/bin/rollouts-controller", rollouts),
        ("flagger", "/usr/local/bin/flagger", canaries),
        ("prometheus", "/usr/local/bin/prometheus", metrics),
    ];
    let image = |(name, program, layer): (&str, &str, Layer)| {
        let start = Start { name: &format!("localhost/{name}:test"), entrypoint: &[program], arguments: &[] };
        write(&folder(), name, &layer, &start)
    };
    images.into_iter().map(image).collect()
}

/// The agent, and the conformance suite's application under the name that the suite's manifests have for it.
pub fn for_conformance(application: &str) -> Result<Vec<PathBuf>> {
    Ok(vec![agent(&folder())?, echo_named(&folder(), "conformance-echo", application)?])
}

fn agent(folder: &Path) -> Result<PathBuf> {
    let start = Start { name: AGENT, entrypoint: &["/usr/local/bin/selvedge"], arguments: &["--help"] };
    write(folder, "selvedge", &agent_layer()?, &start)
}

fn test(folder: &Path) -> Result<PathBuf> {
    let start = Start { name: TEST, entrypoint: &["/usr/local/bin/selvedge-pod"], arguments: &["pause"] };
    write(folder, "selvedge-test", &test_layer()?, &start)
}

fn echo(folder: &Path) -> Result<PathBuf> {
    echo_named(folder, "selvedge-echo", ECHO)
}

/// The server starts by itself; `client` is run in its container.
fn echo_named(folder: &Path, file: &str, name: &str) -> Result<PathBuf> {
    let mut layer = Layer::default();
    let program = build::static_release("selvedge-echo", "selvedge-echo")?;
    layer.file("/usr/local/bin/server", &program, 0o755)?;
    layer.link("/usr/local/bin/client", "server");
    write(folder, file, &layer, &Start { name, entrypoint: &["/usr/local/bin/server"], arguments: &[] })
}

fn pause(folder: &Path) -> Result<PathBuf> {
    let start = Start { name: PAUSE, entrypoint: &["/usr/local/bin/selvedge-pod", "pause"], arguments: &[] };
    write(folder, "pause", &test_layer()?, &start)
}

fn test_layer() -> Result<Layer> {
    let mut layer = Layer::default();
    layer.file("/usr/local/bin/selvedge-pod", &build::static_release("selvedge-lab", "selvedge-pod")?, 0o755)?;
    Ok(layer)
}

/// The static binary, iptables with both back ends, and the certificates that the world trusts.
fn agent_layer() -> Result<Layer> {
    tools::require(&[&tools::IPTABLES, &tools::CA_CERTIFICATES])?;
    let mut layer = Layer::default();
    layer.file("/usr/local/bin/selvedge", &build::release()?, 0o755)?;
    layer.file("/etc/ssl/certs/ca-certificates.crt", Path::new(CERTIFICATES), 0o644)?;
    layer.folder("/run", 0o755);
    layer.folder("/tmp", 0o1777);
    for (program, back_end) in [("xtables-nft-multi", "nft"), ("xtables-legacy-multi", "legacy")] {
        let from = tools::find(program).with_context(|| format!("no {program} is here; install iptables"))?;
        let at = format!("/usr/sbin/{program}");
        layer.file(&at, &from, 0o755)?;
        add_libraries(&mut layer, &from)?;
        for family in ["iptables", "ip6tables"] {
            for verb in ["", "-restore", "-save"] {
                layer.link(&format!("/usr/sbin/{family}-{back_end}{verb}"), program);
                // What has no back end in its name is the modern one, as on Debian.
                if back_end == "nft" {
                    layer.link(&format!("/usr/sbin/{family}{verb}"), program);
                }
            }
        }
    }
    let extensions = extensions()?;
    for entry in fs::read_dir(&extensions)? {
        let file = entry?.path();
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        // Those of arptables and ebtables are for others.
        if ["libxt_", "libipt_", "libip6t_"].iter().any(|beginning| name.starts_with(beginning)) {
            add_extension(&mut layer, &file)?;
        }
    }
    Ok(layer)
}

/// An extension that is another's second name stays one.
fn add_extension(layer: &mut Layer, file: &Path) -> Result<()> {
    let at = file.display().to_string();
    if fs::symlink_metadata(file)?.is_symlink() {
        layer.link(&at, &fs::read_link(file)?.to_string_lossy());
        return Ok(());
    }
    layer.file(&at, file, 0o644)?;
    add_libraries(layer, file)
}

fn add_libraries(layer: &mut Layer, program: &Path) -> Result<()> {
    for library in libraries::of(program)? {
        let at = library.display().to_string();
        if !layer.contains(&at) {
            layer.file(&at, &library, 0o755)?;
        }
    }
    Ok(())
}

/// Where iptables was built to look for its extensions.
fn extensions() -> Result<PathBuf> {
    let triple = format!("/usr/lib/{}-linux-gnu/xtables", std::env::consts::ARCH);
    let places = [triple.as_str(), "/usr/lib64/xtables", "/usr/lib/xtables"].map(PathBuf::from);
    places.into_iter().find(|place| place.is_dir()).context("no extensions of iptables are here; install iptables")
}

/// Writes one image, unless the same is there.
fn write(folder: &Path, name: &str, layer: &Layer, start: &Start) -> Result<PathBuf> {
    let image = pack(layer, start)?;
    let path = folder.join(format!("{name}.tar"));
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    if fs::read(&path).is_ok_and(|have| have == image) {
        return Ok(path);
    }
    fs::write(&path, &image).with_context(|| format!("cannot write {}", path.display()))?;
    eprintln!("{} {}", start.name, dim(format!("{:.1} MB", image.len() as f64 / 1e6)));
    Ok(path)
}

fn folder() -> PathBuf {
    target_directory().join("images")
}

const CERTIFICATES: &str = "/etc/ssl/certs/ca-certificates.crt";
