//! The custom resources, group `selvedge.dev`: the policies that users write, and what agents say of their nodes.
//!
//! These types are the source of `crd/*.yaml`: doc comments become descriptions, attributes become validation.
//! They describe; [`crate::policy::decode`] reads, because a policy that cannot be enforced as written must still
//! be read for what it might deny.
//!
//! Every level of a policy's spec keeps fields that this version does not know
//! (`x-kubernetes-preserve-unknown-fields`): if the API server dropped them, a misspelt selector would turn into none
//! and a condition of tomorrow into no condition, and nobody would hear of it.

#![forbid(unsafe_code)]

mod admission;
#[allow(clippy::duplicated_attributes, reason = "each printcolumn has a type of its own")]
mod authorization_policy;
#[allow(clippy::duplicated_attributes, reason = "each printcolumn has a type of its own")]
mod external_authorizer;
#[allow(clippy::duplicated_attributes, reason = "each printcolumn has a type of its own")]
mod mesh_node;
#[allow(clippy::duplicated_attributes, reason = "each printcolumn has a type of its own")]
mod peer_authentication;
#[allow(clippy::duplicated_attributes, reason = "each printcolumn has a type of its own")]
mod request_authentication;
mod schema;
mod status;
mod target;
#[allow(clippy::duplicated_attributes, reason = "each printcolumn has a type of its own")]
mod traffic_policy;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;

pub use authorization_policy::{
    Action, AuthorizationPolicy, AuthorizationPolicySpec, Condition, Extension, From, Operation, Rule, Source, To,
};
pub use external_authorizer::{
    AuthorizerService, BodyInCheck, ExternalAuthorizer, ExternalAuthorizerSpec, GrpcAuthorizer, HeaderAndValue,
    HttpAuthorizer,
};
pub use mesh_node::{CaptureFailure, MeshNode, MeshNodeStatus, NotEnforced};
pub use peer_authentication::{Mode, MutualTls, PeerAuthentication, PeerAuthenticationSpec};
pub use request_authentication::{
    ClaimToHeader, FetchedKeys, JwtRule, KeyOfConfigMap, RequestAuthentication, RequestAuthenticationSpec,
    RequestAuthenticationStatus, TokenHeader,
};
pub use status::{PolicyStatus, StatusCondition};
pub use target::{TargetRef, WorkloadSelector};
pub use traffic_policy::{TrafficPolicy, TrafficPolicySpec};

/// The API group of every kind here.
pub const GROUP: &str = "selvedge.dev";
/// The one version so far.
pub const VERSION: &str = "v1alpha1";

/// One file of `crd/`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CrdFile {
    /// `<group>_<plural>.yaml`, or `<group>_admission.yaml`.
    pub name: String,
    pub yaml: String,
}

/// The files that stand in `crd/`: every CustomResourceDefinition, and the admission policies that guard them.
pub fn files() -> Result<Vec<CrdFile>, CrdError> {
    let mut files = crds()?;
    let mut guards = admission::mesh_nodes();
    for crd in policies() {
        guards.extend(admission::policies(&crd)?);
    }
    let documents: Vec<String> = guards.iter().map(serde_yaml::to_string).collect::<Result<_, _>>()?;
    let name = format!("{GROUP}_admission.yaml");
    files.push(CrdFile { name, yaml: format!("{GENERATED}{}", documents.join("---\n")) });
    Ok(files)
}

/// Every CustomResourceDefinition.
pub fn crds() -> Result<Vec<CrdFile>, CrdError> {
    let mut crds = policies().to_vec();
    crds.push(MeshNode::crd()?);
    crds.sort_by(|a, b| a.spec.names.plural.cmp(&b.spec.names.plural));
    let file = |crd: CustomResourceDefinition| {
        let name = format!("{}_{}.yaml", crd.spec.group, crd.spec.names.plural);
        let mut crd = serde_yaml::to_value(&crd)?;
        schema::refuse_null(&mut crd);
        schema::drop_strange_formats(&mut crd);
        schema::explain_refusals(&mut crd);
        let yaml = serde_yaml::to_string(&crd)?;
        Ok(CrdFile { name, yaml: format!("{GENERATED}{yaml}") })
    };
    crds.into_iter().map(file).collect()
}

/// Those that users write.
fn policies() -> [CustomResourceDefinition; 5] {
    [
        AuthorizationPolicy::crd(),
        PeerAuthentication::crd(),
        RequestAuthentication::crd(),
        ExternalAuthorizer::crd(),
        TrafficPolicy::crd(),
    ]
}

/// A type of ours that makes no CustomResourceDefinition.
#[derive(Debug, thiserror::Error)]
pub enum CrdError {
    #[error("a schema: {0}")]
    Schema(#[from] serde_json::Error),
    #[error("a file: {0}")]
    Yaml(#[from] serde_yaml::Error),
}

const GENERATED: &str = "# Generated from src/api by `cargo xtask crd`; edit the types there.\n";

#[cfg(test)]
mod tests;
