//! The use of one connection for one request.

use std::cell::Cell;
use std::error::Error;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use http::HeaderMap;
use hyper::body::Incoming;
use hyper::{Request, Response};
use tokio::sync::oneshot;

use super::super::body::RequestBody;
use super::super::cause::{causes, of_http2};
use super::super::guard::Begun;
use super::super::place::Place;
use super::super::pool::Moment;
use super::{Handed, MOST_REST, Sender, Upstream};
use crate::proxy::Counted;
use crate::telemetry::RequestConnection;

/// The use of a connection for one request.
pub struct Lease {
    pub(super) upstream: Upstream,
    pub(super) place: Rc<dyn Place>,
    /// Whether the connection has carried a request before.
    pub reused: bool,
    /// Where the connection comes to once it speaks another protocol.
    pub(super) inheritance: Option<oneshot::Receiver<Handed>>,
    pub(super) _stream: StreamPlace,
    pub(super) _counted: Option<Counted>,
    pub(super) _begun: Option<Begun>,
}

/// A request that came to nothing on its connection.
pub struct Unsent {
    pub error: String,
    /// The request itself, where nothing of it was written.
    pub request: Option<Request<RequestBody>>,
    /// The application says that it has not looked at it.
    pub is_refused: bool,
    /// The client broke its body off.
    pub is_body: bool,
}

impl Lease {
    pub fn info(&self) -> &Arc<RequestConnection> {
        &self.upstream.info
    }

    /// Sends the request, and waits for the head of its answer.
    pub async fn send(&mut self, request: Request<RequestBody>) -> Result<Response<Incoming>, Unsent> {
        let answer = match &mut self.upstream.sender {
            Sender::Http1(sender) => sender.try_send_request(request).await,
            Sender::Http2(sender) => sender.try_send_request(request).await,
        };
        answer.map_err(|mut error| {
            let request = error.take_message();
            let error = error.into_error();
            Unsent { error: describe(&error), request, is_refused: is_refused(&error), is_body: error.is_user() }
        })
    }

    /// Heeds what the application says of how long it keeps a connection: one that is closed a little before is never used as
    /// it goes.
    pub fn heed(&mut self, answer: &HeaderMap) {
        if let Some(kept) = kept_for(answer) {
            self.upstream.rest = MOST_REST.min(kept.saturating_sub(MARGIN));
        }
    }

    /// Takes the connection over once it speaks another protocol, as the answer to the next request may say.
    pub fn inherit(&mut self) {
        let (heir, inheritance) = oneshot::channel();
        self.upstream.heir.replace(Some(heir));
        self.inheritance = Some(inheritance);
    }

    /// It goes on with HTTP.
    pub fn disinherit(&mut self) {
        self.upstream.heir.replace(None);
        self.inheritance = None;
    }

    /// Where the connection comes to, if it was to be taken over.
    pub fn handed(&mut self) -> Option<oneshot::Receiver<Handed>> {
        self.inheritance.take()
    }

    /// Its request is over, and the connection may take the next.
    pub fn give_back(self) {
        let Self { upstream, place, .. } = self;
        let guard = upstream.guard().cloned();
        // Somebody else waits for a connection, and cannot have this one.
        if guard.as_ref().is_some_and(|guard| guard.is_wanted_elsewhere()) {
            return;
        }
        if matches!(upstream.sender, Sender::Http1(_))
            && upstream.bond.is_some()
            && place.keeps()
            && upstream.is_fit(Moment::now())
        {
            place.pool().put(upstream);
            guard.into_iter().for_each(|guard| guard.freed());
        }
    }
}

/// One request under way on a connection.
pub struct StreamPlace(Rc<Cell<usize>>);

impl StreamPlace {
    pub fn take(streams: &Rc<Cell<usize>>) -> Self {
        streams.set(streams.get() + 1);
        Self(streams.clone())
    }
}

impl Drop for StreamPlace {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// RFC 2068, section 19.7.1.1: `Keep-Alive: timeout=5`, which servers still send.
fn kept_for(answer: &HeaderMap) -> Option<Duration> {
    let words = answer.get("keep-alive")?.to_str().ok()?.split(',');
    let seconds = words.filter_map(|word| word.trim().strip_prefix("timeout=")).find_map(|word| word.parse().ok())?;
    Some(Duration::from_secs(seconds))
}

fn describe(error: &hyper::Error) -> String {
    causes(error.source()).fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// RFC 9113, section 8.7: a stream that was refused, or that lies beyond a GOAWAY, was not processed.
fn is_refused(error: &hyper::Error) -> bool {
    of_http2(error.source()).filter(|error| error.is_remote()).any(|error| {
        error.reason() == Some(h2::Reason::REFUSED_STREAM)
            || (error.is_go_away() && error.reason() == Some(h2::Reason::NO_ERROR))
    })
}

/// How much earlier a connection is given up than its application does it.
const MARGIN: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_application_says_how_long_it_keeps_a_connection() {
        for (value, wanted) in [("timeout=5, max=1000", Some(5)), ("max=3", None), ("timeout=soon", None)] {
            let mut answer = HeaderMap::new();
            answer.insert("keep-alive", http::HeaderValue::from_static(value));
            assert_eq!(kept_for(&answer), wanted.map(Duration::from_secs), "{value}");
        }
        assert_eq!(kept_for(&HeaderMap::new()), None);
    }
}
