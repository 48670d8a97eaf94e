use std::time::{Duration, Instant};

/// What is known of one endpoint.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Health {
    pub(super) in_flight: u32,
    failures: u32,
    ejections: u32,
    last_failure: Option<Instant>,
    ejected_until: Option<Instant>,
    /// Since when one connection tries whether it is back.
    trial: Option<Instant>,
}

impl Health {
    /// In order, with connections under way.
    pub(super) fn of_load(in_flight: u32) -> Self {
        Self { in_flight, ..Self::default() }
    }

    pub(super) fn is_usable(&self, now: Instant) -> bool {
        let Some(until) = self.ejected_until else { return true };
        let being_tried = self.trial.is_some_and(|since| now.saturating_duration_since(since) < TRIAL);
        until <= now && !being_tried
    }

    pub(super) fn begin_trial(&mut self, now: Instant) {
        if self.ejected_until.is_some_and(|until| until <= now) {
            self.trial = Some(now);
        }
    }

    pub(super) fn fail(&mut self, now: Instant) {
        self.last_failure = Some(now);
        self.failures = self.failures.saturating_add(1);
        // Connections that began before the ejection fail during it: they tell nothing new.
        let ejected = self.ejected_until.is_some_and(|until| now < until);
        if self.failures >= FAILURES && !ejected {
            let time = EJECTION.saturating_mul(1 << self.ejections.min(16)).min(MAX_EJECTION);
            self.ejections = self.ejections.saturating_add(1);
            self.ejected_until = Some(now + time);
            self.trial = None;
        }
    }

    pub(super) fn is_kept(&self, now: Instant) -> bool {
        let recent = |since: Instant| now.saturating_duration_since(since) < FAILURE_MEMORY;
        self.in_flight > 0 || self.last_failure.is_some_and(recent) || self.ejected_until.is_some_and(recent)
    }
}

/// How many failures in a row eject an endpoint.
pub(super) const FAILURES: u32 = 3;
/// How long the first ejection lasts; each further one twice as long, up to [`MAX_EJECTION`].
pub(super) const EJECTION: Duration = Duration::from_secs(5);
const MAX_EJECTION: Duration = Duration::from_secs(300);
/// How long one connection has to show that an endpoint is back, before another one tries.
const TRIAL: Duration = Duration::from_secs(10);
/// How long a failure is remembered.
const FAILURE_MEMORY: Duration = Duration::from_secs(600);
