//! What an agent says of its node, as far as the controller reads it.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize;
use std::borrow::Cow;

/// A `MeshNode`, named after its node.
#[derive(Clone, Debug, Deserialize)]
pub struct MeshNodeView {
    pub metadata: ObjectMeta,
    #[serde(default)]
    pub status: Report,
}

/// A field that is missing says nothing.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Report {
    pub trust_bundle_hash: Option<String>,
    pub failed: Vec<FailedPod>,
    pub policies_not_enforced: Vec<NotEnforced>,
}

/// A pod whose capture failed.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Deserialize)]
pub struct FailedPod {
    pub uid: String,
    pub namespace: String,
    pub name: String,
    #[serde(default)]
    pub reason: String,
    #[serde(default)]
    pub message: String,
}

/// A policy that the node's agent cannot enforce as written.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
pub struct NotEnforced {
    pub kind: String,
    pub namespace: String,
    pub name: String,
    #[serde(default)]
    pub generation: Option<i64>,
    #[serde(default)]
    pub field: String,
    #[serde(default)]
    pub message: String,
}

impl kube::Resource for MeshNodeView {
    type DynamicType = ();
    type Scope = k8s_openapi::ClusterResourceScope;

    fn kind(_: &()) -> Cow<'_, str> {
        "MeshNode".into()
    }

    fn group(_: &()) -> Cow<'_, str> {
        crate::api::GROUP.into()
    }

    fn version(_: &()) -> Cow<'_, str> {
        crate::api::VERSION.into()
    }

    fn plural(_: &()) -> Cow<'_, str> {
        "meshnodes".into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}
