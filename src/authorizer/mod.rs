//! Who else is asked whether a request may pass: external authorizers, by HTTP as oauth2-proxy and oathkeeper have it, or by
//! Envoy's gRPC.
//!
//! Sans-io: of a request an [`Authorizer`] makes the [`Question`] that is sent, and of what comes back a [`Verdict`]. Sending
//! it is `waypoint`'s, over the mesh as anything else; when somebody is asked, `policy` and `route` say.

#![forbid(unsafe_code)]

mod by_grpc;
mod by_http;
mod check;
mod decode;
mod names;
mod object;
pub mod status;
mod store;
mod verdict;
pub mod wire;

pub use check::{Check, CheckBody, Peer};
pub use decode::DecodeError;
pub use names::Names;
pub use object::{Authorizer, BodyLimit, GrpcSettings, HttpSettings, Protocol, Question, Reply};
pub use store::{Authorizers, Delta};
pub use verdict::{Allowed, Denied, Verdict};

#[cfg(test)]
mod tests;
