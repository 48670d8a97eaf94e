//! Asked by Envoy's gRPC.

use std::collections::HashMap;

use bytes::{BufMut, Bytes, BytesMut};
use http::header::{CONTENT_TYPE, HeaderName, HeaderValue, TE};
use http::{HeaderMap, Method, Request, StatusCode, Uri, Version};
use prost::Message;

use super::verdict::How;
use super::wire::{
    Address, AttributeContext, CheckRequest, CheckResponse, HeaderValueOption, HttpRequest, HttpResponse,
    PortSpecifier, SocketAddress, Timestamped,
};
use super::{Allowed, Check, Denied, GrpcSettings, Names, Peer, Question, Reply, Verdict, wire};

pub(super) fn question(settings: &GrpcSettings, check: &Check<'_>) -> Option<Question> {
    let request = CheckRequest {
        attributes: Some(AttributeContext {
            source: Some(peer(check.source)),
            destination: Some(peer(check.destination)),
            request: Some(Timestamped {
                time: Some(prost_types::Timestamp { seconds: check.time.0, nanos: check.time.1 }),
                http: Some(http_request(settings, check)),
            }),
            context_extensions: HashMap::new(),
        }),
    };
    let message = request.encode_to_vec();
    // gRPC over HTTP/2: a byte that says whether it is compressed, four of its length, and the message.
    let mut body = BytesMut::with_capacity(PREFIX + message.len());
    body.put_u8(0);
    body.put_u32(u32::try_from(message.len()).ok()?);
    body.put_slice(&message);
    let (mut head, ()) = Request::new(()).into_parts();
    head.method = Method::POST;
    head.uri = Uri::from_static(wire::CHECK);
    head.version = Version::HTTP_2;
    head.headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    head.headers.insert(TE, HeaderValue::from_static("trailers"));
    Some(Question { head, body: body.freeze() })
}

fn peer(peer: &Peer) -> wire::Peer {
    let address = SocketAddress {
        address: peer.address.ip().to_canonical().to_string(),
        port: Some(PortSpecifier::Value(peer.address.port().into())),
    };
    wire::Peer { address: Some(Address { socket_address: Some(address) }), principal: peer.principal.clone() }
}

fn http_request(settings: &GrpcSettings, check: &Check<'_>) -> HttpRequest {
    let head = check.head;
    let sent = |name: &HeaderName| settings.request_headers.as_ref().is_none_or(|names: &Names| names.has(name));
    let mut headers: HashMap<String, String> = HashMap::new();
    for name in head.headers.keys().filter(|name| sent(name)) {
        let values: Vec<_> =
            head.headers.get_all(name).iter().map(|value| String::from_utf8_lossy(value.as_bytes())).collect();
        let between = if name == http::header::COOKIE { "; " } else { "," };
        headers.insert(name.as_str().to_owned(), values.join(between));
    }
    for (name, value) in
        [(":method", head.method.as_str()), (":path", check.path()), (":authority", check.host()), (":scheme", SCHEME)]
    {
        headers.insert(name.to_owned(), value.to_owned());
    }
    if let Some(body) = check.body {
        headers.insert("x-envoy-auth-partial-body".to_owned(), body.is_partial.to_string());
    }
    let text = |name: &str| head.headers.get(name).and_then(|value| value.to_str().ok());
    let (body, raw_body) = match check.body.map(|body| &body.data) {
        None => (String::new(), Bytes::new()),
        Some(data) => match std::str::from_utf8(data) {
            Ok(text) => (text.to_owned(), Bytes::new()),
            Err(_) => (String::new(), data.clone()),
        },
    };
    HttpRequest {
        id: text("x-request-id").unwrap_or_default().to_owned(),
        method: head.method.to_string(),
        headers,
        path: check.path().to_owned(),
        host: check.host().to_owned(),
        scheme: SCHEME.to_owned(),
        size: text("content-length").and_then(|length| length.parse().ok()).unwrap_or(-1),
        protocol: if head.version == Version::HTTP_2 { "HTTP/2" } else { "HTTP/1.1" }.to_owned(),
        body,
        raw_body,
    }
}

pub(super) fn verdict(reply: &Reply) -> Verdict {
    match read(reply) {
        Ok(response) => of_response(response),
        Err(cause) => Verdict::Failed(cause),
    }
}

