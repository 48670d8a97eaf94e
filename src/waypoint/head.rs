//! What HTTP asks of an intermediary about the heads that it passes on: RFC 9110, section 7.6, and RFC 9112, section 3.2.

use std::borrow::Cow;

use http::header::{
    CONNECTION, CONTENT_LENGTH, COOKIE, HOST, HeaderMap, HeaderName, HeaderValue, TE, TRANSFER_ENCODING, UPGRADE,
};
use http::request::Parts;
use http::uri::{PathAndQuery, Scheme};
use http::{Method, StatusCode, Uri, Version};
use hyper::ext::Protocol;

use super::answer::Refusal;
use super::wire::{Limits, Violation};
use crate::policy::normal_path;

/// What a request asks to speak once it is answered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Upgrade {
    /// RFC 9110, section 7.8: the value of `Upgrade`.
    Http1(HeaderValue),
    /// RFC 8441: an extended CONNECT.
    Http2,
}

/// Brings a client's request into the one form that routes see and connections to applications begin from: the path in
/// the target, the host in `Host`, and no field that was meant for this hop alone.
pub fn take_in(head: &mut Parts) -> Result<Option<Upgrade>, Violation> {
    if head.version == Version::HTTP_2 {
        // That of HTTP/1 was held against the same bounds on its raw bytes.
        join_cookies(&mut head.headers);
        check_size(head)?;
    }
    let upgrade = upgrade(head)?;
    take_host(head)?;
    if head.headers.get_all(CONTENT_LENGTH).iter().count() > 1 {
        return Err(Violation::Malformed("more than one Content-Length"));
    }
    let trailers = wants_trailers(&head.headers);
    strip(&mut head.headers);
    if trailers {
        head.headers.insert(TE, HeaderValue::from_static("trailers"));
    }
    Ok(upgrade)
}

/// What a head takes, about: RFC 9113, section 6.5.2.
pub fn size(head: &Parts) -> usize {
    head.headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum::<usize>() + target_size(head)
}

fn target_size(head: &Parts) -> usize {
    head.uri.path_and_query().map_or(0, |target| target.as_str().len())
}

/// Brings the path into [its one form](normal_path), which policy is held against and the application gets.
///
/// # Errors
/// It has none.
pub fn settle_path(head: &mut Parts) -> Result<(), Refusal> {
    let refuse = |text: &dyn std::fmt::Display| Refusal::malformed(StatusCode::BAD_REQUEST, text.to_string());
    let Cow::Owned(path) = normal_path(head.uri.path()).map_err(|fault| refuse(&fault))? else { return Ok(()) };
    let settled = match head.uri.query() {
        Some(query) => PathAndQuery::try_from(format!("{path}?{query}")),
        None => PathAndQuery::try_from(path),
    };
    let settled = settled.map_err(|error| refuse(&error))?;
    let mut parts = std::mem::take(&mut head.uri).into_parts();
    parts.path_and_query = Some(settled);
    head.uri = Uri::from_parts(parts).map_err(|error| refuse(&error))?;
    Ok(())
}

/// Makes the request fit for a connection of a version.
pub fn send_as(head: &mut Parts, version: Version, upgrade: Option<&Upgrade>) {
    head.version = version;
    match (version, upgrade) {
        (Version::HTTP_2, _) => {
            let host = head.headers.remove(HOST);
            let authority = host.and_then(|host| http::uri::Authority::try_from(host.as_bytes()).ok());
            let mut parts = std::mem::take(&mut head.uri).into_parts();
            parts.scheme = Some(Scheme::HTTP);
            // A client of HTTP/1.0 may have said none.
            parts.authority = authority.or_else(|| Some(http::uri::Authority::from_static("localhost")));
            parts.path_and_query.get_or_insert_with(|| PathAndQuery::from_static("/"));
            head.uri = Uri::from_parts(parts).unwrap_or_default();
        }
        (_, Some(Upgrade::Http1(protocol))) => {
            head.headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
            head.headers.insert(UPGRADE, protocol.clone());
        }
        _ if head.headers.contains_key(TE) => {
            head.headers.insert(CONNECTION, HeaderValue::from_static("te"));
        }
        _ => {}
    }
}

