//! The token of a request, on its way to an application.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use http::request::Parts;

use super::answer::Refusal;
use crate::authentication::{self, Rule};

/// Verifies the token of a request by the rules over its destination, and leaves whom it speaks for in the head's extensions.
///
/// # Errors
/// What a client is told whose token does not hold.
pub fn authenticate(rules: &[Arc<Rule>], head: &mut Parts) -> Result<(), Refusal> {
    if rules.is_empty() {
        return Ok(());
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
    let outcome = authentication::authenticate(rules, head, i64::try_from(now).unwrap_or(i64::MAX));
    let result = match &outcome {
        Ok(Some(_)) => "ok",
        Ok(None) => "none",
        Err(fault) => fault.code(),
    };
    metrics::counter!(TOKENS, "result" => result).increment(1);
    if let Some(principal) = outcome.map_err(|fault| Refusal::token(&fault))? {
        head.extensions.insert(Arc::new(principal));
    }
    Ok(())
}

pub const TOKENS: &str = "selvedge_http_tokens_total";
