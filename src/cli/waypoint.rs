use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use ipnet::IpNet;

use super::Failure;
use super::agent::{TunnelChoice, parse_duration, parse_lifetime};
use super::tracing::TracingArgs;
use crate::identity::CaAddress;
use crate::identity::anchors::CaRoot;
use crate::mesh::{NamespacedName, TrustDomain};
use crate::source::kube::Access;
use crate::telemetry::{AccessLogFormat, LogFormat};

/// Run a waypoint: requests to Services that name its Gateway are routed and judged in this process.
///
/// One process is one pod of the waypoint; the controller deploys them for each Gateway of class `selvedge-waypoint`.
/// Clients' agents reach it through tunnels on port 15008 and it passes requests on the same way, under its own identity
/// and with a word about the client. It needs no privilege, and asks for a certificate for itself alone.
///
/// Every flag is also an environment variable; a flag given twice counts as written last.
#[derive(Args, Debug, Clone)]
#[command(args_override_self = true)]
pub struct WaypointArgs {
    /// The Gateway that this is the waypoint of, in the pod's own namespace.
    #[arg(long, env = "SELVEDGE_GATEWAY", value_name = "NAME")]
    pub gateway: String,

    /// The name of this pod.
    #[arg(long, env = "SELVEDGE_POD", value_name = "NAME")]
    pub pod: String,

    /// The namespace of this pod.
    #[arg(long, env = "SELVEDGE_POD_NAMESPACE", value_name = "NAME")]
    pub pod_namespace: String,

    /// Instead of a cluster, a folder of YAML or JSON manifests, as the agent reads it.
    #[arg(long, env = "SELVEDGE_MANIFESTS", value_name = "DIR")]
    pub manifests: Option<PathBuf>,

    /// How to reach the API server. Default: as the service account of this pod.
    #[arg(long, env = "SELVEDGE_KUBECONFIG", value_name = "FILE", conflicts_with = "manifests")]
    pub kubeconfig: Option<PathBuf>,

    /// A folder with `ca.crt` and `ca.key` (PEM), for use with a folder of manifests.
    #[arg(long, env = "SELVEDGE_CA_DIR", value_name = "DIR", conflicts_with = "ca_address")]
    pub ca_dir: Option<PathBuf>,

    /// The CA that signs for this pod. Default: the controller.
    #[arg(long, env = "SELVEDGE_CA_ADDRESS", value_name = "URL")]
    pub ca_address: Option<CaAddress>,

    /// The roots that peers and the CA itself must lead to: a file of certificates in PEM, or `configmap` for ConfigMap
    /// selvedge-trust-bundle. Both are followed.
    #[arg(long, env = "SELVEDGE_CA_ROOT", value_name = "FILE|configmap", default_value = "configmap")]
    pub ca_root: CaRoot,

    /// The service account token that the CA is shown. It is read anew for each request.
    #[arg(long, env = "SELVEDGE_CA_TOKEN", value_name = "FILE", default_value = "/var/run/secrets/selvedge/token")]
    pub ca_token: PathBuf,

    /// The namespace of the controller.
    #[arg(long, env = "SELVEDGE_NAMESPACE", value_name = "NAME", default_value = "selvedge-system")]
    pub namespace: String,

    /// The trust domain in every identity: `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
    #[arg(long, env = "SELVEDGE_TRUST_DOMAIN", value_name = "NAME", default_value = "cluster.local")]
    pub trust_domain: TrustDomain,

    /// The name of the cluster, as peers read it in `baggage`.
    #[arg(long, env = "SELVEDGE_CLUSTER", value_name = "NAME", default_value = "Kubernetes")]
    pub cluster: String,

    /// A pod or Service range of the cluster, beside those that Node and ServiceCIDR objects name. May be repeated.
    #[arg(long, env = "SELVEDGE_CLUSTER_CIDRS", value_name = "CIDR", value_delimiter = ',')]
    pub cluster_cidr: Vec<IpNet>,

    /// Where the admin endpoint listens: /live, /ready, /metrics, /dump, /log, /drain. Loopback only.
    #[arg(long, env = "SELVEDGE_ADMIN_PORT", value_name = "PORT", default_value_t = 15000)]
    pub admin_port: u16,

