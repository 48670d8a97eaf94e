use std::time::{SystemTime, UNIX_EPOCH};

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram, gauge};

use super::root::{Alarm, Phase};

/// Tells what this room's metrics mean.
pub fn describe_metrics() {
    describe_counter!(REQUESTS, "Requests for a certificate, by what became of them.");
    describe_histogram!(REQUEST_SECONDS, Unit::Seconds, "How long a request for a certificate took.");
    describe_gauge!(ROOT_EXPIRY, Unit::Seconds, "When the certificate of whoever signs ends, in seconds since 1970.");
    describe_gauge!(ALARM, "Whether the root needs a person, by what is wrong.");
    describe_gauge!(PHASE, "The phase of a root rotation that holds now.");
    describe_gauge!(LEADER, "Whether this replica leads.");
    describe_counter!(super::leader::keys::FETCHES, "Fetches of keys of token issuers, by whether they went well.");
    describe_counter!(WRITES, "What the leader wrote for people, by kind and whether it could.");
}

pub fn record_alarm(alarm: Option<&Alarm>) {
    for reason in Alarm::REASONS {
        let holds = alarm.is_some_and(|alarm| alarm.reason() == reason);
        gauge!(ALARM, "reason" => reason).set(if holds { 1.0 } else { 0.0 });
    }
}

pub fn record_phase(phase: Phase) {
    for one in Phase::ALL {
        gauge!(PHASE, "phase" => one.as_str()).set(if one == phase { 1.0 } else { 0.0 });
    }
}

pub fn record_leader(leads: bool) {
    gauge!(LEADER).set(if leads { 1.0 } else { 0.0 });
}

pub fn record_expiry(not_after: Option<SystemTime>) {
    let seconds =
        not_after.and_then(|end| end.duration_since(UNIX_EPOCH).ok()).map_or(f64::NAN, |end| end.as_secs_f64());
    gauge!(ROOT_EXPIRY).set(seconds);
}

pub const REQUESTS: &str = "selvedge_ca_requests_total";
pub const REQUEST_SECONDS: &str = "selvedge_ca_request_duration_seconds";
const ROOT_EXPIRY: &str = "selvedge_ca_root_expiry_timestamp_seconds";
const ALARM: &str = "selvedge_ca_alarm";
const PHASE: &str = "selvedge_ca_rotation_phase";
const LEADER: &str = "selvedge_controller_leader";
pub const WRITES: &str = "selvedge_controller_writes_total";
