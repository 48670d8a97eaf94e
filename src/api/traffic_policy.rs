use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::PolicyStatus;

/// What becomes of requests beyond what routes say: time-outs, retries, limits, faults, and how an endpoint is chosen.
///
/// Each field holds for itself: what the rule of a route says, else the policy on that rule, on the route, on the
/// Service that the request goes to. Of two policies on one thing the older one wins, field by field. A field that
/// cannot be read has no effect, and the condition Enforced says so.
#[derive(CustomResource, Clone, PartialEq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[kube(
    group = "selvedge.dev",
    version = "v1alpha1",
    kind = "TrafficPolicy",
    plural = "trafficpolicies",
    namespaced,
    status = "PolicyStatus",
    shortname = "stp",
    category = "selvedge",
    doc = "What becomes of requests beyond what routes say.",
    derive = "PartialEq",
    printcolumn(
        name = "Accepted",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Accepted\")].status",
        description = "Whether anything of the policy is in force."
    ),
    printcolumn(
        name = "Enforced",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Enforced\")].status",
        description = "Whether all of it is in force as written."
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[schemars(extend(
    "x-kubernetes-preserve-unknown-fields" = true,
    "x-kubernetes-validations" = [{
        "rule": "!(has(self.circuitBreaker) || has(self.outlierDetection) || has(self.loadBalancer)) || self.targetRefs.all(t, t.kind == 'Service')",
        "message": "only a Service takes circuitBreaker, outlierDetection and loadBalancer: write these in a policy on the Service",
    }],
))]
pub struct TrafficPolicySpec {
    /// What the policy is about, in its own namespace: Services, routes, or rules of routes.
    #[schemars(length(min = 1, max = 16))]
    pub target_refs: Vec<TrafficTargetRef>,
    /// How long a request may take.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeouts: Option<TrafficTimeouts>,
    /// Which requests are sent again, and how often. A route's own `retry` goes before all of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry: Option<TrafficRetry>,
    /// How many of all requests may be repetitions; without it, there is no such bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_constraint: Option<RetryConstraint>,
    /// Leads the requests of one session to one pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session_persistence: Option<SessionPersistence>,
    /// Failures on purpose, at the client's side: once a request, and never tried again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault_injection: Option<FaultInjection>,
    /// How many requests are let through. On a Service, the agents of its pods count, each for itself; on a route, those
    /// of the clients.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 16))]
    pub rate_limits: Option<Vec<RateLimit>>,
    /// How much the Service is given at once, by the clients of one namespace on one node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub circuit_breaker: Option<CircuitBreaker>,
    /// Leaves pods out for a while that fail, as the clients of one namespace on one node see it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outlier_detection: Option<OutlierDetection>,
    /// How a pod is chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load_balancer: Option<LoadBalancer>,
}

/// Names one thing in the policy's own namespace.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend(
    "x-kubernetes-preserve-unknown-fields" = true,
    "x-kubernetes-validations" = [{
        "rule": "self.kind == 'Service' ? !has(self.sectionName) && (!has(self.group) || self.group in ['', 'core']) : has(self.group) && self.group == 'gateway.networking.k8s.io'",
        "message": "name a Service of group \"\" without a sectionName, or an HTTPRoute or GRPCRoute of group gateway.networking.k8s.io",
    }],
))]
pub struct TrafficTargetRef {
    /// API group of the target; empty for a Service, `gateway.networking.k8s.io` for a route.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub group: Option<String>,
    /// Kind of the target.
    #[schemars(extend("enum" = ["Service", "HTTPRoute", "GRPCRoute"]))]
    pub kind: String,
    /// Name of the target.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// The name of one rule of the route.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub section_name: Option<String>,
}

/// How long a request may take, in the words of HTTPRoute.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct TrafficTimeouts {
    /// From its head to the last byte of the answer, over all tries, such as `10s`; `0s` is no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = DURATION))]
    pub request: Option<String>,
    /// One try; `0s` is no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = DURATION))]
    pub backend_request: Option<String>,
}

/// Which requests are sent again, in the words of HTTPRoute. One that reached nobody, was not answered in the time of
/// one try, or whose connection broke before the answer is sent again too.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct TrafficRetry {
    /// How often a request may be sent again; 2 where left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 100))]
    pub attempts: Option<u32>,
    /// The least time before it is sent again; each further time twice as long, with up to a half more. 25ms where left
    /// out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = DURATION))]
    pub backoff: Option<String>,
    /// Answers that are worth another try.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64), inner(range(min = 400, max = 599)))]
    pub codes: Option<Vec<u16>>,
    /// The same of gRPC, by name, such as `UNAVAILABLE`; as far as they come in the head of an answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16))]
    pub grpc_codes: Option<Vec<GrpcCode>>,
}

