//! Our own kinds.

use serde_json::Value;

use super::field::Fault;
use super::{Item, Key, Kind};
use crate::mesh::NamespacedName;
use crate::policy::{self, DRY_RUN, DecodeError, Delta, PolicyKind, PolicyObject, Selection, Unenforced};

/// One policy as it was read.
#[derive(Clone, PartialEq, Debug)]
pub struct PolicyItem {
    object: PolicyObject,
    targets: Vec<Target>,
    /// What is in force in its place while Services that it names are not there.
    closed: Option<PolicyObject>,
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

    fn new(object: PolicyObject, value: &Value, line_of: impl Fn(&str) -> usize) -> Self {
        let Selection::Services(services) = &object.scope().selection else {
            return Self { object, targets: Vec::new(), closed: None };
        };
        let written = value.pointer("/spec/targetRefs").and_then(Value::as_array).into_iter().flatten();
        let target = |(index, written): (usize, &Value)| {
            let service = services.iter().find(|service| written["name"] == *service.name)?.clone();
            let field = format!("spec.targetRefs[{index}].name");
            Some(Target { line: line_of(&field), field, service })
        };
        let targets = written.enumerate().filter_map(target).collect();
        Self { object, targets, closed: None }
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

/// What stands in for a policy that cannot be read and has no last good version.
pub(super) fn malformed(key: &Key, value: &Value, fault: &Fault, line_of: impl Fn(&str) -> usize) -> PolicyItem {
    let error = DecodeError { field: fault.field.clone(), cause: fault.cause.clone() };
    let object = policy::malformed(kind_of(key), key.name.clone(), value, &error);
    PolicyItem::new(object, value, line_of)
}

fn kind_of(key: &Key) -> PolicyKind {
    match key.kind {
        Kind::PeerAuthentication => PolicyKind::PeerAuthentication,
        _ => PolicyKind::AuthorizationPolicy,
    }
}
