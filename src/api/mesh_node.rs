use std::borrow::Cow;

use k8s_openapi::ClusterResourceScope;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::core::schema::StructuralSchemaRewriter;
use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{GROUP, VERSION};

/// What the agent of a node says of it. Named after the node, and written by nobody else.
///
/// There is no spec, for nothing is asked of it, and so status is no subresource: one write tells all.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub struct MeshNode {
    #[schemars(skip)]
    pub metadata: ObjectMeta,
    /// What is so, as far as the agent knows.
    #[serde(default)]
    pub status: MeshNodeStatus,
}

/// What the agent of a node says.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct MeshNodeStatus {
    /// UIDs of the pods that are captured: peers send tunnels to these, and to no others.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "set", "maxItems" = 4096), inner(length(max = 253)))]
    pub captured: Vec<String>,
    /// Joined pods that could not be captured.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["uid"]), length(max = 4096))]
    pub failed: Vec<CaptureFailure>,
    /// How pods' connections are captured: `tproxy` or `redirect`.
    #[schemars(length(max = 63))]
    pub capture_mode: String,
    /// When `connect()` is answered, where neither a pod nor its namespace says it: `truthful` or `eager`.
    #[schemars(length(max = 63))]
    pub connect: String,
    /// Version of the agent.
    #[schemars(length(max = 63))]
    pub version: String,
    /// SHA-256 of the roots that the agent trusts, in hexadecimal: over their DER, sorted, one after the other.
    #[serde(skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 64))]
    pub trust_bundle_hash: String,
    /// Policies, or fields of them, that this agent does not enforce as written. Each fails closed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1024))]
    pub policies_not_enforced: Vec<NotEnforced>,
}

/// A joined pod that could not be captured.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CaptureFailure {
    /// UID of the pod.
    #[schemars(length(max = 253))]
    pub uid: String,
    /// Namespace of the pod.
    #[serde(default)]
    #[schemars(length(max = 253))]
    pub namespace: String,
    /// Name of the pod.
    #[serde(default)]
    #[schemars(length(max = 253))]
    pub name: String,
    /// Why, as one word in CamelCase.
    #[serde(default)]
    #[schemars(length(max = 253))]
    pub reason: String,
    /// Why, for people.
    #[serde(default)]
    #[schemars(length(max = 4096))]
    pub message: String,
}

/// One reason why a policy is not enforced as written.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NotEnforced {
    /// Kind of the policy.
    #[schemars(length(max = 253))]
    pub kind: String,
    /// Namespace of the policy.
    #[serde(default)]
    #[schemars(length(max = 253))]
    pub namespace: String,
    /// Name of the policy.
    #[schemars(length(max = 253))]
    pub name: String,
    /// The generation of the policy that the agent knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<i64>,
    /// The field at fault.
    #[serde(default)]
    #[schemars(length(max = 1024))]
    pub field: String,
    /// What is wrong, and what to write instead.
    #[serde(default)]
    #[schemars(length(max = 4096))]
    pub message: String,
}

impl MeshNode {
    pub const KIND: &'static str = "MeshNode";
    const PLURAL: &'static str = "meshnodes";

    /// Its CustomResourceDefinition.
    pub fn crd() -> Result<CustomResourceDefinition, serde_json::Error> {
        let settings = SchemaSettings::openapi3().with(|settings| {
            settings.inline_subschemas = true;
            settings.meta_schema = None;
        });
        let schema = settings.with_transform(StructuralSchemaRewriter).into_generator().into_root_schema_for::<Self>();
        let mut schema = serde_json::to_value(schema)?;
        // What one agent wrote must be readable to the next, and to the last: nothing is required.
        schema.as_object_mut().map(|schema| schema.remove("required"));
        let column = |name, json_path, kind, description| json!({"name": name, "jsonPath": json_path, "type": kind, "description": description});
        serde_json::from_value(json!({
            "metadata": {"name": format!("{}.{GROUP}", Self::PLURAL)},
            "spec": {
                "group": GROUP,
                "scope": "Cluster",
                "names": {
                    "kind": Self::KIND,
                    "plural": Self::PLURAL,
                    "singular": "meshnode",
                    "shortNames": ["smn"],
                    "categories": ["selvedge"],
                },
                "versions": [{
                    "name": VERSION,
                    "served": true,
                    "storage": true,
                    "schema": {"openAPIV3Schema": schema},
                    "additionalPrinterColumns": [
                        column("Capture", ".status.captureMode", "string", "How connections are captured."),
                        column("Version", ".status.version", "string", "Version of the agent."),
                        column("Failed", ".status.failed[*].name", "string", "Joined pods that could not be captured."),
                        column("Age", ".metadata.creationTimestamp", "date", "Since when the node is known."),
                    ],
                }],
            },
        }))
    }
}

impl kube::Resource for MeshNode {
    type DynamicType = ();
    type Scope = ClusterResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        Self::KIND.into()
    }

    fn group((): &()) -> Cow<'_, str> {
        GROUP.into()
    }

    fn version((): &()) -> Cow<'_, str> {
        VERSION.into()
    }

    fn plural((): &()) -> Cow<'_, str> {
        Self::PLURAL.into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}