/// How many of all requests may be repetitions, in the words of XBackendTrafficPolicy.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct RetryConstraint {
    /// Of the requests of some time, the share that may be repetitions.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub budget: Option<RetryBudget>,
    /// So many repetitions are free, however few requests there are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_retry_rate: Option<RequestRate>,
}

/// Of the requests of some time, the share that may be repetitions.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct RetryBudget {
    /// 20 where left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 100))]
    pub percent: Option<u32>,
    /// 10s where left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = DURATION))]
    pub interval: Option<String>,
}

/// So many in such a time.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct RequestRate {
    /// 10 where left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub count: Option<u32>,
    /// 1s where left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = DURATION))]
    pub interval: Option<String>,
}

/// Leads the requests of one session to one pod, in the words of HTTPRoute.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct SessionPersistence {
    /// The name of the cookie, or of the header.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub session_name: Option<String>,
    /// Cookie where left out.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = ["Cookie", "Header"]))]
    pub kind: Option<String>,
    /// After this a session is over, however busy it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = DURATION))]
    pub absolute_timeout: Option<String>,
    /// After so long without a request a session is over.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = DURATION))]
    pub idle_timeout: Option<String>,
    /// More about the cookie.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cookie_config: Option<CookieConfig>,
}

/// More about the cookie of a session.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct CookieConfig {
    /// Session: until the browser is closed; Permanent: for the absolute time-out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = ["Session", "Permanent"]))]
    pub lifetime_type: Option<String>,
}

/// Failures on purpose.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct FaultInjection {
    /// Only requests that carry all of these headers.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 16))]
    pub headers: Option<Vec<HeaderValueMatch>>,
    /// Keeps a request waiting before it is sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delay: Option<FaultDelay>,
    /// Answers in place of the application.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub abort: Option<FaultAbort>,
}

/// A header with exactly this value.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct HeaderValueMatch {
    /// Name of the header.
    #[schemars(length(min = 1, max = 256))]
    pub name: String,
    /// Its value.
    #[schemars(length(max = 4096))]
    pub value: String,
}

/// Keeps a request waiting.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct FaultDelay {
    /// How long, such as `2s`.
    #[schemars(regex(pattern = DURATION))]
    pub fixed_delay: String,
    /// Of a hundred requests, so many; all where neither this nor `fraction` is written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 100))]
    pub percent: Option<u32>,
    /// The share of all requests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fraction: Option<Fraction>,
}

/// Answers in place of the application.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend(
    "x-kubernetes-preserve-unknown-fields" = true,
    "x-kubernetes-validations" = [{
        "rule": "has(self.httpStatus) != has(self.grpcStatus)",
        "message": "write one of httpStatus and grpcStatus",
    }],
))]
pub struct FaultAbort {
    /// With this status.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 200, max = 599))]
    pub http_status: Option<u16>,
    /// With this one of gRPC.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "GrpcCode")]
    pub grpc_status: Option<GrpcCode>,
    /// Of a hundred requests, so many; all where neither this nor `fraction` is written.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 100))]
    pub percent: Option<u32>,
    /// The share of all requests.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fraction: Option<Fraction>,
}

/// A share of all requests.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct Fraction {
    /// So many.
    pub numerator: u32,
    /// Of so many; 100 where left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub denominator: Option<u32>,
}

/// A status of gRPC.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
#[schemars(inline)]
pub enum GrpcCode {
    Cancelled,
    Unknown,
    InvalidArgument,
    DeadlineExceeded,
    NotFound,
    AlreadyExists,
    PermissionDenied,
    ResourceExhausted,
    FailedPrecondition,
    Aborted,
    OutOfRange,
    Unimplemented,
    Internal,
    Unavailable,
    DataLoss,
    Unauthenticated,
}

