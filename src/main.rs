//! The door: reads the command line and hands over to the verb.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    selvedge::cli::run()
}
