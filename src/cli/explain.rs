use std::fmt::Display;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use http::request::Parts;
use http::{HeaderName, HeaderValue, Method, Request, Uri};
use k8s_openapi::jiff::Timestamp;
use serde::Serialize;

use super::cluster::{ClusterArgs, unread};
use super::{Failure, Output, terminal};
use crate::mesh::{MeshSettings, NamespacedName, TrustDomain};
use crate::model::Model;
use crate::model::explain::{Party, Question, explain, explain_request};
use crate::source::directory;

/// Say whether one workload may talk to another, and which policy, rule and clause make it so; of a request, which rule
/// of which route it meets, and where it goes.
///
/// Reads the cluster with your own rights, or the same folder as the agent, and decides with the agent's code. Exits 0
/// whichever the verdict is.
#[derive(Args, Debug)]
pub struct ExplainArgs {
    /// Who dials: `namespace/pod` (or `pod/namespace/name`), or an IP address.
    #[arg(value_name = "FROM")]
    from: String,

    /// Who is dialled: `namespace/name` of a Pod or a Service, or an IP address. Where both have the name,
    /// `pod/namespace/name` or `service/namespace/name`.
    #[arg(value_name = "TO")]
    to: String,

    /// The port dialled. Default: the only one that the destination has.
    #[arg(long, value_name = "N")]
    port: Option<u16>,

    /// Ask about a request with this method, where routes may decide. Default with the two flags below: GET.
    #[arg(long, value_name = "METHOD")]
    method: Option<Method>,

    /// The path of the request, with its query. Default: /.
    #[arg(long, value_name = "PATH")]
    path: Option<Uri>,

    /// A header of the request; may be given several times. A token in it is verified, with the keys that the agents have.
    #[arg(long, value_name = "NAME: VALUE", value_parser = header)]
    header: Vec<(HeaderName, HeaderValue)>,

    /// Instead of a cluster, a folder of manifests.
    #[arg(long, env = "SELVEDGE_MANIFESTS", value_name = "DIR", conflicts_with = "kubeconfig")]
    manifests: Option<PathBuf>,

    #[command(flatten)]
    cluster: ClusterArgs,

    /// The trust domain, as the agents have it.
    #[arg(long, env = "SELVEDGE_TRUST_DOMAIN", value_name = "NAME", default_value = "cluster.local")]
    trust_domain: TrustDomain,

    /// Pod and Service ranges, as the agents have them.
    #[arg(long, env = "SELVEDGE_CLUSTER_CIDRS", value_name = "CIDR", value_delimiter = ',')]
    cluster_cidr: Vec<ipnet::IpNet>,

    /// How to print it.
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

pub fn run(args: &ExplainArgs) -> Result<ExitCode, Failure> {
    let settings = MeshSettings { trust_domain: args.trust_domain.clone(), cluster_cidrs: args.cluster_cidr.clone() };
    let model = Arc::new(Model::new(settings));
    match &args.manifests {
        Some(manifests) => {
            let loaded = directory::load(manifests).map_err(Failure::new)?;
            loaded.problems.iter().for_each(terminal::remark);
            model.apply(loaded.deltas);
        }
        None => args.cluster.load(&model)?.problems.iter().for_each(terminal::remark),
    }
    unread(&model).iter().for_each(terminal::remark);
    let question = Question { from: party(&args.from)?, to: party(&args.to)?, port: args.port };
    match args.request() {
        Some(head) => {
            let now = Timestamp::now().as_second();
            args.print(&explain_request(&model.read(), &question, &head, now).map_err(Failure::usage)?)
        }
        None => args.print(&explain(&model.read(), &question).map_err(Failure::usage)?),
    }
}

impl ExplainArgs {
    /// The request that is asked about, if any is.
    fn request(&self) -> Option<Parts> {
        if self.method.is_none() && self.path.is_none() && self.header.is_empty() {
            return None;
        }
        let (mut head, ()) = Request::new(()).into_parts();
        head.method = self.method.clone().unwrap_or_default();
        head.uri = self.path.clone().unwrap_or_default();
        head.headers = self.header.iter().cloned().collect();
        Some(head)
    }

    fn print(&self, explanation: &(impl Display + Serialize)) -> Result<ExitCode, Failure> {
        match self.output {
            Output::Text => terminal::say(explanation)?,
            Output::Json => {
                let json = serde_json::to_string_pretty(explanation).map_err(Failure::new)?;
                terminal::say(format_args!("{json}\n"))?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn header(text: &str) -> Result<(HeaderName, HeaderValue), String> {
    let wrong = || format!("{text:?} is no header; write one such as 'x-tester: true'");
    let (name, value) = text.split_once(':').ok_or_else(wrong)?;
    let name = HeaderName::from_bytes(name.trim().as_bytes()).map_err(|_| wrong())?;
    Ok((name, HeaderValue::from_str(value.trim()).map_err(|_| wrong())?))
}

fn party(text: &str) -> Result<Party, Failure> {
    if let Ok(ip) = text.parse::<IpAddr>() {
        return Ok(Party::Address(ip));
    }
    let named = |namespace: &str, name: &str| NamespacedName::new(namespace, name);
    match text.split('/').collect::<Vec<_>>()[..] {
        [.., "", _] | [.., ""] => Err(malformed(text)),
        [namespace, name] => Ok(Party::Named(named(namespace, name))),
        ["pod" | "pods" | "po", namespace, name] => Ok(Party::Pod(named(namespace, name))),
        ["service" | "services" | "svc", namespace, name] => Ok(Party::Service(named(namespace, name))),
        [kind, _, _] => Err(Failure::usage(format!("{kind:?} of {text:?} is neither pod nor service"))),
        _ => Err(malformed(text)),
    }
}

fn malformed(text: &str) -> Failure {
    Failure::usage(format!(
        "{text:?} is neither an IP address nor of the form namespace/name, pod/namespace/name or service/namespace/name"
    ))
}
