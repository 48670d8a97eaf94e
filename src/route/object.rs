use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;

use super::{Filters, Match, Redirect};
use crate::mesh::NamespacedName;

/// One HTTPRoute or GRPCRoute, as far as Services are its parents.
#[derive(Clone, PartialEq, Debug)]
pub struct Route {
    pub kind: RouteKind,
    pub name: NamespacedName,
    /// `metadata.creationTimestamp` in seconds; of two routes the older one goes first, and one without is the youngest.
    pub created: Option<i64>,
    pub parents: Vec<Parent>,
    /// The rules that hold, in the order in which they are written.
    pub rules: Vec<Rule>,
    /// What is not in force as written.
    pub notes: Vec<Note>,
}

impl Route {
    pub fn reference(&self) -> RouteRef {
        RouteRef { kind: self.kind, name: self.name.clone() }
    }
}

/// In the order in which they go: of one Service port, one kind rules (GEP-1294, "Route types").
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum RouteKind {
    Grpc,
    Http,
}

impl RouteKind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Grpc => "GRPCRoute",
            Self::Http => "HTTPRoute",
        }
    }
}

impl fmt::Display for RouteKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Names one route.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct RouteRef {
    pub kind: RouteKind,
    pub name: NamespacedName,
}

/// A Service whose requests a route rules: one entry of `spec.parentRefs`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Parent {
    /// Its place in `spec.parentRefs`, from 0.
    pub index: usize,
    pub service: NamespacedName,
    pub port: ParentPort,
}

/// Which ports of the parent: of a Service, `sectionName` is a port's name (Gateway API, ParentReference).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum ParentPort {
    All,
    Number(u16),
    Name(Arc<str>),
    Both(u16, Arc<str>),
}

impl ParentPort {
    pub fn takes_port(&self, number: u16, name: &str) -> bool {
        match self {
            Self::All => true,
            Self::Number(wanted) => *wanted == number,
            Self::Name(wanted) => **wanted == *name,
            Self::Both(wanted, named) => *wanted == number && **named == *name,
        }
    }
}

/// One rule of a route.
#[derive(Clone, PartialEq, Debug)]
pub struct Rule {
    /// Its place in `spec.rules`, from 0.
    pub index: usize,
    pub name: Option<Arc<str>>,
    /// One of them must be met; never empty.
    pub matches: Vec<Match>,
    pub filters: Filters,
    pub action: Action,
    pub timeouts: Timeouts,
    pub retry: Option<Arc<Retry>>,
    pub session: Option<Arc<SessionPersistence>>,
}

/// What becomes of a request that meets a rule.
#[derive(Clone, PartialEq, Debug)]
pub enum Action {
    /// A filter cannot be honoured, and must not be skipped: 500 (Gateway API, HTTPRouteFilter).
    Refuse,
    Redirect(Redirect),
    /// To the parent itself: the rule names no backend.
    Parent,
    /// To one of these, by weight; never empty.
    Backends(Vec<Backend>),
}

/// One entry of a rule's `backendRefs`.
#[derive(Clone, PartialEq, Debug)]
pub struct Backend {
    /// Its place in `backendRefs`, from 0.
    pub index: usize,
    pub weight: u32,
    /// `None`: not of a kind that requests can be sent to, or with a filter that cannot be honoured; 500 in its share.
    pub to: Option<BackendRef>,
    pub filters: Filters,
}

/// A Service port that requests are sent to.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct BackendRef {
    pub service: NamespacedName,
    pub port: u16,
}

/// Where a request goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Target<'a> {
    /// The Service port that was dialled. Its routes do not apply again.
    Parent,
    Backend(&'a BackendRef),
}

/// `timeouts`. As they are written, zero is no limit, and hides what a policy says; see `traffic::InForce::timeouts`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Timeouts {
    /// From the request's head to the last byte of the answer, over all tries.
    pub request: Option<Duration>,
    /// One try.
    pub backend_request: Option<Duration>,
}

/// `retry` ([GEP-1731](https://gateway-api.sigs.k8s.io/geps/gep-1731/), experimental).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Retry {
    /// How often a request may be sent again, beside the first time.
    pub attempts: Option<u32>,
    /// The least time between two tries.
    pub backoff: Option<Duration>,
    /// Answers that are worth another try.
    pub codes: Vec<StatusCode>,
    /// The same of gRPC; only a policy says these.
    pub grpc_codes: Vec<u16>,
}

/// `sessionPersistence` ([GEP-1619](https://gateway-api.sigs.k8s.io/geps/gep-1619/), experimental).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SessionPersistence {
    /// Of the cookie or header; the implementation's choice where none is given.
    pub name: Option<Arc<str>>,
    pub absolute_timeout: Option<Duration>,
    pub idle_timeout: Option<Duration>,
    pub kind: SessionKind,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SessionKind {
    Cookie(Lifetime),
    Header,
}

/// Of a cookie: until the client forgets, or until the absolute time-out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lifetime {
    Session,
    Permanent,
}

/// A field of a route that is not in force as written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Note {
    /// `spec.rules[0].filters[1].type`
    pub field: String,
    pub cause: String,
    pub why: Why,
}

/// What a note means for the route, and for the conditions of its status.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Why {
    /// The rule of this index is dropped: it holds a value that is not known here.
    Dropped(usize),
    /// A filter, or filters that do not go together: the rule of this index answers 500.
    Refused(usize),
    /// A reference to a kind that is no backend: 500 in its share.
    InvalidKind,
    /// A backend that cannot be used as it is written: 500 in its share.
    Backend,
    /// A field without effect.
    PassedOver,
}