/// So many requests in some time.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[schemars(extend(
    "x-kubernetes-preserve-unknown-fields" = true,
    "x-kubernetes-validations" = [{
        "rule": "has(self.header) == (has(self.by) && self.by == 'Header')",
        "message": "by: Header goes with the name of a header, and nothing else does",
    }],
))]
pub struct RateLimit {
    /// So many requests.
    pub requests: u32,
    /// In such a time; 1s where left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = DURATION))]
    pub interval: Option<String>,
    /// Up to so many at once; as many as `requests` where left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub burst: Option<u32>,
    /// Whose requests are counted together: those of everybody (All), of one client identity (Identity), or with one
    /// value of a header (Header). All where left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = ["All", "Identity", "Header"]))]
    pub by: Option<String>,
    /// The name of the header; requests without it are counted together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256))]
    pub header: Option<String>,
}

/// How much a Service is given at once; what is left out has no bound.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend(
    "x-kubernetes-preserve-unknown-fields" = true,
    "x-kubernetes-validations" = [{
        "rule": "has(self.maxConnections) || has(self.maxPendingRequests) || has(self.maxRequests)",
        "message": "write at least one of maxConnections, maxPendingRequests, maxRequests",
    }],
))]
pub struct CircuitBreaker {
    /// Connections that carry requests.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub max_connections: Option<u32>,
    /// Requests that wait for a connection.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub max_pending_requests: Option<u32>,
    /// Requests under way.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub max_requests: Option<u32>,
}

/// Which pods are left out for a while.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct OutlierDetection {
    /// Failures in a row that put a pod out: an answer of 500 to 599, one of gRPC that says the like, or none. 5 where
    /// left out; 0 is never.
    #[serde(rename = "consecutive5xxErrors", skip_serializing_if = "Option::is_none")]
    pub consecutive_5xx_errors: Option<u32>,
    /// How often success rates are compared; 10s where left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = DURATION))]
    pub interval: Option<String>,
    /// How long the first time lasts; each further one as much longer, up to 5 minutes. 30s where left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = DURATION))]
    pub base_ejection_time: Option<String>,
    /// Of all pods, how many may be out at once; one may always be, but never the last. 10 where left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 100))]
    pub max_ejection_percent: Option<u32>,
    /// Puts out whose success rate is so many thousandths of a standard deviation below the average of at least five
    /// pods, such as 1900. Never where left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub success_rate_stdev_factor: Option<u32>,
    /// Requests in an interval below which a pod is not compared; 100 where left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub success_rate_request_volume: Option<u32>,
}

/// How a pod is chosen.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend(
    "x-kubernetes-preserve-unknown-fields" = true,
    "x-kubernetes-validations" = [{
        "rule": "!(has(self.simple) && has(self.consistentHash))",
        "message": "simple and consistentHash exclude each other: write one",
    }],
))]
pub struct LoadBalancer {
    /// Of two random pods the one with fewer requests under way (LEAST_REQUEST), or where these cost less time
    /// (PEAK_EWMA); one after the other (ROUND_ROBIN); any (RANDOM). LEAST_REQUEST where left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = ["LEAST_REQUEST", "PEAK_EWMA", "ROUND_ROBIN", "RANDOM"]))]
    pub simple: Option<String>,
    /// Requests that have something in common go to one pod, as long as that is there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub consistent_hash: Option<ConsistentHash>,
    /// Which pods go before others, in place of what the Service's own field of this name says.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("enum" = ["PreferSameZone", "PreferSameNode", "PreferClose", "Any"]))]
    pub traffic_distribution: Option<String>,
    /// Gives a pod that comes its share little by little.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warmup: Option<WarmupOf>,
}

/// What requests have in common that go to one pod: one of these.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct ConsistentHash {
    /// The value of a header.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256))]
    pub http_header_name: Option<String>,
    /// A cookie; clients that have none are given one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub http_cookie: Option<HttpCookie>,
    /// The client's address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub use_source_ip: Option<bool>,
}

/// A cookie.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct HttpCookie {
    /// Its name.
    #[schemars(length(min = 1, max = 256))]
    pub name: String,
    /// Its path; that of the request where left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1024))]
    pub path: Option<String>,
    /// How long it lasts; until the browser is closed where left out or `0s`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = DURATION))]
    pub ttl: Option<String>,
}

/// Gives a pod that comes its share little by little.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-preserve-unknown-fields" = true))]
pub struct WarmupOf {
    /// Until it has all of it, such as `1m`; at most an hour.
    #[schemars(regex(pattern = DURATION))]
    pub duration: String,
    /// The percentage of its share that it begins with; 10 where left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 100))]
    pub minimum_percent: Option<u32>,
}

/// [GEP-2257](https://gateway-api.sigs.k8s.io/geps/gep-2257/).
const DURATION: &str = "^([0-9]{1,5}(h|m|s|ms)){1,4}$";
