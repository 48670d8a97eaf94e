use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use k8s_openapi::jiff::Timestamp;
use serde_json::{Map, Value};

use self::field::{Fields, items, refuse, text};
use super::object::{
    Action, AuthorizationPolicy, Malformed, Mode, PeerAuthentication, PolicyKind, PolicyObject, PolicyRef, Unenforced,
};
use super::{Scope, Selection};
use crate::mesh::NamespacedName;

mod authentication;
mod field;
mod rule;

/// Why a policy was refused: the field, what is wrong with it, and what would be right.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{field}: {cause}")]
pub struct DecodeError {
    /// `spec.rules[0].from[1].source.ipBlocks[0]`
    pub field: String,
    pub cause: String,
}

/// Reads one policy object.
///
/// Refused is what is malformed: wrong types, unknown actions and modes, ranges and ports that are none, lists and
/// sources that say nothing. What is well-formed but cannot be enforced here (unknown fields, unknown keys, layer 7)
/// is noted in the policy, which then fails closed.
///
/// A condition of `null` is refused too: in YAML it is a list that somebody has yet to fill, and reading it as absent
/// would match everything.
pub fn decode(kind: PolicyKind, value: &Value) -> Result<PolicyObject, DecodeError> {
    let object = object_at(value, "")?;
    let name = name(object)?;
    let mut notes = Vec::new();
    for key in object.keys().filter(|key| !TOP_LEVEL.contains(&key.as_str())) {
        notes.push(unknown(key));
    }
    let metadata = object.get("metadata").and_then(Value::as_object).into_iter().flat_map(Map::keys);
    // A misspelt `namespace` would put the policy elsewhere without a word.
    for key in metadata.filter(|key| !METADATA.contains(&key.as_str())) {
        notes.push(unknown(format!("metadata.{key}")));
    }
    let empty = Map::new();
    let spec = match object.get("spec") {
        None => &empty,
        Some(spec) => object_at(spec, "spec")?,
    };
    let mut spec = Fields::new(spec, "spec");
    let object = match kind {
        PolicyKind::AuthorizationPolicy => {
            PolicyObject::Authorization(Box::new(authorization(name, dry_run(object)?, &mut spec, notes)?))
        }
        PolicyKind::PeerAuthentication => {
            PolicyObject::PeerAuthentication(Box::new(peer(name, created(object)?, &mut spec, notes)?))
        }
        PolicyKind::RequestAuthentication => {
            let scope = scope(kind, &name.namespace, &mut spec, &mut notes)?;
            let read = authentication::authentication(name, scope, &mut spec, object.get("status"), notes)?;
            PolicyObject::RequestAuthentication(Box::new(read))
        }
    };
    Ok(object)
}

/// What stands in for a policy that [`decode`] refused and that has no last good version: it denies all in as much
/// of its scope as can be read, else in its namespace.
pub fn malformed(kind: PolicyKind, name: NamespacedName, value: &Value, error: &DecodeError) -> PolicyObject {
    let empty = Map::new();
    let spec = value.get("spec").and_then(Value::as_object).unwrap_or(&empty);
    let mut fields = Fields::new(spec, "spec");
    let scope = scope(kind, &name.namespace, &mut fields, &mut Vec::new());
    let scope = scope.unwrap_or(Scope { namespace: name.namespace.clone(), selection: Selection::All });
    let annotations = value.pointer("/metadata/annotations");
    let dry_run = annotations.and_then(|annotations| annotations.get(DRY_RUN)).is_some_and(|dry| dry == "true");
    let audit = spec.get("action").is_some_and(|action| action == "AUDIT");
    PolicyObject::Malformed(Box::new(Malformed {
        reference: PolicyRef { kind, name },
        scope,
        observes: kind == PolicyKind::AuthorizationPolicy && (dry_run || audit),
        field: error.field.clone(),
        cause: error.cause.clone(),
    }))
}

