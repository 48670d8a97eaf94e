use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{PolicyStatus, TargetRef, WorkloadSelector};

/// Who may connect to which pods.
///
/// Any matching DENY policy denies. Otherwise, where no ALLOW policy stands over the destination, the connection is
/// allowed; where one does, a rule of some ALLOW policy must match. AUDIT policies, and any policy annotated with
/// `selvedge.dev/dry-run: "true"`, are counted and logged and change nothing. A policy in namespace
/// `selvedge-system` stands over the whole mesh.
///
/// A field that cannot be enforced fails closed: an ALLOW rule that has one matches nothing, a DENY rule that has one
/// matches as if that field were not there.
#[derive(CustomResource, Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[kube(
    group = "selvedge.dev",
    version = "v1alpha1",
    kind = "AuthorizationPolicy",
    plural = "authorizationpolicies",
    namespaced,
    status = "PolicyStatus",
    shortname = "sap",
    category = "selvedge",
    doc = "Who may connect to which pods.",
    derive = "PartialEq",
    printcolumn(
        name = "Action",
        type_ = "string",
        json_path = ".spec.action",
        description = "What a match does; ALLOW where empty."
    ),
    printcolumn(
        name = "Enforced",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Enforced\")].status",
        description = "Whether the policy is enforced as written."
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[schemars(extend(
    "x-kubernetes-preserve-unknown-fields" = true,
    "x-kubernetes-validations" = [
        {
            "rule": "!(has(self.selector) && has(self.targetRefs))",
            "message": "selector and targetRefs exclude each other: split the policy in two",
        },
        {
            "rule": "!has(self.action) || self.action != 'CUSTOM' || has(self.provider)",
            "message": "action CUSTOM needs a provider: name it, or take ALLOW, DENY or AUDIT",
        },
    ],
))]
pub struct AuthorizationPolicySpec {
    /// The pods that the policy stands over. Without selector and targetRefs: all of its namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<WorkloadSelector>,
    /// The Services whose endpoints the policy stands over, at the ports that the Service leads to, however reached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 16))]
    pub target_refs: Option<Vec<TargetRef>>,
    /// What a match does; ALLOW where left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Action")]
    pub action: Option<Action>,
    /// The policy matches where any of its rules does. ALLOW without a rule allows nothing; DENY without one denies
    /// nothing. An empty rule `{}` matches everything.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 512))]
    pub rules: Vec<Rule>,
    /// The ExternalAuthorizer that action CUSTOM asks about each request. About a connection nobody can be asked: there what
    /// CUSTOM matches is denied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub provider: Option<Extension>,
}

/// What a match of the policy does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
#[schemars(inline)]
pub enum Action {
    #[default]
    Allow,
    Deny,
    Audit,
    Custom,
}

/// An external authorizer.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct Extension {
    /// Name of the provider.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
}

/// Matches where one of `from`, one of `to` and all of `when` do; what is left out matches anything.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct Rule {
    /// Sources, of which one must match.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    pub from: Option<Vec<From>>,
    /// Operations, of which one must match.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    pub to: Option<Vec<To>>,
    /// Conditions, all of which must match.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    pub when: Option<Vec<Condition>>,
}

/// One source.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[schemars(extend(
    "x-kubernetes-preserve-unknown-fields" = true,
    "x-kubernetes-validations" = [{
        "rule": "has(self.source)",
        "message": "an entry of from without a source says nothing: give it one, as in from: [{source: {namespaces: [shop]}}], or leave from out to mean everybody",
    }],
))]
pub struct From {
    /// Who connects.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
}

