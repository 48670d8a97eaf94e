//! Endpoints that fail while others do not.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

/// `outlierDetection`, as DestinationRule names it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OutlierRules {
    /// Failures in a row that eject an endpoint; 0 is never.
    pub consecutive_errors: u32,
    /// How often success rates are compared.
    pub interval: Duration,
    /// How long the first ejection lasts; each further one as much longer.
    pub base_ejection: Duration,
    /// Of all endpoints, how many may be ejected at once; one may always be.
    pub max_ejected_percent: u32,
    /// Of a round's requests, the share of successes below which an endpoint is ejected, compared with what all
    /// endpoints have on average: so many thousandths of a standard deviation below it. 0 is never.
    pub success_rate_deviation: u32,
    /// Requests in a round below which an endpoint is not compared.
    pub least_requests: u32,
}

impl Default for OutlierRules {
    fn default() -> Self {
        Self {
            consecutive_errors: 5,
            interval: Duration::from_secs(10),
            base_ejection: Duration::from_secs(30),
            max_ejected_percent: 10,
            success_rate_deviation: 0,
            least_requests: 100,
        }
    }
}

/// The endpoints of one backend as the clients of one namespace know them.
#[derive(Clone, Debug)]
pub struct Outliers<E> {
    endpoints: HashMap<E, Record>,
    round: Option<Instant>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Record {
    /// Failures in a row.
    errors: u32,
    /// Of this round.
    requests: u32,
    successes: u32,
    /// In the round before.
    was_asked: bool,
    ejections: u32,
    ejected_until: Option<Instant>,
}

impl Record {
    fn is_ejected(&self, now: Instant) -> bool {
        self.ejected_until.is_some_and(|until| until > now)
    }
}

impl<E> Default for Outliers<E> {
    fn default() -> Self {
        Self { endpoints: HashMap::new(), round: None }
    }
}

impl<E: Hash + Eq + Clone> Outliers<E> {
    /// Whether an endpoint is to be passed over.
    pub fn is_ejected(&self, endpoint: &E, now: Instant) -> bool {
        self.endpoints.get(endpoint).is_some_and(|record| record.is_ejected(now))
    }

    /// An endpoint answered, or failed to; of `known` endpoints in all. Says whether this ejected it.
    pub fn tell(&mut self, rules: &OutlierRules, endpoint: &E, is_success: bool, known: usize, now: Instant) -> bool {
        self.compare(rules, known, now);
        let record = self.endpoints.entry(endpoint.clone()).or_default();
        record.requests = record.requests.saturating_add(1);
        if is_success {
            record.successes = record.successes.saturating_add(1);
            record.errors = 0;
            return false;
        }
        record.errors = record.errors.saturating_add(1);
        // What began before the ejection tells nothing new.
        let is_due = rules.consecutive_errors > 0 && record.errors >= rules.consecutive_errors;
        is_due && self.eject(rules, endpoint, known, now)
    }

    /// Forgets endpoints that are no more.
    pub fn keep(&mut self, is_there: impl Fn(&E) -> bool) {
        self.endpoints.retain(|endpoint, _| is_there(endpoint));
    }

    fn eject(&mut self, rules: &OutlierRules, endpoint: &E, known: usize, now: Instant) -> bool {
        let ejected = self.endpoints.values().filter(|record| record.is_ejected(now)).count();
        let share = known.saturating_mul(rules.max_ejected_percent.try_into().unwrap_or(usize::MAX)) / 100;
        // Whom nobody could take the place of is never ejected.
        let may = ejected < share.max(1).min(known.saturating_sub(1));
        let Some(record) = self.endpoints.get_mut(endpoint).filter(|record| may && !record.is_ejected(now)) else {
            return false;
        };
        record.ejections = record.ejections.saturating_add(1);
        record.ejected_until = Some(now + rules.base_ejection.saturating_mul(record.ejections).min(LONGEST));
        record.errors = 0;
        true
    }

