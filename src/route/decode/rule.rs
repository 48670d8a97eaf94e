//! One rule.

use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use serde_json::Value;

use super::filter::{self, Asked};
use super::matches::Patterns;
use super::{DecodeError, is_core, matches, passed_over, read, wire};
use crate::mesh::NamespacedName;
use crate::route::{
    Action, Backend, BackendRef, Lifetime, Match, Note, PathMatch, PathRewrite, Place, Retry, RouteKind, Rule,
    SessionKind, SessionPersistence, Timeouts, Why, parse_duration,
};

/// The rule, unless something forbids it.
pub(super) fn rule(mut reader: Reader<'_>, value: &Value, notes: &mut Vec<Note>) -> Option<Rule> {
    let index = reader.index;
    let rule = match reader.rule(value) {
        Ok(rule) => Some(rule),
        Err(error) => {
            let cause = format!("{}; the rule is dropped", error.cause);
            reader.notes.push(Note { field: error.field, cause, why: Why::Dropped(index) });
            None
        }
    };
    let is_dropped = reader.notes.iter().any(|note| note.why == Why::Dropped(index));
    notes.append(&mut reader.notes);
    rule.filter(|_| !is_dropped)
}

/// Reads one rule, and notes what of it is not in force as written.
pub(super) struct Reader<'a> {
    pub namespace: &'a Arc<str>,
    pub index: usize,
    pub kind: RouteKind,
    pub patterns: &'a mut Patterns,
    pub notes: Vec<Note>,
}

impl Reader<'_> {
    fn rule(&mut self, value: &Value) -> Result<Rule, DecodeError> {
        let field = format!("spec.rules[{}]", self.index);
        let mut unknown = Vec::new();
        let written: wire::Rule = read(value, &field, &mut unknown)?;
        self.notes.extend(unknown.into_iter().map(|field| passed_over(field, Why::PassedOver)));
        let matches = self.matches(&field, written.matches.unwrap_or_default())?;
        let (filters, asked) = self.filters(&format!("{field}.filters"), written.filters.unwrap_or_default());
        let only_prefixes =
            matches.iter().all(|one| matches!(one.place, Place::Path(PathMatch::Prefix(_)) | Place::Rpc(_)));
        let backends = written.backend_refs.unwrap_or_default();
        let backends: Vec<Backend> =
            backends.into_iter().enumerate().map(|(at, one)| self.backend(&field, at, one, only_prefixes)).collect();
        let path = match &asked {
            Asked::Redirect(redirect) => redirect.path.as_ref(),
            _ => filters.rewrite.path.as_ref(),
        };
        let action = match asked {
            Asked::Refuse => Action::Refuse,
            _ if matches!(path, Some(PathRewrite::Prefix(_))) && !only_prefixes => {
                self.refuse(format!("{field}.filters"), NO_PREFIX, Why::Refused(self.index));
                Action::Refuse
            }
            Asked::Redirect(redirect) => Action::Redirect(redirect),
            Asked::Nothing if backends.is_empty() => Action::Parent,
            Asked::Nothing => Action::Backends(backends),
        };
        Ok(Rule {
            index: self.index,
            name: written.name.filter(|name| !name.is_empty()).map(Into::into),
            matches,
            filters,
            action,
            timeouts: timeouts(&format!("{field}.timeouts"), written.timeouts)?,
            retry: written.retry.map(|retry| read_retry(&format!("{field}.retry"), retry)).transpose()?.map(Arc::new),
            session: match written.session_persistence {
                Some(session) => Some(Arc::new(read_session(&format!("{field}.sessionPersistence"), session)?)),
                None => None,
            },
        })
    }

    /// One that takes every request where none is written.
    fn matches(&mut self, rule: &str, written: Vec<Value>) -> Result<Vec<Match>, DecodeError> {
        let written = if written.is_empty() { vec![Value::Object(serde_json::Map::new())] } else { written };
        let mut read_matches = Vec::new();
        for (at, value) in written.iter().enumerate() {
            let field = format!("{rule}.matches[{at}]");
            let mut unknown = Vec::new();
            read_matches.push(match self.kind {
                RouteKind::Http => matches::http(&field, read(value, &field, &mut unknown)?, self.patterns)?,
                RouteKind::Grpc => matches::grpc(&field, read(value, &field, &mut unknown)?, self.patterns)?,
            });
            self.notes.extend(unknown.into_iter().map(|field| passed_over(field, Why::Dropped(self.index))));
        }
        Ok(read_matches)
    }

    fn backend(&mut self, rule: &str, at: usize, written: wire::BackendRef, only_prefixes: bool) -> Backend {
        let field = format!("{rule}.backendRefs[{at}]");
        let reference = wire::ObjectRef {
            group: written.group,
            kind: written.kind,
            namespace: written.namespace,
            name: written.name,
            port: written.port,
        };
        let to = self.backend_ref(&field, reference);
        let before = self.notes.len();
        let (filters, asked) = self.filters(&format!("{field}.filters"), written.filters.unwrap_or_default());
        let replaces = matches!(filters.rewrite.path, Some(PathRewrite::Prefix(_)));
        let cause = match asked {
            Asked::Refuse => Some(None),
            Asked::Nothing if filters.cors.is_none() => (replaces && !only_prefixes).then_some(Some(NO_PREFIX)),
            _ => Some(Some("a backend takes no redirect and no CORS; write it on the rule")),
        };
        if let Some(Some(cause)) = cause {
            self.refuse(format!("{field}.filters"), cause, Why::Backend);
        }
        // Only the share of this backend is refused.
        let refused = Why::Refused(self.index);
        self.notes[before..].iter_mut().filter(|note| note.why == refused).for_each(|note| note.why = Why::Backend);
        Backend { index: at, weight: written.weight.unwrap_or(1), to: to.filter(|_| cause.is_none()), filters }
    }

    /// A Service port; `None`, with a note, where it is none.
    pub fn backend_ref(&mut self, field: &str, written: wire::ObjectRef) -> Option<BackendRef> {
        let kind = written.kind.as_deref().unwrap_or("Service");
        let group = written.group.as_deref().unwrap_or_default();
        let mut note = |field: String, cause: String, why| self.notes.push(Note { field, cause, why });
        if kind != "Service" || !is_core(group) {
            let cause = format!("{kind:?} of group {group:?} is no backend here; name a Service");
            note(format!("{field}.kind"), cause, Why::InvalidKind);
            return None;
        }
        let Some(port) = written.port.filter(|port| *port > 0) else {
            let cause = "a Service is a backend with the number of one of its ports".to_owned();
            note(format!("{field}.port"), cause, Why::Backend);
            return None;
        };
        let namespace = written.namespace.map_or_else(|| self.namespace.clone(), Into::into);
        Some(BackendRef { service: NamespacedName { namespace, name: written.name.into() }, port })
    }

    fn filters(&mut self, field: &str, written: Vec<Value>) -> (crate::route::Filters, Asked) {
        filter::filters(self, field, &written)
    }

    /// Notes why requests are answered with 500.
    pub fn refuse(&mut self, field: String, cause: &str, why: Why) {
        let cause = format!("{cause}; what it would take is answered with 500");
        self.notes.push(Note { field, cause, why });
    }
}

