//! The custom resources that users write, group `selvedge.dev`.
//!
//! These types are the source of `crd/*.yaml`: doc comments become descriptions, attributes become validation.
//! They describe; [`crate::policy::decode`] reads, because a policy that cannot be enforced as written must still
//! be read for what it might deny.
//!
//! Every level of a policy's spec keeps fields that this version does not know
//! (`x-kubernetes-preserve-unknown-fields`): if the API server dropped them, a misspelt selector would turn into none
//! and a condition of tomorrow into no condition, and nobody would hear of it.

#![forbid(unsafe_code)]

#[allow(clippy::duplicated_attributes, reason = "each printcolumn has a type of its own")]
mod authorization_policy;
#[allow(clippy::duplicated_attributes, reason = "each printcolumn has a type of its own")]
mod peer_authentication;
mod status;
mod target;

use kube::CustomResourceExt;

pub use authorization_policy::{
    Action, AuthorizationPolicy, AuthorizationPolicySpec, Condition, Extension, From, Operation, Rule, Source, To,
};
pub use peer_authentication::{Mode, MutualTls, PeerAuthentication, PeerAuthenticationSpec};
pub use status::{PolicyStatus, StatusCondition};
pub use target::{TargetRef, WorkloadSelector};

/// The API group of every kind here.
pub const GROUP: &str = "selvedge.dev";
/// The one version so far.
pub const VERSION: &str = "v1alpha1";

/// One definition as a file of `crd/`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CrdFile {
    /// `<group>_<plural>.yaml`
    pub name: String,
    pub yaml: String,
}

/// Every CustomResourceDefinition, as the files that stand in `crd/`.
pub fn crds() -> Result<Vec<CrdFile>, serde_yaml::Error> {
    [AuthorizationPolicy::crd(), PeerAuthentication::crd()]
        .into_iter()
        .map(|crd| {
            let name = format!("{}_{}.yaml", crd.spec.group, crd.spec.names.plural);
            let mut crd = serde_yaml::to_value(&crd)?;
            refuse_null(&mut crd);
            let yaml = serde_yaml::to_string(&crd)?;
            Ok(CrdFile {
                name,
                yaml: format!("# Generated from src/api by `cargo xtask crd`; edit the types there.\n{yaml}"),
            })
        })
        .collect()
}

/// Takes `nullable` from every field: what is left out is left out, and a `null` in a policy is a list that somebody
/// has yet to fill.
fn refuse_null(value: &mut serde_yaml::Value) {
    match value {
        serde_yaml::Value::Mapping(fields) => {
            // A property of that name would be an object; the keyword is a boolean.
            if fields.get("nullable").is_some_and(serde_yaml::Value::is_bool) {
                fields.remove("nullable");
            }
            fields.values_mut().for_each(refuse_null);
        }
        serde_yaml::Value::Sequence(items) => items.iter_mut().for_each(refuse_null),
        _ => {}
    }
}

#[cfg(test)]
mod tests;
