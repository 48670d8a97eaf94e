use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, ValueEnum};
use ipnet::IpNet;

use super::Failure;
use super::tracing::TracingArgs;
use crate::capture::{BackEnd, Mode};
use crate::identity::CaAddress;
use crate::identity::anchors::CaRoot;
use crate::mesh::{Connect, TrustDomain};
use crate::proxy::{PortRanges, SameNode};
use crate::source::kube::Access;
use crate::telemetry::{AccessLogFormat, LogFormat};
use crate::transport::tls::Offer;

/// Run the agent of one node: capture the traffic of its joined pods, carry it to other nodes over mutual TLS, and
/// decide who may talk to whom.
///
/// The agent watches the API server of its cluster, or reads the same objects from a folder of manifests and follows
/// it: a saved file takes effect within a second. It needs CAP_NET_ADMIN, CAP_NET_RAW, CAP_SYS_ADMIN and CAP_SYS_PTRACE, or root in a user namespace.
///
/// Every flag is also an environment variable; a flag given twice counts as written last.
#[derive(Args, Debug, Clone)]
#[command(args_override_self = true)]
pub struct AgentArgs {
    /// The name of this node: pods whose `spec.nodeName` it is are this agent's.
    #[arg(long, env = "SELVEDGE_NODE", value_name = "NAME")]
    pub node: String,

    /// Instead of a cluster, a folder of YAML or JSON manifests: Namespace, Pod, Service, EndpointSlice, Node,
    /// ServiceCIDR, AuthorizationPolicy, PeerAuthentication, TrafficPolicy, Gateway, HTTPRoute, GRPCRoute,
    /// XBackendTrafficPolicy, NetworkPolicy and those of CNIs. Other kinds are passed over.
    #[arg(long, env = "SELVEDGE_MANIFESTS", value_name = "DIR")]
    pub manifests: Option<PathBuf>,

    /// How to reach the API server. Default: as the service account of the pod that the agent runs in.
    #[arg(long, env = "SELVEDGE_KUBECONFIG", value_name = "FILE", conflicts_with = "manifests")]
    pub kubeconfig: Option<PathBuf>,

    /// A folder with `ca.crt` and `ca.key` (PEM). An empty one is filled with a new CA, so that agents given one folder
    /// trust each other. Default: with a folder of manifests /var/lib/selvedge/ca, in a cluster none.
    #[arg(long, env = "SELVEDGE_CA_DIR", value_name = "DIR", conflicts_with = "ca_address")]
    pub ca_dir: Option<PathBuf>,

    /// The CA that signs for this node's pods, which speaks the field's protocol: `selvedge controller`, istiod or
    /// istio-csr. Default: in a cluster the controller, with a folder of manifests the CA of --ca-dir.
    #[arg(long, env = "SELVEDGE_CA_ADDRESS", value_name = "URL")]
    pub ca_address: Option<CaAddress>,

    /// The roots that peers and the CA itself must lead to: a file of certificates in PEM, or `configmap` for ConfigMap
    /// selvedge-trust-bundle. Both are followed.
    #[arg(long, env = "SELVEDGE_CA_ROOT", value_name = "FILE|configmap", default_value = "configmap")]
    pub ca_root: CaRoot,

    /// The service account token that the CA is shown. It is read anew for each request.
    #[arg(long, env = "SELVEDGE_CA_TOKEN", value_name = "FILE", default_value = "/var/run/secrets/selvedge/token")]
    pub ca_token: PathBuf,

    /// The namespace of the controller and the agents.
    #[arg(long, env = "SELVEDGE_NAMESPACE", value_name = "NAME", default_value = "selvedge-system")]
    pub namespace: String,

    /// The trust domain in every identity: `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
    #[arg(long, env = "SELVEDGE_TRUST_DOMAIN", value_name = "NAME", default_value = "cluster.local")]
    pub trust_domain: TrustDomain,

    /// The name of the cluster, as peers read it in `baggage`.
    #[arg(long, env = "SELVEDGE_CLUSTER", value_name = "NAME", default_value = "Kubernetes")]
    pub cluster: String,

    /// A pod or Service range of the cluster, beside those that Node and ServiceCIDR objects name. An address inside
    /// one that no object has is held for a second, then refused: it never leaves in plaintext. May be repeated.
    #[arg(long, env = "SELVEDGE_CLUSTER_CIDRS", value_name = "CIDR", value_delimiter = ',')]
    pub cluster_cidr: Vec<IpNet>,

    /// How pods' connections are captured. `auto` takes TPROXY, and REDIRECT where the kernel lacks TPROXY.
    #[arg(long, env = "SELVEDGE_CAPTURE", value_enum, value_name = "HOW", default_value_t = CaptureChoice::Auto)]
    pub capture: CaptureChoice,

    /// When `connect()` is answered, in pods that do not say it by `selvedge.dev/connect`: `truthful`, once it is known
    /// whether the server is there and policy lets the client in; `eager`, at once. Where the kernel cannot hold a SYN
    /// it is eager.
    #[arg(long, env = "SELVEDGE_CONNECT", value_enum, value_name = "WHEN", default_value_t = ConnectChoice::Truthful)]
    pub connect: ConnectChoice,

