//! One try of a request: an endpoint, and a connection to it.

use std::net::SocketAddr;
use std::sync::Arc;

use http::request::Parts;
use hyper::body::Incoming;
use hyper::{Request, Response};

use super::RETRIED;
use super::answer::Refusal;
use super::authorize;
use super::body::RequestBody;
use super::client::Version;
use super::head::Upgrade;
use super::place::{Permit, Receiver};
use super::plan::Telling;
use super::tries::Errand;
use super::upstream::{Lease, acquire};
use crate::authorizer::{Allowed, Authorizer};
use crate::mesh::AppProtocol;
use crate::policy::RequestHead;
use crate::route::resilience::Outcome;

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

    pub fn http(self) -> http::Version {
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
    /// Who wants to know how it ends.
    pub telling: Option<Box<Telling>>,
}

/// A try that came to nothing.
pub struct Failed {
    /// Whether another may go better; none where it may not.
    pub outcome: Option<Outcome>,
    /// What the client is told if there is none.
    pub refusal: Refusal,
    /// The request itself as it came, where nothing of it was written.
    pub request: Option<Box<Request<RequestBody>>>,
}

impl Failed {
    /// For good.
    fn refused(refusal: Refusal) -> Self {
        Self { outcome: None, refusal, request: None }
    }
}

/// The way of one request, from one endpoint to the next.
pub struct Way<'a> {
    errand: Errand<'a>,
    tried: Vec<SocketAddr>,
    /// Where it is, or was last.
    endpoint: Option<SocketAddr>,
    asked: Option<Asked>,
}

/// What authorizers made of a request, and where it was to go.
struct Asked {
    endpoint: SocketAddr,
    authorizers: Vec<Arc<Authorizer>>,
    allowed: Vec<Allowed>,
}

impl<'a> Way<'a> {
    pub fn new(errand: Errand<'a>) -> Self {
        Self { errand, tried: Vec::new(), endpoint: None, asked: None }
    }

    /// Where the last try led.
    pub fn endpoint(&self) -> Option<SocketAddr> {
        self.endpoint
    }

    /// Whether there is an endpoint for another try; `any` takes those that have been tried already.
    pub fn has_more(&mut self, any: bool) -> bool {
        self.tried.extend(self.endpoint.filter(|endpoint| !self.tried.contains(endpoint)));
        any || self.errand.plan.known().is_none_or(|known| self.tried.len() < known)
    }

    /// One endpoint, and the head of its answer. A connection that waited too long says nothing about its endpoint.
    pub async fn once(&mut self, mut request: Request<RequestBody>) -> Result<Answered, Failed> {
        self.endpoint = None;
        for stale in 0.. {
            let Some(endpoint) = self.pick() else { return Err(Failed::refused(no_endpoint(self.errand.to))) };
            self.endpoint = Some(endpoint);
            let prepared = self.prepare(endpoint, request).await.map_err(Failed::refused)?;
            let Prepared { request: ready, before, permit } = prepared;
            let mut lease = match acquire(
                self.errand.place,
                self.errand.to,
                endpoint,
                self.errand.manner.version,
                self.errand.plan,
            )
            .await
            {
                Ok(lease) => lease,
                Err(failure) => {
                    let outcome = failure.retry.then_some(Outcome::NotSent);
                    if failure.retry {
                        self.errand.place.reached(endpoint, false);
                    }
                    let request = Some(Box::new(as_it_was(ready, before)));
                    return Err(Failed { outcome, refusal: Refusal::unreached(failure), request });
                }
            };
            if !lease.reused {
                self.errand.place.reached(endpoint, true);
            }
            if let Some(Upgrade::Http1(_)) = self.errand.manner.upgrade {
                lease.inherit();
            }
            let unsent = match lease.send(ready).await {
                Ok(mut response) => {
                    let allowed = self.asked.iter().flat_map(|asked| &asked.allowed);
                    allowed.for_each(|one| one.edit_answer(response.headers_mut()));
                    lease.heed(response.headers());
                    if response.status() != http::StatusCode::SWITCHING_PROTOCOLS {
                        lease.disinherit();
                    }
                    return Ok(Answered { response, lease, permit, telling: None });
                }
                Err(unsent) => unsent,
            };
            let refusal = || Refusal::broken(format!("{endpoint}: {}", unsent.error));
            request = match unsent.request {
                Some(again) if lease.reused && stale < STALE_TRIES => {
                    metrics::counter!(RETRIED, "why" => "unsent").increment(1);
                    as_it_was(again, before)
                }
                None if unsent.is_body => {
                    let refusal = Refusal::malformed(http::StatusCode::BAD_REQUEST, unsent.error);
                    return Err(Failed::refused(refusal));
                }
                Some(again) => {
                    let outcome = Some(Outcome::NotSent);
                    let request = Some(Box::new(as_it_was(again, before)));
                    return Err(Failed { outcome, refusal: refusal(), request });
                }
                None => {
                    let outcome = if unsent.is_refused { Outcome::NotSent } else { Outcome::Unanswered };
                    return Err(Failed { outcome: Some(outcome), refusal: refusal(), request: None });
                }
            };
        }
        Err(Failed::refused(no_endpoint(self.errand.to)))
    }

