//! How many of all requests may be repetitions ([GEP-3388](https://gateway-api.sigs.k8s.io/geps/gep-3388/)): a backend
//! that fails is not buried under tries.

use std::time::{Duration, Instant};

/// `retryConstraint`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BudgetRules {
    /// `budget.percent`: of the requests of the interval, how many may be repetitions.
    pub percent: u32,
    /// `budget.interval`.
    pub interval: Duration,
    /// `minRetryRate`: so many repetitions in such a time are free, however few requests there are.
    pub free: u32,
    pub free_interval: Duration,
}

impl Default for BudgetRules {
    fn default() -> Self {
        Self { percent: 20, interval: Duration::from_secs(10), free: 10, free_interval: Duration::from_secs(1) }
    }
}

/// The requests and repetitions to one backend from one client namespace.
#[derive(Clone, Debug, Default)]
pub struct Budget {
    requests: Window,
    repeated: Window,
    free: Window,
}

impl Budget {
    /// A request is sent for the first time.
    pub fn request(&mut self, rules: &BudgetRules, now: Instant) {
        self.requests.add(rules.interval, now);
    }

    /// Whether one more repetition is allowed; if so, it counts.
    pub fn repeat(&mut self, rules: &BudgetRules, now: Instant) -> bool {
        let is_free = self.free.count(rules.free_interval, now) < u64::from(rules.free);
        let repeated = self.repeated.count(rules.interval, now);
        let all = self.requests.count(rules.interval, now) + repeated;
        let is_within = (repeated + 1) * 100 <= all.saturating_mul(rules.percent.into());
        if is_free || is_within {
            self.free.add(rules.free_interval, now);
            self.repeated.add(rules.interval, now);
        }
        is_free || is_within
    }
}

/// How many things happened in the time just gone by, to a tenth of it.
#[derive(Clone, Copy, Debug, Default)]
struct Window {
    counts: [u64; PARTS as usize],
    /// Where the newest of the parts begins.
    since: Option<Instant>,
    newest: usize,
}

impl Window {
    fn add(&mut self, length: Duration, now: Instant) {
        self.turn(length, now);
        self.counts[self.newest] += 1;
    }

    fn count(&mut self, length: Duration, now: Instant) -> u64 {
        self.turn(length, now);
        self.counts.iter().sum()
    }

    /// Forgets what is too old.
    fn turn(&mut self, length: Duration, now: Instant) {
        let part = (length / PARTS).max(Duration::from_millis(1));
        let since = *self.since.get_or_insert(now);
        let passed = now.saturating_duration_since(since).as_nanos() / part.as_nanos();
        for _ in 0..passed.min(PARTS.into()) {
            self.newest = (self.newest + 1) % self.counts.len();
            self.counts[self.newest] = 0;
        }
        if passed >= u128::from(PARTS) {
            self.since = Some(now);
        } else if let Ok(passed) = u32::try_from(passed) {
            self.since = Some(since + part * passed);
        }
    }
}

const PARTS: u32 = 10;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RULES: BudgetRules =
        BudgetRules { percent: 20, interval: Duration::from_secs(10), free: 0, free_interval: Duration::from_secs(1) };

    #[test]
    fn a_fifth_of_all_may_be_repetitions() {
        let now = Instant::now();
        let mut budget = Budget::default();
        (0..100).for_each(|_| budget.request(&RULES, now));
        let repeated = (0..100).filter(|_| budget.repeat(&RULES, now)).count();
        assert_eq!(repeated, 24, "a fifth of 124, in whole ones");
    }

    #[test]
    fn what_is_long_ago_no_longer_counts() {
        let now = Instant::now();
        let mut budget = Budget::default();
        (0..100).for_each(|_| budget.request(&RULES, now));
        assert!(budget.repeat(&RULES, now + Duration::from_secs(9)));
        assert!(!budget.repeat(&RULES, now + Duration::from_secs(12)));
    }

    #[test]
    fn a_few_are_free() {
        let rules = BudgetRules { free: 3, ..RULES };
        let now = Instant::now();
        let mut budget = Budget::default();
        let repeated = |budget: &mut Budget, now| (0..10).filter(|_| budget.repeat(&rules, now)).count();
        assert_eq!(repeated(&mut budget, now), 3);
        assert_eq!(repeated(&mut budget, now + Duration::from_millis(100)), 0);
        assert_eq!(repeated(&mut budget, now + Duration::from_secs(2)), 3);
    }

    proptest! {
        /// Whatever comes when, repetitions stay within their share of what the window can have seen.
        #[test]
        fn repetitions_stay_within_the_budget(steps in prop::collection::vec((0u64..400, any::<bool>()), 1..400)) {
            let start = Instant::now();
            let (mut now, mut budget) = (start, Budget::default());
            let (mut requests, mut repeated) = (Vec::new(), Vec::new());
            for (millis, repeats) in steps {
                now += Duration::from_millis(millis);
                if !repeats {
                    budget.request(&RULES, now);
                    requests.push(now);
                } else if budget.repeat(&RULES, now) {
                    repeated.push(now);
                }
                let recent = |times: &[Instant], within| times.iter().filter(|time| now - **time <= within).count();
                // The window is true to one of its parts.
                let (most, least) = (Duration::from_millis(11_000), Duration::from_millis(9_000));
                let all = recent(&requests, most) + recent(&repeated, most);
                prop_assert!(!repeats || recent(&repeated, least) * 100 <= all * 20 + 100);
            }
        }
    }
}
