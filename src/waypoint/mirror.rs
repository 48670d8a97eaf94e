//! Copies of requests, which nobody waits for.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use http::request::Parts;
use http_body_util::BodyExt;

use super::MIRRORED;
use super::body::RequestBody;
use super::forward::Manner;
use super::place::{Place, Receiver};
use super::plan::Plan;
use super::tee::{State, Tee};
use super::tries::{Errand, Limits, send};

/// Sends a copy once the whole body is here, under the identity of the client. What is oversize, slow or too much is
/// dropped and counted; a part of a request is never sent.
pub fn copy(place: Rc<dyn Place>, to: Option<Receiver>, manner: Manner<'static>, head: Parts, tee: Rc<Tee>) {
    let Some(turn) = Turn::take() else { return count("busy") };
    tokio::task::spawn_local(async move {
        let copying = tokio::time::timeout(MOST_TIME, copy_now(&place, to, manner, head, &tee));
        count(copying.await.unwrap_or("failed"));
        drop(turn);
    });
}

async fn copy_now(
    place: &Rc<dyn Place>,
    to: Option<Receiver>,
    manner: Manner<'static>,
    head: Parts,
    tee: &Tee,
) -> &'static str {
    let kept = match tee.settled().await {
        State::Whole => tee.whole(),
        State::Oversize => return "oversize",
        State::Crowded => return "crowded",
        State::Passing | State::Broken => return "unfinished",
    };
    let (Some(kept), Some(to)) = (kept, to) else { return "failed" };
    let (plan, limits) = (Plan::default(), Limits::default());
    let errand = Errand { place, to: &to, plan: &plan, limits: &limits, manner };
    let Ok(answered) = send(errand, head, RequestBody::kept(kept), None).await else { return "failed" };
    // The answer is nobody's; read to its end, its connection takes the next.
    let mut body = answered.response.into_body();
    while let Some(frame) = body.frame().await {
        if frame.is_err() {
            return "sent";
        }
    }
    answered.lease.give_back();
    "sent"
}

fn count(outcome: &'static str) {
    metrics::counter!(MIRRORED, "outcome" => outcome).increment(1);
}

/// One of the copies of this thread.
struct Turn;

impl Turn {
    fn take() -> Option<Self> {
        UNDER_WAY.with(|count| {
            (count.get() < MOST).then(|| {
                count.set(count.get() + 1);
                Self
            })
        })
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        UNDER_WAY.with(|count| count.set(count.get() - 1));
    }
}

thread_local! {
    static UNDER_WAY: Cell<usize> = const { Cell::new(0) };
}

/// Copies of one thread at once: with the largest bodies, 16 MiB.
const MOST: usize = 256;
const MOST_TIME: Duration = Duration::from_secs(15);
