//! What becomes of the token of a request: verified as the engine does it, with the keys that the agents have.

use std::sync::Arc;

use http::header::AUTHORIZATION;
use http::request::Parts;
use http::{HeaderMap, Request};
use serde::Serialize;

use super::AnswerExplanation;
use crate::authentication::{self, Challenge, Fault, Judged, KeySource, Place, Principal, Rule};
use crate::model::State;
use crate::policy::{Query, RequestAuthentication};
use crate::route::{GrpcStatus, is_grpc};

/// What was made of a request's token.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct TokenExplanation {
    /// In one sentence.
    pub summary: String,
    /// Whose rule decided: `RequestAuthentication shop/users`; none where no rule is for such a token.
    pub policy: Option<String>,
    /// That rule, counted from 1.
    pub rule: Option<usize>,
    /// Whose tokens the rule takes.
    pub issuer: Option<String>,
    /// `<issuer>/<subject>`, of a token that holds and names a subject.
    pub principal: Option<String>,
    /// What the client is told whose token does not hold.
    pub answer: Option<AnswerExplanation>,
    /// What the application gets of it: `x-user: ann`.
    pub headers: Vec<String>,
}

/// Verifies the token of a request by the rules over its destination, and leaves whom it speaks for in its extensions. None
/// where there is nothing to tell.
///
/// # Errors
/// Why it does not hold.
pub(super) fn verify(
    state: &State,
    query: &Query<'_>,
    request: &mut Request<()>,
    now: i64,
) -> Result<Option<TokenExplanation>, (Fault, Box<TokenExplanation>)> {
    let over = state.policies.token_policies(query);
    let rules: Vec<Arc<Rule>> = over.iter().flat_map(|policy| policy.rules.iter().cloned()).collect();
    if rules.is_empty() {
        let words = "no RequestAuthentication stands over it: what the client sends as a token means nothing there";
        return Ok(request.headers().contains_key(AUTHORIZATION).then(|| told(words.to_owned())));
    }
    let (mut head, ()) = std::mem::take(request).into_parts();
    let Judged { outcome, rule } = authentication::judge(&rules, &mut head, now);
    let by = rule.and_then(|at| By::find(&over, at));
    let told = match outcome {
        Ok(None) => Ok(Some(told(format!("the request has none, at {}", places(&rules))))),
        Ok(Some(principal)) => {
            let told = holds(&principal, by.as_ref(), &head.headers);
            head.extensions.insert(Arc::new(principal));
            Ok(Some(told))
        }
        Err(fault) => {
            let told = refused(&fault, by.as_ref(), &rules, &head);
            Err((fault, Box::new(told)))
        }
    };
    *request = Request::from_parts(head, ());
    told
}

/// The rule that decided, and where it stands.
struct By<'a> {
    policy: &'a RequestAuthentication,
    /// Counted from 0.
    at: usize,
    rule: &'a Rule,
}

impl<'a> By<'a> {
    /// By its place among the rules of all policies.
    fn find(over: &'a [RequestAuthentication], place: usize) -> Option<Self> {
        let mut all =
            over.iter().flat_map(|policy| policy.rules.iter().enumerate().map(move |(at, rule)| (policy, at, rule)));
        all.nth(place).map(|(policy, at, rule)| Self { policy, at, rule })
    }

    fn words(&self) -> String {
        format!("RequestAuthentication {}, rule {} ({})", self.policy.name, self.at + 1, self.rule.issuer)
    }

    /// Why it has no keys, or takes no token, where that is it.
    fn cause(&self, fault: &Fault) -> Option<String> {
        let of_rule = format!("spec.jwtRules[{}].", self.at);
        match (fault, &self.rule.keys) {
            (Fault::NoKeys(_), keys) if keys.found.is_some() => Some(format!(
                "those of {} were fetched more than {} hours ago; the policy's condition KeysFetched says what is wrong",
                keys.source,
                authentication::KEYS_HOLD / 3600
            )),
            (Fault::NoKeys(_), keys) => {
                let lacking = self.policy.lacking.iter().find(|note| note.field.starts_with(&of_rule));
                let source = Some(&keys.source).filter(|source| **source != KeySource::Inline);
                let source = source.map(|source| format!(" {source}:")).unwrap_or_default();
                lacking.map(|note| format!("{}:{source} {}", note.field, note.cause))
            }
            (Fault::Unenforced(_), _) => {
                let notes = &self.policy.unenforced;
                let note = notes.iter().find(|note| note.field.starts_with(&of_rule)).or(notes.first())?;
                Some(format!("{}: {}", note.field, note.cause))
            }
            _ => None,
        }
    }
}

fn told(summary: String) -> TokenExplanation {
    let (policy, rule, issuer, principal, answer) = (None, None, None, None, None);
    TokenExplanation { summary, policy, rule, issuer, principal, answer, headers: Vec::new() }
}

fn by_rule(summary: String, by: Option<&By<'_>>) -> TokenExplanation {
    TokenExplanation {
        policy: by.map(|by| format!("RequestAuthentication {}", by.policy.name)),
        rule: by.map(|by| by.at + 1),
        issuer: by.map(|by| by.rule.issuer.to_string()),
        ..told(summary)
    }
}

fn holds(principal: &Principal, by: Option<&By<'_>>, headers: &HeaderMap) -> TokenExplanation {
    let name = principal.name();
    let whose = name
        .as_ref()
        .map_or("it names no subject, so there is no principal".to_owned(), |name| format!("principal {name}"));
    let by_words = by.map(By::words).unwrap_or_default();
    let written = by.map(|by| &by.rule.claim_headers).into_iter().flatten().map(|one| &one.header);
    let written = written.filter_map(|name| Some(format!("{name}: {}", headers.get(name)?.to_str().ok()?)));
    let headers: Vec<String> = written.collect();
    TokenExplanation { principal: name, headers, ..by_rule(format!("it holds, by {by_words}: {whose}"), by) }
}

fn refused(fault: &Fault, by: Option<&By<'_>>, rules: &[Arc<Rule>], head: &Parts) -> TokenExplanation {
    let why = match by {
        Some(by) => {
            let cause = by.cause(fault).map(|cause| format!(" ({cause})")).unwrap_or_default();
            format!("{}: {fault}{cause}", by.words())
        }
        None if matches!(fault, Fault::Issuer(_)) => {
            let mut issuers: Vec<&str> = rules.iter().map(|rule| &*rule.issuer).collect();
            issuers.dedup();
            format!("{fault}: they take those of {}, at {}", issuers.join(", "), places(rules))
        }
        None => fault.to_string(),
    };
    let answer = AnswerExplanation {
        status: Challenge::of(fault).status.as_u16(),
        grpc_status: is_grpc(head).then_some(GrpcStatus::Unauthenticated as u16),
        location: None,
    };
    let summary = format!("its token is refused with {answer}, by {why}");
    let summary = if by.is_some() { summary } else { format!("its token is refused with {answer}: {why}") };
    TokenExplanation { answer: Some(answer), ..by_rule(summary, by) }
}

fn places(rules: &[Arc<Rule>]) -> String {
    let mut places: Vec<&Place> = Vec::new();
    for place in rules.iter().flat_map(|rule| &rule.places) {
        if !places.contains(&place) {
            places.push(place);
        }
    }
    places.into_iter().map(ToString::to_string).collect::<Vec<_>>().join(" or ")
}

#[cfg(test)]
mod tests;
