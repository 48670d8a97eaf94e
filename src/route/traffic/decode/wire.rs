//! What is written, field by field.

use serde::Deserialize;
use serde_json::Value;

use crate::route::decode::wire::Fraction;

#[derive(Deserialize)]
pub(super) struct Envelope {
    pub metadata: Metadata,
    pub spec: Option<Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Metadata {
    pub name: String,
    pub namespace: Option<String>,
    pub creation_timestamp: Option<String>,
}

/// Each field is read for itself.
#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Spec {
    pub target_refs: Option<Vec<Value>>,
    pub timeouts: Option<Value>,
    pub retry: Option<Value>,
    pub retry_constraint: Option<Value>,
    pub session_persistence: Option<Value>,
    pub fault_injection: Option<Value>,
    pub rate_limits: Option<Value>,
    pub circuit_breaker: Option<Value>,
    pub outlier_detection: Option<Value>,
    pub load_balancer: Option<Value>,
}

impl Spec {
    /// Fields that the Gateway API's kind does not have.
    pub fn take_strangers(&mut self) -> Vec<&'static str> {
        let strangers = [
            ("timeouts", &mut self.timeouts),
            ("retry", &mut self.retry),
            ("faultInjection", &mut self.fault_injection),
            ("rateLimits", &mut self.rate_limits),
            ("circuitBreaker", &mut self.circuit_breaker),
            ("outlierDetection", &mut self.outlier_detection),
            ("loadBalancer", &mut self.load_balancer),
        ];
        strangers.into_iter().filter_map(|(name, field)| field.take().map(|_| name)).collect()
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct TargetRef {
    pub group: Option<String>,
    #[serde(default)]
    pub kind: String,
    #[serde(default)]
    pub name: String,
    pub namespace: Option<String>,
    pub section_name: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Retry {
    pub attempts: Option<u32>,
    pub backoff: Option<String>,
    pub codes: Option<Vec<u16>>,
    pub grpc_codes: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RetryConstraint {
    pub budget: Option<Budget>,
    pub min_retry_rate: Option<RequestRate>,
}

#[derive(Deserialize)]
pub(super) struct Budget {
    pub percent: Option<u32>,
    pub interval: Option<String>,
}

#[derive(Deserialize)]
pub(super) struct RequestRate {
    pub count: Option<u32>,
    pub interval: Option<String>,
}

#[derive(Deserialize)]
pub(super) struct FaultInjection {
    pub headers: Option<Vec<HeaderValueOf>>,
    pub delay: Option<Delay>,
    pub abort: Option<Abort>,
}

#[derive(Deserialize)]
pub(super) struct HeaderValueOf {
    pub name: String,
    pub value: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Delay {
    pub fixed_delay: Option<String>,
    pub percent: Option<u32>,
    pub fraction: Option<Fraction>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Abort {
    pub http_status: Option<u16>,
    pub grpc_status: Option<String>,
    pub percent: Option<u32>,
    pub fraction: Option<Fraction>,
}

#[derive(Deserialize)]
pub(super) struct RateLimit {
    pub requests: Option<u32>,
    pub interval: Option<String>,
    pub burst: Option<u32>,
    pub by: Option<String>,
    pub header: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct CircuitBreaker {
    pub max_connections: Option<u32>,
    pub max_pending_requests: Option<u32>,
    pub max_requests: Option<u32>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct OutlierDetection {
    #[serde(rename = "consecutive5xxErrors")]
    pub consecutive_5xx_errors: Option<u32>,
    pub interval: Option<String>,
    pub base_ejection_time: Option<String>,
    pub max_ejection_percent: Option<u32>,
    pub success_rate_stdev_factor: Option<u32>,
    pub success_rate_request_volume: Option<u32>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct LoadBalancer {
    pub simple: Option<String>,
    pub consistent_hash: Option<ConsistentHash>,
    pub traffic_distribution: Option<String>,
    pub warmup: Option<Warmup>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ConsistentHash {
    pub http_header_name: Option<String>,
    pub http_cookie: Option<HttpCookie>,
    pub use_source_ip: Option<bool>,
}

#[derive(Deserialize)]
pub(super) struct HttpCookie {
    pub name: String,
    pub path: Option<String>,
    pub ttl: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Warmup {
    pub duration: Option<String>,
    pub minimum_percent: Option<u32>,
}
