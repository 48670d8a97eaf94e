use std::collections::BTreeMap;
use std::process::ExitCode;

use clap::Args;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use serde::Serialize;

use super::check::Facts;
use super::cluster::{CONTROLLER, ClusterArgs, NAMESPACE, block_on};
use super::table::Table;
use super::{Failure, Output, terminal};
use crate::mesh::TrustDomain;
use crate::model::State;

/// Show the mesh at a glance: controller, agents, joined namespaces.
///
/// Reads the cluster with your own kubeconfig. `selvedge check` says what is wrong and what to do.
#[derive(Args, Debug)]
pub struct StatusArgs {
    #[command(flatten)]
    cluster: ClusterArgs,

    /// The trust domain, as the agents have it.
    #[arg(long, env = "SELVEDGE_TRUST_DOMAIN", value_name = "NAME", default_value = "cluster.local")]
    trust_domain: TrustDomain,

    /// How to print it.
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

pub fn run(args: &StatusArgs) -> Result<ExitCode, Failure> {
    let status = block_on(async {
        let client = args.cluster.client().await?;
        let facts = Facts::ask(&client).await?;
        let leases = Api::<Lease>::namespaced(client.clone(), NAMESPACE);
        // Who may not read it is told the rest.
        let lease = leases.get_opt(CONTROLLER).await.ok().flatten();
        let view = args.cluster.view(&args.trust_domain).await;
        let mut status = Status::of(&facts, lease);
        match view {
            Ok(view) => status.namespaces = Some(namespaces(&view.model.read())),
            Err(cause) => status.unknown.push(format!("the namespaces: {cause}")),
        }
        Ok(status)
    })?;
    match args.output {
        Output::Text => terminal::say(&status)?,
        Output::Json => {
            let json = serde_json::to_string_pretty(&status).map_err(Failure::new)?;
            terminal::say(format_args!("{json}\n"))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

#[derive(Serialize)]
struct Status {
    kubernetes: String,
    controllers_ready: Option<i32>,
    controllers: Option<i32>,
    leader: Option<String>,
    nodes: Vec<NodeLine>,
    namespaces: Option<Vec<NamespaceLine>>,
    /// What could not be read, and why.
    unknown: Vec<String>,
}

/// One node, as its agent and its pod tell.
#[derive(Serialize, Default)]
struct NodeLine {
    node: String,
    /// `ready`, `not ready`, `none` or `unknown`.
    agent: &'static str,
    version: String,
    capture: String,
    connect: String,
    captured: usize,
    failed: usize,
    policies_not_enforced: usize,
}

/// One namespace that has joined pods.
#[derive(Serialize)]
struct NamespaceLine {
    namespace: String,
    joined: usize,
    captured: usize,
    outside: usize,
}

impl Status {
    fn of(facts: &Facts, lease: Option<Lease>) -> Self {
        let wanted = |deployment: &Deployment| deployment.spec.replicas.unwrap_or(1);
        let ready = |deployment: &Deployment| deployment.status.as_ref()?.ready_replicas;
        let controller = facts.controller.as_ref().ok().map(Option::as_ref);
        let unread = [
            ("the controller", facts.controller.as_ref().err()),
            ("the nodes", facts.nodes.as_ref().err()),
            ("the agents", facts.agent_pods.as_ref().err()),
            ("what the agents say", facts.mesh_nodes.as_ref().err()),
        ];
        let unknown = unread.into_iter().filter_map(|(what, cause)| Some(format!("{what}: {}", cause?)));
        Self {
            kubernetes: facts.version.clone(),
            controllers: controller.map(|deployment| deployment.map_or(0, wanted)),
            controllers_ready: controller.map(|deployment| deployment.and_then(ready).unwrap_or(0)),
            leader: lease.and_then(|lease| lease.spec?.holder_identity).filter(|holder| !holder.is_empty()),
            nodes: nodes(facts),
            namespaces: None,
            unknown: unknown.collect(),
        }
    }
}

fn nodes(facts: &Facts) -> Vec<NodeLine> {
    let mut lines: BTreeMap<String, NodeLine> = BTreeMap::new();
    let agent = if facts.agent_pods.is_ok() { "none" } else { "unknown" };
    let names = facts.nodes.iter().flatten().filter_map(|node| node.metadata.name.clone());
    for name in names.chain(facts.mesh_nodes.iter().flatten().filter_map(|node| node.metadata.name.clone())) {
        lines.insert(name.clone(), NodeLine { node: name, agent, ..NodeLine::default() });
    }
    for pod in facts.agent_pods.iter().flatten() {
        let Some(line) = pod.spec.as_ref().and_then(|spec| lines.get_mut(spec.node_name.as_deref()?)) else { continue };
        // While one takes over from another there are two: one that is ready counts.
        if line.agent != "ready" {
            line.agent = if is_ready(pod) { "ready" } else { "not ready" };
        }
    }
    for node in facts.mesh_nodes.iter().flatten() {
        let Some(line) = node.metadata.name.as_ref().and_then(|name| lines.get_mut(name)) else { continue };
        let said = &node.status;
        line.version.clone_from(&said.version);
        line.capture.clone_from(&said.capture_mode);
        line.connect.clone_from(&said.connect);
        line.captured = said.captured.len();
        line.failed = said.failed.len();
        line.policies_not_enforced = said.policies_not_enforced.len();
    }
    lines.into_values().collect()
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.into_iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

fn namespaces(state: &State) -> Vec<NamespaceLine> {
    let mut lines: BTreeMap<String, NamespaceLine> = BTreeMap::new();
    for workload in state.mesh.workloads().filter(|workload| workload.pod.is_live()) {
        let namespace = workload.name().namespace.to_string();
        let line =
            lines.entry(namespace.clone()).or_insert(NamespaceLine { namespace, joined: 0, captured: 0, outside: 0 });
        match workload.membership.is_joined() {
            true => line.joined += 1,
            false => line.outside += 1,
        }
        line.captured += usize::from(workload.captured);
    }
    lines.into_values().filter(|line| line.joined > 0).collect()
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "Kubernetes   {}", self.kubernetes)?;
        let leader = self.leader.as_ref().map(|leader| format!(", {leader} leads")).unwrap_or_default();
        match self.controllers_ready.zip(self.controllers) {
            None => writeln!(f, "Controller   unknown")?,
            Some((_, 0)) => writeln!(f, "Controller   none")?,
            Some((ready, wanted)) => writeln!(f, "Controller   {ready} of {wanted} ready{leader}")?,
        }
        if !self.nodes.is_empty() {
            write!(f, "\n{}", self.node_table())?;
        }
        match &self.namespaces {
            Some(lines) if lines.is_empty() => writeln!(f, "\n{NOBODY_JOINED}")?,
            Some(lines) => write!(f, "\n{}", namespace_table(lines))?,
            None => {}
        }
        if !self.unknown.is_empty() {
            writeln!(f, "\nNot known:")?;
        }
        self.unknown.iter().try_for_each(|cause| writeln!(f, "  ? {cause}"))
    }
}

impl Status {
    fn node_table(&self) -> Table<8> {
        let mut table =
            Table::new(["NODE", "AGENT", "VERSION", "CAPTURE", "CONNECT", "CAPTURED", "FAILED", "NOT ENFORCED"]);
        for line in &self.nodes {
            table.row([
                line.node.clone(),
                line.agent.to_owned(),
                line.version.clone(),
                line.capture.clone(),
                line.connect.clone(),
                line.captured.to_string(),
                line.failed.to_string(),
                line.policies_not_enforced.to_string(),
            ]);
        }
        table
    }
}

fn namespace_table(lines: &[NamespaceLine]) -> Table<4> {
    let mut table = Table::new(["NAMESPACE", "JOINED", "CAPTURED", "OUTSIDE"]);
    for line in lines {
        let [joined, captured, outside] = [line.joined, line.captured, line.outside].map(|count| count.to_string());
        table.row([line.namespace.clone(), joined, captured, outside]);
    }
    table
}

const NOBODY_JOINED: &str = "No namespace has joined: kubectl annotate namespace NAME selvedge.dev/mesh=enabled";
