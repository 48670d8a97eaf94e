use std::process::ExitCode;

use clap::Args;
use serde::Serialize;

use super::cluster::{ClusterArgs, block_on};
use super::table::Table;
use super::{Failure, Output, terminal};
use crate::mesh::{Membership, TrustDomain, Workload};
use crate::model::State;

/// List the pods of the cluster: which are in the mesh, whether they are captured, and who they are.
///
/// Reads the cluster as an agent does, with your own kubeconfig and rights.
#[derive(Args, Debug)]
pub struct WorkloadsArgs {
    #[command(flatten)]
    cluster: ClusterArgs,

    /// The trust domain, as the agents have it.
    #[arg(long, env = "SELVEDGE_TRUST_DOMAIN", value_name = "NAME", default_value = "cluster.local")]
    trust_domain: TrustDomain,

    /// Pods of this namespace. Default: all.
    #[arg(short, long, value_name = "NAME")]
    namespace: Option<String>,

    /// Pods that are in the mesh, or should be, and no others.
    #[arg(long)]
    joined: bool,

    /// How to print it.
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

pub fn run(args: &WorkloadsArgs) -> Result<ExitCode, Failure> {
    let view = block_on(args.cluster.view(&args.trust_domain))?;
    let state = view.model.read();
    let mut lines: Vec<Line> = state.mesh.workloads().map(|workload| Line::of(&state, workload)).collect();
    lines.retain(|line| args.namespace.as_ref().is_none_or(|wanted| *wanted == line.namespace));
    lines.retain(|line| !args.joined || line.mesh != Standing::Outside);
    lines.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
    match args.output {
        Output::Json => {
            let json = serde_json::to_string_pretty(&lines).map_err(Failure::new)?;
            terminal::say(format_args!("{json}\n"))?;
        }
        Output::Text if lines.is_empty() => terminal::remark("no such pods"),
        Output::Text => terminal::say(table(&lines))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// One pod.
#[derive(Serialize)]
struct Line {
    namespace: String,
    name: String,
    node: Option<String>,
    addresses: Vec<String>,
    mesh: Standing,
    /// Why it is outside, or not captured.
    why: Option<String>,
    /// As whom it speaks in the mesh.
    identity: Option<String>,
    /// Whether a NetworkPolicy, or a CNI's own kind, selects it.
    network_policy: bool,
}

#[derive(Serialize, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum Standing {
    /// Its traffic goes through the mesh.
    Captured,
    /// It should be in the mesh, and its node has not said that it is.
    Pending,
    /// It has ended.
    Ended,
    Outside,
}

impl Line {
    fn of(state: &State, workload: &Workload) -> Self {
        let pod = &workload.pod;
        let (mesh, why) = match &workload.membership {
            Membership::Outside(why) => (Standing::Outside, Some((*why).to_owned())),
            Membership::Joined(_) if !pod.is_live() => (Standing::Ended, None),
            Membership::Joined(_) if workload.captured => (Standing::Captured, None),
            Membership::Joined(_) => {
                let why = match &pod.node {
                    Some(node) => format!("node {node} does not list it as captured; see `selvedge check`"),
                    None => "it is not scheduled yet".to_owned(),
                };
                (Standing::Pending, Some(why))
            }
        };
        Self {
            namespace: pod.name.namespace.to_string(),
            name: pod.name.name.to_string(),
            node: pod.node.as_deref().map(str::to_owned),
            addresses: pod.ips.iter().map(ToString::to_string).collect(),
            mesh,
            why,
            identity: workload.identity.as_ref().filter(|_| mesh != Standing::Outside).map(ToString::to_string),
            network_policy: state.mesh.is_under_network_policy(workload.uid()),
        }
    }
}

fn table(lines: &[Line]) -> Table<6> {
    let mut table = Table::new(["NAMESPACE", "POD", "NODE", "ADDRESS", "MESH", "IDENTITY"]);
    for line in lines {
        let mesh = match line.mesh {
            Standing::Captured => "captured",
            Standing::Pending => "pending",
            Standing::Ended => "ended",
            Standing::Outside => "outside",
        };
        let mesh = match &line.why {
            Some(why) => format!("{mesh}: {why}"),
            None => mesh.to_owned(),
        };
        let node = line.node.clone().unwrap_or_default();
        let identity = line.identity.clone().unwrap_or_default();
        table.row([line.namespace.clone(), line.name.clone(), node, line.addresses.join(","), mesh, identity]);
    }
    table
}
