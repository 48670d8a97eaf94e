use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{StatusCondition, TargetRef, WorkloadSelector};

/// Whose tokens are taken, of requests to which pods.
///
/// A request with a token that does not hold is answered with 401. One without a token passes, and has no request principal:
/// an AuthorizationPolicy with `requestPrincipals` says who may do without. A policy in namespace `selvedge-system` stands
/// over the whole mesh. Rules of several policies over one pod add up.
#[derive(CustomResource, Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[kube(
    group = "selvedge.dev",
    version = "v1alpha1",
    kind = "RequestAuthentication",
    plural = "requestauthentications",
    namespaced,
    status = "RequestAuthenticationStatus",
    shortname = "sra",
    category = "selvedge",
    doc = "Whose tokens are taken, of requests to which pods.",
    derive = "PartialEq",
    printcolumn(
        name = "Enforced",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Enforced\")].status",
        description = "Whether the policy is enforced as written."
    ),
    printcolumn(
        name = "Keys",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"KeysFetched\")].status",
        description = "Whether the keys of every issuer are there."
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[schemars(extend(
    "x-kubernetes-preserve-unknown-fields" = true,
    "x-kubernetes-validations" = [{
        "rule": "!(has(self.selector) && has(self.targetRefs))",
        "message": "selector and targetRefs exclude each other: split the policy in two",
    }],
))]
pub struct RequestAuthenticationSpec {
    /// The pods that the policy stands over. Without selector and targetRefs: all of its namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<WorkloadSelector>,
    /// The Services whose endpoints the policy stands over, at the ports that the Service leads to, however reached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 16))]
    pub target_refs: Option<Vec<TargetRef>>,
    /// One rule for each issuer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 32))]
    pub jwt_rules: Option<Vec<JwtRule>>,
}

/// What is taken of one issuer.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend(
    "x-kubernetes-preserve-unknown-fields" = true,
    "x-kubernetes-validations" = [{
        "rule": "[has(self.jwks), has(self.jwksUri), has(self.jwksConfigMap)].filter(given, given).size() == 1",
        "message": "the keys of an issuer are in one place: give exactly one of jwks, jwksUri and jwksConfigMap",
    }],
))]
pub struct JwtRule {
    /// The `iss` of its tokens, to the letter.
    #[schemars(length(min = 1, max = 2048))]
    pub issuer: String,
    /// One of these must be among the `aud` of a token. Without: whomever it is for.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), inner(length(min = 1, max = 2048)))]
    pub audiences: Option<Vec<String>>,
    /// Its keys, as a JSON Web Key Set.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 262144))]
    pub jwks: Option<String>,
    /// Where it publishes them: by https, or by http at a Service in the mesh, `http://NAME.NAMESPACE.svc/...`, through a
    /// tunnel. The controller fetches them; those that could not be fetched for 24 hours hold no longer.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 2048))]
    pub jwks_uri: Option<String>,
    /// Certificates (PEM) that `jwksUri` is trusted by, in place of the public ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 65536))]
    pub jwks_ca_bundle: Option<String>,
    /// A ConfigMap of the policy's own namespace that has them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jwks_config_map: Option<KeyOfConfigMap>,
    /// Headers that may hold a token. Without these and fromParams: `Authorization: Bearer`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 16))]
    pub from_headers: Option<Vec<TokenHeader>>,
    /// Query parameters that may hold a token.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 16), inner(length(min = 1, max = 256)))]
    pub from_params: Option<Vec<String>>,
    /// Whether the application gets the token too; false where left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub forward_original_token: Option<bool>,
    /// Claims that the application gets as headers. What a client wrote there never arrives, with a token or without.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 32))]
    pub output_claim_to_headers: Option<Vec<ClaimToHeader>>,
    /// The header in which the application gets all claims, as they stand in the token (base64url).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256))]
    pub output_payload_to_header: Option<String>,
}

/// One key of a ConfigMap.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct KeyOfConfigMap {
    /// Name of the ConfigMap.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// The key in its data; `jwks.json` where left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub key: Option<String>,
}

/// A header that may hold a token.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct TokenHeader {
    /// Name of the header.
    #[schemars(length(min = 1, max = 256))]
    pub name: String,
    /// What stands before the token, such as `Bearer `.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256))]
    pub prefix: Option<String>,
}

/// A claim that becomes a header.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct ClaimToHeader {
    /// Name of the header.
    #[schemars(length(min = 1, max = 256))]
    pub header: String,
    /// Name of the claim; dots lead into objects.
    #[schemars(length(min = 1, max = 256))]
    pub claim: String,
}

/// What became of the policy, and the keys that were fetched for it.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RequestAuthenticationStatus {
    /// `Enforced` is `False`, with field and cause in its message, where the policy cannot be enforced as written;
    /// `KeysFetched` where keys of an issuer are not there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<StatusCondition>,
    /// The keys that the controller fetched, from where agents take them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["source"]))]
    pub keys: Vec<FetchedKeys>,
}

/// The keys of one source.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FetchedKeys {
    /// The `jwksUri`, or `configmap/NAME/KEY`.
    #[schemars(length(min = 1, max = 2304))]
    pub source: String,
    /// The JSON Web Key Set.
    pub jwks: String,
    /// When it was last seen there (RFC 3339), to the hour.
    #[schemars(extend("format" = "date-time"))]
    pub fetch_time: String,
}
