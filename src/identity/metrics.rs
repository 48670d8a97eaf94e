use metrics::{Unit, describe_counter, describe_gauge};

/// Tells what this room's metrics mean.
pub fn describe_metrics() {
    describe_gauge!(
        EXPIRY,
        Unit::Seconds,
        "When the certificate held for an identity ends, in seconds since 1970; one series for each identity that pods of this node run as."
    );
    describe_counter!(RENEWALS, "Certificates obtained from the CA.");
    describe_counter!(FAILURES, "Requests for a certificate that the CA did not fulfil.");
    describe_gauge!(ANCHORS, "Trust anchors in the bundle that peers are checked against.");
    describe_gauge!(GENERATION, "How often the trust bundle has changed since the agent started.");
}

pub(super) const EXPIRY: &str = "selvedge_certificate_expiry_timestamp_seconds";
pub(super) const RENEWALS: &str = "selvedge_certificate_renewals_total";
pub(super) const FAILURES: &str = "selvedge_certificate_failures_total";
pub(super) const ANCHORS: &str = "selvedge_trust_anchors";
pub(super) const GENERATION: &str = "selvedge_trust_generation";
