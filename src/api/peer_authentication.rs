use std::collections::BTreeMap;

use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{PolicyStatus, WorkloadSelector};

/// Whether pods accept plaintext.
///
/// The narrowest policy decides: one with a selector, then the namespace's, then the mesh's (namespace
/// `selvedge-system`); in each, the port before the pod. Among equals the oldest decides. Without any: PERMISSIVE.
#[derive(CustomResource, Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[kube(
    group = "selvedge.dev",
    version = "v1alpha1",
    kind = "PeerAuthentication",
    plural = "peerauthentications",
    namespaced,
    status = "PolicyStatus",
    shortname = "spa",
    category = "selvedge",
    doc = "Whether pods accept plaintext.",
    derive = "PartialEq",
    printcolumn(
        name = "Mode",
        type_ = "string",
        json_path = ".spec.mtls.mode",
        description = "Whether plaintext is refused (STRICT) or accepted too (PERMISSIVE)."
    ),
    printcolumn(
        name = "Enforced",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Enforced\")].status",
        description = "Whether the policy is enforced as written."
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct PeerAuthenticationSpec {
    /// The pods that the policy stands over. Without: all of its namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<WorkloadSelector>,
    /// What holds for every port without a mode of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtls: Option<MutualTls>,
    /// What holds for one port of the pod, by its number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend(
        "minProperties" = 1,
        "maxProperties" = 128,
        "x-kubernetes-validations" = [{
            "rule": "self.all(port, size(port) <= 5 && int(port) >= 1 && int(port) <= 65535)",
            "message": "a port is a number from 1 to 65535: write portLevelMtls: {'8080': {mode: PERMISSIVE}}",
        }],
    ))]
    pub port_level_mtls: Option<BTreeMap<String, MutualTls>>,
}

/// What is asked of those who connect.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct MutualTls {
    /// STRICT refuses plaintext, PERMISSIVE accepts it too, UNSET leaves it to the next wider policy. There is no
    /// DISABLE: mutual TLS between pods of the mesh is never off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Mode")]
    pub mode: Option<Mode>,
}

/// Whether plaintext is accepted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
#[schemars(inline)]
pub enum Mode {
    Unset,
    Strict,
    Permissive,
}
