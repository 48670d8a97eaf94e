//! Our own kinds.

use serde_json::Value;

use super::{Fault, Item, Key, Read};
use crate::policy;

/// One policy as it was read.
#[derive(Clone, PartialEq, Debug)]
pub struct PolicyItem {
    key: Key,
    written: Value,
    malformed: bool,
}

impl PolicyItem {
    pub fn apply(&self) -> Option<policy::Delta> {
        None
    }

    pub fn delete(&self) -> Option<policy::Delta> {
        None
    }

    pub fn is_malformed(&self) -> bool {
        self.malformed
    }
}

pub(super) fn decode(key: &Key, value: Value) -> Result<Read, Fault> {
    Ok((Item::Policy(PolicyItem { key: key.clone(), written: value, malformed: false }), Vec::new()))
}

/// What stands in for a policy that cannot be read and has no last good version.
pub(super) fn malformed(key: &Key, value: &Value, _fault: &Fault) -> PolicyItem {
    PolicyItem { key: key.clone(), written: value.clone(), malformed: true }
}