    /// Where Prometheus scrapes /metrics.
    #[arg(long, env = "SELVEDGE_METRICS_PORT", value_name = "PORT", default_value_t = 15020)]
    pub metrics_port: u16,

    /// Where the kubelet asks /ready.
    #[arg(long, env = "SELVEDGE_READINESS_PORT", value_name = "PORT", default_value_t = 15021)]
    pub readiness_port: u16,

    /// The address on which everything but the admin endpoint listens. Default: all, IPv4 and IPv6.
    #[arg(long, env = "SELVEDGE_BIND", value_name = "IP")]
    pub bind: Option<IpAddr>,

    /// One line a request on standard output, and one a connection to an endpoint.
    #[arg(long, env = "SELVEDGE_ACCESS_LOG", value_enum, value_name = "FORMAT", default_value_t = AccessLogFormat::Text)]
    pub access_log: AccessLogFormat,

    #[command(flatten)]
    pub tracing: TracingArgs,

    /// Form of the waypoint's own log, on standard error.
    #[arg(long, env = "SELVEDGE_LOG_FORMAT", value_enum, value_name = "FORMAT", default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,

    /// What the waypoint's own log tells: a level, or filters such as `info,selvedge::waypoint=debug`.
    #[arg(long, env = "SELVEDGE_LOG", value_name = "FILTER", default_value = "info,kube_client=off")]
    pub log: String,

    /// How long certificates live. They are renewed at half of it.
    #[arg(long, env = "SELVEDGE_CERTIFICATE_LIFETIME", value_name = "DURATION", default_value = "24h",
          value_parser = parse_lifetime)]
    pub certificate_lifetime: Duration,

    /// For how long new connections are still taken after SIGTERM, while clients' agents learn that this pod goes.
    #[arg(long, env = "SELVEDGE_LINGER", value_name = "DURATION", default_value = "5s", value_parser = parse_duration)]
    pub linger: Duration,

    /// How long requests may go on behind that; what outlives it is reset.
    #[arg(long, env = "SELVEDGE_DRAIN", value_name = "DURATION", default_value = "30s", value_parser = parse_duration)]
    pub drain: Duration,

    /// What carries connections. `auto` takes the fast tunnel where both sides speak it, and HBONE with everybody else.
    #[arg(long, env = "SELVEDGE_TUNNEL", value_enum, value_name = "HOW", default_value_t = TunnelChoice::Auto)]
    pub tunnel: TunnelChoice,

    /// Threads that carry connections. Default: one a core.
    #[arg(long, env = "SELVEDGE_WORKERS", value_name = "N")]
    pub workers: Option<usize>,

    /// Connections carried at once. Default: what the descriptor limit allows.
    #[arg(long, env = "SELVEDGE_MAX_CONNECTIONS", value_name = "N")]
    pub max_connections: Option<usize>,

    /// A tunnel that a peer opened and that carries no connection is closed after so long.
    #[arg(long, env = "SELVEDGE_TUNNEL_IDLE", value_name = "DURATION", default_value = "10m",
          value_parser = parse_duration)]
    pub tunnel_idle: Duration,

    /// How long a metric series without news is kept.
    #[arg(long, env = "SELVEDGE_METRICS_IDLE", value_name = "DURATION", default_value = "15m",
          value_parser = parse_duration)]
    pub metrics_idle: Duration,
}

impl WaypointArgs {
    /// How the API server is reached; none where there is a folder instead.
    pub fn access(&self) -> Option<Access> {
        match (&self.manifests, &self.kubeconfig) {
            (Some(_), _) => None,
            (None, Some(file)) => Some(Access::File(file.clone())),
            (None, None) => Some(Access::InCluster),
        }
    }

    pub fn pod_name(&self) -> NamespacedName {
        NamespacedName::new(self.pod_namespace.as_str(), self.pod.as_str())
    }

    pub fn gateway_name(&self) -> NamespacedName {
        NamespacedName::new(self.pod_namespace.as_str(), self.gateway.as_str())
    }
}

pub fn run(args: WaypointArgs) -> Result<ExitCode, Failure> {
    for (flag, value) in [("--gateway", &args.gateway), ("--pod", &args.pod), ("--pod-namespace", &args.pod_namespace)]
    {
        if value.is_empty() {
            return Err(Failure::usage(format!("{flag} is empty: give the name that the object has")));
        }
    }
    crate::waypoint_process::run(args)
}
