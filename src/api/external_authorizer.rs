use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::PolicyStatus;

/// A Service that is asked whether a request may pass.
///
/// An AuthorizationPolicy of action CUSTOM names it as its `provider`, in its own namespace or, where there is none of that
/// name, in `selvedge-system`. It is reached through the mesh as any Service, under the identity of the pod that the request
/// is for. Where it cannot be asked, or does not answer in time, the request is refused.
#[derive(CustomResource, Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[kube(
    group = "selvedge.dev",
    version = "v1alpha1",
    kind = "ExternalAuthorizer",
    plural = "externalauthorizers",
    namespaced,
    status = "PolicyStatus",
    shortname = "sea",
    category = "selvedge",
    doc = "A Service that is asked whether a request may pass.",
    derive = "PartialEq",
    printcolumn(
        name = "Service",
        type_ = "string",
        json_path = ".spec.service.name",
        description = "The Service that is asked."
    ),
    printcolumn(
        name = "Accepted",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Accepted\")].status",
        description = "Whether it can be asked as written."
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[schemars(extend(
    "x-kubernetes-preserve-unknown-fields" = true,
    "x-kubernetes-validations" = [{
        "rule": "has(self.http) != has(self.grpc)",
        "message": "it is asked in one way: give it http or grpc",
    }],
))]
pub struct ExternalAuthorizerSpec {
    /// Who is asked.
    pub service: AuthorizerService,
    /// Asked by HTTP, as oauth2-proxy and oathkeeper are: 2xx lets the request pass.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<HttpAuthorizer>,
    /// Asked by Envoy's gRPC: `envoy.service.auth.v3.Authorization/Check`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grpc: Option<GrpcAuthorizer>,
    /// For how long an answer is waited for; 5s where left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = r"^([0-9]{1,5}(h|m|s|ms)){1,4}$"))]
    pub timeout: Option<String>,
    /// What a client is told where nobody can be asked; 403 where left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 400, max = 599))]
    pub status_on_error: Option<u16>,
    /// Sends the request's body too, up to a bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub include_request_body_in_check: Option<BodyInCheck>,
}

/// A port of a Service.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct AuthorizerService {
    /// Name of the Service.
    #[schemars(length(min = 1, max = 63))]
    pub name: String,
    /// Its namespace; the authorizer's own where left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub namespace: Option<String>,
    /// Port of the Service.
    #[schemars(range(min = 1, max = 65535))]
    pub port: u16,
}

/// What an authorizer is asked by HTTP. A header is written exactly, as a prefix (`x-auth-*`) or as a suffix (`*-id`).
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct HttpAuthorizer {
    /// Stands before the path of the request.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub path_prefix: Option<String>,
    /// Headers of the request that it gets, beside Host and Authorization.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), inner(length(min = 1, max = 256)))]
    pub include_request_headers_in_check: Option<Vec<String>>,
    /// Headers that it gets with every request.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64))]
    pub include_additional_headers_in_check: Option<Vec<HeaderAndValue>>,
    /// Headers of its answer that the application gets, where the request passes. What the client wrote in these never arrives.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), inner(length(min = 1, max = 256)))]
    pub headers_to_upstream_on_allow: Option<Vec<String>>,
    /// Headers of its answer that the client gets, where the request passes.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), inner(length(min = 1, max = 256)))]
    pub headers_to_downstream_on_allow: Option<Vec<String>>,
    /// Headers of its answer that the client gets, where the request is refused; all of them where left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), inner(length(min = 1, max = 256)))]
    pub headers_to_downstream_on_deny: Option<Vec<String>>,
}

/// A header with its value.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct HeaderAndValue {
    /// Name of the header.
    #[schemars(length(min = 1, max = 256))]
    pub name: String,
    /// Its value.
    #[schemars(length(max = 4096))]
    pub value: String,
}

/// What an authorizer is asked by gRPC.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct GrpcAuthorizer {
    /// Headers of the request that it gets; all of them where left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), inner(length(min = 1, max = 256)))]
    pub include_request_headers_in_check: Option<Vec<String>>,
}

/// How much of a body an authorizer gets.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct BodyInCheck {
    /// So many bytes at most. A request with more is answered with 413, unless a part will do.
    #[schemars(range(min = 1, max = 1048576))]
    pub max_request_bytes: u32,
    /// Whether the first part of a longer body will do; false where left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allow_partial_message: Option<bool>,
}
