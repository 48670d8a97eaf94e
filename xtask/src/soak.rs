//! `cargo xtask soak`: the soak of the real-network tests, for longer than they have time.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;

use crate::build::cargo;
use crate::tools;

/// What `cargo xtask soak` takes.
#[derive(Args)]
pub struct Options {
    /// For how long everything talks.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    minutes: u64,
}

pub fn run(options: &Options) -> Result<ExitCode> {
    tools::require(&[&tools::IPTABLES, &tools::IPROUTE2])?;
    let mut command = cargo();
    command.args(["test", "--workspace", "--locked", "--test", "network", "--", "soak", "--nocapture"]);
    let status = command.env("SELVEDGE_SOAK_SECONDS", (options.minutes * 60).to_string()).status()?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
