//! A policy about traffic, as it is written, into a [`TrafficPolicy`].
//!
//! A field that cannot be read has no effect, and it is told; the others hold. Where the policy's targets cannot be
//! read, nobody knows what it is about, and it is refused as a whole.

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderName, HeaderValue, StatusCode};
use k8s_openapi::jiff::Timestamp;
use serde_json::Value;

use super::{
    Balance, Fields, HashOn, Note, OF_SERVICES, PolicyRef, RateBy, RateLimit, Target, TargetRef, TrafficKind,
    TrafficPolicy, Way,
};
use crate::mesh::balance::Warmup;
use crate::mesh::{NamespacedName, TrafficDistribution};
use crate::route::decode::rule::{duration, read_retry, read_session, timeouts};
use crate::route::decode::{GATEWAY_GROUP, is_core, read};
use crate::route::resilience::{Abort, BudgetRules, FaultRules, Limits, OutlierRules, Rate};
use crate::route::{DecodeError, GrpcStatus, Retry, RouteKind, RouteRef, Share};

mod wire;

/// Reads one policy.
///
/// # Errors
/// Where it cannot be told what the policy is about.
pub fn decode(kind: TrafficKind, value: &Value) -> Result<TrafficPolicy, DecodeError> {
    let envelope: wire::Envelope = read(value, "", &mut Vec::new())?;
    let metadata = envelope.metadata;
    let name = NamespacedName::new(metadata.namespace.as_deref().unwrap_or("default"), metadata.name);
    let created = match metadata.creation_timestamp {
        None => None,
        Some(text) => {
            let refused =
                |_| refuse("metadata.creationTimestamp", format!("{text:?} is no time such as 2026-01-31T12:00:00Z"));
            Some(text.parse::<Timestamp>().map_err(refused)?.as_second())
        }
    };
    let spec = envelope.spec.ok_or_else(|| refuse("spec", "a policy says here what it is about, in targetRefs"))?;
    let mut policy = TrafficPolicy {
        name: PolicyRef { kind, name },
        created,
        targets: Vec::new(),
        fields: Fields::default(),
        notes: Vec::new(),
    };
    let mut unknown = Vec::new();
    let mut spec: wire::Spec = read(&spec, "spec", &mut unknown)?;
    for (index, written) in spec.target_refs.take().unwrap_or_default().iter().enumerate() {
        let field = format!("spec.targetRefs[{index}]");
        let written: wire::TargetRef = read(written, &field, &mut unknown)?;
        match target(kind, &policy.name.name.namespace, &field, written) {
            Ok(target) => policy.targets.push(TargetRef { index, target }),
            Err(error) => policy.note(error),
        }
    }
    if policy.targets.is_empty() && policy.notes.is_empty() {
        return Err(refuse("spec.targetRefs", "name what the policy is about, such as {kind: Service, name: cart}"));
    }
    if kind == TrafficKind::Backend {
        unknown.extend(spec.take_strangers().into_iter().map(|name| format!("spec.{name}")));
    }
    Reader { policy: &mut policy, unknown: &mut unknown }.fields(spec);
    policy.notes.extend(
        unknown
            .into_iter()
            .map(|field| Note { field, cause: "no such field is known here; it has no effect".to_owned() }),
    );
    policy.check_targets();
    Ok(policy)
}

