//! What `cargo xtask bench` runs beside a mesh, in a program of its own so that it is always built for speed.

mod open_loop;
mod relay;

use std::env;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::open_loop::Load;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    match run(&arguments.iter().map(String::as_str).collect::<Vec<_>>()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("selvedge-load: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[&str]) -> Result<()> {
    match arguments {
        ["relay", routes @ ..] if !routes.is_empty() => {
            relay::run(&routes.iter().map(|route| route.parse()).collect::<Result<Vec<_>>>()?)
        }
        ["open-loop", to, rate, connections, warm_up, milliseconds] => {
            let time =
                |text: &str| Ok::<_, anyhow::Error>(Duration::from_millis(text.parse().context("a time in ms")?));
            let load = Load {
                to: to.parse().context("where to send")?,
                rate: rate.parse().context("requests a second")?,
                connections: connections.parse().context("a number of connections")?,
                warm_up: time(warm_up)?,
                time: time(milliseconds)?,
            };
            println!("{}", load.run()?.to_json());
            Ok(())
        }
        _ => bail!("{USAGE}"),
    }
}

const USAGE: &str = "usage:
  selvedge-load relay PORT=ADDRESS:PORT ...
      listens on each port, and copies both ways to the address behind it
  selvedge-load open-loop ADDRESS:PORT RATE CONNECTIONS WARM-UP-MS MS
      sends so many HTTP requests a second, answered or not, and prints the latencies as JSON";
