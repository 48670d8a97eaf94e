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
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use tokio::time::Sleep;

use super::answer::Refusal;
use super::body::{AnswerBody, Gate, RequestBody, Trail, grpc_status, sleep_to};
use super::client::Version;
use super::forward::{Answered, Manner};
use super::head::{self, Upgrade};
use super::place::{Permit, View};
use super::plan::{Plan, stick_to_backend};
use super::session::Session;
use super::tee::Tee;
use super::tries::{Errand, Limits, send};
use super::upgrade::{Tunnel, carry_streams};
use super::upstream::Lease;
use super::wire::Violation;
use super::{authorize, mirror};
use crate::mesh::Reason;
use crate::proxy::with_random;
use crate::route::{self, Because, Decision, Forward, RouteRef, is_grpc};
use crate::telemetry::{ConnectionInfo, RequestInfo, RequestProtocol, RequestTelemetry, Verdict};

/// Answers one request of a client, whatever becomes of it.
pub async fn answer(session: Rc<Session>, mut request: Request<Incoming>) -> Result<Response<AnswerBody>, Infallible> {
    let place = session.place.count_request();
    let upgraded = (request.version() == http::Version::HTTP_2).then(|| hyper::upgrade::on(&mut request));
    let (mut head, body) = request.into_parts();
    let asks_upgrade = head.headers.contains_key(UPGRADE);
    let asked = Asked {
        is_grpc: is_grpc(&head),
        version: if head.version == http::Version::HTTP_2 { Version::Http2 } else { Version::Http1 },
        sent: Rc::default(),
        is_alone: place.count <= MOST_OF_POD,
    };
    let telemetry = session.place.telemetry();
    let info = describe(&session, &head, &asked);
    let span = telemetry.traces().begin(info.connection.direction.into(), &mut head.headers);
    let mut record = telemetry.request(info);
    if let Some(span) = span {
        record.traced(span);
    }
    // On the heap: what is large is made where it stays, and not moved from one future into the next.
    let exchange = Box::pin(exchange(&session, &asked, &mut record, head, body));
    let outcome = AssertUnwindSafe(exchange).catch_unwind().await;
    let outcome = outcome.unwrap_or_else(|_| Err(Refusal::internal("serving it panicked").into()));
    let (mut head, from) = match outcome {
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
    if session.is_retired() && asked.version == Version::Http1 && status != StatusCode::SWITCHING_PROTOCOLS {
        head.headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
    if asks_upgrade
        && status != StatusCode::SWITCHING_PROTOCOLS
        && let Some(check) = &session.check
    {
        check.stayed();
    }
    let trail = |lease, deadline| Trail { record, sent: asked.sent, received: 0, deadline, lease, _place: place };
    let body = match from {
        Given::Here(words) => AnswerBody::of_words(words, trail(None, None)),
        Given::Application { body, lease, deadline } => AnswerBody::of_application(body, trail(Some(lease), deadline)),
        Given::Upgraded(handed, lease) => {
            let trail = trail(Some(lease), None);
            session.tunnel.replace(Some(Tunnel { handed, trail }));
            AnswerBody::silent()
        }
        Given::Streams(application, lease) => {
            let trail = trail(Some(lease), None);
            if let Some(client) = upgraded {
                tokio::task::spawn_local(carry_streams(client, application, trail));
            }
            AnswerBody::silent()
        }
    };
    Ok(Response::from_parts(head, body))
}

/// What is known of a request from its head.
struct Asked {
    is_grpc: bool,
    version: Version,
    sent: Rc<Cell<u64>>,
    /// Whether there is room for it among those of its pod.
    is_alone: bool,
}

/// Where an answer's body comes from.
enum Given {
    Here(Bytes),
    Application { body: Incoming, lease: Lease, deadline: Option<Pin<Box<Sleep>>> },
    Upgraded(tokio::sync::oneshot::Receiver<super::upstream::Handed>, Lease),
    Streams(OnUpgrade, Lease),
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
    if !asked.is_alone {
        return Err(Refusal::too_many("the pod has as many requests under way as it may").into());
    }
    let upgrade = head::take_in(&mut head).map_err(|(status, text)| Refusal::malformed(status, text))?;
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
    match decision {
        None => ask.forward(None, record, head, body).await,
        Some(Decision::Answer(answer)) => Err(NotSent::Answered(Box::new(answer))),
        Some(Decision::Forward(mut forward)) => {
            stick_to_backend(session, &mut forward, &head.headers);
            let RouteRef { name, .. } = forward.route();
            record.amend(|info| info.route = Some(name));
            ask.forward(Some(&forward), record, head, body).await
        }
    }
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
            record.amend(|info| info.connection.service = Some(service.clone()));
        }
        let mut body = RequestBody::of_client(body, self.asked.sent.clone());
        let mut allowed = Vec::new();
        for authorizer in forward.into_iter().flat_map(Forward::authorizers) {
            let one = authorize::ask(&self.session.place, authorizer, &head, &mut body).await?;
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
        let gate = gate(&mut head, manner.version);
        body.attach(tee.clone(), gate);
        let errand = Errand { place: &self.session.place, to: &to, plan: &plan, limits: &limits, manner };
        let Answered { response, lease, permit } = Box::pin(send(errand, head, body, tee.as_deref())).await?;
        record.amend(|info| {
            if let Some(Permit { policy, .. }) = permit {
                (info.verdict, info.policy) = (Some(Verdict::Allow), policy);
            }
            let service = info.connection.service.take();
            info.connection = ConnectionInfo { requested: info.connection.requested, ..lease.info().clone() };
            info.connection.service = info.connection.service.take().or(service);
        });
        let (mut head, given) = self.take_back(forward, &plan, response, lease, &limits)?;
        allowed.iter().for_each(|one| one.edit_answer(&mut head.headers));
        Ok((head, given))
    }

    fn take_back(
        &self,
        forward: Option<&Forward<'_>>,
        plan: &Plan,
        mut response: Response<Incoming>,
        mut lease: Lease,
        limits: &Limits,
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
            Some(streams) => Given::Streams(streams, lease),
            None if switches => {
                let handed = lease.handed().ok_or_else(|| Refusal::broken("101, which nobody had asked for"))?;
                Given::Upgraded(handed, lease)
            }
            None => Given::Application { body, lease, deadline: limits.until().map(sleep_to) },
        };
        Ok((head, given))
    }

    /// Keeps the body for mirrors and other tries, and begins the mirrors.
    fn tee(&self, forward: Option<&Forward<'_>>, plan: &Plan, head: &Parts) -> Option<Rc<Tee>> {
        if self.upgrade.is_some() {
            return None;
        }
        let mut tee = plan.in_force().retry.as_ref().map(|_| Tee::new());
        for backend in forward.into_iter().flat_map(Forward::mirrors) {
            let tee = tee.get_or_insert_with(Tee::new);
            let to = self.session.backend(backend);
            let port = to.as_ref().and_then(|to| to.protocol());
            let manner = Manner::of(self.asked.version, self.asked.is_grpc, None, port);
            let mut head = head.clone();
            head.headers.remove(EXPECT);
            mirror::copy(self.session.place.clone(), to, manner, head, tee.clone());
        }
        tee
    }
}