fn target(
    kind: TrafficKind,
    namespace: &Arc<str>,
    field: &str,
    written: wire::TargetRef,
) -> Result<Target, DecodeError> {
    let at = |name: &str, cause: String| Err(DecodeError { field: format!("{field}.{name}"), cause });
    if written.name.is_empty() {
        return at("name", "a target needs a name".to_owned());
    }
    if written.namespace.as_deref().is_some_and(|written| *written != **namespace) {
        return at("namespace", "a policy is about what lies in its own namespace: put it there".to_owned());
    }
    let name = NamespacedName { namespace: namespace.clone(), name: written.name.into() };
    let section: Option<Arc<str>> = written.section_name.filter(|name| !name.is_empty()).map(Into::into);
    let is_ours = kind == TrafficKind::Traffic;
    let group = written.group.as_deref().unwrap_or_default();
    let route = match &*written.kind {
        "Service" if is_core(group) => {
            return match section {
                None => Ok(Target::Service(name)),
                Some(_) => {
                    at("sectionName", "a Service is taken with all of its ports: leave sectionName out".to_owned())
                }
            };
        }
        "HTTPRoute" if is_ours && group == GATEWAY_GROUP => RouteKind::Http,
        "GRPCRoute" if is_ours && group == GATEWAY_GROUP => RouteKind::Grpc,
        other => {
            let known = match is_ours {
                true => "a Service of group \"\", or an HTTPRoute or GRPCRoute of group gateway.networking.k8s.io",
                false => "a Service of group \"\"",
            };
            return at("kind", format!("{other:?} of group {group:?} takes no such policy; name {known}"));
        }
    };
    let route = RouteRef { kind: route, name };
    Ok(match section {
        None => Target::Route(route),
        Some(rule) => Target::Rule(route, rule),
    })
}

impl TrafficPolicy {
    fn note(&mut self, error: DecodeError) {
        self.notes.push(Note { field: error.field, cause: format!("{}; it has no effect", error.cause) });
    }

    /// What only a Service takes has no effect on a route.
    fn check_targets(&mut self) {
        let Some(route) = self.targets.iter().find(|target| !target.target.is_service()) else { return };
        let names: Vec<_> = self.fields.names().filter(|name| OF_SERVICES.contains(name)).collect();
        self.notes.extend(names.into_iter().map(|name| Note {
            field: format!("spec.{name}"),
            cause: format!(
                "only a Service takes it, and spec.targetRefs[{}] is none: write it in a policy on the Service; it has \
                 no effect there",
                route.index
            ),
        }));
    }
}

/// Reads the fields of a policy, each for itself.
struct Reader<'a> {
    policy: &'a mut TrafficPolicy,
    unknown: &'a mut Vec<String>,
}

impl Reader<'_> {
    fn fields(&mut self, written: wire::Spec) {
        let (request, backend_request) = self
            .one("timeouts", written.timeouts, |field, written| timeouts(field, Some(written)))
            .map_or((None, None), |timeouts| (timeouts.request, timeouts.backend_request));
        self.policy.fields = Fields {
            request,
            backend_request,
            retry: self.one("retry", written.retry, retry).map(Arc::new),
            retry_constraint: self.one("retryConstraint", written.retry_constraint, budget),
            session: self.one("sessionPersistence", written.session_persistence, read_session).map(Arc::new),
            fault: self.one("faultInjection", written.fault_injection, fault).map(Arc::new),
            rate_limits: self.one("rateLimits", written.rate_limits, rate_limits),
            breaker: self.one("circuitBreaker", written.circuit_breaker, breaker),
            outliers: self.one("outlierDetection", written.outlier_detection, outliers),
            balance: self.one("loadBalancer", written.load_balancer, balance).map(Arc::new),
        };
    }

    fn one<W: serde::de::DeserializeOwned, T>(
        &mut self,
        name: &str,
        written: Option<Value>,
        make: impl FnOnce(&str, W) -> Result<T, DecodeError>,
    ) -> Option<T> {
        let field = format!("spec.{name}");
        let made = read(&written?, &field, self.unknown).and_then(|written| make(&field, written));
        made.map_err(|error| self.policy.note(error)).ok()
    }
}

