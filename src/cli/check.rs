//! `selvedge check`: [`facts`] asks the cluster, the modules beside it judge what it said, and this file prints it.

use std::fmt;
use std::process::ExitCode;

use clap::Args;
use serde::Serialize;

pub use self::facts::Facts;
use super::cluster::{ClusterArgs, block_on};
use super::{Failure, Output, terminal};
use crate::mesh::TrustDomain;

mod certificates;
mod clocks;
mod facts;
mod installation;
mod neighbours;
mod network_policies;
mod nodes;
mod pods;
mod policies;
mod waypoints;

/// Check that the mesh can run on this cluster, or that it runs well.
///
/// Reads the cluster with your own kubeconfig and changes nothing. Each finding that is not good names its cure. Exits 1
/// where one is an error.
#[derive(Args, Debug)]
pub struct CheckArgs {
    #[command(flatten)]
    cluster: ClusterArgs,

    /// The trust domain, as the agents have it.
    #[arg(long, env = "SELVEDGE_TRUST_DOMAIN", value_name = "NAME", default_value = "cluster.local")]
    trust_domain: TrustDomain,

    /// Before an installation: only what the mesh needs of the cluster, and of your rights.
    #[arg(long)]
    pre: bool,

    /// How to print it.
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

pub fn run(args: &CheckArgs) -> Result<ExitCode, Failure> {
    let findings = block_on(async {
        let client = args.cluster.client().await?;
        let facts = Facts::ask(&client).await?;
        let mut findings = Findings::default();
        nodes::judge(&facts, &mut findings);
        neighbours::judge(&facts, &mut findings);
        if args.pre {
            installation::judge_rights(&facts::rights(&client).await, &mut findings);
            installation::judge_absence(&facts, &mut findings);
            return Ok(findings);
        }
        installation::judge(&facts, &mut findings);
        certificates::judge(&facts, &mut findings);
        clocks::judge(&facts, &mut findings);
        match args.cluster.view(&args.trust_domain).await {
            Ok(view) => {
                let state = view.model.read();
                pods::judge(&facts, &state, &mut findings);
                pods::judge_addresses(&state, &mut findings);
                policies::judge(&facts, &view.problems, &mut findings);
                waypoints::judge(&facts.waypoints, &state, &args.trust_domain, &mut findings);
                network_policies::judge(&facts, &state, &mut findings);
            }
            Err(cause) => findings.error(Area::Pods, "pods and policies could not be read", cause.to_string()),
        }
        Ok(findings)
    })?;
    match args.output {
        Output::Text => terminal::say(&findings)?,
        Output::Json => {
            let json = serde_json::to_string_pretty(&findings).map_err(Failure::new)?;
            terminal::say(format_args!("{json}\n"))?;
        }
    }
    let worst = findings.0.iter().map(|finding| finding.verdict).max();
    Ok(if worst == Some(Verdict::Error) { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// What was found, in the order in which it was looked for.
#[derive(Default, Debug, Serialize)]
struct Findings(Vec<Finding>);

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Finding {
    area: Area,
    verdict: Verdict,
    /// What was found, as a sentence without its full stop.
    text: String,
    /// What to do about it.
    cure: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Area {
    Cluster,
    Neighbours,
    Installation,
    Certificates,
    Clocks,
    Pods,
    Policies,
    Waypoints,
    NetworkPolicies,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    /// Could not be found out.
    Unknown,
    /// Works, but not as most would want it.
    Warning,
    Error,
}

impl Findings {
    fn ok(&mut self, area: Area, text: impl Into<String>) {
        self.add(area, Verdict::Ok, text, None);
    }

    fn unknown(&mut self, area: Area, text: impl Into<String>) {
        self.add(area, Verdict::Unknown, text, None);
    }

    fn warn(&mut self, area: Area, text: impl Into<String>, cure: impl Into<String>) {
        self.add(area, Verdict::Warning, text, Some(cure.into()));
    }

    fn error(&mut self, area: Area, text: impl Into<String>, cure: impl Into<String>) {
        self.add(area, Verdict::Error, text, Some(cure.into()));
    }

    fn add(&mut self, area: Area, verdict: Verdict, text: impl Into<String>, cure: Option<String>) {
        self.0.push(Finding { area, verdict, text: text.into(), cure });
    }
}

impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut area = None;
        for finding in &self.0 {
            if area.replace(finding.area) != Some(finding.area) {
                writeln!(f, "{}", finding.area.heading())?;
            }
            writeln!(f, "  {} {}", finding.verdict.mark(), finding.text)?;
            if let Some(cure) = &finding.cure {
                writeln!(f, "      {cure}")?;
            }
        }
        let count = |verdict| self.0.iter().filter(|finding| finding.verdict == verdict).count();
        let (errors, warnings, unknown) = (count(Verdict::Error), count(Verdict::Warning), count(Verdict::Unknown));
        match errors + warnings + unknown {
            0 => writeln!(f, "\nAll {} checks passed.", self.0.len()),
            _ => {
                let (errors, warnings) = (counted(errors, "error"), counted(warnings, "warning"));
                writeln!(f, "\n{errors}, {warnings}, {unknown} could not be found out.")
            }
        }
    }
}

fn counted(count: usize, what: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {what}{plural}")
}

impl Area {
    fn heading(self) -> &'static str {
        match self {
            Self::Cluster => "Cluster",
            Self::Neighbours => "Neighbours",
            Self::Installation => "Installation",
            Self::Certificates => "Certificates",
            Self::Clocks => "Clocks",
            Self::Pods => "Pods",
            Self::Policies => "Policies",
            Self::Waypoints => "Waypoints",
            Self::NetworkPolicies => "NetworkPolicies",
        }
    }
}

impl Verdict {
    fn mark(self) -> &'static str {
        match self {
            Self::Ok => "✓",
            Self::Unknown => "?",
            Self::Warning => "!",
            Self::Error => "✗",
        }
    }
}

#[cfg(test)]
mod tests;
