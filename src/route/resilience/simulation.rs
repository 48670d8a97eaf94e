//! All of them together, on a clock of its own: many requests to a few endpoints that fail now and then, or always.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

use http::StatusCode;
use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};

use super::{Breaker, Budget, BudgetRules, Limits, Outcome, OutlierRules, Outliers, RetryRules, Tries};

const ENDPOINTS: u8 = 5;
/// It always fails.
const BROKEN: u8 = 4;

struct World {
    random: StdRng,
    now: Instant,
    began: Instant,
    events: BinaryHeap<Reverse<(Instant, u64)>>,
    requests: Vec<Request>,
    breaker: Breaker,
    budget: Budget,
    outliers: Outliers<u8>,
    under_way: u32,
    /// When requests were sent for the first time, and again.
    first: Vec<Instant>,
    again: Vec<Instant>,
    /// To the one that always fails, and to all, in the second half.
    to_broken: usize,
    to_all: usize,
    refused: usize,
    answered: usize,
}

struct Request {
    tries: Tries,
    /// None: it waits for its turn.
    at: Option<u8>,
    is_begun: bool,
}

const RETRY: fn() -> RetryRules = || RetryRules {
    attempts: 3,
    codes: vec![StatusCode::SERVICE_UNAVAILABLE],
    grpc_codes: Vec::new(),
    backoff: Duration::from_millis(20),
    unanswered: true,
};
const LIMITS: Limits = Limits { connections: None, pending: None, requests: Some(40) };
const BUDGET: BudgetRules =
    BudgetRules { percent: 20, interval: Duration::from_secs(5), free: 2, free_interval: Duration::from_secs(1) };
const OUTLIERS: OutlierRules = OutlierRules {
    consecutive_errors: 5,
    interval: Duration::from_secs(5),
    base_ejection: Duration::from_secs(10),
    max_ejected_percent: 40,
    success_rate_deviation: 1900,
    least_requests: 20,
};
const LENGTH: Duration = Duration::from_secs(60);

impl World {
    fn run(seed: u64) -> Self {
        let began = Instant::now();
        let mut world = Self {
            random: StdRng::seed_from_u64(seed),
            now: began,
            began,
            events: BinaryHeap::new(),
            requests: Vec::new(),
            breaker: Breaker::default(),
            budget: Budget::default(),
            outliers: Outliers::default(),
            under_way: 0,
            first: Vec::new(),
            again: Vec::new(),
            to_broken: 0,
            to_all: 0,
            refused: 0,
            answered: 0,
        };
        let mut at = began;
        while at < began + LENGTH {
            let number = world.requests.len() as u64;
            world.requests.push(Request { tries: Tries::new(&RETRY()), at: None, is_begun: false });
            world.events.push(Reverse((at, number)));
            at += Duration::from_micros(world.random.random_range(100..10_000));
        }
        while let Some(Reverse((at, number))) = world.events.pop() {
            world.now = at;
            match world.requests[number as usize].at {
                None => world.send(number),
                Some(endpoint) => world.answer(number, endpoint),
            }
        }
        world
    }

    fn send(&mut self, number: u64) {
        if self.breaker.begin(&LIMITS).is_err() {
            self.refused += 1;
            return;
        }
        self.under_way += 1;
        assert!(self.under_way <= 40, "the breaker lets too much through");
        let request = &mut self.requests[number as usize];
        if !std::mem::replace(&mut request.is_begun, true) {
            self.budget.request(&BUDGET, self.now);
            self.first.push(self.now);
        }
        let usable: Vec<u8> = (0..ENDPOINTS).filter(|one| !self.outliers.is_ejected(one, self.now)).collect();
        assert!(!usable.is_empty(), "nobody is left");
        let endpoint = usable[self.random.random_range(0..usable.len())];
        if self.now > self.began + LENGTH / 2 {
            self.to_all += 1;
            self.to_broken += usize::from(endpoint == BROKEN);
        }
        request.at = Some(endpoint);
        let takes = Duration::from_millis(self.random.random_range(1..100));
        self.events.push(Reverse((self.now + takes, number)));
    }

    fn answer(&mut self, number: u64, endpoint: u8) {
        self.breaker.end();
        self.under_way -= 1;
        let fails = endpoint == BROKEN || self.random.random_range(0..100) < 5;
        self.outliers.tell(&OUTLIERS, &endpoint, !fails, ENDPOINTS.into(), self.now);
        let outcome = match self.random.random_range(0..3) {
            _ if !fails => Outcome::Answered(StatusCode::OK),
            0 => Outcome::Unanswered,
            1 => Outcome::NotSent,
            _ => Outcome::Answered(StatusCode::SERVICE_UNAVAILABLE),
        };
        let request = &mut self.requests[number as usize];
        request.at = None;
        let pause = request.tries.again(&RETRY(), outcome, true, self.random.next_u64());
        match pause.filter(|_| self.budget.repeat(&BUDGET, self.now)) {
            Some(pause) => {
                self.again.push(self.now);
                self.events.push(Reverse((self.now + pause, number)));
            }
            None => self.answered += 1,
        }
    }
}

#[test]
fn whatever_fails_what_is_sent_stays_within_bounds_and_the_broken_one_is_left_out() {
    let seed: u64 = match std::env::var("SELVEDGE_SEED") {
        Ok(text) => text.parse().unwrap(),
        Err(_) => rand::random(),
    };
    println!("SELVEDGE_SEED={seed}");
    for round in 0..20 {
        let world = World::run(seed.wrapping_add(round));
        assert!(world.breaker.is_idle(), "something was never given back");
        assert_eq!(world.answered + world.refused, world.requests.len(), "every request comes to an end");
        // In any ten seconds, a fifth of all, and what is free.
        for (at, begins) in world.again.iter().enumerate() {
            let within = |times: &[Instant], length| {
                times.iter().filter(|time| **time >= *begins && **time - *begins <= length).count()
            };
            let repeated = within(&world.again[at..], Duration::from_secs(10));
            let before = world.first.iter().filter(|time| {
                **time <= *begins + Duration::from_secs(10) && **time + Duration::from_secs(6) >= *begins
            });
            let all = before.count() + repeated;
            assert!(repeated * 100 <= all * 20 + 100 * 2 * 12, "{repeated} of {all} were repetitions, round {round}");
        }
        let share = world.to_broken as f64 / world.to_all as f64;
        assert!(share < 0.02, "{share} of all went to the one that always fails, round {round}");
    }
}