fn retry(field: &str, written: wire::Retry) -> Result<Retry, DecodeError> {
    let codes = written.grpc_codes.unwrap_or_default();
    let upstream = crate::route::decode::wire::Retry {
        attempts: written.attempts,
        backoff: written.backoff,
        codes: written.codes,
    };
    let code =
        |(at, name): (usize, &String)| grpc_code(&format!("{field}.grpcCodes[{at}]"), name).map(|status| status as u16);
    let grpc_codes = codes.iter().enumerate().map(code).collect::<Result<_, _>>()?;
    Ok(Retry { grpc_codes, ..read_retry(field, upstream)? })
}

fn budget(field: &str, written: wire::RetryConstraint) -> Result<BudgetRules, DecodeError> {
    let mut rules = BudgetRules::default();
    let some = |time: Option<Duration>, otherwise: Duration| time.filter(|time| !time.is_zero()).unwrap_or(otherwise);
    if let Some(budget) = written.budget {
        let field = format!("{field}.budget");
        rules.percent = percent(&format!("{field}.percent"), budget.percent)?.unwrap_or(rules.percent);
        rules.interval = some(duration(&field, "interval", budget.interval.as_deref())?, rules.interval);
    }
    if let Some(rate) = written.min_retry_rate {
        let field = format!("{field}.minRetryRate");
        rules.free = rate.count.unwrap_or(rules.free);
        rules.free_interval = some(duration(&field, "interval", rate.interval.as_deref())?, rules.free_interval);
    }
    Ok(rules)
}

fn fault(field: &str, written: wire::FaultInjection) -> Result<FaultRules, DecodeError> {
    let mut headers = Vec::new();
    for (at, header) in written.headers.unwrap_or_default().into_iter().enumerate() {
        let field = format!("{field}.headers[{at}]");
        let value = HeaderValue::from_str(&header.value)
            .map_err(|_| refuse(format!("{field}.value"), format!("{:?} is no value of a header", header.value)))?;
        headers.push((header_name(&format!("{field}.name"), &header.name)?, value));
    }
    let delay = match written.delay {
        None => None,
        Some(delay) => {
            let field = format!("{field}.delay");
            let length = required(duration(&field, "fixedDelay", delay.fixed_delay.as_deref())?, &field, "fixedDelay")?;
            Some((length, share(&field, delay.percent, delay.fraction)?))
        }
    };
    let abort = match written.abort {
        None => None,
        Some(abort) => {
            let field = format!("{field}.abort");
            let what = match (abort.http_status, abort.grpc_status) {
                (Some(code), None) => {
                    let known = (200..600).contains(&code).then(|| StatusCode::from_u16(code).ok()).flatten();
                    let cause =
                        || refuse(format!("{field}.httpStatus"), format!("{code} is no status; write 200 to 599"));
                    Abort::Http(known.ok_or_else(cause)?)
                }
                (None, Some(name)) => Abort::Grpc(grpc_code(&format!("{field}.grpcStatus"), &name)?),
                _ => return Err(refuse(field, "write one of httpStatus and grpcStatus")),
            };
            Some((what, share(&field, abort.percent, abort.fraction)?))
        }
    };
    if delay.is_none() && abort.is_none() {
        return Err(refuse(field, "write a delay, an abort, or both"));
    }
    Ok(FaultRules { headers, delay, abort })
}

fn rate_limits(field: &str, written: Vec<wire::RateLimit>) -> Result<Arc<[RateLimit]>, DecodeError> {
    let one = |(at, written): (usize, wire::RateLimit)| {
        let field = format!("{field}[{at}]");
        let interval = duration(&field, "interval", written.interval.as_deref())?.unwrap_or(Duration::from_secs(1));
        if interval.is_zero() {
            return Err(refuse(format!("{field}.interval"), "a rate is so many requests in some time, such as 1s"));
        }
        let requests = required(written.requests, &field, "requests")?;
        let by = match (written.by.as_deref(), written.header) {
            (None | Some("All"), None) => RateBy::Target,
            (Some("Identity"), None) => RateBy::Identity,
            (Some("Header"), Some(name)) => RateBy::Header(header_name(&format!("{field}.header"), &name)?),
            (Some("Header"), None) => return Err(refuse(format!("{field}.header"), "name the header to count by")),
            (None | Some("All" | "Identity"), Some(_)) => {
                return Err(refuse(format!("{field}.header"), "it goes with by: Header alone"));
            }
            (Some(other), _) => {
                return Err(refuse(format!("{field}.by"), format!("{other:?} is none of All, Identity, Header")));
            }
        };
        let burst = written.burst.unwrap_or(requests).max(1);
        Ok(RateLimit { rate: Rate { requests, interval, burst }, by })
    };
    if written.is_empty() {
        return Err(refuse(field, "write at least one limit, or leave it out"));
    }
    written.into_iter().enumerate().map(one).collect()
}

