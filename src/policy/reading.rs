//! What of a request its terms are held against.

use std::borrow::Cow;
use std::net::IpAddr;
use std::sync::Arc;

use http::HeaderName;
use serde_json::Value;

use super::RequestHead;
use super::block::Blocks;
use super::matcher::Texts;
use super::object::{Pattern, RequestAttribute, Values};

/// One request, its texts in the form that they are compared in.
pub(super) struct Reading<'a> {
    head: RequestHead<'a>,
    remote_ip: IpAddr,
    /// In lower case, without its port and a dot at its end; and with the port, where there is one.
    host: String,
    host_and_port: Option<String>,
    /// In capitals: what a careless server takes for DELETE is DELETE.
    method: Cow<'a, str>,
    /// Issuer and subject.
    principal: Option<String>,
}

impl<'a> Reading<'a> {
    pub(super) fn of(head: &RequestHead<'a>, remote_ip: IpAddr) -> Self {
        let (host, port) = split_port(head.host);
        let host = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
        let principal = head.principal.filter(|principal| !principal.subject.is_empty());
        Self {
            head: *head,
            remote_ip: remote_ip.to_canonical(),
            host_and_port: port.map(|port| format!("{host}:{port}")),
            host,
            method: match head.method.bytes().any(|byte| byte.is_ascii_lowercase()) {
                true => head.method.to_ascii_uppercase().into(),
                false => head.method.into(),
            },
            principal: principal.map(|principal| format!("{}/{}", principal.issuer, principal.subject)),
        }
    }
}

/// A host may be an IPv6 address in brackets.
fn split_port(host: &str) -> (&str, Option<&str>) {
    match host.rsplit_once(':') {
        Some((name, port)) if !port.contains(']') => (name, Some(port)),
        _ => (host, None),
    }
}

/// One field of a request and the values that it may have.
#[derive(Debug)]
pub(super) enum RequestMatcher {
    RemoteIp(Blocks),
    Host(Texts),
    Method(Texts),
    Path(Texts),
    Header(HeaderName, Texts),
    Principal(Texts),
    Claim(Arc<[String]>, Texts),
}

impl RequestMatcher {
    /// None for values of a type that the attribute does not have.
    pub(super) fn compile(attribute: &RequestAttribute, values: &Values) -> Option<Self> {
        let patterns = match (attribute, values) {
            (RequestAttribute::RemoteIp, Values::Blocks(blocks)) => {
                return Some(Self::RemoteIp(blocks.iter().collect()));
            }
            (_, Values::Text(patterns)) => patterns.iter(),
            _ => return None,
        };
        let as_written = || patterns.clone().cloned().collect();
        let changed = |change: fn(&str) -> String| patterns.clone().map(|pattern| with_text(pattern, change)).collect();
        Some(match attribute {
            RequestAttribute::RemoteIp => return None,
            RequestAttribute::Host => Self::Host(changed(str::to_ascii_lowercase)),
            RequestAttribute::Method => Self::Method(changed(str::to_ascii_uppercase)),
            RequestAttribute::Path => Self::Path(as_written()),
            RequestAttribute::Header(name) => Self::Header(name.clone(), as_written()),
            RequestAttribute::Principal => Self::Principal(as_written()),
            RequestAttribute::Claim(path) => Self::Claim(path.clone(), as_written()),
        })
    }

    /// Whether a value is found. Of a header that comes several times, `any` says whether one of its values suffices.
    pub(super) fn finds(&self, request: &Reading<'_>, any: bool) -> bool {
        match self {
            Self::RemoteIp(blocks) => blocks.contains(request.remote_ip),
            Self::Host(texts) => {
                texts.contains(&request.host) || request.host_and_port.as_ref().is_some_and(|host| texts.contains(host))
            }
            Self::Method(texts) => texts.contains(&request.method),
            Self::Path(texts) => texts.contains(request.head.path),
            Self::Header(name, texts) => header(request, name, texts, any),
            Self::Principal(texts) => request.principal.as_ref().is_some_and(|principal| texts.contains(principal)),
            Self::Claim(path, texts) => claim(request, path).is_some_and(|value| holds(value, path, texts)),
        }
    }
}

fn header(request: &Reading<'_>, name: &HeaderName, texts: &Texts, any: bool) -> bool {
    if name == http::header::HOST {
        return !request.head.host.is_empty() && texts.contains(request.head.host);
    }
    let mut values = request.head.headers.get_all(name).iter().peekable();
    // A header that is there and empty is there.
    let fits =
        |value: &http::HeaderValue| texts.is_presence() || value.to_str().is_ok_and(|value| texts.contains(value));
    match any {
        true => values.any(fits),
        false => values.peek().is_some() && values.all(fits),
    }
}

fn claim<'a>(request: &Reading<'a>, path: &[String]) -> Option<&'a Value> {
    let claims = &request.head.principal?.claims;
    let (first, rest) = path.split_first()?;
    rest.iter().try_fold(claims.get(first)?, |value, name| value.as_object()?.get(name))
}

/// A claim is a text, a list of them, a number, or true or false; of a list, one suffices.
fn holds(value: &Value, path: &[String], texts: &Texts) -> bool {
    match value {
        // RFC 8693, section 4.2: a list of words in one text.
        Value::String(text) if matches!(path, [name] if name == "scope") => {
            texts.contains(text) || text.split(' ').any(|word| texts.contains(word))
        }
        Value::String(text) => texts.contains(text),
        Value::Array(list) => list.iter().any(|value| !value.is_array() && holds(value, &[], texts)),
        Value::Bool(_) | Value::Number(_) => texts.contains(&value.to_string()),
        Value::Null | Value::Object(_) => false,
    }
}

fn with_text(pattern: &Pattern, change: fn(&str) -> String) -> Pattern {
    match pattern {
        Pattern::Exact(text) => Pattern::Exact(change(text).into()),
        Pattern::Prefix(text) => Pattern::Prefix(change(text).into()),
        Pattern::Suffix(text) => Pattern::Suffix(change(text).into()),
        Pattern::Presence => Pattern::Presence,
    }
}
