//! Asked by HTTP: the request without its body, and its status is the answer.

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE, COOKIE, DATE, HOST, HeaderName, HeaderValue, SET_COOKIE};
use http::uri::PathAndQuery;
use http::{Method, Request, StatusCode};

use super::verdict::How;
use super::{Allowed, Check, Denied, HttpSettings, Question, Reply, Verdict};
use crate::authentication::may_carry;

pub(super) fn question(settings: &HttpSettings, check: &Check<'_>) -> Option<Question> {
    // What is asked about is a request, and the question is no tunnel.
    let method = if check.head.method == Method::CONNECT { Method::GET } else { check.head.method.clone() };
    let asterisk = check.path() == "*";
    let target = if asterisk { "/".to_owned() } else { check.path().to_owned() };
    let target = PathAndQuery::try_from(format!("{}{target}", settings.path_prefix)).ok()?;
    let (mut head, ()) = Request::new(()).into_parts();
    head.method = method;
    head.uri = target.into();
    let asked = |name: &HeaderName| {
        *name == AUTHORIZATION
            || settings.request_headers.has(name)
            || *name == CONTENT_TYPE && check.body.is_some_and(|body| !body.data.is_empty())
    };
    for (name, value) in check.head.headers.iter().filter(|(name, _)| may_carry(name) && asked(name)) {
        // RFC 9113, section 8.2.3: the parts of a Cookie are one for whoever does not speak HTTP/2.
        match head.headers.get(COOKIE).filter(|_| *name == COOKIE) {
            Some(before) => {
                let joined = HeaderValue::from_bytes(&[before.as_bytes(), b"; ", value.as_bytes()].concat()).ok()?;
                head.headers.insert(COOKIE, joined);
            }
            None => drop(head.headers.append(name, value.clone())),
        }
    }
    head.headers.insert(HOST, HeaderValue::from_str(check.host()).ok()?);
    for (name, value) in &settings.added {
        head.headers.insert(name, value.clone());
    }
    if let Some(body) = check.body {
        head.headers.insert(PARTIAL, HeaderValue::from_static(if body.is_partial { "true" } else { "false" }));
    }
    Some(Question { head, body: check.body.map_or_else(Bytes::new, |body| body.data.clone()) })
}

pub(super) fn verdict(settings: &HttpSettings, reply: Reply) -> Verdict {
    let Reply { status, headers, body, .. } = reply;
    let passes = if settings.any_success { status.is_success() } else { status == StatusCode::OK };
    let of_message = |name: &HeaderName| *name == CONTENT_TYPE || ABOUT_ITSELF.contains(&name.as_str());
    if passes {
        let to = |asked: &dyn Fn(&HeaderName) -> bool| {
            let mut taken: Vec<(HeaderName, HeaderValue, How)> = Vec::new();
            for (name, value) in headers.iter().filter(|(name, _)| may_carry(name) && asked(name)) {
                let again = taken.iter().any(|(before, ..)| before == name);
                taken.push((name.clone(), value.clone(), if again { How::Append } else { How::Replace }));
            }
            taken
        };
        let upstream = to(&|name| match &settings.to_upstream {
            Some(names) => names.has(name),
            // What speaks of the answer itself, or is for the client, is none of the application's.
            None => !of_message(name) && *name != DATE && *name != SET_COOKIE,
        });
        let mut downstream = to(&|name| settings.to_downstream.has(name));
        // An application's cookies stay beside those of the authorizer.
        downstream.iter_mut().filter(|(name, ..)| *name == SET_COOKIE).for_each(|(.., how)| *how = How::Append);
        return Verdict::Allow(Allowed {
            stripped: settings.to_upstream.clone().unwrap_or_default(),
            headers: upstream,
            downstream,
            ..Allowed::default()
        });
    }
    if status.is_server_error() || status.is_informational() || status.is_success() && settings.any_success {
        return Verdict::Failed(format!("it answered {status}"));
    }
    let status = if status.is_success() { StatusCode::FORBIDDEN } else { status };
    let goes = |name: &HeaderName| match &settings.of_denial {
        Some(names) => names.has(name) || ["www-authenticate", "location", "content-type"].contains(&name.as_str()),
        None => true,
    };
    let mut kept = http::HeaderMap::new();
    for (name, value) in headers.iter().filter(|(name, _)| may_carry(name) && goes(name)) {
        kept.append(name, value.clone());
    }
    Verdict::Deny(Denied { status, headers: kept, body })
}

/// Envoy's: whether the body is not all of it.
const PARTIAL: HeaderName = HeaderName::from_static("x-envoy-auth-partial-body");
const ABOUT_ITSELF: [&str; 10] = [
    "accept-ranges",
    "age",
    "allow",
    "cache-control",
    "content-encoding",
    "content-language",
    "etag",
    "expires",
    "last-modified",
    "server",
];
