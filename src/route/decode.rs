//! An HTTPRoute or GRPCRoute, as it is written, into a [`Route`].

use std::sync::Arc;

use k8s_openapi::jiff::Timestamp;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use self::matches::Patterns;
use self::rule::Reader;
use super::{Note, Parent, ParentPort, Route, RouteKind, Why};
use crate::mesh::NamespacedName;

mod external;
mod filter;
mod matches;
pub(super) mod rule;
pub(super) mod wire;

/// Why a route was refused as a whole.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{field}: {cause}")]
pub struct DecodeError {
    /// `spec.parentRefs[0].port`
    pub field: String,
    pub cause: String,
}

/// Reads one route. Of one that has no Service as its parent, nothing more is read: it is somebody else's.
///
/// A rule that cannot be read is dropped, and one whose filter cannot be honoured answers 500; [`Route::notes`] says so.
///
/// # Errors
/// Where it cannot be told what the route is about.
pub fn decode(kind: RouteKind, value: &Value) -> Result<Route, DecodeError> {
    let envelope: Envelope = read(value, "", &mut Vec::new())?;
    let name = NamespacedName::new(envelope.metadata.namespace.as_deref().unwrap_or("default"), envelope.metadata.name);
    let mut route = Route { kind, created: None, parents: Vec::new(), rules: Vec::new(), notes: Vec::new(), name };
    let spec = envelope.spec.unwrap_or_default();
    for (index, written) in spec.parent_refs.into_iter().flatten().enumerate() {
        let field = format!("spec.parentRefs[{index}]");
        let mut unknown = Vec::new();
        let written: wire::ParentRef = read(&written, &field, &mut unknown)?;
        if written.kind.as_deref() != Some("Service") || !is_core(written.group.as_deref().unwrap_or(GATEWAY_GROUP)) {
            continue;
        }
        route.parents.push(parent(&route.name, index, &field, written)?);
        route.notes.extend(unknown.into_iter().map(|field| passed_over(field, Why::PassedOver)));
    }
    if route.parents.is_empty() {
        return Ok(route);
    }
    if let Some(created) = envelope.metadata.creation_timestamp {
        let read: Timestamp = created.parse().map_err(|_| DecodeError {
            field: "metadata.creationTimestamp".to_owned(),
            cause: format!("{created:?} is no time such as 2026-01-31T12:00:00Z"),
        })?;
        route.created = Some(read.as_second());
    }
    // A route without rules has one that takes every request (HTTPRouteSpec, the default of `rules`).
    let written = spec.rules.unwrap_or_else(|| vec![Value::Object(serde_json::Map::new())]);
    let mut patterns = Patterns::default();
    for (index, written) in written.iter().enumerate() {
        let reader =
            Reader { namespace: &route.name.namespace, index, kind, patterns: &mut patterns, notes: Vec::new() };
        route.rules.extend(rule::rule(reader, written, &mut route.notes));
    }
    Ok(route)
}

#[derive(Deserialize)]
struct Envelope {
    metadata: Metadata,
    spec: Option<Spec>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Metadata {
    name: String,
    namespace: Option<String>,
    creation_timestamp: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase")]
struct Spec {
    parent_refs: Option<Vec<Value>>,
    rules: Option<Vec<Value>>,
}

fn parent(route: &NamespacedName, index: usize, field: &str, written: wire::ParentRef) -> Result<Parent, DecodeError> {
    let refuse = |name: &str, cause: &str| DecodeError { field: format!("{field}.{name}"), cause: cause.to_owned() };
    let service = match written.name.as_deref() {
        Some(name) if !name.is_empty() => {
            NamespacedName::new(written.namespace.as_deref().unwrap_or(&route.namespace), name)
        }
        _ => return Err(refuse("name", "a parent needs the name of a Service")),
    };
    let port = match written.port {
        Some(0) => return Err(refuse("port", "0 is no port; write a number from 1 to 65535")),
        port => port,
    };
    let section: Option<Arc<str>> = written.section_name.filter(|name| !name.is_empty()).map(Into::into);
    let port = match (port, section) {
        (None, None) => ParentPort::All,
        (Some(port), None) => ParentPort::Number(port),
        (None, Some(name)) => ParentPort::Name(name),
        (Some(port), Some(name)) => ParentPort::Both(port, name),
    };
    Ok(Parent { index, service, port })
}

/// Reads a part of the route; with the fields that nobody here knows.
pub(super) fn read<T: DeserializeOwned>(
    value: &Value,
    field: &str,
    unknown: &mut Vec<String>,
) -> Result<T, DecodeError> {
    let at = |path: &str| match (field, path) {
        ("", path) => path.to_owned(),
        (field, "" | ".") => field.to_owned(),
        (field, path) if path.starts_with('[') => format!("{field}{path}"),
        (field, path) => format!("{field}.{path}"),
    };
    let mut track = serde_path_to_error::Track::new();
    let deserializer = serde_path_to_error::Deserializer::new(value, &mut track);
    let read = serde_ignored::deserialize(deserializer, |path| unknown.push(at(&plain(&path))));
    read.map_err(|error| DecodeError { field: at(&track.path().to_string()), cause: error.to_string() })
}

/// As fields are written everywhere else: `headers[0].name`, and nothing of what may be absent.
fn plain(path: &serde_ignored::Path<'_>) -> String {
    use serde_ignored::Path;
    let joined = |parent: &Path<'_>, rest: String| format!("{}{rest}", plain(parent));
    match path {
        Path::Root => String::new(),
        Path::Seq { parent, index } => joined(parent, format!("[{index}]")),
        Path::Map { parent, key } => match plain(parent) {
            parent if parent.is_empty() => key.clone(),
            parent => format!("{parent}.{key}"),
        },
        Path::Some { parent } | Path::NewtypeStruct { parent } | Path::NewtypeVariant { parent } => plain(parent),
    }
}

fn passed_over(field: String, why: Why) -> Note {
    let cause = match why {
        Why::Dropped(_) => {
            "no such field is known here: the rule is dropped, for it may take other requests than meant"
        }
        Why::Refused(_) => "no such field is known here: the rule answers 500",
        _ => "no such field is known here; it has no effect",
    };
    Note { field, cause: cause.to_owned(), why }
}

/// The group of Services is written as nothing, and by some as `core`.
pub fn is_core(group: &str) -> bool {
    matches!(group, "" | "core")
}

pub(super) const GATEWAY_GROUP: &str = "gateway.networking.k8s.io";

#[cfg(test)]
mod tests;
