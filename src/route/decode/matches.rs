//! The matches of a rule.

use std::collections::BTreeSet;
use std::sync::Arc;

use http::{HeaderName, Method};

use super::{DecodeError, wire};
use crate::route::{HeaderMatch, Match, PathMatch, Pattern, Place, Prefix, QueryMatch, RpcMatch, TextMatch};

pub(super) fn http(field: &str, written: wire::HttpMatch) -> Result<Match, DecodeError> {
    let method = match written.method {
        None => None,
        Some(text) if METHODS.contains(&&*text) => Method::from_bytes(text.as_bytes()).ok(),
        Some(text) => return refuse(field, "method", format!("{text:?} is none of {}", METHODS.join(", "))),
    };
    Ok(Match {
        place: Place::Path(path(field, written.path)?),
        method,
        headers: headers(field, written.headers.unwrap_or_default())?,
        query: query(field, written.query_params.unwrap_or_default())?,
    })
}

pub(super) fn grpc(field: &str, written: wire::GrpcMatch) -> Result<Match, DecodeError> {
    let place = match written.method {
        None => RpcMatch { service: None, method: None },
        Some(written) => {
            let kind = written.kind.as_deref().unwrap_or("Exact");
            let part = |name: &str, text: Option<String>| {
                let text = text.filter(|text| !text.is_empty());
                text.map(|text| text_match(&format!("{field}.method"), name, Some(kind), &text)).transpose()
            };
            RpcMatch { service: part("service", written.service)?, method: part("method", written.method)? }
        }
    };
    let headers = headers(field, written.headers.unwrap_or_default())?;
    Ok(Match { place: Place::Rpc(place), method: None, headers, query: Vec::new() })
}

fn path(field: &str, written: Option<wire::PathMatch>) -> Result<PathMatch, DecodeError> {
    let Some(written) = written else { return Ok(PathMatch::Prefix(Prefix::new("/"))) };
    let value = written.value.as_deref().unwrap_or("/");
    let kind = written.kind.as_deref().unwrap_or("PathPrefix");
    if kind != "RegularExpression" && !value.starts_with('/') {
        return refuse(field, "path.value", format!("{value:?} does not begin with a slash"));
    }
    Ok(match kind {
        "Exact" => PathMatch::Exact(value.into()),
        "PathPrefix" => PathMatch::Prefix(Prefix::new(value)),
        "RegularExpression" => PathMatch::Pattern(pattern(field, "path.value", value)?),
        other => {
            return refuse(field, "path.type", format!("{other:?} is none of Exact, PathPrefix, RegularExpression"));
        }
    })
}

// HTTPHeaderMatch: "If multiple entries specify equivalent header names, only the first entry with an equivalent name
// MUST be considered for a match."
fn headers(field: &str, written: Vec<wire::NamedMatch>) -> Result<Vec<HeaderMatch>, DecodeError> {
    let mut seen = BTreeSet::new();
    let mut read = Vec::new();
    for (at, one) in written.into_iter().enumerate() {
        let field = format!("{field}.headers[{at}]");
        let Ok(name) = HeaderName::from_bytes(one.name.as_bytes()) else {
            return refuse(&field, "name", format!("{:?} is no name of a header", one.name));
        };
        let value = text_match(&field, "value", one.kind.as_deref(), &one.value)?;
        if seen.insert(name.as_str().to_owned()) {
            read.push(HeaderMatch { name, value });
        }
    }
    Ok(read)
}

fn query(field: &str, written: Vec<wire::NamedMatch>) -> Result<Vec<QueryMatch>, DecodeError> {
    let mut read: Vec<QueryMatch> = Vec::new();
    for (at, one) in written.into_iter().enumerate() {
        let field = format!("{field}.queryParams[{at}]");
        let name: Arc<str> = one.name.into();
        let value = text_match(&field, "value", one.kind.as_deref(), &one.value)?;
        if read.iter().all(|other| other.name != name) {
            read.push(QueryMatch { name, value });
        }
    }
    Ok(read)
}

fn text_match(field: &str, name: &str, kind: Option<&str>, text: &str) -> Result<TextMatch, DecodeError> {
    match kind.unwrap_or("Exact") {
        "Exact" => Ok(TextMatch::Exact(text.into())),
        "RegularExpression" => Ok(TextMatch::Pattern(pattern(field, name, text)?)),
        other => refuse(field, "type", format!("{other:?} is none of Exact, RegularExpression")),
    }
}

fn pattern(field: &str, name: &str, text: &str) -> Result<Pattern, DecodeError> {
    Pattern::new(text).or_else(|error| refuse(field, name, format!("{text:?} is no regular expression: {error}")))
}

fn refuse<T>(field: &str, name: &str, cause: String) -> Result<T, DecodeError> {
    Err(DecodeError { field: format!("{field}.{name}"), cause })
}

/// HTTPMethod.
const METHODS: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"];