fn read(reply: &Reply) -> Result<CheckResponse, String> {
    if reply.status != StatusCode::OK {
        return Err(format!("it answered {}, and speaks no gRPC", reply.status));
    }
    let said =
        |headers: &HeaderMap, name: &str| headers.get(name).and_then(|value| value.to_str().ok().map(str::to_owned));
    let trailers = reply.trailers.as_ref().unwrap_or(&reply.headers);
    match said(trailers, "grpc-status").as_deref() {
        Some("0") => {}
        Some(code) => {
            let message = said(trailers, "grpc-message").unwrap_or_default();
            return Err(format!(
                "its call failed with grpc-status {code}: {}",
                message.chars().take(200).collect::<String>()
            ));
        }
        None => return Err("its answer broke off".to_owned()),
    }
    let Some((prefix, message)) = reply.body.split_at_checked(PREFIX) else {
        return Err("its answer has no message".to_owned());
    };
    let length = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]) as usize;
    if prefix[0] != 0 || length != message.len() {
        return Err("its answer is not one message that is not compressed".to_owned());
    }
    CheckResponse::decode(message).map_err(|error| format!("its answer is no CheckResponse: {error}"))
}

fn of_response(response: CheckResponse) -> Verdict {
    let code = response.status.as_ref().map_or(0, |status| status.code);
    match (code, response.http_response) {
        (0, Some(HttpResponse::Ok(ok))) => {
            let mut query: Vec<(String, Option<String>)> =
                ok.query_parameters_to_remove.into_iter().map(|name| (name, None)).collect();
            query.extend(ok.query_parameters_to_set.into_iter().map(|one| (one.key, Some(one.value))));
            let removed = ok.headers_to_remove.iter().filter_map(|name| HeaderName::from_bytes(name.as_bytes()).ok());
            Verdict::Allow(Allowed {
                removed: removed.collect(),
                headers: edits(ok.headers),
                downstream: edits(ok.response_headers_to_add),
                query,
                ..Allowed::default()
            })
        }
        (0, None) => Verdict::Allow(Allowed::default()),
        (0, Some(HttpResponse::Denied(_))) => Verdict::Failed("it allows and denies at once".to_owned()),
        (_, Some(HttpResponse::Denied(denied))) => {
            let status = denied.status.and_then(|status| StatusCode::from_u16(u16::try_from(status.code).ok()?).ok());
            let mut headers = HeaderMap::new();
            for (name, value, how) in edits(denied.headers) {
                if how == How::Append {
                    headers.append(name, value)
                } else {
                    headers.insert(name, value).is_some()
                };
            }
            // One that says no cannot mean that the request went well, or that it goes on.
            let is_final = |status: &StatusCode| !status.is_informational() && !status.is_success();
            let status = status.filter(is_final).unwrap_or(StatusCode::FORBIDDEN);
            Verdict::Deny(Denied { status, headers, body: denied.body.into() })
        }
        (_, _) => {
            Verdict::Deny(Denied { status: StatusCode::FORBIDDEN, headers: HeaderMap::new(), body: Bytes::new() })
        }
    }
}

/// Those that a request or an answer can have: of pseudo-headers nothing is changed.
fn edits(options: Vec<HeaderValueOption>) -> Vec<(HeaderName, HeaderValue, How)> {
    let edit = |option: HeaderValueOption| {
        let header = option.header?;
        let name = HeaderName::from_bytes(header.key.as_bytes()).ok().filter(crate::authentication::may_carry)?;
        let bytes = if header.raw_value.is_empty() { header.value.as_bytes() } else { &header.raw_value };
        let value = HeaderValue::from_bytes(bytes).ok()?;
        // `append` is false unless it is said, and what an authorizer says replaces what a client wrote.
        let how = match (option.append, option.append_action) {
            (Some(true), _) => How::Append,
            (_, ADD_IF_ABSENT) => How::IfAbsent,
            (_, OVERWRITE_IF_EXISTS) => How::IfPresent,
            _ => How::Replace,
        };
        Some((name, value, how))
    };
    options.into_iter().filter_map(edit).collect()
}

const PREFIX: usize = 5;
const SCHEME: &str = "http";
/// `envoy.config.core.v3.HeaderValueOption.HeaderAppendAction`
const ADD_IF_ABSENT: i32 = 1;
const OVERWRITE_IF_EXISTS: i32 = 3;
