//! What metrics and the access log are told of a request as it begins.

use http::Request;
use http::header::HOST;
use http::request::Parts;

use super::client::Version;
use super::session::Session;
use super::wire::Violation;
use crate::mesh::Reason;
use crate::telemetry::{RequestInfo, RequestProtocol};

pub fn describe(session: &Session, head: &Parts, is_grpc: bool, version: Version) -> RequestInfo {
    let connection = session.client();
    let service = connection.service.clone();
    let host = head.headers.get(HOST).and_then(|host| host.to_str().ok());
    RequestInfo {
        service: service.or_else(|| session.view()?.to.service().cloned()),
        requested: connection.requested,
        connection,
        protocol: match (is_grpc, version) {
            (true, _) => RequestProtocol::Grpc,
            (false, Version::Http1) => RequestProtocol::Http1,
            (false, Version::Http2) => RequestProtocol::Http2,
        },
        method: start(head.method.as_str()),
        host: start(host.or(head.uri.host()).unwrap_or_default()),
        path: start(head.uri.path()),
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

/// Records a request whose head was refused before anybody had read it.
pub fn refused(session: &Session, violation: Violation) {
    let (head, ()) = Request::new(()).into_parts();
    let mut info = describe(session, &head, false, Version::Http1);
    // Nobody knows what it was meant to be.
    (info.method, info.path) = ("-".to_owned(), "-".to_owned());
    info.status = violation.status().as_u16();
    info.reason = Some(reason(violation));
    info.detail = violation.to_string();
    session.place.telemetry().request(info).ended();
}

/// Why bytes are refused, in a word.
pub fn reason(violation: Violation) -> Reason {
    match violation {
        Violation::Crowded => Reason::Limit,
        _ => Reason::Protocol,
    }
}

/// Of a method, host or path in the access log.
const MOST_WRITTEN: usize = 1024;

/// What there is room for in a log.
fn start(text: &str) -> String {
    text[..text.floor_char_boundary(MOST_WRITTEN)].to_owned()
}
