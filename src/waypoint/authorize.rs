//! Asking an external authorizer about a request: over the mesh, as anything else the pod sends.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::BytesMut;
use http::request::Parts;
use http_body_util::BodyExt;
use hyper::body::Incoming;

use super::answer::Refusal;
use super::body::{RequestBody, Unread};
use super::client::Version;
use super::forward::{Answered, Manner};
use super::place::{Place, Receiver};
use super::plan::Plan;
use super::tee::Kept;
use super::tries::{Errand, Limits, send};
use crate::authorizer::{Allowed, Authorizer, Check, CheckBody, Peer, Reply, Verdict};
use crate::telemetry::{ConnectionInfo, Party};

/// Asks; comes back with what becomes of the request, or with what its client is told instead. Whatever goes wrong is a no.
/// `endpoint` is where the request goes, where that is known already.
pub async fn ask(
    place: &Rc<dyn Place>,
    authorizer: &Authorizer,
    endpoint: Option<SocketAddr>,
    head: &Parts,
    body: &mut RequestBody,
) -> Result<Allowed, Refusal> {
    let checked = match authorizer.body {
        None => None,
        Some(limit) => {
            let (data, is_partial) = body.peek(limit.bytes, place.room()).await.map_err(|error| match error {
                Unread::Broken(_) => Refusal::malformed(http::StatusCode::BAD_REQUEST, error.to_string()),
                Unread::Crowded => Refusal::too_many(error.to_string()),
            })?;
            if is_partial && !limit.partial {
                let text =
                    format!("the body is larger than the {} bytes that {} is asked with", limit.bytes, authorizer.name);
                return Err(Refusal::malformed(http::StatusCode::PAYLOAD_TOO_LARGE, text));
            }
            Some(CheckBody { data, is_partial })
        }
    };
    let asking = tokio::time::timeout(authorizer.timeout, asked(place, authorizer, endpoint, head, checked.as_ref()));
    let verdict = match asking.await {
        Ok(verdict) => verdict,
        Err(_) => Verdict::Failed(format!("no answer within {:?}", authorizer.timeout)),
    };
    let outcome = match &verdict {
        Verdict::Allow(_) => "allow",
        Verdict::Deny(_) => "deny",
        Verdict::Failed(_) => "error",
    };
    metrics::counter!(ASKED, "authorizer" => authorizer.name.to_string(), "verdict" => outcome).increment(1);
    match verdict {
        Verdict::Allow(allowed) => Ok(allowed),
        Verdict::Deny(denied) => Err(Refusal::denied(&authorizer.name, denied)),
        Verdict::Failed(cause) => Err(Refusal::unasked(&authorizer.name, authorizer.status_on_error, &cause)),
    }
}

/// Asks each in turn, and changes the request as each has it.
pub async fn ask_all(
    place: &Rc<dyn Place>,
    authorizers: &[Arc<Authorizer>],
    endpoint: SocketAddr,
    head: &mut Parts,
    body: &mut RequestBody,
) -> Result<Vec<Allowed>, Refusal> {
    let mut all = Vec::new();
    for authorizer in authorizers {
        let allowed = ask(place, authorizer, Some(endpoint), head, body).await?;
        allowed.edit(head);
        all.push(allowed);
    }
    Ok(all)
}

async fn asked(
    place: &Rc<dyn Place>,
    authorizer: &Authorizer,
    endpoint: Option<SocketAddr>,
    head: &Parts,
    body: Option<&CheckBody>,
) -> Verdict {
    let to = {
        let state = place.model().read();
        let service = state.mesh.service(&authorizer.service);
        service.and_then(|service| state.mesh.service_destination(service, authorizer.port))
    };
    let Some(to) = to else {
        return Verdict::Failed(format!("there is no port {} of a Service {}", authorizer.port, authorizer.service));
    };
    let Some(asker) = place.asker(&to) else {
        return Verdict::Failed("nobody can be asked from here".to_owned());
    };
    let ConnectionInfo { source, destination, .. } = place.describe();
    let destination = match endpoint {
        Some(endpoint) => at(endpoint, place),
        None => peer(&destination, place),
    };
    let source = peer(&source, place);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let time =
        (i64::try_from(now.as_secs()).unwrap_or(i64::MAX), i32::try_from(now.subsec_nanos()).unwrap_or_default());
    let check = Check { head, body, source: &source, destination: &destination, time };
    let Some(question) = authorizer.question(&check) else {
        return Verdict::Failed("the request cannot be put to it".to_owned());
    };
    let is_grpc = authorizer.is_grpc();
    let speaks = if is_grpc { Version::Http2 } else { Version::Http1 };
    let manner = Manner::of(speaks, is_grpc, None, to.port.protocol());
    let body = RequestBody::kept(Kept::of(question.body));
    let (to, plan, limits) = (Receiver::Service(to), Plan::default(), Limits::default());
    let errand = Errand { place: &asker, to: &to, plan: &plan, limits: &limits, manner };
    let Answered { response, lease, .. } = match send(errand, question.head, body, None).await {
        Ok(answered) => answered,
        Err(refusal) => return Verdict::Failed(refusal.detail),
    };
    let (head, body) = response.into_parts();
    match read(body).await {
        Ok((body, trailers)) => {
            lease.give_back();
            authorizer.verdict(Reply { status: head.status, headers: head.headers, body, trailers })
        }
        Err(cause) => Verdict::Failed(cause),
    }
}

fn peer(party: &Party, place: &Rc<dyn Place>) -> Peer {
    Peer {
        address: party.addr.unwrap_or_else(|| place.dialled()),
        principal: party.identity.as_ref().map(ToString::to_string).unwrap_or_default(),
    }
}

/// The pod at an endpoint, as the mesh knows it.
fn at(endpoint: SocketAddr, place: &Rc<dyn Place>) -> Peer {
    let state = place.model().read();
    let identity = state.mesh.workload_by_ip(endpoint.ip()).and_then(|workload| workload.identity.as_ref());
    Peer { address: endpoint, principal: identity.map(ToString::to_string).unwrap_or_default() }
}

async fn read(mut body: Incoming) -> Result<(bytes::Bytes, Option<http::HeaderMap>), String> {
    let (mut data, mut trailers) = (BytesMut::new(), None);
    while let Some(frame) = body.frame().await {
        match frame.map_err(|error| format!("its answer broke off: {error}"))?.into_data() {
            Ok(chunk) if data.len() + chunk.len() > MOST => {
                return Err(format!("its answer is larger than {} KiB", MOST >> 10));
            }
            Ok(chunk) => data.extend_from_slice(&chunk),
            Err(frame) => trailers = frame.into_trailers().ok().or(trailers),
        }
    }
    Ok((data.freeze(), trailers))
}

pub const ASKED: &str = "selvedge_http_authorizer_checks_total";
const MOST: usize = 64 * 1024;