    /// Which iptables back end programs the rules. `auto` takes the first that works here.
    #[arg(long, env = "SELVEDGE_IPTABLES", value_enum, value_name = "BACK_END", default_value_t = IptablesChoice::Auto)]
    pub iptables: IptablesChoice,

    /// The folder in which the container runtime names pods' network namespaces. Only root may write there.
    #[arg(long, env = "SELVEDGE_NETNS_DIR", value_name = "DIR", default_value = "/run/netns")]
    pub netns_dir: PathBuf,

    /// The node's own network namespace, where the kubelet's probes come from. Default: the agent's.
    #[arg(long, env = "SELVEDGE_NODE_NETNS", value_name = "PATH")]
    pub node_netns: Option<PathBuf>,

    /// A folder that is shared with the CNI plugin and with other agents of this node, root's alone. With it pods are
    /// captured as they start, not once they run; and the next agent of the node takes over while this one still runs.
    #[arg(long, env = "SELVEDGE_SHARED_DIR", value_name = "DIR")]
    pub shared_dir: Option<PathBuf>,

    /// The DaemonSet that this agent belongs to. Once it is seen to be deleted, the end of the agent is an uninstall:
    /// everything is removed, whatever --keep-capture says.
    #[arg(long, env = "SELVEDGE_DAEMONSET", value_name = "NAMESPACE/NAME", requires = "shared_dir")]
    pub daemonset: Option<String>,

    /// Where the admin endpoint listens: /live, /ready, /metrics, /dump, /log, /drain. Loopback only.
    #[arg(long, env = "SELVEDGE_ADMIN_PORT", value_name = "PORT", default_value_t = 15000)]
    pub admin_port: u16,

    /// Where Prometheus scrapes /metrics.
    #[arg(long, env = "SELVEDGE_METRICS_PORT", value_name = "PORT", default_value_t = 15020)]
    pub metrics_port: u16,

    /// Where the kubelet asks /ready.
    #[arg(long, env = "SELVEDGE_READINESS_PORT", value_name = "PORT", default_value_t = 15021)]
    pub readiness_port: u16,

    /// The address on which metrics and readiness listen. Default: all, IPv4 and IPv6.
    #[arg(long, env = "SELVEDGE_BIND", value_name = "IP")]
    pub bind: Option<IpAddr>,

    /// One line a connection on standard output.
    #[arg(long, env = "SELVEDGE_ACCESS_LOG", value_enum, value_name = "FORMAT", default_value_t = AccessLogFormat::Text)]
    pub access_log: AccessLogFormat,

    /// Form of the agent's own log, on standard error.
    #[arg(long, env = "SELVEDGE_LOG_FORMAT", value_enum, value_name = "FORMAT", default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,

    /// What the agent's own log tells: a level, or filters such as `info,selvedge::capture=debug`. At run time:
    /// `curl -X PUT localhost:15000/log?level=debug`.
    #[arg(long, env = "SELVEDGE_LOG", value_name = "FILTER", default_value = "info,kube_client=off")]
    pub log: String,

    /// How long certificates live. They are renewed at half of it.
    #[arg(long, env = "SELVEDGE_CERTIFICATE_LIFETIME", value_name = "DURATION", default_value = "24h",
          value_parser = parse_lifetime)]
    pub certificate_lifetime: Duration,

    /// How long connections may go on after SIGTERM, and those of a pod that leaves; what outlives it is reset.
    #[arg(long, env = "SELVEDGE_DRAIN", value_name = "DURATION", default_value = "30s", value_parser = parse_duration)]
    pub drain: Duration,

    /// At SIGTERM leave the capture rules in the pods: once it has ended, their connections fail until an agent is back,
    /// and never leave in plaintext. Without it everything is removed, to the last rule.
    #[arg(long, env = "SELVEDGE_KEEP_CAPTURE")]
    pub keep_capture: bool,

    /// What carries connections between nodes. `auto` takes the fast tunnel where both sides speak it, and HBONE with
    /// everybody else.
    #[arg(long, env = "SELVEDGE_TUNNEL", value_enum, value_name = "HOW", default_value_t = TunnelChoice::Auto)]
    pub tunnel: TunnelChoice,

    /// Threads that carry connections. Default: one a core.
    #[arg(long, env = "SELVEDGE_WORKERS", value_name = "N")]
    pub workers: Option<usize>,

    /// Connections carried at once. Default: what the descriptor limit allows.
    #[arg(long, env = "SELVEDGE_MAX_CONNECTIONS", value_name = "N")]
    pub max_connections: Option<usize>,

    /// A tunnel that a peer opened and that carries no connection is closed after so long. Peers close theirs earlier:
    /// agents after five minutes.
    #[arg(long, env = "SELVEDGE_TUNNEL_IDLE", value_name = "DURATION", default_value = "10m",
          value_parser = parse_duration)]
    pub tunnel_idle: Duration,

    /// Ports from which applications are dialled when they see the client's own address. Clients rarely choose the
    /// default ones; a port that a live connection holds is never taken.
    #[arg(long, env = "SELVEDGE_SOURCE_PORTS", value_name = "RANGES", default_value_t = PortRanges::default())]
    pub source_ports: PortRanges,

    /// What carries a connection between two pods of this node. Directly only where no NetworkPolicy selects either and
    /// no waypoint stands between; else through the tunnel.
    #[arg(long, env = "SELVEDGE_SAME_NODE", value_enum, value_name = "HOW", default_value_t = SameNode::Direct)]
    pub same_node: SameNode,

    #[command(flatten)]
    pub tracing: TracingArgs,

    /// How long a metric series without news is kept.
    #[arg(long, env = "SELVEDGE_METRICS_IDLE", value_name = "DURATION", default_value = "15m",
          value_parser = parse_duration)]
    pub metrics_idle: Duration,
}