fn breaker(field: &str, written: wire::CircuitBreaker) -> Result<Limits, DecodeError> {
    let limits = Limits {
        connections: written.max_connections,
        pending: written.max_pending_requests,
        requests: written.max_requests,
    };
    let said = [limits.connections, limits.pending, limits.requests];
    if said.contains(&Some(0)) {
        return Err(refuse(field, "0 lets nothing through; write 1 or more"));
    }
    match said.iter().all(Option::is_none) {
        true => Err(refuse(field, "write at least one of maxConnections, maxPendingRequests, maxRequests")),
        false => Ok(limits),
    }
}

fn outliers(field: &str, written: wire::OutlierDetection) -> Result<OutlierRules, DecodeError> {
    let rules = OutlierRules::default();
    let time = |name: &str, text: Option<String>, otherwise: Duration| {
        Ok(duration(field, name, text.as_deref())?.filter(|time| !time.is_zero()).unwrap_or(otherwise))
    };
    Ok(OutlierRules {
        consecutive_errors: written.consecutive_5xx_errors.unwrap_or(rules.consecutive_errors),
        interval: time("interval", written.interval, rules.interval)?,
        base_ejection: time("baseEjectionTime", written.base_ejection_time, rules.base_ejection)?,
        max_ejected_percent: percent(&format!("{field}.maxEjectionPercent"), written.max_ejection_percent)?
            .unwrap_or(rules.max_ejected_percent),
        success_rate_deviation: written.success_rate_stdev_factor.unwrap_or(rules.success_rate_deviation),
        least_requests: written.success_rate_request_volume.unwrap_or(rules.least_requests),
    })
}

fn balance(field: &str, written: wire::LoadBalancer) -> Result<Balance, DecodeError> {
    let way = match (written.simple.as_deref(), written.consistent_hash) {
        (None | Some("LEAST_REQUEST"), None) => Way::LeastRequest,
        (Some("PEAK_EWMA"), None) => Way::PeakEwma,
        (Some("ROUND_ROBIN"), None) => Way::RoundRobin,
        (Some("RANDOM"), None) => Way::Random,
        (None, Some(hash)) => Way::Hash(hash_on(&format!("{field}.consistentHash"), hash)?),
        (Some(_), Some(_)) => return Err(refuse(field, "simple and consistentHash exclude each other: write one")),
        (Some(other), None) => {
            let known = "LEAST_REQUEST, PEAK_EWMA, ROUND_ROBIN, RANDOM";
            return Err(refuse(format!("{field}.simple"), format!("{other:?} is none of {known}")));
        }
    };
    let distribution = match written.traffic_distribution.as_deref() {
        None => None,
        Some("Any") => Some(None),
        Some("PreferSameZone" | "PreferClose") => Some(Some(TrafficDistribution::PreferSameZone)),
        Some("PreferSameNode") => Some(Some(TrafficDistribution::PreferSameNode)),
        Some(other) => {
            let known = "PreferSameZone, PreferSameNode, Any";
            return Err(refuse(format!("{field}.trafficDistribution"), format!("{other:?} is none of {known}")));
        }
    };
    let warmup = match written.warmup {
        None => None,
        Some(warmup) => {
            let field = format!("{field}.warmup");
            let length = required(duration(&field, "duration", warmup.duration.as_deref())?, &field, "duration")?;
            let least = percent(&format!("{field}.minimumPercent"), warmup.minimum_percent)?.unwrap_or(10);
            Some(Warmup { length, least })
        }
    };
    Ok(Balance { way, distribution, warmup })
}

