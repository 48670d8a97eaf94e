use std::time::Duration;

/// When to start a worker again. Sans-io: told how long each one lived.
#[derive(Debug, Default)]
pub(super) struct Restarts {
    total: u64,
    /// Deaths in quick succession.
    quick: u32,
}

impl Restarts {
    /// A worker died after `lived`: how long to wait before the next one.
    pub(super) fn after(&mut self, lived: Duration) -> Duration {
        self.total += 1;
        self.quick = if lived < STEADY { self.quick.saturating_add(1) } else { 0 };
        match self.quick.checked_sub(AT_ONCE + 1) {
            None => Duration::ZERO,
            Some(doublings) => FIRST_DELAY.saturating_mul(1 << doublings.min(16)).min(LONGEST_DELAY),
        }
    }

    pub(super) fn total(&self) -> u64 {
        self.total
    }
}

/// A worker that lived this long did not die of its start.
const STEADY: Duration = Duration::from_secs(20);
/// So many quick deaths in a row are followed by a start without delay.
const AT_ONCE: u32 = 3;
const FIRST_DELAY: Duration = Duration::from_millis(100);
const LONGEST_DELAY: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_is_started_at_once_then_with_a_delay_that_grows_to_a_bound() {
        let mut restarts = Restarts::default();
        let delays: Vec<u128> = (0..12).map(|_| restarts.after(Duration::from_secs(1)).as_millis()).collect();
        assert_eq!(delays, [0, 0, 0, 100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000]);
        assert_eq!(restarts.total(), 12);
    }

    #[test]
    fn a_worker_that_lived_long_is_started_at_once_again() {
        let mut restarts = Restarts::default();
        for _ in 0..100 {
            restarts.after(Duration::ZERO);
        }
        assert_eq!(restarts.after(STEADY), Duration::ZERO);
        assert_eq!(restarts.after(Duration::ZERO), Duration::ZERO);
    }
}
