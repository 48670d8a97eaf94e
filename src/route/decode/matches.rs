//! The matches of a rule.

use std::collections::BTreeSet;
use std::sync::Arc;

use http::{HeaderName, Method};

use super::{DecodeError, wire};
use crate::route::{HeaderMatch, Match, PathMatch, Pattern, Place, Prefix, QueryMatch, RpcMatch, TextMatch};

/// How many more regular expressions a route may have: each takes memory in every agent.
pub(super) struct Patterns {
    left: usize,
}

impl Patterns {
    fn read(&mut self, field: &str, name: &str, text: &str) -> Result<Pattern, DecodeError> {
        let Some(left) = self.left.checked_sub(1) else {
            let cause = format!("a route may have {MOST_PATTERNS} regular expressions; make several routes of it");
            return refuse(field, name, cause);
        };
        self.left = left;
        Pattern::new(text).or_else(|error| refuse(field, name, format!("{text:?} is no regular expression: {error}")))
    }
}

impl Default for Patterns {
    fn default() -> Self {
        Self { left: MOST_PATTERNS }
    }
}

pub(super) fn http(field: &str, written: wire::HttpMatch, patterns: &mut Patterns) -> Result<Match, DecodeError> {
    let method = match written.method {
        None => None,
        Some(text) if METHODS.contains(&&*text) => Method::from_bytes(text.as_bytes()).ok(),
        Some(text) => return refuse(field, "method", format!("{text:?} is none of {}", METHODS.join(", "))),
    };
    Ok(Match {
        place: Place::Path(path(field, written.path, patterns)?),
        method,
        headers: headers(field, written.headers.unwrap_or_default(), patterns)?,
        query: query(field, written.query_params.unwrap_or_default(), patterns)?,
    })
}

pub(super) fn grpc(field: &str, written: wire::GrpcMatch, patterns: &mut Patterns) -> Result<Match, DecodeError> {
    let place = match written.method {
        None => RpcMatch { service: None, method: None },
        Some(written) => {
            let kind = written.kind.as_deref().unwrap_or("Exact");
            let mut part = |name: &str, text: Option<String>| {
                let text = text.filter(|text| !text.is_empty());
                text.map(|text| text_match(&format!("{field}.method"), name, Some(kind), &text, patterns)).transpose()
            };
            RpcMatch { service: part("service", written.service)?, method: part("method", written.method)? }
        }
    };
    let headers = headers(field, written.headers.unwrap_or_default(), patterns)?;
    Ok(Match { place: Place::Rpc(place), method: None, headers, query: Vec::new() })
}

fn path(field: &str, written: Option<wire::PathMatch>, patterns: &mut Patterns) -> Result<PathMatch, DecodeError> {
    let Some(written) = written else { return Ok(PathMatch::Prefix(Prefix::new("/"))) };
    let value = written.value.as_deref().unwrap_or("/");
    let kind = written.kind.as_deref().unwrap_or("PathPrefix");
    if kind != "RegularExpression" && !value.starts_with('/') {
        return refuse(field, "path.value", format!("{value:?} does not begin with a slash"));
    }
    Ok(match kind {
        "Exact" => PathMatch::Exact(value.into()),
        "PathPrefix" => PathMatch::Prefix(Prefix::new(value)),
        "RegularExpression" => PathMatch::Pattern(patterns.read(field, "path.value", value)?),
        other => {
            return refuse(field, "path.type", format!("{other:?} is none of Exact, PathPrefix, RegularExpression"));
        }
    })
}

// HTTPHeaderMatch: "If multiple entries specify equivalent header names, only the first entry with an equivalent name
// MUST be considered for a match."
fn headers(
    field: &str,
    written: Vec<wire::NamedMatch>,
    patterns: &mut Patterns,
) -> Result<Vec<HeaderMatch>, DecodeError> {
    let mut seen = BTreeSet::new();
    let mut read = Vec::new();
    for (at, one) in written.into_iter().enumerate() {
        let field = format!("{field}.headers[{at}]");
        let Ok(name) = HeaderName::from_bytes(one.name.as_bytes()) else {
            return refuse(&field, "name", format!("{:?} is no name of a header", one.name));
        };
        let value = text_match(&field, "value", one.kind.as_deref(), &one.value, patterns)?;
        if seen.insert(name.as_str().to_owned()) {
            read.push(HeaderMatch { name, value });
        }
    }
    Ok(read)
}

fn query(field: &str, written: Vec<wire::NamedMatch>, patterns: &mut Patterns) -> Result<Vec<QueryMatch>, DecodeError> {
    let mut read: Vec<QueryMatch> = Vec::new();
    for (at, one) in written.into_iter().enumerate() {
        let field = format!("{field}.queryParams[{at}]");
        let name: Arc<str> = one.name.into();
        let value = text_match(&field, "value", one.kind.as_deref(), &one.value, patterns)?;
        if read.iter().all(|other| other.name != name) {
            read.push(QueryMatch { name, value });
        }
    }
    Ok(read)
}

fn text_match(
    field: &str,
    name: &str,
    kind: Option<&str>,
    text: &str,
    patterns: &mut Patterns,
) -> Result<TextMatch, DecodeError> {
    match kind.unwrap_or("Exact") {
        "Exact" => Ok(TextMatch::Exact(text.into())),
        "RegularExpression" => Ok(TextMatch::Pattern(patterns.read(field, name, text)?)),
        other => refuse(field, "type", format!("{other:?} is none of Exact, RegularExpression")),
    }
}

fn refuse<T>(field: &str, name: &str, cause: String) -> Result<T, DecodeError> {
    Err(DecodeError { field: format!("{field}.{name}"), cause })
}

const MOST_PATTERNS: usize = 64;
/// HTTPMethod.
const METHODS: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"];
