use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;

use super::Failure;
use super::agent::parse_lifetime;
use crate::mesh::TrustDomain;
use crate::telemetry::LogFormat;

/// Run the controller: the CA that signs what each node may hold, waypoints, and status on users' objects.
///
/// Runs in the cluster as two replicas or more. Every replica signs; the one that holds the Lease `selvedge-controller`
/// rotates the root and writes status. The root lies in Secret `selvedge-ca`, which the controller makes where neither it
/// nor ConfigMap `selvedge-trust-bundle` is there; a Secret of your own, as cert-manager writes it, is taken as it is.
///
/// An agent gets a certificate only for an identity that a live pod scheduled on the agent's own node runs as: its token
/// says which node that is. A waypoint gets one for itself alone. All else is refused, logged and counted.
///
/// Every flag is also an environment variable; a flag given twice counts as written last.
#[derive(Args, Debug, Clone)]
#[command(args_override_self = true)]
pub struct ControllerArgs {
    /// The namespace of the controller and the agents.
    #[arg(long, env = "SELVEDGE_NAMESPACE", value_name = "NAME", default_value = "selvedge-system")]
    pub namespace: String,

    /// The name of this replica: its pod's.
    #[arg(long, env = "SELVEDGE_POD", value_name = "NAME", default_value = "selvedge-controller")]
    pub name: String,

    /// How to reach the API server. Default: as the pod that this is.
    #[arg(long, env = "SELVEDGE_KUBECONFIG", value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,

    /// The trust domain in every identity: `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
    #[arg(long, env = "SELVEDGE_TRUST_DOMAIN", value_name = "NAME", default_value = "cluster.local")]
    pub trust_domain: TrustDomain,

    /// The longest that a certificate may live; agents may ask for less.
    #[arg(long, env = "SELVEDGE_CERTIFICATE_LIFETIME", value_name = "DURATION", default_value = "24h",
          value_parser = parse_lifetime)]
    pub certificate_lifetime: Duration,

    /// The audience of the tokens that agents bring.
    #[arg(long, env = "SELVEDGE_CA_AUDIENCE", value_name = "NAME", default_value = "selvedge-ca")]
    pub audience: String,

    /// The service account that agents run as.
    #[arg(long, env = "SELVEDGE_AGENT_SERVICE_ACCOUNT", value_name = "NAME", default_value = "selvedge-agent")]
    pub agent_service_account: String,

    /// The DaemonSet that agents are pods of.
    #[arg(long, env = "SELVEDGE_AGENT_DAEMON_SET", value_name = "NAME", default_value = "selvedge-agent")]
    pub agent_daemon_set: String,

    /// The Service through which agents reach the CA: its name is in the CA's own certificate.
    #[arg(long, env = "SELVEDGE_CONTROLLER_SERVICE", value_name = "NAME", default_value = "selvedge-controller")]
    pub service_name: String,

    /// The image of the waypoints that are deployed for Gateways of class `selvedge-waypoint`. Default: that of the
    /// controller's own pod.
    #[arg(long, env = "SELVEDGE_WAYPOINT_IMAGE", value_name = "IMAGE")]
    pub waypoint_image: Option<String>,

    /// Where the CA listens: gRPC over TLS 1.3.
    #[arg(long, env = "SELVEDGE_CA_PORT", value_name = "PORT", default_value_t = 15012)]
    pub ca_port: u16,

    /// Where the admin endpoint listens: /live, /ready, /metrics, /dump, /log, /drain. Loopback only.
    #[arg(long, env = "SELVEDGE_ADMIN_PORT", value_name = "PORT", default_value_t = 15000)]
    pub admin_port: u16,

    /// Where Prometheus scrapes /metrics.
    #[arg(long, env = "SELVEDGE_METRICS_PORT", value_name = "PORT", default_value_t = 15020)]
    pub metrics_port: u16,

    /// Where the kubelet asks /ready.
    #[arg(long, env = "SELVEDGE_READINESS_PORT", value_name = "PORT", default_value_t = 15021)]
    pub readiness_port: u16,

    /// The address on which the CA, metrics and readiness listen. Default: all, IPv4 and IPv6.
    #[arg(long, env = "SELVEDGE_BIND", value_name = "IP")]
    pub bind: Option<IpAddr>,

    /// Form of the controller's log, on standard error.
    #[arg(long, env = "SELVEDGE_LOG_FORMAT", value_enum, value_name = "FORMAT", default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,

    /// What the log tells: a level, or filters such as `info,selvedge::controller=debug`.
    #[arg(long, env = "SELVEDGE_LOG", value_name = "FILTER", default_value = "info,kube_client=off")]
    pub log: String,
}

pub fn run(args: ControllerArgs) -> Result<ExitCode, Failure> {
    crate::controller::run(args)
}
