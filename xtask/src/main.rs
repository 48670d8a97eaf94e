//! The project's own commands, run as `cargo xtask <command>`.

mod bench;
mod build;
mod cluster;
mod conformance;
mod demo;
mod e2e;
mod image;
mod install;
mod soak;
mod style;
mod test;
mod tools;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let result = match Command::parse() {
        Command::Bench(options) => bench::run(&options),
        Command::Demo(options) => demo::run(&options),
        Command::Soak(options) => soak::run(&options),
        Command::Test(options) => test::run(&options),
        Command::Build => build::release().map(|binary| {
            println!("{}", binary.display());
            ExitCode::SUCCESS
        }),
        Command::Cluster(options) => cluster::run(&options),
        Command::Image(options) => image::run(&options),
        Command::E2e(options) => e2e::run(&options),
        Command::Conformance(options) => conformance::run(&options),
        Command::Prepare => test::prepare(),
        Command::Crd => build::write_crds().and_then(|()| install::write()).map(|()| ExitCode::SUCCESS),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

/// The project's own commands.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Command {
    /// Measures what the mesh costs, beside no mesh and beside a bare relay, in one run.
    Bench(bench::Options),
    /// Shows two nodes' pods talk over mutual TLS, with real namespaces, iptables, TLS and traffic.
    Demo(demo::Options),
    /// Lets everything talk at once over every path, for minutes, and counts every byte.
    Soak(soak::Options),
    /// Runs everything that guards the project, and ends with a count.
    Test(test::Options),
    /// Builds the static release binary and prints where it is.
    Build,
    /// A real Kubernetes on this machine: up, down, kubectl, load, shell.
    Cluster(cluster::Options),
    /// Builds the container images, without a container engine, and prints where they are.
    Image(image::Options),
    /// Runs the tests on a real cluster, which is brought up once for all of them.
    E2e(e2e::Options),
    /// Runs the Gateway API's conformance suite for meshes on a real cluster.
    Conformance(conformance::Options),
    /// Builds ahead what takes long and what tests need: release binary, bench, images.
    Prepare,
    /// Writes crd/ anew from the Rust types, and the Helm charts from crd/ and daemonset/base.
    Crd,
}