pub(in crate::route) fn timeouts(field: &str, written: Option<wire::Timeouts>) -> Result<Timeouts, DecodeError> {
    let Some(written) = written else { return Ok(Timeouts::default()) };
    // "A zero-valued timeout means no timeout" (GEP-1742): also where a policy says another one.
    Ok(Timeouts {
        request: duration(field, "request", written.request.as_deref())?,
        backend_request: duration(field, "backendRequest", written.backend_request.as_deref())?,
    })
}

pub(in crate::route) fn read_retry(field: &str, written: wire::Retry) -> Result<Retry, DecodeError> {
    let code = |(at, code): (usize, u16)| {
        let known = (400..600).contains(&code).then(|| StatusCode::from_u16(code).ok()).flatten();
        known.ok_or_else(|| DecodeError {
            field: format!("{field}.codes[{at}]"),
            cause: format!("{code} is no status of an error; write one from 400 to 599"),
        })
    };
    let codes = written.codes.unwrap_or_default();
    Ok(Retry {
        attempts: written.attempts,
        backoff: duration(field, "backoff", written.backoff.as_deref())?,
        codes: codes.into_iter().enumerate().map(code).collect::<Result<_, _>>()?,
        grpc_codes: Vec::new(),
    })
}

pub(in crate::route) fn read_session(
    field: &str,
    written: wire::SessionPersistence,
) -> Result<SessionPersistence, DecodeError> {
    let one_of = |name: &str, text: &str, known: &str| DecodeError {
        field: format!("{field}.{name}"),
        cause: format!("{text:?} is none of {known}"),
    };
    let lifetime = match written.cookie_config.and_then(|config| config.lifetime_type).as_deref() {
        None | Some("Session") => Lifetime::Session,
        Some("Permanent") => Lifetime::Permanent,
        Some(other) => return Err(one_of("cookieConfig.lifetimeType", other, "Session, Permanent")),
    };
    let kind = match written.kind.as_deref() {
        None | Some("Cookie") => SessionKind::Cookie(lifetime),
        Some("Header") => SessionKind::Header,
        Some(other) => return Err(one_of("type", other, "Cookie, Header")),
    };
    Ok(SessionPersistence {
        name: written.session_name.filter(|name| !name.is_empty()).map(Into::into),
        absolute_timeout: duration(field, "absoluteTimeout", written.absolute_timeout.as_deref())?,
        idle_timeout: duration(field, "idleTimeout", written.idle_timeout.as_deref())?,
        kind,
    })
}

pub(in crate::route) fn duration(field: &str, name: &str, text: Option<&str>) -> Result<Option<Duration>, DecodeError> {
    let Some(text) = text else { return Ok(None) };
    let read = parse_duration(text);
    let refused = |error| DecodeError { field: format!("{field}.{name}"), cause: format!("{text:?} is {error}") };
    read.map(Some).map_err(refused)
}

const NO_PREFIX: &str = "ReplacePrefixMatch needs matches that all have a path of type PathPrefix";
