//! The application of the Gateway API's conformance suite for meshes: a server that tells what it was asked, and a client
//! that prints what it was told, in the words that the suite reads (`conformance/utils/echo/parse.go` of its module).
//!
//! One program under two names, as the suite starts them: a container's own process is `server`, and `client` runs in it
//! by exec.

mod answer;
mod client;
mod grpc;
mod server;
mod tls;

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;

fn main() -> ExitCode {
    match run(Program::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(program: Program) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start tokio")?;
    match program {
        Program::Server(options) => runtime.block_on(server::run(&options)),
        Program::Client(options) => runtime.block_on(client::run(&options)),
    }
}

/// Which one it is, by the name that it was started under.
#[derive(Parser)]
#[command(multicall = true)]
enum Program {
    /// Answers on every port with what it was asked.
    Server(server::Options),
    /// Sends requests and prints the answers, with a blank line after each.
    Client(client::Options),
}
