//! What a team asks of the requests to its Services beyond what routes say: `TrafficPolicy`, and the Gateway API's
//! `XBackendTrafficPolicy`.
//!
//! [`decode`] reads one, [`Table`] keeps them by what they are about and says what is in force for a request, and
//! [`status`] what became of each.

mod decode;
pub mod status;
mod table;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use http::HeaderName;

use super::resilience::{BudgetRules, FaultRules, Limits, OutlierRules, Rate};
use super::{Retry, RouteRef, SessionPersistence};
use crate::mesh::balance::Warmup;
use crate::mesh::{NamespacedName, TrafficDistribution};

pub use decode::decode;
pub use table::{Delta, InForce, Lost, Table};

/// One policy about traffic.
#[derive(Clone, PartialEq, Debug)]
pub struct TrafficPolicy {
    pub name: PolicyRef,
    /// `metadata.creationTimestamp` in seconds; the older of two goes first, and one without is the youngest.
    pub created: Option<i64>,
    pub targets: Vec<TargetRef>,
    pub fields: Fields,
    /// What is not in force as written.
    pub notes: Vec<Note>,
}

/// Names one policy.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct PolicyRef {
    pub kind: TrafficKind,
    pub name: NamespacedName,
}

impl fmt::Display for PolicyRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind.as_str(), self.name)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum TrafficKind {
    /// Ours.
    Traffic,
    /// The Gateway API's ([GEP-3388](https://gateway-api.sigs.k8s.io/geps/gep-3388/), experimental).
    Backend,
}

impl TrafficKind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Traffic => "TrafficPolicy",
            Self::Backend => "XBackendTrafficPolicy",
        }
    }
}

/// One entry of `spec.targetRefs`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TargetRef {
    /// Its place, from 0.
    pub index: usize,
    pub target: Target,
}

/// What a policy is about; always of the policy's own namespace.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Target {
    /// The requests that go to a Service, by whatever way.
    Service(NamespacedName),
    /// Those that a route rules.
    Route(RouteRef),
    /// Those that meet one rule of it, by its name.
    Rule(RouteRef, Arc<str>),
}

impl Target {
    pub fn is_service(&self) -> bool {
        matches!(self, Self::Service(_))
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Service(name) => write!(f, "Service {name}"),
            Self::Route(route) => write!(f, "{} {}", route.kind, route.name),
            Self::Rule(route, rule) => write!(f, "rule {rule} of {} {}", route.kind, route.name),
        }
    }
}

/// What may be asked for; each holds for itself, wherever it comes from.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Fields {
    /// `timeouts.request`; zero is none, and hides what a wider policy says.
    pub request: Option<Duration>,
    /// `timeouts.backendRequest`, likewise.
    pub backend_request: Option<Duration>,
    pub retry: Option<Arc<Retry>>,
    pub retry_constraint: Option<BudgetRules>,
    pub session: Option<Arc<SessionPersistence>>,
    pub fault: Option<Arc<FaultRules>>,
    pub rate_limits: Option<Arc<[RateLimit]>>,
    // The rest is for Services alone.
    pub breaker: Option<Limits>,
    pub outliers: Option<OutlierRules>,
    pub balance: Option<Arc<Balance>>,
}

impl Fields {
    /// The names of those that say something, as they are written.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        let said = [
            self.request.is_some(),
            self.backend_request.is_some(),
            self.retry.is_some(),
            self.retry_constraint.is_some(),
            self.session.is_some(),
            self.fault.is_some(),
            self.rate_limits.is_some(),
            self.breaker.is_some(),
            self.outliers.is_some(),
            self.balance.is_some(),
        ];
        NAMES.into_iter().zip(said).filter(|(_, said)| *said).map(|(name, _)| name)
    }
}

/// Of all fields, in the order in which they are told.
const NAMES: [&str; 10] = [
    "timeouts.request",
    "timeouts.backendRequest",
    "retry",
    "retryConstraint",
    "sessionPersistence",
    "faultInjection",
    "rateLimits",
    "circuitBreaker",
    "outlierDetection",
    "loadBalancer",
];

/// Those that only a Service takes: they are about its endpoints.
pub const OF_SERVICES: [&str; 3] = ["circuitBreaker", "outlierDetection", "loadBalancer"];

/// One entry of `rateLimits`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RateLimit {
    pub rate: Rate,
    pub by: RateBy,
}

/// Whose requests are counted together.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RateBy {
    /// Everybody's.
    Target,
    /// Those of one client identity; of one address where there is none.
    Identity,
    /// Those with one value of this header; those without it together.
    Header(HeaderName),
}

/// `loadBalancer`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Balance {
    pub way: Way,
    /// In place of what the Service says; within, none: anywhere.
    pub distribution: Option<Option<TrafficDistribution>>,
    pub warmup: Option<Warmup>,
}

/// How an endpoint is chosen.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Way {
    #[default]
    LeastRequest,
    PeakEwma,
    RoundRobin,
    Random,
    Hash(HashOn),
}

/// What requests have in common that go to one endpoint.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum HashOn {
    Header(HeaderName),
    /// Given to a client that has none.
    Cookie {
        name: Arc<str>,
        path: Option<Arc<str>>,
        ttl: Duration,
    },
    /// The client's address.
    Source,
}

/// A field that is not in force as written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Note {
    /// `spec.retry.codes[0]`
    pub field: String,
    pub cause: String,
}

#[cfg(test)]
mod tests;