    /// Once a round, ejects those whose success rate is far below that of all.
    fn compare(&mut self, rules: &OutlierRules, known: usize, now: Instant) {
        let began = *self.round.get_or_insert(now);
        if now.saturating_duration_since(began) < rules.interval {
            return;
        }
        self.round = Some(now);
        let rated = self.endpoints.iter().filter(|(_, record)| record.requests >= rules.least_requests.max(1));
        let rates: Vec<(E, f64)> = rated
            .map(|(endpoint, record)| (endpoint.clone(), f64::from(record.successes) / f64::from(record.requests)))
            .collect();
        for record in self.endpoints.values_mut() {
            // One that was in order for a whole round begins anew with short ejections.
            let is_well = !record.is_ejected(now) && record.requests > 0 && record.requests == record.successes;
            record.ejections = record.ejections.saturating_sub(u32::from(is_well));
            record.was_asked = record.requests > 0;
            (record.requests, record.successes) = (0, 0);
        }
        // What nobody has asked for a while is forgotten: endpoints come and go.
        self.endpoints.retain(|_, record| {
            record.was_asked || record.errors > 0 || record.ejected_until.is_some_and(|until| now < until + LONGEST)
        });
        if rules.success_rate_deviation == 0 || rates.len() < FEWEST {
            return;
        }
        let count = rates.len() as f64;
        let mean = rates.iter().map(|(_, rate)| rate).sum::<f64>() / count;
        let variance = rates.iter().map(|(_, rate)| (rate - mean).powi(2)).sum::<f64>() / count;
        let bound = mean - variance.sqrt() * f64::from(rules.success_rate_deviation) / 1000.0;
        for (endpoint, _) in rates.iter().filter(|(_, rate)| *rate < bound) {
            self.eject(rules, endpoint, known, now);
        }
    }
}

/// However often an endpoint fails, it is tried again after this.
const LONGEST: Duration = Duration::from_secs(300);
/// Endpoints of which an average says something.
const FEWEST: usize = 5;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RULES: OutlierRules = OutlierRules {
        consecutive_errors: 3,
        interval: Duration::from_secs(10),
        base_ejection: Duration::from_secs(30),
        max_ejected_percent: 50,
        success_rate_deviation: 0,
        least_requests: 10,
    };

    fn fail(outliers: &mut Outliers<u8>, endpoint: u8, times: usize, now: Instant) -> bool {
        (0..times).any(|_| outliers.tell(&RULES, &endpoint, false, 4, now))
    }

    #[test]
    fn failures_in_a_row_eject_and_a_success_between_does_not() {
        let now = Instant::now();
        let mut outliers = Outliers::default();
        assert!(!fail(&mut outliers, 1, 2, now));
        outliers.tell(&RULES, &1, true, 4, now);
        assert!(!fail(&mut outliers, 1, 2, now));
        assert!(fail(&mut outliers, 1, 1, now));
        assert!(outliers.is_ejected(&1, now + Duration::from_secs(29)));
        assert!(!outliers.is_ejected(&1, now + Duration::from_secs(30)));
        assert!(!outliers.is_ejected(&2, now));
    }

    #[test]
    fn each_further_ejection_lasts_longer() {
        let now = Instant::now();
        let mut outliers = Outliers::default();
        fail(&mut outliers, 1, 3, now);
        let later = now + Duration::from_secs(31);
        assert!(fail(&mut outliers, 1, 3, later));
        assert!(outliers.is_ejected(&1, later + Duration::from_secs(59)));
        assert!(!outliers.is_ejected(&1, later + Duration::from_secs(60)));
    }

    #[test]
    fn no_more_than_a_share_is_ejected_and_the_last_one_never() {
        let now = Instant::now();
        let mut outliers = Outliers::default();
        let ejected = (0..4).filter(|endpoint| fail(&mut outliers, *endpoint, 3, now)).count();
        assert_eq!(ejected, 2, "half of four");
        let mut alone = Outliers::default();
        assert!((0..10).all(|_| !alone.tell(&RULES, &1, false, 1, now)));
    }

    #[test]
    fn one_far_below_the_average_is_ejected() {
        let rules = OutlierRules { consecutive_errors: 0, success_rate_deviation: 1500, ..RULES };
        let now = Instant::now();
        let mut outliers = Outliers::default();
        for endpoint in 0..6u8 {
            for n in 0..20 {
                outliers.tell(&rules, &endpoint, endpoint != 3 || n % 2 == 0, 6, now);
            }
        }
        let later = now + Duration::from_secs(10);
        outliers.tell(&rules, &0, true, 6, later);
        assert_eq!((0..6).filter(|endpoint| outliers.is_ejected(endpoint, later)).collect::<Vec<_>>(), [3]);
    }

    #[test]
    fn what_is_gone_is_forgotten() {
        let now = Instant::now();
        let mut outliers = Outliers::default();
        fail(&mut outliers, 1, 3, now);
        outliers.keep(|endpoint| *endpoint != 1);
        assert!(!outliers.is_ejected(&1, now));
    }

    proptest! {
        #[test]
        fn whatever_fails_somebody_is_left(
            steps in prop::collection::vec((0u8..4, any::<bool>(), 0u64..8), 0..300), percent in 0u32..200,
        ) {
            let rules = OutlierRules { max_ejected_percent: percent, success_rate_deviation: 1000, ..RULES };
            let (mut now, mut outliers) = (Instant::now(), Outliers::default());
            for (endpoint, is_success, seconds) in steps {
                now += Duration::from_secs(seconds);
                outliers.tell(&rules, &endpoint, is_success, 4, now);
                prop_assert!((0..4).any(|endpoint| !outliers.is_ejected(&endpoint, now)));
            }
        }
    }
}
