use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};

use super::{Failure, Output, terminal};
use crate::capture::NetNs;
use crate::capture::show::{Actual, Snapshot};

/// See what the agent has put into pods' network namespaces.
#[derive(Subcommand, Debug)]
pub enum CaptureVerb {
    Show(ShowArgs),
}

/// Print what is in place and what should be: rules, routes, listeners, and why a pod is not captured.
///
/// Asks the agent of this node, so run it in the agent's network namespace. With --netns it reads one namespace from
/// the kernel itself, with or without an agent.
#[derive(Args, Debug)]
pub struct ShowArgs {
    /// One pod, as `namespace/pod`. Default: all pods of this node that are joined or leaving.
    #[arg(value_name = "POD")]
    pod: Option<String>,

    /// Read this network namespace from the kernel instead, for example `/run/netns/NAME` or `/proc/PID/ns/net`.
    #[arg(long, value_name = "PATH", conflicts_with = "pod")]
    netns: Option<PathBuf>,

    /// The agent's admin port.
    #[arg(long, env = "SELVEDGE_ADMIN_PORT", value_name = "PORT", default_value_t = 15000)]
    admin_port: u16,

    /// How to print it.
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

pub fn run(verb: &CaptureVerb) -> Result<ExitCode, Failure> {
    let CaptureVerb::Show(args) = verb;
    match &args.netns {
        Some(path) => {
            let about = |cause| Failure::new(format!("{}: {cause}", path.display()));
            let actual = NetNs::open(path).and_then(|netns| Actual::read(&netns)).map_err(about)?;
            print(&actual, args.output)?;
        }
        None => {
            let mut snapshot = ask(args.admin_port)?;
            if let Some(pod) = &args.pod {
                snapshot.pods.retain(|status| status.pod == *pod);
                if snapshot.pods.is_empty() {
                    let text =
                        format!("the agent of this node has no joined pod {pod}; `selvedge capture show` lists them");
                    return Err(Failure::new(text));
                }
            }
            for pod in &mut snapshot.pods {
                pod.look().map_err(|cause| Failure::new(format!("the namespace of pod {}: {cause}", pod.pod)))?;
            }
            print(&snapshot, args.output)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn print<T: std::fmt::Display + serde::Serialize>(what: &T, output: Output) -> Result<(), Failure> {
    match output {
        Output::Text => terminal::say(what),
        Output::Json => terminal::say(format_args!("{}\n", serde_json::to_string_pretty(what).map_err(Failure::new)?)),
    }
}

fn ask(port: u16) -> Result<Snapshot, Failure> {
    let admin = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let about = |cause: std::io::Error| {
        let cure = "run it in the agent's network namespace, or read one namespace with --netns";
        Failure::new(format!("no answer from an agent at {admin}: {cause}; {cure}"))
    };
    let mut stream = TcpStream::connect_timeout(&admin, TIMEOUT).map_err(about)?;
    stream.set_read_timeout(Some(TIMEOUT)).map_err(about)?;
    let request = format!("GET /dump HTTP/1.0\r\nHost: localhost:{port}\r\n\r\n");
    stream.write_all(request.as_bytes()).map_err(about)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).map_err(about)?;
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    let mut dump: serde_json::Map<String, serde_json::Value> = serde_json::from_str(body)
        .map_err(|cause| Failure::new(format!("{admin} answers, but not as an agent does: {cause}")))?;
    serde_json::from_value(dump.remove("capture").unwrap_or_default())
        .map_err(|cause| Failure::new(format!("the agent at {admin} is of another version: {cause}")))
}

const TIMEOUT: Duration = Duration::from_secs(10);
