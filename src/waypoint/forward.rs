//! A request on its way to an endpoint, and to another one where the first provably never heard of it.

use std::net::SocketAddr;
use std::rc::Rc;

use http::request::Parts;
use hyper::body::{Body, Incoming};
use hyper::{Request, Response};

use super::answer::Refusal;
use super::authorize;
use super::body::RequestBody;
use super::client::Version;
use super::head::{self, Upgrade};
use super::place::{Permit, Place, Receiver};
use super::tee::Kept;
use super::upstream::{Lease, acquire};
use super::{Failure, RETRIED};
use crate::authorizer::Allowed;
use crate::mesh::AppProtocol;
use crate::policy::RequestHead;

/// What a request is sent as.
#[derive(Clone, Copy)]
pub struct Manner<'a> {
    pub version: Version,
    pub upgrade: Option<&'a Upgrade>,
}

impl<'a> Manner<'a> {
    /// A port speaks what it declares, and else what the client does. gRPC and upgrades go on as what they are.
    pub fn of(client: Version, is_grpc: bool, upgrade: Option<&'a Upgrade>, port: Option<AppProtocol>) -> Self {
        let version = match (upgrade, port) {
            (Some(Upgrade::Http1(_)), _) => Version::Http1,
            (Some(Upgrade::Http2), _) => Version::Http2,
            _ if is_grpc && client == Version::Http2 => Version::Http2,
            (None, Some(AppProtocol::Http2 | AppProtocol::Grpc)) => Version::Http2,
            (None, Some(AppProtocol::WebSocket)) => Version::Http1,
            (None, _) => client,
        };
        Self { version, upgrade }
    }

    fn http(self) -> http::Version {
        match self.version {
            Version::Http1 => http::Version::HTTP_11,
            Version::Http2 => http::Version::HTTP_2,
        }
    }
}

/// The head of an application's answer, and the connection that it comes on.
pub struct Answered {
    pub response: Response<Incoming>,
    pub lease: Lease,
    /// Where policy was asked here.
    pub permit: Option<Permit>,
}

/// Sends a request to an endpoint. One that nothing of has been written is tried elsewhere.
pub async fn send(
    place: &Rc<dyn Place>,
    to: &Receiver,
    manner: Manner<'_>,
    mut head: Parts,
    body: RequestBody,
) -> Result<Answered, Refusal> {
    place.settle(&mut head)?;
    head::send_as(&mut head, manner.http(), manner.upgrade);
    // Of HTTP/2 the request is gone once it is on its way; without a body it is easily made again.
    let mut spare =
        (manner.version == Version::Http2 && manner.upgrade.is_none() && body.is_end_stream()).then(|| head.clone());
    let mut request = Request::from_parts(head, body);
    let (mut tried, mut last): (Vec<_>, Option<Failure>) = (Vec::new(), None);
    let mut stale = 0;
    let (mut asked_at, mut allowed): (Option<SocketAddr>, Vec<Allowed>) = (None, Vec::new());
    while tried.len() < ENDPOINT_TRIES {
        let Some(endpoint) = place.pick(to, &tried) else { break };
        let mut permit = place.judge(endpoint, &RequestHead::of(&request))?;
        let asks = permit.as_ref().map(|permit| permit.asks.clone()).unwrap_or_default();
        if !asks.is_empty() && asked_at != Some(endpoint) {
            let (mut head, mut body) = request.into_parts();
            allowed = authorize::ask_all(place, &asks, &mut head, &mut body).await?;
            spare = spare.map(|_| head.clone());
            request = Request::from_parts(head, body);
            asked_at = Some(endpoint);
            // Decided on the request as the application will get it.
            permit = place.judge(endpoint, &RequestHead::of(&request))?;
        }
        let mut lease = match acquire(place, to, endpoint, manner.version).await {
            Ok(lease) => lease,
            Err(failure) if failure.retry => {
                place.reached(endpoint, false);
                tried.push(endpoint);
                last = Some(failure);
                continue;
            }
            Err(failure) => return Err(Refusal::unreached(failure)),
        };
        if !lease.reused {
            place.reached(endpoint, true);
        }
        if let Some(Upgrade::Http1(_)) = manner.upgrade {
            lease.inherit();
        }
        match lease.send(request).await {
            Ok(mut response) => {
                allowed.iter().for_each(|one| one.edit_answer(response.headers_mut()));
                lease.heed(response.headers());
                if response.status() != http::StatusCode::SWITCHING_PROTOCOLS {
                    lease.disinherit();
                }
                return Ok(Answered { response, lease, permit });
            }
            Err(unsent) => {
                let refused = spare.as_ref().filter(|_| unsent.is_refused && tried.len() + 1 < ENDPOINT_TRIES);
                let again = refused.map(|head| Request::from_parts(head.clone(), RequestBody::kept(Kept::default())));
                let Some(again) = unsent.request.or(again) else {
                    return Err(match unsent.is_body {
                        true => Refusal::malformed(http::StatusCode::BAD_REQUEST, unsent.error),
                        false => Refusal::broken(format!("{endpoint}: {}", unsent.error)),
                    });
                };
                metrics::counter!(RETRIED, "why" => "unsent").increment(1);
                request = again;
                // One that waited too long in the pool says nothing about its endpoint.
                if lease.reused && stale < STALE_TRIES {
                    stale += 1;
                } else {
                    tried.push(endpoint);
                }
            }
        }
    }
    Err(last.map_or_else(|| no_endpoint(to), Refusal::unreached))
}

fn no_endpoint(to: &Receiver) -> Refusal {
    Refusal::no_endpoint(format!("{to}: no endpoint is ready"))
}

const ENDPOINT_TRIES: usize = 5;
/// Connections that waited and turned out to be closed, before one is made anew.
const STALE_TRIES: usize = 3;

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn a_port_speaks_what_it_declares_and_nothing_is_downgraded() {
        let websocket = Upgrade::Http1(HeaderValue::from_static("websocket"));
        let (one, two) = (Version::Http1, Version::Http2);
        for (client, is_grpc, upgrade, port, wanted) in [
            (one, false, None, None, one),
            (two, false, None, None, two),
            (one, false, None, Some(AppProtocol::Http), one),
            (two, false, None, Some(AppProtocol::Http), two),
            (one, false, None, Some(AppProtocol::Http2), two),
            (one, false, None, Some(AppProtocol::Grpc), two),
            (two, false, None, Some(AppProtocol::WebSocket), one),
            (two, true, None, Some(AppProtocol::WebSocket), two),
            (one, true, None, Some(AppProtocol::Http), one),
            (one, false, Some(&websocket), Some(AppProtocol::Http2), one),
            (two, false, Some(&Upgrade::Http2), Some(AppProtocol::WebSocket), two),
        ] {
            let version = Manner::of(client, is_grpc, upgrade, port).version;
            assert_eq!(version, wanted, "{client:?} {is_grpc} {upgrade:?} {port:?}");
        }
    }
}
