use std::fmt;

use super::NamespacedName;

/// Why a connection was refused or ended badly: one code to metric, access log and `explain`.
///
/// The codes are a user interface; `docs/troubleshooting.md` has a section on each.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Reason {
    /// A policy denied it, or an ALLOW policy that stands over the destination did not match.
    Policy(NamespacedName),
    /// The destination speaks mutual TLS only (PeerAuthentication STRICT), and this was plaintext.
    Plaintext(Option<NamespacedName>),
    /// The request's token does not hold (RequestAuthentication), and in what way.
    Token(&'static str),
    /// An external authorizer said no, or could not be asked.
    Authorizer(NamespacedName),
    /// The destination's agent denied it, by a policy that this agent does not know.
    Denied,
    /// No certificate for the source pod's own identity could be had.
    Identity,
    /// The TLS handshake failed, or the peer is not who it should be.
    Tls,
    /// The next hop could not be reached, or refused.
    Connect,
    /// Nobody answered in time.
    Timeout,
    /// An address inside the cluster's ranges that no object explains.
    UnknownDestination,
    /// A Service without an endpoint that may be used.
    NoEndpoint,
    /// The Service's waypoint, a process of its own, is not there, or does not admit the Service; or somebody went round
    /// it.
    Waypoint,
    /// The peer is to be in the mesh, but its node has not captured it yet, and STRICT rules there.
    PeerUncaptured,
    /// A source that nobody may claim: loopback, link-local, or the pod's own address.
    Source,
    /// The peer broke the protocol: a malformed request, a flood, the wrong address.
    Protocol,
    /// Too many connections, handshakes or descriptors.
    Limit,
    /// A TrafficPolicy's `circuitBreaker`: the backend has as much as it may be given at once.
    CircuitBreaker,
    /// A TrafficPolicy's `retryConstraint`: a request was worth another try, and there were too many of these.
    RetryBudget,
    /// A TrafficPolicy's `rateLimits`.
    RateLimit,
    /// A TrafficPolicy's `faultInjection`.
    Fault,
    /// The source or destination pod left, or the agent drained.
    Drain,
    /// One side reset the connection.
    Reset,
    /// The agent failed where it should not: a defect, or the kernel refused a call.
    Internal,
}

impl Reason {
    /// The code without what varies, for metric labels: bounded in number.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Policy(_) => "policy",
            Self::Plaintext(_) => "plaintext",
            Self::Token(_) => "token",
            Self::Authorizer(_) => "authorizer",
            Self::Denied => "denied",
            Self::Identity => "identity",
            Self::Tls => "tls",
            Self::Connect => "connect",
            Self::Timeout => "timeout",
            Self::UnknownDestination => "unknown-destination",
            Self::NoEndpoint => "no-endpoint",
            Self::Waypoint => "waypoint",
            Self::PeerUncaptured => "peer-uncaptured",
            Self::Source => "source",
            Self::Protocol => "protocol",
            Self::Limit => "limit",
            Self::CircuitBreaker => "circuit-breaker",
            Self::RetryBudget => "retry-budget",
            Self::RateLimit => "rate-limit",
            Self::Fault => "fault",
            Self::Drain => "drain",
            Self::Reset => "reset",
            Self::Internal => "internal",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Policy(policy) | Self::Plaintext(Some(policy)) | Self::Authorizer(policy) => {
                write!(f, "{}:{policy}", self.code())
            }
            Self::Token(fault) => write!(f, "{}:{fault}", self.code()),
            other => f.write_str(other.code()),
        }
    }
}