/// Takes out of an answer what was meant for this hop alone.
pub fn take_back(headers: &mut HeaderMap, status: StatusCode) {
    let upgrade = (status == StatusCode::SWITCHING_PROTOCOLS).then(|| headers.remove(UPGRADE)).flatten();
    strip(headers);
    if let Some(upgrade) = upgrade {
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(UPGRADE, upgrade);
    }
}

/// Removes the fields of one hop, and those that `Connection` names.
fn strip(headers: &mut HeaderMap) {
    if !headers.keys().any(|name| ONE_HOP.contains(name)) {
        return;
    }
    let named = words(headers, &CONNECTION).filter(|word| word != "keep-alive" && word != "close");
    let named: Vec<HeaderName> = named.filter_map(|name| name.parse().ok()).collect();
    // What frames a message, or names whom it is for, is no hop's own, whatever is said of it.
    for name in named.iter().filter(|name| **name != HOST && **name != CONTENT_LENGTH) {
        headers.remove(name);
    }
    for name in &ONE_HOP {
        headers.remove(name);
    }
}

fn upgrade(head: &mut Parts) -> Result<Option<Upgrade>, Violation> {
    if head.extensions.get::<Protocol>().is_some() {
        return Ok(Some(Upgrade::Http2));
    }
    if head.method == Method::CONNECT {
        return Err(Violation::Connect);
    }
    let asks = head.version == Version::HTTP_11 && words(&head.headers, &CONNECTION).any(|word| word == "upgrade");
    let protocol = head.headers.get(UPGRADE).filter(|_| asks);
    // RFC 9113, section 3.1: this use of Upgrade was never widely deployed and is obsolete.
    Ok(protocol.filter(|protocol| !protocol.as_bytes().eq_ignore_ascii_case(b"h2c")).cloned().map(Upgrade::Http1))
}

fn check_size(head: &Parts) -> Result<(), Violation> {
    let bounds = Limits::default();
    if target_size(head) > bounds.target {
        return Err(Violation::TargetTooLong);
    }
    if head.headers.len() > bounds.fields {
        return Err(Violation::TooManyFields);
    }
    Ok(())
}

/// RFC 9113, section 8.2.3: HTTP/2 may send each cookie in a field of its own, and nobody else knows of that.
fn join_cookies(headers: &mut HeaderMap) {
    let mut cookies = headers.get_all(COOKIE).iter();
    if cookies.nth(1).is_none() {
        return;
    }
    let all: Vec<&[u8]> = headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if let Ok(joined) = HeaderValue::from_bytes(&all.join(&b"; "[..])) {
        headers.insert(COOKIE, joined);
    }
}

/// RFC 9112, section 3.2.2: the host of a target in absolute form replaces that of `Host`. RFC 9113, section 8.3.1: where
/// both are there in HTTP/2, they must not differ.
fn take_host(head: &mut Parts) -> Result<(), Violation> {
    let mut parts = std::mem::take(&mut head.uri).into_parts();
    parts.scheme = None;
    if let Some(authority) = parts.authority.take() {
        if authority.as_str().contains('@') {
            return Err(Violation::Malformed("a host with a user in it"));
        }
        let written = HeaderValue::from_str(authority.as_str());
        let written = written.map_err(|_| Violation::Malformed("a host that is none"))?;
        let differs = |host: &HeaderValue| !host.as_bytes().eq_ignore_ascii_case(written.as_bytes());
        if head.version == Version::HTTP_2 && head.headers.get(HOST).is_some_and(differs) {
            return Err(Violation::Malformed("a Host that differs from the authority"));
        }
        head.headers.insert(HOST, written);
    }
    if head.headers.get_all(HOST).iter().count() > 1 {
        return Err(Violation::Malformed("more than one Host"));
    }
    parts.path_and_query.get_or_insert_with(|| PathAndQuery::from_static("/"));
    head.uri = Uri::from_parts(parts).map_err(|_| Violation::Malformed("a request target of no known form"))?;
    Ok(())
}

fn wants_trailers(headers: &HeaderMap) -> bool {
    words(headers, &TE).any(|word| word == "trailers")
}

/// The members of a list, in lower case.
fn words<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = String> + use<'a> {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values
        .flat_map(|value| value.split(','))
        .map(|word| word.trim().to_ascii_lowercase())
        .filter(|word| !word.is_empty())
}

