//! Who a request speaks for, as the token in it says: JSON Web Tokens (RFC 7519), signed (RFC 7515) with keys that their issuer
//! publishes (RFC 7517).
//!
//! Sans-io: a request's head, the rules over its destination and the time come in, a [`Principal`] or a [`Fault`] goes out.
//! Which rules stand over a destination is `policy`'s to say; keys are brought by whoever reads the objects. Only signatures
//! of a public key are verified, by algorithms that the key's own type has: there is no `none` here and no shared secret.

#![forbid(unsafe_code)]

mod algorithm;
mod challenge;
mod fault;
mod jwk;
mod place;
mod rule;
mod service_url;
mod token;

pub use algorithm::Algorithm;
pub use challenge::Challenge;
pub use fault::Fault;
pub use jwk::{KeySet, KeySetError};
pub use place::Place;
pub use rule::{
    ClaimHeader, Found, Judged, KeySource, Keys, Principal, Rule, authenticate, claim_text, judge, may_carry,
};
pub use service_url::ServiceUrl;
pub use token::Token;

/// How far the clocks of an issuer and a node may be apart, in seconds.
pub const SKEW: i64 = 60;
/// For how long keys that were fetched hold unless they are fetched again, in seconds.
pub const KEYS_HOLD: i64 = 24 * 60 * 60;

#[cfg(test)]
pub mod tests;
