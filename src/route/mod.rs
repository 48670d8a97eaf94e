//! L7: which rule of which route a request meets, and what is to be done with it.
//!
//! Sans-io: a request's head and a random number come in, a [`Decision`] goes out. Routes are the Gateway API's:
//! HTTPRoute and GRPCRoute with a Service as their parent
//! ([GEP-1294](https://gateway-api.sigs.k8s.io/geps/gep-1294/)). [`Table`] keeps them by the Service port and the
//! client namespace that they rule; [`Routes`] is what rules one of these.

#![forbid(unsafe_code)]

mod answer;
mod cors;
mod decide;
mod decode;
mod duration;
mod edit;
mod filter;
mod head;
mod index;
mod matching;
mod object;
mod path;
mod pattern;
pub mod resilience;
pub mod session;
pub mod status;
mod table;
pub mod traffic;

pub use answer::{Answer, Because, GrpcStatus, is_grpc};
pub use cors::{Allowed, Cors, Origin};
pub use decide::{Decision, Forward, Routes};
pub use decode::{DecodeError, decode, is_core};
pub use duration::{DurationError, parse_duration};
pub use edit::set_host;
pub use filter::{Filters, HeaderEdits, Mirror, PathRewrite, Redirect, Rewrite, Share};
pub use matching::{HeaderMatch, Match, PathMatch, Place, QueryMatch, RpcMatch, TextMatch};
pub use object::{
    Action, Backend, BackendRef, Lifetime, Note, Parent, ParentPort, Retry, Route, RouteKind, RouteRef, Rule,
    SessionKind, SessionPersistence, Target, Timeouts, Why,
};
pub use path::Prefix;
pub use pattern::{Pattern, PatternError};
pub use table::{Delta, Table};

#[cfg(test)]
mod tests;