fn hash_on(field: &str, written: wire::ConsistentHash) -> Result<HashOn, DecodeError> {
    match (written.http_header_name, written.http_cookie, written.use_source_ip) {
        (Some(name), None, None | Some(false)) => {
            Ok(HashOn::Header(header_name(&format!("{field}.httpHeaderName"), &name)?))
        }
        (None, Some(cookie), None | Some(false)) => {
            let field = format!("{field}.httpCookie");
            let is_token = |text: &str| !text.is_empty() && HeaderName::from_bytes(text.as_bytes()).is_ok();
            if !is_token(&cookie.name) {
                return Err(refuse(format!("{field}.name"), format!("{:?} is no name of a cookie", cookie.name)));
            }
            let is_path = |path: &str| path.starts_with('/') && path.bytes().all(|b| b.is_ascii_graphic() && b != b';');
            if let Some(path) = cookie.path.as_deref().filter(|path| !is_path(path)) {
                return Err(refuse(format!("{field}.path"), format!("{path:?} is no path of a cookie")));
            }
            let ttl = duration(&field, "ttl", cookie.ttl.as_deref())?.unwrap_or_default();
            Ok(HashOn::Cookie { name: cookie.name.into(), path: cookie.path.map(Into::into), ttl })
        }
        (None, None, Some(true)) => Ok(HashOn::Source),
        _ => Err(refuse(field, "write one of httpHeaderName, httpCookie and useSourceIp: true")),
    }
}

fn share(
    field: &str,
    percent: Option<u32>,
    fraction: Option<crate::route::decode::wire::Fraction>,
) -> Result<Share, DecodeError> {
    let share = match (percent, fraction) {
        (None, None) => return Ok(Share::ALL),
        (Some(percent), None) => Share { numerator: percent, denominator: 100 },
        (None, Some(fraction)) => {
            Share { numerator: fraction.numerator, denominator: fraction.denominator.unwrap_or(100) }
        }
        (Some(_), Some(_)) => return Err(refuse(field, "percent and fraction say the same thing: write one")),
    };
    match share.denominator > 0 && share.numerator <= share.denominator {
        true => Ok(share),
        false => {
            Err(refuse(field, format!("{} of {} is no share of all requests", share.numerator, share.denominator)))
        }
    }
}

fn percent(field: &str, written: Option<u32>) -> Result<Option<u32>, DecodeError> {
    match written {
        Some(percent) if percent > 100 => Err(refuse(field, format!("{percent} is no share; write 0 to 100"))),
        other => Ok(other),
    }
}

fn header_name(field: &str, text: &str) -> Result<HeaderName, DecodeError> {
    HeaderName::from_bytes(text.as_bytes()).map_err(|_| refuse(field, format!("{text:?} is no name of a header")))
}

fn grpc_code(field: &str, name: &str) -> Result<GrpcStatus, DecodeError> {
    let known = GrpcStatus::ALL.into_iter().find(|(known, _)| *known == name).map(|(_, status)| status);
    known.ok_or_else(|| {
        refuse(field, format!("{name:?} is no status of an error of gRPC; write one such as UNAVAILABLE"))
    })
}

fn required<T>(written: Option<T>, field: &str, name: &str) -> Result<T, DecodeError> {
    written.ok_or_else(|| refuse(format!("{field}.{name}"), "this must be written"))
}

fn refuse(field: impl Into<String>, cause: impl Into<String>) -> DecodeError {
    DecodeError { field: field.into(), cause: cause.into() }
}
