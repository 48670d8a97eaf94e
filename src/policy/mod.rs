//! Compile, decide, explain: who may talk to whom, and why.
//!
//! An object is read once by [`decode`], which refuses what is malformed and notes what cannot be enforced. [`Policies`]
//! keeps what was read, compiled, and answers [`Policies::decide`] from what stands over one destination.
//! Sans-io: no socket, no clock, no runtime.

#![forbid(unsafe_code)]

mod around;
mod authentication;
mod block;
mod compile;
mod decide;
mod decode;
mod explain;
mod matcher;
mod object;
mod path;
mod problem;
mod reading;
mod request;
mod scope;
mod standing;
mod store;
mod word;

pub use authentication::RequestAuthentication;
pub use compile::Reads;
pub use decide::{Ask, Clause, Decision, Observed, Query, Verdict};
pub use decode::{DRY_RUN, DecodeError, decode, malformed};
pub use explain::{Considered, Explanation, RuleOutcome};
pub use object::{
    Action, Attribute, AuthorizationPolicy, Malformed, Mode, Pattern, PeerAuthentication, PolicyKind, PolicyObject,
    PolicyRef, RequestAttribute, Rule, Term, Terms, Unenforced, Values,
};
pub use path::{PathFault, normal_path};
pub use problem::{Problem, describe_metrics, record_metrics};
pub use request::RequestHead;
pub use scope::{Scope, Selection};
pub use standing::PeerMode;
pub use store::{Delta, Policies};

pub use crate::authentication::Principal;

/// The namespace whose policies stand over the whole mesh.
pub const ROOT_NAMESPACE: &str = "selvedge-system";

#[cfg(test)]
mod tests;