fn authorization(
    name: NamespacedName,
    dry_run: bool,
    spec: &mut Fields<'_>,
    mut notes: Vec<Unenforced>,
) -> Result<AuthorizationPolicy, DecodeError> {
    let action = match spec.take("action").map(|(path, value)| text(value, &path)).transpose()? {
        None | Some("ALLOW") => Action::Allow,
        Some("DENY") => Action::Deny,
        Some("AUDIT") => Action::Audit,
        Some("CUSTOM") => Action::Custom,
        Some(other) => {
            return Err(refuse("spec.action", format!("{other:?} is none of ALLOW, DENY, AUDIT, CUSTOM")));
        }
    };
    let scope = scope(PolicyKind::AuthorizationPolicy, &name.namespace, spec, &mut notes)?;
    let rules_field = spec.take("rules");
    let provider = if action == Action::Custom { spec.take("provider") } else { None };
    let provider = match provider {
        None => None,
        Some((path, provider)) => {
            let mut fields = Fields::new(object_at(provider, &path)?, &path);
            let name = fields.take("name").map(|(path, name)| text(name, &path)).transpose()?;
            notes.extend(fields.rest());
            name.filter(|name| !name.is_empty()).map(Arc::<str>::from)
        }
    };
    if action == Action::Custom && provider.is_none() {
        notes.push(Unenforced {
            field: "spec.provider.name".into(),
            cause: "CUSTOM asks an ExternalAuthorizer, and none is named: what it matches is denied; name one".into(),
        });
    }
    notes.extend(spec.rest());
    // So far everything noted is beside the rules: it may have been a misspelt action, scope or `rules`.
    let opaque = !notes.is_empty();
    let mut rules = Vec::new();
    if let Some((path, value)) = rules_field {
        let Value::Array(list) = value else {
            return Err(refuse(&path, format!("{} is not a list of rules", field::kind(value))));
        };
        for (index, value) in list.iter().enumerate() {
            rules.push(rule::rule(&name, value, &format!("{path}[{index}]"), &mut notes)?);
        }
    }
    Ok(AuthorizationPolicy { name, scope, action, provider, dry_run, rules, opaque, unenforced: notes })
}

fn peer(
    name: NamespacedName,
    created: Option<Timestamp>,
    spec: &mut Fields<'_>,
    mut notes: Vec<Unenforced>,
) -> Result<PeerAuthentication, DecodeError> {
    let scope = scope(PolicyKind::PeerAuthentication, &name.namespace, spec, &mut notes)?;
    let mode = match spec.take("mtls") {
        None => None,
        Some((path, value)) => read_mode(value, &path, &mut notes)?,
    };
    let mut ports = BTreeMap::new();
    if let Some((path, value)) = spec.take("portLevelMtls") {
        let levels = object_at(value, &path)?;
        if levels.is_empty() {
            return Err(refuse(&path, "it names no port; leave it out".into()));
        }
        for (port, value) in levels {
            let path = format!("{path}[{port}]");
            let number = field::port(port, &path)?;
            if let Some(mode) = read_mode(value, &path, &mut notes)? {
                ports.insert(number, mode);
            }
        }
    }
    notes.extend(spec.rest());
    Ok(PeerAuthentication { name, scope, created, mode, ports, unenforced: notes })
}

fn read_mode(value: &Value, path: &str, notes: &mut Vec<Unenforced>) -> Result<Option<Mode>, DecodeError> {
    let mut fields = Fields::new(object_at(value, path)?, path);
    let mode = match fields.take("mode") {
        None => None,
        Some((path, value)) => match text(value, &path)? {
            "STRICT" => Some(Mode::Strict),
            "PERMISSIVE" => Some(Mode::Permissive),
            "UNSET" => None,
            "DISABLE" => {
                let cure = "mutual TLS between pods of the mesh is never off; PERMISSIVE accepts plaintext too";
                return Err(refuse(&path, format!("DISABLE does not exist here: {cure}")));
            }
            other => return Err(refuse(&path, format!("{other:?} is none of STRICT, PERMISSIVE, UNSET"))),
        },
    };
    notes.extend(fields.rest());
    Ok(mode)
}

fn scope(
    kind: PolicyKind,
    namespace: &Arc<str>,
    spec: &mut Fields<'_>,
    notes: &mut Vec<Unenforced>,
) -> Result<Scope, DecodeError> {
    let selector = spec.take("selector");
    let targets = if kind == PolicyKind::PeerAuthentication { None } else { spec.take("targetRefs") };
    let selection = match (selector, targets) {
        (Some(_), Some((path, _))) => {
            return Err(refuse(&path, "it excludes spec.selector: split the policy in two".into()));
        }
        (Some((path, value)), None) => labels(value, &path, notes)?,
        (None, Some((path, value))) => services(namespace, value, &path, notes)?,
        (None, None) => Selection::All,
    };
    Ok(Scope { namespace: namespace.clone(), selection })
}

fn labels(value: &Value, path: &str, notes: &mut Vec<Unenforced>) -> Result<Selection, DecodeError> {
    let mut fields = Fields::new(object_at(value, path)?, path);
    let mut labels = BTreeMap::new();
    if let Some((path, value)) = fields.take("matchLabels") {
        for (key, value) in object_at(value, &path)? {
            let path = format!("{path}[{key}]");
            let value = text(value, &path)?;
            if value.contains('*') || key.contains('*') {
                return Err(refuse(
                    &path,
                    "labels are matched exactly, '*' stands in none; list one policy each".into(),
                ));
            }
            labels.insert(key.clone(), value.to_owned());
        }
    }
    notes.extend(fields.rest());
    Ok(if labels.is_empty() { Selection::All } else { Selection::Labels(labels) })
}