impl AgentArgs {
    /// How the API server is reached; none where there is a folder instead.
    pub fn access(&self) -> Option<Access> {
        match (&self.manifests, &self.kubeconfig) {
            (Some(_), _) => None,
            (None, Some(file)) => Some(Access::File(file.clone())),
            (None, None) => Some(Access::InCluster),
        }
    }
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum CaptureChoice {
    Auto,
    Tproxy,
    Redirect,
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum ConnectChoice {
    Truthful,
    Eager,
}

impl ConnectChoice {
    pub fn connect(self) -> Connect {
        match self {
            Self::Truthful => Connect::Truthful,
            Self::Eager => Connect::Eager,
        }
    }
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum TunnelChoice {
    Auto,
    Hbone,
}

impl TunnelChoice {
    pub fn offer(self) -> Offer {
        match self {
            Self::Auto => Offer::Both,
            Self::Hbone => Offer::Hbone,
        }
    }
}

#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum IptablesChoice {
    Auto,
    Nft,
    Legacy,
}

impl CaptureChoice {
    pub fn mode(self) -> Option<Mode> {
        match self {
            Self::Auto => None,
            Self::Tproxy => Some(Mode::Tproxy),
            Self::Redirect => Some(Mode::Redirect),
        }
    }
}

impl IptablesChoice {
    pub fn back_end(self) -> Option<BackEnd> {
        match self {
            Self::Auto => None,
            Self::Nft => Some(BackEnd::Nft),
            Self::Legacy => Some(BackEnd::Legacy),
        }
    }
}

pub fn run(args: AgentArgs) -> Result<ExitCode, Failure> {
    if args.node.is_empty() {
        return Err(Failure::usage("--node is empty: give the name that pods have as spec.nodeName"));
    }
    crate::agent::run(args)
}

/// Reads `500ms`, `30s`, `15m`, `24h`. A time that nobody lives to see is a slip of the finger, and no clock counts it.
pub(super) fn parse_duration(text: &str) -> Result<Duration, String> {
    let refused = || format!("{text:?} is not a duration such as 500ms, 30s, 15m or 24h, at most 876000h");
    let split = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(refused)?;
    let number: u64 = text[..split].parse().map_err(|_| refused())?;
    let seconds = |factor: u64| number.checked_mul(factor).map(Duration::from_secs).ok_or_else(refused);
    let duration = match &text[split..] {
        "ms" => Duration::from_millis(number),
        "s" => seconds(1)?,
        "m" => seconds(60)?,
        "h" => seconds(3600)?,
        _ => return Err(refused()),
    };
    if duration <= LONGEST { Ok(duration) } else { Err(refused()) }
}

// Shorter ones could not be renewed in time: each is replaced at half of it.
pub(super) fn parse_lifetime(text: &str) -> Result<Duration, String> {
    let lifetime = parse_duration(text)?;
    if lifetime < SHORTEST_LIFETIME {
        return Err(format!("certificates that live {text} could not be renewed in time; give at least 1s"));
    }
    Ok(lifetime)
}

const SHORTEST_LIFETIME: Duration = Duration::from_secs(1);
/// A hundred years.
const LONGEST: Duration = Duration::from_secs(876_000 * 3600);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::mutation::mutated_text;

    #[test]
    fn durations_are_read_with_their_unit() {
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("24h"), Ok(Duration::from_secs(86_400)));
        assert_eq!(parse_duration("876000h"), Ok(LONGEST));
        for text in ["", "5", "h", "1d", "-1s", "99999999999999999999s", "18446744073709551615h", "876001h"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
        assert!(parse_lifetime("999ms").is_err() && parse_lifetime("1s").is_ok());
    }

    proptest! {
        #[test]
        fn what_a_person_mistypes_is_refused_or_means_what_it_says(
            duration in mutated_text(&["500ms", "30s", "15m", "24h", "876000h"]),
            ports in mutated_text(&["1024-32767,61000-65535", "100-103,200", "7"]),
        ) {
            if let Ok(duration) = parse_duration(&duration) {
                prop_assert!(duration <= LONGEST);
            }
            if let Ok(ranges) = ports.parse::<PortRanges>() {
                prop_assert_eq!(ranges.to_string().parse(), Ok(ranges));
            }
        }
    }
}
