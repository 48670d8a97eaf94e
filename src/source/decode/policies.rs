//! Our own kinds.

use serde_json::Value;

use super::field::Fault;
use super::{Item, Key, Kind, Read};
use crate::policy::{self, DecodeError, Delta, PolicyKind, PolicyObject};

/// One policy as it was read.
#[derive(Clone, PartialEq, Debug)]
pub struct PolicyItem(PolicyObject);

impl PolicyItem {
    pub fn apply(&self) -> Delta {
        Delta::Apply(self.0.clone())
    }

    pub fn delete(&self) -> Delta {
        Delta::Delete(self.0.reference())
    }

    /// Whether it stands in for one that could not be read.
    pub fn is_malformed(&self) -> bool {
        matches!(self.0, PolicyObject::Malformed(_))
    }
}

/// Reads a policy; what of it cannot be enforced as written is told, and makes it fail closed.
pub(super) fn decode(key: &Key, value: &Value) -> Result<Read, Fault> {
    let object = policy::decode(kind_of(key), value).map_err(|error| Fault::new(error.field, error.cause))?;
    let notes = object.unenforced().iter().map(|note| Fault::new(note.field.clone(), note.cause.clone())).collect();
    Ok((Item::Policy(PolicyItem(object)), notes))
}

/// What stands in for a policy that cannot be read and has no last good version.
pub(super) fn malformed(key: &Key, value: &Value, fault: &Fault) -> PolicyItem {
    let error = DecodeError { field: fault.field.clone(), cause: fault.cause.clone() };
    PolicyItem(policy::malformed(kind_of(key), key.name.clone(), value, &error))
}

fn kind_of(key: &Key) -> PolicyKind {
    match key.kind {
        Kind::PeerAuthentication => PolicyKind::PeerAuthentication,
        _ => PolicyKind::AuthorizationPolicy,
    }
}