fn services(
    namespace: &Arc<str>,
    value: &Value,
    path: &str,
    notes: &mut Vec<Unenforced>,
) -> Result<Selection, DecodeError> {
    let mut services = BTreeSet::new();
    let mut readable = true;
    for (path, value) in items(value, path)? {
        let mut fields = Fields::new(object_at(value, &path)?, &path);
        let mut word = |key: &str| fields.take(key).map(|(path, value)| text(value, &path)).transpose();
        let (group, kind, name, other) = (word("group")?, word("kind")?, word("name")?, word("namespace")?);
        if other.is_some_and(|other| other != &**namespace) {
            return Err(refuse(
                &format!("{path}.namespace"),
                format!("a target stands in {namespace}, the policy's own namespace; put the policy beside it"),
            ));
        }
        let Some(kind) = kind else {
            return Err(refuse(&format!("{path}.kind"), "it is missing; Service is meant?".into()));
        };
        let Some(name) = name.filter(|name| !name.is_empty()) else {
            return Err(refuse(&format!("{path}.name"), "it is missing; name the Service".into()));
        };
        let group = group.unwrap_or_default();
        if !matches!(group, "" | "core") || kind != "Service" {
            readable = false;
            notes.push(Unenforced {
                field: path.clone(),
                cause: format!("a target of kind {kind:?} in group {group:?} cannot be enforced here: the policy stands over all of its namespace; name a Service"),
            });
        }
        services.insert(NamespacedName::new(namespace.clone(), name));
        let rest = fields.rest();
        readable &= rest.is_empty();
        notes.extend(rest);
    }
    Ok(if readable { Selection::Services(services) } else { Selection::All })
}

fn name(object: &Map<String, Value>) -> Result<NamespacedName, DecodeError> {
    let Some(metadata) = object.get("metadata") else {
        return Err(refuse("metadata", "it is missing; a policy needs a name".into()));
    };
    let metadata = object_at(metadata, "metadata")?;
    let name = match metadata.get("name") {
        Some(name) => text(name, "metadata.name")?,
        None => return Err(refuse("metadata.name", "it is missing; a policy needs a name".into())),
    };
    let namespace = match metadata.get("namespace") {
        Some(namespace) => text(namespace, "metadata.namespace")?,
        None => "default",
    };
    Ok(NamespacedName::new(namespace, name))
}

fn created(object: &Map<String, Value>) -> Result<Option<Timestamp>, DecodeError> {
    // The API server's own clients write an unset time as null.
    match object.get("metadata").and_then(|metadata| metadata.get("creationTimestamp")) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => {
            let path = "metadata.creationTimestamp";
            let text = text(value, path)?;
            text.parse()
                .map(Some)
                .map_err(|_| refuse(path, format!("{text:?} is no time such as 2026-01-31T12:00:00Z")))
        }
    }
}

fn dry_run(object: &Map<String, Value>) -> Result<bool, DecodeError> {
    // The API server's own clients write annotations that are not there as null.
    let annotations = match object.get("metadata").and_then(|metadata| metadata.get("annotations")) {
        None | Some(Value::Null) => return Ok(false),
        Some(annotations) => object_at(annotations, "metadata.annotations")?,
    };
    let Some(value) = annotations.get(DRY_RUN) else { return Ok(false) };
    let path = format!("metadata.annotations[{DRY_RUN}]");
    match value {
        Value::String(text) if text == "true" => Ok(true),
        Value::String(text) if text == "false" => Ok(false),
        _ => Err(refuse(&path, format!("{value} is neither \"true\" nor \"false\" (text, in quotes)"))),
    }
}

fn object_at<'a>(value: &'a Value, path: &str) -> Result<&'a Map<String, Value>, DecodeError> {
    value.as_object().ok_or_else(|| refuse(path, format!("{} is not an object with fields", field::kind(value))))
}

fn unknown(path: impl fmt::Display) -> Unenforced {
    Unenforced {
        field: path.to_string(),
        cause: "the field is not known: misspelt, misplaced, or of another version; it fails closed".into(),
    }
}

/// The annotation that makes a policy observe.
pub const DRY_RUN: &str = "selvedge.dev/dry-run";
const TOP_LEVEL: [&str; 5] = ["apiVersion", "kind", "metadata", "spec", "status"];
/// [ObjectMeta](https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/object-meta/), and what earlier
/// versions of Kubernetes had in it.
const METADATA: [&str; 16] = [
    "name",
    "generateName",
    "namespace",
    "labels",
    "annotations",
    "finalizers",
    "managedFields",
    "ownerReferences",
    "creationTimestamp",
    "deletionGracePeriodSeconds",
    "deletionTimestamp",
    "generation",
    "resourceVersion",
    "selfLink",
    "uid",
    "clusterName",
];
