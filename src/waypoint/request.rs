//! The life of one request.

use std::cell::Cell;
use std::convert::Infallible;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::rc::Rc;
use std::time::Instant;

use bytes::Bytes;
use futures_util::FutureExt;
use http::header::{CONNECTION, EXPECT, HOST, HeaderValue, UPGRADE};
use http::request::Parts;
use http::{Request, Response, StatusCode, response};
use hyper::body::{Body, Incoming};
use hyper::upgrade::OnUpgrade;
use tokio::time::Sleep;

use super::answer::Refusal;
use super::body::{AnswerBody, RequestBody, Trail, grpc_status, sleep_to};
use super::client::Version;
use super::forward::{Answered, Manner};
use super::gate::{Gate, Held, Leave};
use super::head::{self, Upgrade};
use super::place::{Permit, View};
use super::plan::{Plan, Telling, stick_to_backend};
use super::record::describe;
use super::room::Want;
use super::session::Session;
use super::tee::Tee;
use super::tries::{Errand, Limits, send};
use super::upgrade::{Tunnel, carry_streams};
use super::upstream::Lease;
use super::{authorize, mirror};
use crate::proxy::with_random;
use crate::route::{self, Because, Decision, Forward, RouteRef, is_grpc};
use crate::telemetry::{RequestTelemetry, Verdict};
use crate::transport::unsent::Unsent;

