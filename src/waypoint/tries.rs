//! A request on its way to an endpoint, and to another one, or once more, where that is worth it.

use std::cell::Cell;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::time::{Duration, Instant};

use http::request::Parts;
use http::{HeaderMap, StatusCode};
use hyper::Request;
use hyper::body::Body;
use tokio::time::timeout_at;

use super::RETRIED;
use super::answer::Refusal;
use super::body::{RequestBody, grpc_status};
use super::client::Version;
use super::forward::{Answered, Failed, Manner, Way};
use super::head;
use super::place::{Place, Receiver};
use super::plan::{Plan, Telling};
use super::tee::{Kept, Tee};
use crate::proxy::with_random;
use crate::route::is_grpc;
use crate::route::resilience::{Outcome, RetryRules, Tries};
use crate::route::traffic::InForce;

/// Where a request is sent from and to, and how.
#[derive(Clone, Copy)]
pub struct Errand<'a> {
    pub place: &'a Rc<dyn Place>,
    pub to: &'a Receiver,
    pub plan: &'a Plan,
    pub limits: &'a Limits,
    pub manner: Manner<'a>,
}

/// Sends a request, as often as its policies say, and waits for the head of an answer. `tee` keeps its body for other tries.
pub async fn send(
    errand: Errand<'_>,
    mut head: Parts,
    body: RequestBody,
    tee: Option<&Tee>,
) -> Result<Answered, Refusal> {
    let Errand { plan, limits, manner, .. } = errand;
    head::send_as(&mut head, manner.http(), manner.upgrade);
    // An upgrade is begun once: what came of it nobody here can tell.
    let is_upgrade = manner.upgrade.is_some();
    let rules = if is_upgrade { RetryRules::default() } else { plan.retry() };
    let mut tries = Tries::new(&rules);
    plan.count();
    let is_empty = body.is_end_stream();
    // Once it is on its way a request of HTTP/2 is gone, and one that was answered is too.
    let is_kept = !is_upgrade && (tee.is_some() || manner.version == Version::Http2 && is_empty);
    let spare = is_kept.then(|| head.clone());
    let whole = || if is_empty { Some(Kept::default()) } else { tee.and_then(Tee::whole) };
    let mut way = Way::new(errand);
    let mut request = Request::from_parts(head, body);
    loop {
        let began = Instant::now();
        let tried = {
            // Made where it stays: it is large, and there is one for each request.
            let trying = pin!(way.once(request));
            limits.bounded(trying).await
        };
        let (outcome, showing) = judge(&tried);
        let mut telling = None;
        match (way.endpoint(), showing) {
            (Some(endpoint), Showing::Known(is_success)) => plan.tell(endpoint, is_success, began.elapsed()),
            (Some(endpoint), Showing::InTrailers) => telling = plan.telling(endpoint, began.elapsed()),
            _ => {}
        }
        let again = match &tried {
            Ok(_) | Err(Failed { request: None, .. }) => spare.as_ref().and_then(|head| Some((head.clone(), whole()?))),
            Err(_) => None,
        };
        let has_body = again.is_some() || matches!(&tried, Err(Failed { request: Some(_), .. }));
        let pause =
            outcome.and_then(|outcome| tries.again(&rules, outcome, has_body, with_random(rand::Rng::next_u64)));
        let Some(pause) = pause.filter(|pause| !limits.is_over_after(*pause)) else {
            return concluded(tried, telling);
        };
        if !way.has_more(plan.in_force().retry.is_some()) {
            return concluded(tried, telling);
        }
        if !plan.may_repeat() {
            metrics::counter!(super::WITHHELD).increment(1);
            let last = match tried {
                Ok(answered) => format!("the last one was answered with {}", answered.response.status()),
                Err(failed) => failed.refusal.detail,
            };
            return Err(Refusal::budget(&last));
        }
        metrics::counter!(RETRIED, "why" => why(outcome)).increment(1);
        request = match (tried, again) {
            (Err(Failed { request: Some(request), .. }), _) => *request,
            (tried, Some((head, kept))) => {
                // What came of the last try is of no more use.
                drop(tried);
                Request::from_parts(head, RequestBody::kept(kept))
            }
            (tried, None) => return concluded(tried, telling),
        };
        if !pause.is_zero() {
            tokio::time::sleep(pause).await;
        }
    }
}

fn concluded(tried: Result<Answered, Failed>, telling: Option<Box<Telling>>) -> Result<Answered, Refusal> {
    tried.map(|answered| Answered { telling, ..answered }).map_err(Failed::into)
}

/// Whether an endpoint did well.
enum Showing {
    Known(bool),
    /// The end of its answer says so.
    InTrailers,
    /// What came of the try was not its doing.
    Nothing,
}

