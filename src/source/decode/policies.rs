//! Our own kinds.

use std::sync::Arc;

use serde_json::Value;

use super::field::{Fault, SUBDOMAIN, check_namespaced, is_subdomain};
use super::{Item, Key, Kind};
use crate::authorizer::Authorizer;
use crate::mesh::NamespacedName;
use crate::policy::{self, DRY_RUN, DecodeError, Delta, PolicyKind, PolicyObject, Selection, Unenforced};

/// One policy as it was read.
#[derive(Clone, PartialEq, Debug)]
pub struct PolicyItem {
    object: PolicyObject,
    targets: Vec<Target>,
    /// What is in force in its place while Services that it names are not there.
    closed: Option<PolicyObject>,
    /// Where its fields for keys stand.
    key_lines: Vec<(String, usize)>,
}

/// One entry of `targetRefs`.
#[derive(Clone, PartialEq, Debug)]
struct Target {
    /// `spec.targetRefs[0].name`
    field: String,
    line: usize,
    service: NamespacedName,
}

/// A Service that a policy names and that is not there.
#[derive(Clone, PartialEq, Debug)]
pub struct MissingTarget {
    pub field: String,
    pub line: usize,
    pub cause: String,
}

impl PolicyItem {
    pub fn apply(&self) -> Delta {
        Delta::Apply(self.closed.as_ref().unwrap_or(&self.object).clone())
    }

    pub fn delete(&self) -> Delta {
        Delta::Delete(self.object.reference())
    }

    /// Whether it stands over Services, which may come and go.
    pub fn has_targets(&self) -> bool {
        !self.targets.is_empty()
    }

    /// Whether it stands in for one that could not be read.
    pub fn is_malformed(&self) -> bool {
        matches!(self.object, PolicyObject::Malformed(_))
    }

    /// The same policy beside these Services: one that names a Service which is not there fails closed until it is.
    pub fn beside(&self, is_there: impl Fn(&NamespacedName) -> bool) -> (Self, Vec<MissingTarget>) {
        let missing: Vec<MissingTarget> =
            self.targets.iter().filter(|target| !is_there(&target.service)).map(Target::missing).collect();
        let notes = missing.iter().map(|one| Unenforced { field: one.field.clone(), cause: one.cause.clone() });
        let closed = (!missing.is_empty()).then(|| self.object.without_targets(notes));
        (Self { closed, ..self.clone() }, missing)
    }

    /// The same policy beside the ConfigMaps of a folder, by name and key.
    pub fn beside_config_maps(&self, text: impl Fn(&NamespacedName, &str) -> Option<String>) -> Self {
        let PolicyObject::RequestAuthentication(policy) = &self.object else { return self.clone() };
        if policy.config_maps().next().is_none() {
            return self.clone();
        }
        let beside = policy.beside_config_maps(text);
        Self { object: PolicyObject::RequestAuthentication(Box::new(beside)), ..self.clone() }
    }

    /// The keys of issuers that are not there, as far as it tells.
    pub fn lacking(&self) -> Vec<MissingTarget> {
        let PolicyObject::RequestAuthentication(policy) = &self.object else { return Vec::new() };
        let line = |field: &str| self.key_lines.iter().find(|(of, _)| of == field).map_or(0, |(_, line)| *line);
        let told = policy.lacking.iter();
        told.map(|one| MissingTarget { line: line(&one.field), field: one.field.clone(), cause: one.cause.clone() })
            .collect()
    }

    fn new(object: PolicyObject, value: &Value, line_of: impl Fn(&str) -> usize) -> Self {
        let key_lines = match &object {
            PolicyObject::RequestAuthentication(policy) => {
                policy.lacking.iter().map(|one| (one.field.clone(), line_of(&one.field))).collect()
            }
            _ => Vec::new(),
        };
        let Selection::Services(services) = &object.scope().selection else {
            return Self { object, targets: Vec::new(), closed: None, key_lines };
        };
        let written = value.pointer("/spec/targetRefs").and_then(Value::as_array).into_iter().flatten();
        let target = |(index, written): (usize, &Value)| {
            let service = services.iter().find(|service| written["name"] == *service.name)?.clone();
            let field = format!("spec.targetRefs[{index}].name");
            Some(Target { line: line_of(&field), field, service })
        };
        let targets = written.enumerate().filter_map(target).collect();
        Self { object, targets, closed: None, key_lines }
    }
}

impl Target {
    fn missing(&self) -> MissingTarget {
        let cause = format!(
            "there is no Service {}, or none that can be read: until there is one, the policy stands over all of its \
             namespace and fails closed; correct the name, add the Service, or remove the entry",
            self.service
        );
        MissingTarget { field: self.field.clone(), line: self.line, cause }
    }
}

/// Reads a policy; what of it cannot be enforced as written is told, and makes it fail closed.
pub(super) fn decode(key: &Key, value: &Value, line_of: impl Fn(&str) -> usize) -> Result<(Item, Vec<Fault>), Fault> {
    let object = policy::decode(kind_of(key), value).map_err(|error| Fault::new(error.field, error.cause))?;
    let mut notes: Vec<Fault> =
        object.unenforced().iter().map(|note| Fault::new(note.field.clone(), note.cause.clone())).collect();
    for (place, known) in [("annotations", Some(DRY_RUN)), ("labels", None)] {
        let keys = value["metadata"][place].as_object().into_iter().flatten().map(|(key, _)| key.as_str());
        let ours = keys.filter(|key| key.starts_with("selvedge.dev/") && Some(*key) != known);
        notes.extend(ours.map(|key| {
            let cause = format!("a policy has no such key, it has no effect; known is {DRY_RUN}, as an annotation");
            Fault::new(format!("metadata.{place}[{key}]"), cause)
        }));
    }
    Ok((Item::Policy(PolicyItem::new(object, value, line_of)), notes))
}

/// Reads an external authorizer; one that cannot be asked as written is not there, and what would ask it is refused.
pub(super) fn authorizer(key: &Key, value: &Value) -> Result<(Item, Vec<Fault>), Fault> {
    check_namespaced(key, is_subdomain, SUBDOMAIN)?;
    let authorizer = Authorizer::decode(&key.name, value).map_err(|error| Fault::new(error.field, error.cause))?;
    Ok((Item::Authorizer(Arc::new(authorizer)), Vec::new()))
}

/// What stands in for a policy that cannot be read and has no last good version.
pub(super) fn malformed(key: &Key, value: &Value, fault: &Fault, line_of: impl Fn(&str) -> usize) -> PolicyItem {
    let error = DecodeError { field: fault.field.clone(), cause: fault.cause.clone() };
    let object = policy::malformed(kind_of(key), key.name.clone(), value, &error);
    PolicyItem::new(object, value, line_of)
}

fn kind_of(key: &Key) -> PolicyKind {
    match key.kind {
        Kind::PeerAuthentication => PolicyKind::PeerAuthentication,
        Kind::RequestAuthentication => PolicyKind::RequestAuthentication,
        _ => PolicyKind::AuthorizationPolicy,
    }
}