    /// Makes of a request what the application at an endpoint gets, if policy there lets it pass: its token is verified, it is
    /// decided, whoever else must let it pass is asked, and it is decided again as they made it.
    async fn prepare(&mut self, endpoint: SocketAddr, request: Request<RequestBody>) -> Result<Prepared, Refusal> {
        let place = self.errand.place;
        self.asked.take_if(|asked| asked.endpoint != endpoint);
        let (mut head, mut body) = request.into_parts();
        let mut before = place.settle(endpoint, &mut head)?;
        let request = Request::from_parts(head, body);
        let permit = place.judge(endpoint, &RequestHead::of(&request))?;
        if permit.as_ref().is_some_and(|permit| !permit.is_last) {
            return Ok(Prepared { request: as_it_was(request, before), before: None, permit });
        }
        let asks = permit.as_ref().map(|permit| permit.asks.as_slice()).unwrap_or_default();
        if asks.is_empty() {
            self.asked = None;
            return Ok(Prepared { request, before, permit });
        }
        (head, body) = request.into_parts();
        before.get_or_insert_with(|| head.clone());
        match &self.asked {
            // What they said holds for the request, however often it is sent there.
            Some(asked) if asked.authorizers == asks => {
                asked.allowed.iter().for_each(|one| one.edit(&mut head));
            }
            _ => {
                // On the heap: few requests are asked about.
                let allowed = Box::pin(authorize::ask_all(place, asks, endpoint, &mut head, &mut body)).await?;
                self.asked = Some(Asked { endpoint, authorizers: asks.to_vec(), allowed });
            }
        }
        let request = Request::from_parts(head, body);
        place.judge_again(endpoint, &RequestHead::of(&request))?;
        Ok(Prepared { request, before, permit })
    }

    fn pick(&mut self) -> Option<SocketAddr> {
        let pick = |tried: &[SocketAddr]| match self.errand.plan.pick(tried) {
            Some(picked) => picked,
            None => self.errand.place.pick(self.errand.to, tried),
        };
        let picked = pick(&self.tried);
        if picked.is_some() || self.tried.is_empty() {
            return picked;
        }
        // Whoever asks for another try gets it, if there is but one to try.
        self.tried.clear();
        pick(&self.tried)
    }
}

/// A request that may go to an endpoint.
struct Prepared {
    request: Request<RequestBody>,
    /// Its head as it was, where it was changed for this very endpoint.
    before: Option<Parts>,
    permit: Option<Permit>,
}

/// The request for another try: what was made of its head for one endpoint is none of the next one's.
fn as_it_was(request: Request<RequestBody>, before: Option<Parts>) -> Request<RequestBody> {
    let (head, body) = request.into_parts();
    Request::from_parts(before.unwrap_or(head), body)
}

fn no_endpoint(to: &Receiver) -> Refusal {
    Refusal::no_endpoint(format!("{to}: no endpoint is ready"))
}

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
