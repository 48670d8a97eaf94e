//! The fields of routes as the Gateway API (v1.6) has them, standard and experimental.

use serde::Deserialize;
use serde_json::Value;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::route) struct ParentRef {
    pub group: Option<String>,
    pub kind: Option<String>,
    pub namespace: Option<String>,
    pub name: Option<String>,
    pub section_name: Option<String>,
    pub port: Option<u16>,
}

/// Its parts are read one by one: what an unknown field means differs.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::route) struct Rule {
    pub name: Option<String>,
    pub matches: Option<Vec<Value>>,
    pub filters: Option<Vec<Value>>,
    pub backend_refs: Option<Vec<BackendRef>>,
    pub timeouts: Option<Timeouts>,
    pub retry: Option<Retry>,
    pub session_persistence: Option<SessionPersistence>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::route) struct HttpMatch {
    pub path: Option<PathMatch>,
    pub method: Option<String>,
    pub headers: Option<Vec<NamedMatch>>,
    pub query_params: Option<Vec<NamedMatch>>,
}

#[derive(Deserialize)]
pub(in crate::route) struct PathMatch {
    #[serde(rename = "type")]
    pub kind: Option<String>,
    pub value: Option<String>,
}

#[derive(Deserialize)]
pub(in crate::route) struct NamedMatch {
    #[serde(rename = "type")]
    pub kind: Option<String>,
    pub name: String,
    pub value: String,
}

#[derive(Deserialize)]
pub(in crate::route) struct GrpcMatch {
    pub method: Option<MethodMatch>,
    pub headers: Option<Vec<NamedMatch>>,
}

#[derive(Deserialize)]
pub(in crate::route) struct MethodMatch {
    #[serde(rename = "type")]
    pub kind: Option<String>,
    pub service: Option<String>,
    pub method: Option<String>,
}

#[derive(Deserialize)]
pub(in crate::route) struct BackendRef {
    pub group: Option<String>,
    pub kind: Option<String>,
    pub namespace: Option<String>,
    pub name: String,
    pub port: Option<u16>,
    pub weight: Option<u32>,
    pub filters: Option<Vec<Value>>,
}

/// A reference as mirrors have it.
#[derive(Deserialize)]
pub(in crate::route) struct ObjectRef {
    pub group: Option<String>,
    pub kind: Option<String>,
    pub namespace: Option<String>,
    pub name: String,
    pub port: Option<u16>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::route) struct Filter {
    #[serde(rename = "type")]
    pub kind: String,
    pub request_header_modifier: Option<HeaderFilter>,
    pub response_header_modifier: Option<HeaderFilter>,
    pub request_mirror: Option<RequestMirror>,
    pub request_redirect: Option<RequestRedirect>,
    pub url_rewrite: Option<UrlRewrite>,
    pub cors: Option<Cors>,
    pub external_auth: Option<ExternalAuth>,
    // What it says is nothing to us: it is not honoured here, whatever it is. Yet it is known.
    #[serde(rename = "extensionRef")]
    pub _extension_ref: Option<Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::route) struct ExternalAuth {
    pub protocol: String,
    pub backend_ref: ObjectRef,
    pub grpc: Option<ExternalGrpc>,
    pub http: Option<ExternalHttp>,
    pub forward_body: Option<ForwardBody>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::route) struct ExternalGrpc {
    pub allowed_headers: Option<Vec<String>>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::route) struct ExternalHttp {
    pub path: Option<String>,
    pub allowed_headers: Option<Vec<String>>,
    pub allowed_response_headers: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::route) struct ForwardBody {
    pub max_size: Option<u16>,
}

#[derive(Deserialize)]
pub(in crate::route) struct HeaderFilter {
    pub set: Option<Vec<Header>>,
    pub add: Option<Vec<Header>>,
    pub remove: Option<Vec<String>>,
}

#[derive(Deserialize)]
pub(in crate::route) struct Header {
    pub name: String,
    pub value: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::route) struct RequestMirror {
    pub backend_ref: ObjectRef,
    pub percent: Option<u32>,
    pub fraction: Option<Fraction>,
}

#[derive(Deserialize)]
pub(in crate::route) struct Fraction {
    pub numerator: u32,
    pub denominator: Option<u32>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::route) struct RequestRedirect {
    pub scheme: Option<String>,
    pub hostname: Option<String>,
    pub path: Option<PathModifier>,
    pub port: Option<u16>,
    pub status_code: Option<u16>,
}

#[derive(Deserialize)]
pub(in crate::route) struct UrlRewrite {
    pub hostname: Option<String>,
    pub path: Option<PathModifier>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::route) struct PathModifier {
    #[serde(rename = "type")]
    pub kind: String,
    pub replace_full_path: Option<String>,
    pub replace_prefix_match: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::route) struct Cors {
    pub allow_origins: Option<Vec<String>>,
    pub allow_credentials: Option<bool>,
    pub allow_methods: Option<Vec<String>>,
    pub allow_headers: Option<Vec<String>>,
    pub expose_headers: Option<Vec<String>>,
    pub max_age: Option<u32>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::route) struct Timeouts {
    pub request: Option<String>,
    pub backend_request: Option<String>,
}

#[derive(Deserialize)]
pub(in crate::route) struct Retry {
    pub attempts: Option<u32>,
    pub backoff: Option<String>,
    pub codes: Option<Vec<u16>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::route) struct SessionPersistence {
    pub session_name: Option<String>,
    pub absolute_timeout: Option<String>,
    pub idle_timeout: Option<String>,
    #[serde(rename = "type")]
    pub kind: Option<String>,
    pub cookie_config: Option<CookieConfig>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(in crate::route) struct CookieConfig {
    pub lifetime_type: Option<String>,
}
