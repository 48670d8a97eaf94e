//! The command line: one file a verb.

#![forbid(unsafe_code)]

mod agent;
mod capture;
mod certificate;
mod check;
mod cluster;
mod cni;
mod controller;
mod crd;
mod explain;
mod rotate_root;
mod status;
mod table;
mod terminal;
mod tracing;
mod uninstall;
mod validate;
mod waypoint;
mod workloads;

use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

pub use agent::AgentArgs;
pub use controller::ControllerArgs;
pub use waypoint::WaypointArgs;

/// Selvedge, a node-level ambient service mesh: encryption, identity and policy between pods, without sidecars and
/// without touching applications, for the price of one small process a node.
#[derive(Parser, Debug)]
#[command(name = "selvedge", version, propagate_version = true, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand, Debug)]
enum Verb {
    Agent(Box<agent::AgentArgs>),
    Controller(Box<controller::ControllerArgs>),
    Waypoint(Box<waypoint::WaypointArgs>),
    Validate(validate::ValidateArgs),
    Explain(explain::ExplainArgs),
    Check(check::CheckArgs),
    Status(status::StatusArgs),
    Workloads(workloads::WorkloadsArgs),
    #[command(subcommand)]
    Capture(capture::CaptureVerb),
    Cni(cni::CniArgs),
    CniInstall(cni::CniInstallArgs),
    Certificate(certificate::CertificateArgs),
    RotateRoot(rotate_root::RotateRootArgs),
    Crd(crd::CrdArgs),
    Uninstall(uninstall::UninstallArgs),
}

/// Reads the command line and runs the verb.
pub fn run() -> ExitCode {
    // A container runtime gives no arguments.
    if std::env::args_os().len() == 1 && crate::cni::is_called() {
        return crate::cni::run();
    }
    let cli = parse();
    let result = match cli.verb {
        Verb::Agent(args) => agent::run(*args),
        Verb::Controller(args) => controller::run(*args),
        Verb::Waypoint(args) => waypoint::run(*args),
        Verb::Validate(args) => validate::run(&args),
        Verb::Explain(args) => explain::run(&args),
        Verb::Check(args) => check::run(&args),
        Verb::Status(args) => status::run(&args),
        Verb::Workloads(args) => workloads::run(&args),
        Verb::Capture(verb) => capture::run(&verb),
        Verb::Cni(args) => Ok(cni::plugin(&args)),
        Verb::CniInstall(args) => cni::install(&args),
        Verb::Certificate(args) => certificate::run(&args),
        Verb::RotateRoot(args) => rotate_root::run(&args),
        Verb::Crd(args) => crd::run(&args),
        Verb::Uninstall(args) => uninstall::run(&args),
    };
    result.unwrap_or_else(|failure| {
        if !failure.message.is_empty() {
            terminal::remark(format_args!("selvedge: {failure}"));
        }
        ExitCode::from(failure.exit_code)
    })
}

/// Under the name of a plugin of kubectl it speaks of itself as its user typed it.
fn parse() -> Cli {
    let name = std::env::args_os().next().unwrap_or_default();
    let mut command = Cli::command();
    if Path::new(&name).file_stem().is_some_and(|name| name == "kubectl-selvedge") {
        command = command.bin_name("kubectl selvedge");
    }
    let parsed = Cli::from_arg_matches_mut(&mut command.clone().get_matches());
    parsed.unwrap_or_else(|error| error.format(&mut command).exit())
}

/// A verb that could not do its work: a sentence for the person at the terminal.
#[derive(Debug)]
pub struct Failure {
    /// Empty where nobody listens.
    message: String,
    exit_code: u8,
}

impl Failure {
    /// Something on this machine failed: exit code 1.
    pub fn new(message: impl std::fmt::Display) -> Self {
        Self { message: message.to_string(), exit_code: 1 }
    }

    /// Starting again would not help until a person has mended it: exit code 78, at which the agent's parent ends too.
    pub fn configuration(message: impl std::fmt::Display) -> Self {
        Self { message: message.to_string(), exit_code: crate::handover::EXIT_CONFIG }
    }

    fn silent(exit_code: u8) -> Self {
        Self { message: String::new(), exit_code }
    }

    /// What was asked for makes no sense: exit code 2, as for a flag that does not exist.
    pub fn usage(message: impl std::fmt::Display) -> Self {
        Self { message: message.to_string(), exit_code: crate::handover::EXIT_USAGE }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

/// How a verb prints what it found.
#[derive(clap::ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Output {
    /// For people.
    #[default]
    Text,
    /// One JSON object.
    Json,
}
