//! Whether a request is sent again, and when.

use std::time::Duration;

use http::StatusCode;

use super::super::Retry;

/// What is worth another try.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RetryRules {
    /// How often a request may be sent again, beside the first time.
    pub attempts: u32,
    /// Answers that are worth another try.
    pub codes: Vec<StatusCode>,
    /// The same of gRPC.
    pub grpc_codes: Vec<u16>,
    /// The least time before the first repetition; each further one waits twice as long, up to [`MOST_DOUBLINGS`].
    pub backoff: Duration,
    /// Whether a try counts as failed, and is repeated, that ran into `timeouts.backendRequest` or broke before an
    /// answer came. The application may have had it.
    pub unanswered: bool,
}

impl Default for RetryRules {
    /// Without a word from anybody: only what never reached the application is sent again, elsewhere and at once.
    fn default() -> Self {
        Self { attempts: 4, codes: Vec::new(), grpc_codes: Vec::new(), backoff: Duration::ZERO, unanswered: false }
    }
}

impl From<&Retry> for RetryRules {
    fn from(written: &Retry) -> Self {
        Self {
            attempts: written.attempts.unwrap_or(ATTEMPTS),
            codes: written.codes.clone(),
            grpc_codes: written.grpc_codes.clone(),
            backoff: written.backoff.unwrap_or(BACKOFF),
            unanswered: true,
        }
    }
}

/// What became of one try.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// It provably never reached the application: no connection, or one that refused the stream unprocessed.
    NotSent,
    /// It ran into `timeouts.backendRequest`, or its connection broke, before an answer came.
    Unanswered,
    Answered(StatusCode),
    /// With the status of gRPC, where that came in the head of the answer.
    GrpcAnswered(u16),
}

/// The tries of one request.
#[derive(Clone, Debug)]
pub struct Tries {
    left: u32,
    repeated: u32,
}

impl Tries {
    pub fn new(rules: &RetryRules) -> Self {
        Self { left: rules.attempts, repeated: 0 }
    }

    /// How long to wait before the request is sent again; none where what there is goes to the client.
    ///
    /// `has_body` says that all of the request is still at hand. Whoever is told to wait asks the [`Budget`] too, and
    /// does not wait beyond `timeouts.request`.
    ///
    /// [`Budget`]: super::Budget
    pub fn again(&mut self, rules: &RetryRules, outcome: Outcome, has_body: bool, random: u64) -> Option<Duration> {
        let is_worth = match outcome {
            Outcome::NotSent => true,
            Outcome::Unanswered => rules.unanswered,
            Outcome::Answered(status) => rules.codes.contains(&status),
            Outcome::GrpcAnswered(status) => rules.grpc_codes.contains(&status),
        };
        if !is_worth || !has_body {
            return None;
        }
        self.left = self.left.checked_sub(1)?;
        let doublings = self.repeated.min(MOST_DOUBLINGS);
        self.repeated += 1;
        // Never less than what is written (GEP-1731), and up to half as much more: those that failed together come
        // back apart.
        let least = rules.backoff.saturating_mul(1 << doublings);
        let spread = u64::try_from(least.as_micros() / 2).unwrap_or(u64::MAX);
        Some(least + Duration::from_micros(random.checked_rem(spread).unwrap_or(0)))
    }

    /// How often the request was sent again.
    pub fn repeated(&self) -> u32 {
        self.repeated
    }
}

/// Where a policy does not say how many, or how long.
const ATTEMPTS: u32 = 2;
const BACKOFF: Duration = Duration::from_millis(25);
/// After these the pauses stay as long as they are.
pub const MOST_DOUBLINGS: u32 = 5;

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> RetryRules {
        RetryRules {
            attempts: 3,
            codes: vec![StatusCode::SERVICE_UNAVAILABLE],
            grpc_codes: vec![14],
            backoff: Duration::from_millis(100),
            unanswered: true,
        }
    }

    #[test]
    fn what_is_worth_it_is_tried_again_and_nothing_else() {
        let careful = RetryRules::default();
        for (outcome, asked, unasked) in [
            (Outcome::NotSent, true, true),
            (Outcome::Unanswered, true, false),
            (Outcome::Answered(StatusCode::SERVICE_UNAVAILABLE), true, false),
            (Outcome::Answered(StatusCode::INTERNAL_SERVER_ERROR), false, false),
            (Outcome::Answered(StatusCode::OK), false, false),
            (Outcome::GrpcAnswered(14), true, false),
            (Outcome::GrpcAnswered(2), false, false),
        ] {
            let again = |rules: &RetryRules, has_body| Tries::new(rules).again(rules, outcome, has_body, 0).is_some();
            assert_eq!(again(&rules(), true), asked, "{outcome:?}");
            assert_eq!(again(&careful, true), unasked, "{outcome:?}");
            assert!(!again(&rules(), false), "{outcome:?}: its body is gone");
        }
    }

    #[test]
    fn pauses_double_and_are_never_shorter_than_written() {
        let rules = RetryRules { attempts: 9, ..rules() };
        let mut tries = Tries::new(&rules);
        let mut pause = |random| tries.again(&rules, Outcome::NotSent, true, random).map(|pause| pause.as_millis());
        let least: Vec<_> = (0..7).map(|_| pause(0).unwrap()).collect();
        assert_eq!(least, [100, 200, 400, 800, 1600, 3200, 3200]);
        let spread = pause(u64::MAX).unwrap();
        assert!((3200..4800).contains(&spread), "{spread}");
    }

    #[test]
    fn the_tries_come_to_an_end() {
        let rules = rules();
        let mut tries = Tries::new(&rules);
        let count = (0..10).filter(|_| tries.again(&rules, Outcome::NotSent, true, 0).is_some()).count();
        assert_eq!((count, tries.repeated()), (3, 3));
    }

    #[test]
    fn without_a_pause_there_is_none() {
        let rules = RetryRules { backoff: Duration::ZERO, ..rules() };
        assert_eq!(Tries::new(&rules).again(&rules, Outcome::NotSent, true, 7), Some(Duration::ZERO));
    }
}
