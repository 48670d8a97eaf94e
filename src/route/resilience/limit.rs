//! How many requests are let through in a time.

use std::time::{Duration, Instant};

/// So many requests in such a time; up to `burst` of them at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rate {
    pub requests: u32,
    pub interval: Duration,
    pub burst: u32,
}

impl Rate {
    /// The time that one request pays for.
    fn price(&self) -> Duration {
        self.interval / self.requests.max(1)
    }
}

/// What is left of a rate, kept as the time up to which it is spent: the [generic cell rate
/// algorithm](https://www.rfc-editor.org/rfc/rfc2697), exact and of one word.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bucket {
    spent_until: Option<Instant>,
}

impl Bucket {
    /// Lets one request through, or says when it is worth asking again.
    pub fn take(&mut self, rate: &Rate, now: Instant) -> Result<(), Duration> {
        if rate.requests == 0 {
            return Err(rate.interval);
        }
        let price = rate.price();
        let ahead = price.saturating_mul(rate.burst.max(1));
        let spent_until = self.spent_until.filter(|until| *until > now).unwrap_or(now) + price;
        match spent_until.saturating_duration_since(now).checked_sub(ahead) {
            None | Some(Duration::ZERO) => {
                self.spent_until = Some(spent_until);
                Ok(())
            }
            Some(early) => Err(early),
        }
    }

    /// Whether it is as good as new, and need not be remembered.
    pub fn is_full(&self, now: Instant) -> bool {
        self.spent_until.is_none_or(|until| until <= now)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_burst_goes_through_and_then_one_at_a_time() {
        let rate = Rate { requests: 10, interval: Duration::from_secs(1), burst: 5 };
        let start = Instant::now();
        let mut bucket = Bucket::default();
        assert_eq!((0..20).filter(|_| bucket.take(&rate, start).is_ok()).count(), 5);
        assert_eq!(bucket.take(&rate, start), Err(Duration::from_millis(100)));
        assert_eq!(bucket.take(&rate, start + Duration::from_millis(100)), Ok(()));
        assert_eq!(bucket.take(&rate, start + Duration::from_millis(199)), Err(Duration::from_millis(1)));
        assert!(!bucket.is_full(start + Duration::from_millis(200)));
        assert!(bucket.is_full(start + Duration::from_secs(10)));
    }

    #[test]
    fn a_rate_of_nothing_lets_nothing_through() {
        let rate = Rate { requests: 0, interval: Duration::from_secs(1), burst: 5 };
        assert!(Bucket::default().take(&rate, Instant::now()).is_err());
    }

    proptest! {
        #[test]
        fn in_any_time_no_more_go_through_than_the_rate_and_one_burst(
            requests in 1u32..50, burst in 1u32..20, pauses in prop::collection::vec(0u64..200, 1..300),
        ) {
            let rate = Rate { requests, interval: Duration::from_secs(1), burst };
            let (mut now, mut bucket, mut through) = (Instant::now(), Bucket::default(), Vec::new());
            for pause in pauses {
                now += Duration::from_millis(pause);
                if bucket.take(&rate, now).is_ok() {
                    through.push(now);
                }
            }
            for (at, first) in through.iter().enumerate() {
                for (count, last) in (1u32..).zip(&through[at..]) {
                    let most = (*last - *first).as_secs_f64() / rate.price().as_secs_f64() + f64::from(burst) + 1e-6;
                    prop_assert!(f64::from(count) <= most, "{count} in {:?}", *last - *first);
                }
            }
        }
    }
}
