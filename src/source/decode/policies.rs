//! Our own kinds.

use serde_json::Value;

use super::{Fault, Key};
use crate::policy;

/// One policy as it was written, and what became of it.
#[derive(Clone, PartialEq, Debug)]
pub struct PolicyItem {
    pub key: Key,
    /// The text that it was read from: two policies are one if they say the same.
    written: Value,
}

impl PolicyItem {
    pub fn apply(&self) -> Option<policy::Delta> {
        None
    }

    pub fn delete(&self) -> Option<policy::Delta> {
        None
    }
}

pub(super) fn decode(key: &Key, value: Value) -> Result<PolicyItem, Fault> {
    Ok(PolicyItem { key: key.clone(), written: value })
}

/// A policy that cannot be read and has no last good version: it denies all in its namespace.
pub fn malformed(key: &Key, cause: &str) -> PolicyItem {
    PolicyItem { key: key.clone(), written: Value::from(cause) }
}

impl PolicyItem {
    pub fn is_malformed(&self) -> bool {
        self.written.is_string()
    }
}