/// What came of a try: whether it may be worth another, and whether the endpoint did well.
fn judge(tried: &Result<Answered, Failed>) -> (Option<Outcome>, Showing) {
    match tried {
        Ok(answered) => {
            let (status, headers) = (answered.response.status(), answered.response.headers());
            if status == StatusCode::SWITCHING_PROTOCOLS {
                return (None, Showing::Known(true));
            }
            match grpc_status(headers).filter(|_| is_grpc_answer(headers)) {
                Some(code) => (Some(Outcome::GrpcAnswered(code)), Showing::Known(!is_grpc_failure(code))),
                None if is_grpc_answer(headers) && status.is_success() => {
                    (Some(Outcome::Answered(status)), Showing::InTrailers)
                }
                None => (Some(Outcome::Answered(status)), Showing::Known(!status.is_server_error())),
            }
        }
        // The client's doing, or policy's, says nothing of the endpoint.
        Err(failed) => (failed.outcome, failed.outcome.map_or(Showing::Nothing, |_| Showing::Known(false))),
    }
}

/// UNKNOWN, DEADLINE_EXCEEDED, INTERNAL, UNAVAILABLE, DATA_LOSS: what HTTP has from 500 on for.
pub fn is_grpc_failure(code: u16) -> bool {
    matches!(code, 2 | 4 | 13..=15)
}

fn is_grpc_answer(headers: &HeaderMap) -> bool {
    headers.get("content-type").is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

fn why(outcome: Option<Outcome>) -> &'static str {
    match outcome {
        Some(Outcome::NotSent) | None => "unsent",
        Some(Outcome::Unanswered) => "unanswered",
        Some(Outcome::Answered(_)) => "status",
        Some(Outcome::GrpcAnswered(_)) => "grpc-status",
    }
}

/// When a request's time is up.
#[derive(Default)]
pub struct Limits {
    /// All of it, from its head to the last byte of the answer.
    request: Option<Instant>,
    /// One try of it.
    of_try: Option<Duration>,
    try_until: Cell<Option<Instant>>,
}

impl Limits {
    pub fn of(in_force: &InForce, head: &Parts, started: Instant) -> Self {
        let timeouts = in_force.timeouts();
        let request = [timeouts.request, grpc_timeout(head)].into_iter().flatten().min();
        Self {
            request: request.map(|time| started + time),
            of_try: timeouts.backend_request,
            try_until: Cell::default(),
        }
    }

    /// When all of it must be over.
    pub fn request(&self) -> Option<Instant> {
        self.request
    }

    /// When the answer of the last try must be there to its last byte.
    pub fn until(&self) -> Option<Instant> {
        self.try_until.get()
    }

    /// One try, within its time.
    async fn bounded(
        &self,
        trying: Pin<&mut impl Future<Output = Result<Answered, Failed>>>,
    ) -> Result<Answered, Failed> {
        let until = self.of_try.map(|time| Instant::now() + time).into_iter().chain(self.request).min();
        self.try_until.set(until);
        let Some(until) = until else { return trying.await };
        let outcome = timeout_at(until.into(), trying).await;
        outcome.unwrap_or_else(|_| {
            let refusal = Refusal::timeout("no answer within the time-out that its route or a policy says");
            Err(Failed { outcome: Some(Outcome::Unanswered), refusal, request: None })
        })
    }

    fn is_over_after(&self, pause: Duration) -> bool {
        self.request.is_some_and(|until| until <= Instant::now() + pause)
    }
}

/// The client's own limit: digits and a unit, as [gRPC over HTTP/2](
/// https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md) has it.
fn grpc_timeout(head: &Parts) -> Option<Duration> {
    let text = head.headers.get("grpc-timeout").filter(|_| is_grpc(head))?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let amount: u64 = digits.parse().ok().filter(|_| digits.len() <= 8)?;
    Some(match unit {
        "H" => Duration::from_secs(amount * 3600),
        "M" => Duration::from_secs(amount * 60),
        "S" => Duration::from_secs(amount),
        "m" => Duration::from_millis(amount),
        "u" => Duration::from_micros(amount),
        "n" => Duration::from_nanos(amount),
        _ => return None,
    })
}

impl From<Failed> for Refusal {
    fn from(failed: Failed) -> Self {
        failed.refusal
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What it is moved about in until it is answered, with all that may come between.
    #[test]
    fn a_request_on_its_way_takes_little_room() {
        fn size<F>(_: impl FnOnce(Errand<'static>, Parts, RequestBody, Option<&'static Tee>) -> F) -> usize {
            size_of::<F>()
        }
        let size = size(send);
        assert!(size <= MOST_ROOM, "{size} bytes: what is rare belongs on the heap");
    }

    const MOST_ROOM: usize = 7 * 1024;
}