/// Answers one request of a client, whatever becomes of it.
pub async fn answer(session: Rc<Session>, mut request: Request<Incoming>) -> Result<Response<AnswerBody>, Infallible> {
    let place = session.place.count_request();
    let upgraded = (request.version() == http::Version::HTTP_2).then(|| hyper::upgrade::on(&mut request));
    let (mut head, body) = request.into_parts();
    let asks_upgrade = head.headers.contains_key(UPGRADE);
    let share = session.place.room().take(Want::Head, head::size(&head));
    let asked = Asked {
        is_grpc: is_grpc(&head),
        version: if head.version == http::Version::HTTP_2 { Version::Http2 } else { Version::Http1 },
        sent: Rc::default(),
        crowd: match &share {
            _ if place.count > MOST_OF_POD => Some("the pod has as many requests under way as it may"),
            None => Some("the pod's requests hold as many bytes as they may"),
            Some(_) => None,
        },
    };
    let telemetry = session.place.telemetry();
    let info = describe(&session, &head, asked.is_grpc, asked.version);
    let span = telemetry.traces().begin(info.connection.direction.into(), &mut head.headers);
    let mut record = telemetry.request(info);
    if let Some(span) = span {
        record.traced(span);
    }
    let (mut head, from) = match survived(exchange(&session, &asked, &mut record, head, body)).await {
        Ok(given) => given,
        Err(NotSent::Refused(refusal)) => {
            record.amend(|info| {
                if let Some(policy) = refusal.denial() {
                    (info.verdict, info.policy) = (Some(Verdict::Deny), policy.cloned());
                }
                info.reason = Some(refusal.reason.clone());
                info.detail = refusal.detail.clone();
            });
            (refusal.head(asked.is_grpc), Given::Here(refusal.body(asked.is_grpc)))
        }
        Err(NotSent::Answered(answer)) => {
            record.amend(|info| {
                info.route = answer.route.as_ref().map(|route| route.name.clone());
                info.detail = answer.because.message().to_owned();
            });
            (answer.into_head(), Given::Here(Bytes::new()))
        }
    };
    let status = head.status;
    record.amend(|info| {
        info.status = status.as_u16();
        info.grpc_status = grpc_status(&head.headers);
    });
    let is_last = session.is_retired() || matches!(&from, Given::Application(_, Rest { held: Some(_), .. }));
    if is_last && asked.version == Version::Http1 && status != StatusCode::SWITCHING_PROTOCOLS {
        head.headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
    if asks_upgrade
        && status != StatusCode::SWITCHING_PROTOCOLS
        && let Some(check) = &session.check
    {
        check.stayed();
    }
    if let Some(check) = &session.check {
        check.interim.end().await;
    }
    let mut trail = Trail::new(record, asked.sent, place, share);
    let body = match from {
        Given::Here(words) => AnswerBody::of_words(words, trail),
        Given::Application(body, Rest { lease, held, telling, until }) => {
            (trail.lease, trail.held, trail.telling, trail.deadline) = (Some(lease), held, telling, until);
            let unsent = (asked.version == Version::Http2).then(|| Unsent::new(session.place.room().clone()));
            AnswerBody::of_application(body, trail, unsent)
        }
        Given::Upgraded(handed, lease) => {
            trail.lease = Some(lease);
            session.tunnel.replace(Some(Tunnel { handed, trail }));
            AnswerBody::silent()
        }
        Given::Streams(application, lease) => {
            trail.lease = Some(lease);
            if let Some(client) = upgraded {
                tokio::task::spawn_local(carry_streams(client, application, trail));
            }
            AnswerBody::silent()
        }
    };
    Ok(Response::from_parts(head, body))
}

/// A defect of ours costs the one request that it befalls.
async fn survived<T>(exchange: impl Future<Output = Result<T, NotSent>>) -> Result<T, NotSent> {
    // On the heap: what is large is made where it stays, and not moved from one future into the next.
    let outcome = AssertUnwindSafe(Box::pin(exchange)).catch_unwind().await;
    outcome.unwrap_or_else(|_| Err(Refusal::internal("serving it panicked").into()))
}

/// What is known of a request from its head.
struct Asked {
    is_grpc: bool,
    version: Version,
    sent: Rc<Cell<u64>>,
    /// Why there is no room for it among those of its pod.
    crowd: Option<&'static str>,
}

/// Where an answer's body comes from.
enum Given {
    Here(Bytes),
    Application(Incoming, Rest),
    Upgraded(tokio::sync::oneshot::Receiver<super::upstream::Handed>, Lease),
    Streams(OnUpgrade, Lease),
}

/// What ends with an application's answer.
struct Rest {
    lease: Lease,
    /// What is left of the request, where the application wants none of it.
    held: Option<Held>,
    telling: Option<Box<Telling>>,
    /// When its time is up.
    until: Option<Pin<Box<Sleep>>>,
}

/// Why no application answers.
enum NotSent {
    Refused(Refusal),
    /// A route says so.
    Answered(Box<route::Answer>),
}

impl From<Refusal> for NotSent {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

async fn exchange(
    session: &Session,
    asked: &Asked,
    record: &mut RequestTelemetry,
    mut head: Parts,
    body: Incoming,
) -> Result<(response::Parts, Given), NotSent> {
    if let Some(crowd) = asked.crowd {
        return Err(Refusal::too_many(crowd).into());
    }
    let upgrade =
        head::take_in(&mut head).map_err(|violation| Refusal::malformed(violation.status(), violation.to_string()))?;
    // A client of HTTP/1.0 need not say one, and an application of HTTP/1.1 must be told.
    if !head.headers.contains_key(HOST)
        && let Ok(dialled) = HeaderValue::try_from(session.place.dialled().to_string())
    {
        head.headers.insert(HOST, dialled);
    }
    let Some(view) = session.view() else {
        return Err(Refusal::no_endpoint("what was dialled has gone").into());
    };
    let ask = Ask { session, asked, view: &view, upgrade: upgrade.as_ref(), started: record.started() };
    let routes = view.routes.clone();
    let decision = routes.as_ref().map(|routes| routes.decide(&head, with_random(rand::Rng::next_u64)));
    let forward = match decision {
        None => None,
        Some(Decision::Answer(answer)) => return Err(NotSent::Answered(Box::new(answer))),
        Some(Decision::Forward(mut forward)) => {
            stick_to_backend(session, &mut forward, &head.headers);
            let RouteRef { name, .. } = forward.route();
            record.amend(|info| info.route = Some(name));
            Some(forward)
        }
    };
    ask.forward(forward.as_ref(), record, head, body).await
}

/// A request that goes on.
struct Ask<'a> {
    session: &'a Session,
    asked: &'a Asked,
    view: &'a View,
    upgrade: Option<&'a Upgrade>,
    started: Instant,
}

impl Ask<'_> {
    async fn forward(
        &self,
        forward: Option<&Forward<'_>>,
        record: &mut RequestTelemetry,
        mut head: Parts,
        body: Incoming,
    ) -> Result<(response::Parts, Given), NotSent> {
        let target = forward.map_or(route::Target::Parent, Forward::target);
        let Some(to) = self.session.receiver(self.view, target) else {
            let missing = forward.map(|forward| NotSent::Answered(Box::new(forward.answer(Because::NoBackend))));
            return Err(missing.unwrap_or_else(|| Refusal::no_endpoint("what was dialled has gone").into()));
        };
        if let Some(service) = to.service() {
            record.amend(|info| info.service = Some(service.clone()));
        }
        let mut body = RequestBody::of_client(body, self.asked.sent.clone());
        let mut allowed = Vec::new();
        for authorizer in forward.into_iter().flat_map(Forward::authorizers) {
            // On the heap: few requests are asked about.
            let one = Box::pin(authorize::ask(&self.session.place, authorizer, None, &head, &mut body)).await?;
            one.edit(&mut head);
            allowed.push(one);
        }
        if let Some(forward) = forward {
            forward.edit_request(&mut head);
        }
        let plan = Plan::of(self.session, forward, &to, &head);
        let limits = Limits::of(plan.in_force(), &head, self.started);
        plan.limit(self.session, &head)?;
        plan.befall(&head, self.asked.is_grpc, limits.request()).await?;
        let tee = self.tee(forward, &plan, &head);
        let manner = Manner::of(self.asked.version, self.asked.is_grpc, self.upgrade, to.protocol());
        let gate = self.gate(&mut head, &body, manner.version);
        let leave = gate.as_ref().map(Gate::leave);
        body.attach(tee.clone(), gate);
        let errand = Errand { place: &self.session.place, to: &to, plan: &plan, limits: &limits, manner };
        let answered = Box::pin(send(errand, head, body, tee.as_deref())).await?;
        let Answered { response, lease, permit, telling } = answered;
        record.amend(|info| {
            if let Some(Permit { policy, .. }) = permit {
                (info.verdict, info.policy) = (Some(Verdict::Allow), policy);
            }
            info.connection = lease.info().clone();
            if let Some(service) = &info.connection.service {
                info.service = Some(service.clone());
            }
        });
        let held = leave.and_then(|leave| leave.answered(response.status()));
        let until = limits.until().map(sleep_to);
        let (mut head, given) = self.take_back(forward, &plan, response, Rest { lease, held, telling, until })?;
        allowed.iter().for_each(|one| one.edit_answer(&mut head.headers));
        Ok((head, given))
    }

    fn take_back(
        &self,
        forward: Option<&Forward<'_>>,
        plan: &Plan,
        mut response: Response<Incoming>,
        mut rest: Rest,
    ) -> Result<(response::Parts, Given), NotSent> {
        let streams = matches!(self.upgrade, Some(Upgrade::Http2)) && response.status().is_success();
        let streams = streams.then(|| hyper::upgrade::on(&mut response));
        let (mut head, body) = response.into_parts();
        head.extensions.clear();
        head::take_back(&mut head.headers, head.status);
        if let Some(forward) = forward {
            forward.edit_response(&mut head);
        }
        plan.mark(&mut head);
        let switches = head.status == StatusCode::SWITCHING_PROTOCOLS;
        let given = match streams {
            Some(streams) => Given::Streams(streams, rest.lease),
            None if switches => {
                let handed = rest.lease.handed().ok_or_else(|| Refusal::broken("101, which nobody had asked for"))?;
                Given::Upgraded(handed, rest.lease)
            }
            None => Given::Application(body, rest),
        };
        Ok((head, given))
    }

    /// Keeps the body for mirrors and other tries, and begins the mirrors.
    fn tee(&self, forward: Option<&Forward<'_>>, plan: &Plan, head: &Parts) -> Option<Rc<Tee>> {
        if self.upgrade.is_some() {
            return None;
        }
        let mut tee = plan.in_force().retry.as_ref().map(|_| Tee::new(self.session.place.room()));
        for backend in forward.into_iter().flat_map(Forward::mirrors) {
            let tee = tee.get_or_insert_with(|| Tee::new(self.session.place.room()));
            let to = self.session.backend(backend);
            let port = to.as_ref().and_then(|to| to.protocol());
            let manner = Manner::of(self.asked.version, self.asked.is_grpc, None, port);
            let mut head = head.clone();
            head.headers.remove(EXPECT);
            mirror::copy(self.session.place.clone(), to, manner, head, tee.clone());
        }
        tee
    }

    /// Hears what an application of HTTP/1 says ahead of its answer: whether it wants the body, and what its client is to be
    /// told. HTTP/2 has the same, but hyper neither tells of it nor says it.
    fn gate(&self, head: &mut Parts, body: &RequestBody, version: Version) -> Option<Gate> {
        if version == Version::Http2 {
            head.headers.remove(EXPECT);
            return None;
        }
        let gate = (!body.is_end_stream()).then(|| {
            let expects = head.headers.get(EXPECT).map(HeaderValue::as_bytes);
            Gate::new(expects.is_some_and(|value| value.eq_ignore_ascii_case(b"100-continue")))
        });
        // RFC 9110, section 15.2: a client of HTTP/1.0 is never told.
        let check = self.session.check.as_ref().filter(|_| head.version == http::Version::HTTP_11);
        let interim = check.map(|check| (check.interim.clone(), check.interim.begin()));
        let leave = gate.as_ref().map(Gate::leave);
        if interim.is_some() || leave.is_some() {
            let mut request = Request::from_parts(std::mem::replace(head, Request::new(()).into_parts().0), ());
            hyper::ext::on_informational(&mut request, move |answer| match answer.status() {
                // The client is told as its body is asked for.
                StatusCode::CONTINUE => leave.iter().for_each(Leave::give),
                status => {
                    let Some((interim, turn)) = &interim else { return };
                    let mut headers = answer.headers().clone();
                    head::take_back(&mut headers, status);
                    interim.say(*turn, status, &headers);
                }
            });
            *head = request.into_parts().0;
        }
        gate
    }
}

/// Requests of one pod under way at once.
const MOST_OF_POD: usize = 16_384;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_costs_one_request() {
        let outcome: Result<(), _> = survived(async { panic!("a defect") }).await;
        let Err(NotSent::Refused(refusal)) = outcome else { panic!("it was taken for an answer") };
        let head = refusal.head(false);
        assert_eq!(head.status, StatusCode::INTERNAL_SERVER_ERROR);
        assert_eq!(head.headers["selvedge-reason"], "internal");
        // The next one of the same connection is none the worse.
        assert!(survived(async { Ok(()) }).await.is_ok());
    }
}