/// Holds back the body of a client that waits for `100 Continue`, until the application says it.
fn gate(head: &mut Parts, version: Version) -> Option<Gate> {
    let expects = head.headers.get(EXPECT).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"));
    if !expects || version == Version::Http2 {
        head.headers.remove(EXPECT);
        return None;
    }
    let (gate, leave) = Gate::new();
    let mut request = Request::from_parts(std::mem::replace(head, Request::new(()).into_parts().0), ());
    hyper::ext::on_informational(&mut request, move |answer| {
        if answer.status() == StatusCode::CONTINUE {
            leave.give();
        }
    });
    *head = request.into_parts().0;
    Some(gate)
}

/// Records a request whose head was refused before anybody had read it.
pub fn refused(session: &Session, violation: Violation) {
    let asked = Asked { is_grpc: false, version: Version::Http1, sent: Rc::default(), is_alone: true };
    let (head, ()) = Request::new(()).into_parts();
    let mut info = describe(session, &head, &asked);
    // Nobody knows what it was meant to be.
    (info.method, info.path) = ("-".to_owned(), "-".to_owned());
    info.status = violation.status().as_u16();
    info.reason = Some(Reason::Protocol);
    info.detail = violation.to_string();
    session.place.telemetry().request(info).ended();
}

fn describe(session: &Session, head: &Parts, asked: &Asked) -> RequestInfo {
    let connection = session.place.describe();
    let service = session.view().and_then(|view| view.to.service().cloned());
    let written = |text: &str| text.chars().take(MOST_WRITTEN).collect();
    let host = head.headers.get(HOST).and_then(|host| host.to_str().ok());
    RequestInfo {
        connection: ConnectionInfo { service: connection.service.or(service), ..connection },
        protocol: match (asked.is_grpc, asked.version) {
            (true, _) => RequestProtocol::Grpc,
            (false, Version::Http1) => RequestProtocol::Http1,
            (false, Version::Http2) => RequestProtocol::Http2,
        },
        method: written(head.method.as_str()),
        host: written(host.or(head.uri.host()).unwrap_or_default()),
        path: written(head.uri.path()),
        route: None,
        status: 0,
        verdict: None,
        policy: None,
        grpc_status: None,
        trace: None,
        reason: None,
        detail: String::new(),
        sent: 0,
        received: 0,
    }
}

/// Requests of one pod under way at once.
const MOST_OF_POD: usize = 16_384;
/// Of a method, host or path in the access log.
const MOST_WRITTEN: usize = 1024;