/// What is said to the next hop alone.
const ONE_HOP: [HeaderName; 7] =
    [CONNECTION, TRANSFER_ENCODING, UPGRADE, TE, KEEP_ALIVE, PROXY_CONNECTION, HTTP2_SETTINGS];
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn head(target: &str, version: Version, headers: &[(&str, &str)]) -> Parts {
        let mut request = Request::builder().uri(target).version(version);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    #[test]
    fn what_one_hop_says_to_the_next_goes_no_further() {
        let mut head = head(
            "/x?y",
            Version::HTTP_11,
            &[
                ("host", "cart"),
                ("connection", "keep-alive, X-Own"),
                ("connection", "host, content-length"),
                ("x-own", "1"),
                ("keep-alive", "timeout=5"),
                ("proxy-connection", "keep-alive"),
                ("te", "gzip, trailers"),
                ("transfer-encoding", "chunked"),
                ("authorization", "Bearer x"),
            ],
        );
        assert_eq!(take_in(&mut head), Ok(None));
        let mut names: Vec<&str> = head.headers.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["authorization", "host", "te"]);
        assert_eq!(head.headers[TE], "trailers");
        send_as(&mut head, Version::HTTP_11, None);
        assert_eq!(head.headers[CONNECTION], "te");
    }

    #[test]
    fn the_host_is_in_one_place_whatever_the_target_looked_like() {
        for (target, version, host) in [
            ("/x?y", Version::HTTP_11, "cart:80"),
            ("http://cart:80/x?y", Version::HTTP_11, "other"),
            ("http://cart:80/x?y", Version::HTTP_2, "CART:80"),
        ] {
            let mut head = head(target, version, &[("host", host)]);
            take_in(&mut head).unwrap();
            assert_eq!(
                (head.uri.to_string().as_str(), head.headers[HOST].to_str().unwrap().to_lowercase().as_str()),
                ("/x?y", "cart:80")
            );
            send_as(&mut head, Version::HTTP_2, None);
            assert_eq!(head.uri.to_string().to_lowercase(), "http://cart:80/x?y");
            assert!(!head.headers.contains_key(HOST));
        }
        let mut asterisk = head("*", Version::HTTP_11, &[("host", "cart")]);
        asterisk.method = Method::OPTIONS;
        take_in(&mut asterisk).unwrap();
        assert_eq!(asterisk.uri.to_string(), "*");
    }

    #[test]
    fn hosts_that_could_be_read_in_two_ways_are_refused() {
        let two = [("host", "a"), ("host", "b")];
        assert!(take_in(&mut head("/", Version::HTTP_11, &two)).is_err());
        assert!(take_in(&mut head("http://a/", Version::HTTP_2, &[("host", "b")])).is_err());
        assert!(take_in(&mut head("http://user@a/", Version::HTTP_11, &[("host", "a")])).is_err());
    }

    #[test]
    fn an_upgrade_goes_on_and_comes_back_but_that_to_http2() {
        let asking = |protocol| {
            let headers = [("host", "a"), ("connection", "Upgrade, HTTP2-Settings"), ("upgrade", protocol)];
            head("/", Version::HTTP_11, &headers)
        };
        let mut websocket = asking("websocket");
        let upgrade = take_in(&mut websocket).unwrap();
        assert_eq!(upgrade, Some(Upgrade::Http1(HeaderValue::from_static("websocket"))));
        send_as(&mut websocket, Version::HTTP_11, upgrade.as_ref());
        assert_eq!(
            (&websocket.headers[CONNECTION], &websocket.headers[UPGRADE]),
            (&"upgrade".parse().unwrap(), &"websocket".parse().unwrap())
        );
        assert_eq!(take_in(&mut asking("h2c")), Ok(None));
        let mut answer = HeaderMap::new();
        answer.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        answer.insert(UPGRADE, HeaderValue::from_static("websocket"));
        take_back(&mut answer, StatusCode::SWITCHING_PROTOCOLS);
        assert_eq!(answer[UPGRADE], "websocket");
        take_back(&mut answer, StatusCode::OK);
        assert!(answer.is_empty());
    }
}