/// Who connects. Every field given must match; a field matches where any of its values does.
///
/// Patterns are exact (`abc`), prefix (`abc*`), suffix (`*abc`) or presence (`*`: any, but not none). A source that
/// has proven no identity matches no principals, namespaces or serviceAccounts, and every not-field of these.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend(
    "x-kubernetes-preserve-unknown-fields" = true,
    "x-kubernetes-validations" = [{
        "rule": "has(self.principals) || has(self.notPrincipals) || has(self.namespaces) || has(self.notNamespaces) || has(self.serviceAccounts) || has(self.notServiceAccounts) || has(self.ipBlocks) || has(self.notIpBlocks) || has(self.requestPrincipals) || has(self.notRequestPrincipals) || has(self.remoteIpBlocks) || has(self.notRemoteIpBlocks)",
        "message": "a source without a field that is known says nothing: give it at least one, such as namespaces, principals, serviceAccounts or ipBlocks, or leave from out to mean everybody",
    }],
))]
pub struct Source {
    /// Identities: `<trust domain>/ns/<namespace>/sa/<service account>`, without `spiffe://`. `cluster.local` stands
    /// for the mesh's own trust domain.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1), inner(regex(pattern = r"^([^:*]+\*?|\*[^:*]*)$")))]
    pub principals: Option<Vec<String>>,
    /// Identities that must not match.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1), inner(regex(pattern = r"^([^:*]+\*?|\*[^:*]*)$")))]
    pub not_principals: Option<Vec<String>>,
    /// Namespaces of the identity.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1), inner(regex(pattern = r"^([^*]+\*?|\*[^*]*)$")))]
    pub namespaces: Option<Vec<String>>,
    /// Namespaces of the identity that must not match.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1), inner(regex(pattern = r"^([^*]+\*?|\*[^*]*)$")))]
    pub not_namespaces: Option<Vec<String>>,
    /// Service accounts: `namespace/name`, or `name` in the policy's own namespace. No patterns.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1), inner(regex(pattern = r"^[^/*]+(/[^/*]+)?$")))]
    pub service_accounts: Option<Vec<String>>,
    /// Service accounts that must not match.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1), inner(regex(pattern = r"^[^/*]+(/[^/*]+)?$")))]
    pub not_service_accounts: Option<Vec<String>>,
    /// Source addresses: an IP or a range such as `10.0.0.0/8`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1), inner(regex(pattern = r"^[0-9A-Fa-f:.]+(/[0-9]{1,3})?$")))]
    pub ip_blocks: Option<Vec<String>>,
    /// Source addresses that must not match.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1), inner(regex(pattern = r"^[0-9A-Fa-f:.]+(/[0-9]{1,3})?$")))]
    pub not_ip_blocks: Option<Vec<String>>,
    /// Issuer and subject of a request's valid token: `<issuer>/<subject>`. It speaks of requests: see `paths`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1), inner(length(min = 1)))]
    pub request_principals: Option<Vec<String>>,
    /// Issuer and subject of a request's token that must not match.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1), inner(length(min = 1)))]
    pub not_request_principals: Option<Vec<String>>,
    /// Addresses of the client, as the last one on the way that is believed says it; else the TCP peer's. It speaks of
    /// requests: see `paths`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1), inner(length(min = 1)))]
    pub remote_ip_blocks: Option<Vec<String>>,
    /// Addresses of the client that must not match.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1), inner(length(min = 1)))]
    pub not_remote_ip_blocks: Option<Vec<String>>,
}

/// One operation.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[schemars(extend(
    "x-kubernetes-preserve-unknown-fields" = true,
    "x-kubernetes-validations" = [{
        "rule": "has(self.operation)",
        "message": "an entry of to without an operation says nothing: give it one, as in to: [{operation: {ports: ['8080']}}], or leave to out to mean everything",
    }],
))]
pub struct To {
    /// What is connected to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<Operation>,
}

/// What is connected to. Every field given must match; a field matches where any of its values does.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend(
    "x-kubernetes-preserve-unknown-fields" = true,
    "x-kubernetes-validations" = [{
        "rule": "has(self.ports) || has(self.notPorts) || has(self.hosts) || has(self.notHosts) || has(self.methods) || has(self.notMethods) || has(self.paths) || has(self.notPaths)",
        "message": "an operation without a field that is known says nothing: give it at least one, such as ports, or leave to out to mean everything",
    }],
))]
pub struct Operation {
    /// Ports of the pod, as text.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1), inner(regex(pattern = "^[1-9][0-9]{0,4}$")))]
    pub ports: Option<Vec<String>>,
    /// Ports of the pod that must not match.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1), inner(regex(pattern = "^[1-9][0-9]{0,4}$")))]
    pub not_ports: Option<Vec<String>>,
    /// Hosts of a request, in any case; one without a port matches any port. It speaks of requests: see `paths`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1), inner(length(min = 1)))]
    pub hosts: Option<Vec<String>>,
    /// Hosts that must not match.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1), inner(length(min = 1)))]
    pub not_hosts: Option<Vec<String>>,
    /// Methods of a request; of gRPC it is always `POST`. It speaks of requests: see `paths`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1), inner(length(min = 1)))]
    pub methods: Option<Vec<String>>,
    /// Methods that must not match.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1), inner(length(min = 1)))]
    pub not_methods: Option<Vec<String>>,
    /// Paths of a request, without the query and in their one form: dot segments and double slashes are gone, unreserved
    /// characters are decoded; of gRPC `/package.Service/Method`.
    ///
    /// What speaks of requests is enforced at ports that a Service under `selvedge.dev/waypoint: node` leads to;
    /// elsewhere it fails closed.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1), inner(length(min = 1)))]
    pub paths: Option<Vec<String>>,
    /// Paths that must not match.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1), inner(length(min = 1)))]
    pub not_paths: Option<Vec<String>>,
}

/// One further condition, on one attribute of the connection or of the request.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend(
    "x-kubernetes-preserve-unknown-fields" = true,
    "x-kubernetes-validations" = [
        { "rule": "has(self.values) || has(self.notValues)", "message": "a condition without values says nothing: give values or notValues, or remove it" },
    ],
))]
pub struct Condition {
    /// `source.ip`, `source.namespace`, `source.principal`, `destination.ip` or `destination.port`; of requests
    /// `remote.ip`, `request.headers[NAME]`, `request.auth.principal`, `request.auth.audiences`,
    /// `request.auth.presenter` or `request.auth.claims[NAME]`. Any other key fails closed.
    #[schemars(length(min = 1, max = 253))]
    pub key: String,
    /// Values, of which one must match.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1), inner(length(min = 1)))]
    pub values: Option<Vec<String>>,
    /// Values, of which none may match.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1), inner(length(min = 1)))]
    pub not_values: Option<Vec<String>>,
}
