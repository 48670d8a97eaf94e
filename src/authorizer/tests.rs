use bytes::{BufMut, Bytes, BytesMut};
use http::request::Parts;
use http::{HeaderMap, HeaderName, Request, StatusCode};
use prost::Message;
use serde_json::{Value, json};

use super::wire::{
    CheckRequest, CheckResponse, DeniedHttpResponse, HeaderValueOption, HttpResponse, HttpStatus, OkHttpResponse,
    QueryParameter, Status,
};
use super::*;
use crate::mesh::NamespacedName;

fn decode(spec: Value) -> Result<Authorizer, DecodeError> {
    let object = json!({"metadata": {"name": "gate", "namespace": "auth"}, "spec": spec});
    Authorizer::decode(&NamespacedName::new("auth", "gate"), &object)
}

fn by_http(settings: Value) -> Authorizer {
    decode(json!({"service": {"name": "gate", "port": 80}, "http": settings})).unwrap()
}

fn by_grpc() -> Authorizer {
    decode(json!({"service": {"name": "gate", "namespace": "other", "port": 9000}, "grpc": {}})).unwrap()
}

fn head(target: &str, headers: &[(&str, &str)]) -> Parts {
    let mut request = Request::builder().method("POST").uri(target);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(()).unwrap().into_parts().0
}

fn ask(authorizer: &Authorizer, head: &Parts, body: Option<&CheckBody>) -> Question {
    let source =
        Peer { address: "10.0.0.1:1234".parse().unwrap(), principal: "spiffe://cluster.local/ns/a/sa/b".into() };
    let destination = Peer { address: "10.0.0.9:80".parse().unwrap(), principal: String::new() };
    let check = Check { head, body, source: &source, destination: &destination, time: (7, 0) };
    authorizer.question(&check).unwrap()
}

fn reply(status: u16, headers: &[(&str, &str)], body: &'static str) -> Reply {
    let mut map = HeaderMap::new();
    for (name, value) in headers {
        map.append(HeaderName::try_from(*name).unwrap(), value.parse().unwrap());
    }
    Reply {
        status: StatusCode::from_u16(status).unwrap(),
        headers: map,
        body: Bytes::from_static(body.as_bytes()),
        trailers: None,
    }
}

fn allowed(verdict: Verdict) -> Allowed {
    match verdict {
        Verdict::Allow(allowed) => allowed,
        other => panic!("{other:?}"),
    }
}

fn denied(verdict: Verdict) -> Denied {
    match verdict {
        Verdict::Deny(denied) => denied,
        other => panic!("{other:?}"),
    }
}

#[test]
fn http_is_asked_with_the_requests_own_line_and_the_headers_that_are_let_through() {
    let gate = by_http(json!({
        "pathPrefix": "/check/",
        "includeRequestHeadersInCheck": ["cookie", "x-trace-*"],
        "includeAdditionalHeadersInCheck": [{"name": "x-from", "value": "mesh"}],
    }));
    let head = head(
        "/cart?id=1",
        &[
            ("host", "cart"),
            ("authorization", "Bearer x"),
            ("cookie", "a=1"),
            ("cookie", "b=2"),
            ("x-trace-id", "7"),
            ("x-from", "spoofed"),
            ("x-else", "1"),
            ("content-length", "5"),
            ("content-type", "text/plain"),
        ],
    );
    let question = ask(&gate, &head, None);
    assert_eq!((question.head.method.as_str(), question.head.uri.to_string().as_str()), ("POST", "/check/cart?id=1"));
    let mut sent: Vec<String> =
        question.head.headers.iter().map(|(name, value)| format!("{name}={}", value.to_str().unwrap())).collect();
    sent.sort();
    assert_eq!(sent, ["authorization=Bearer x", "cookie=a=1; b=2", "host=cart", "x-from=mesh", "x-trace-id=7"]);
    let body = CheckBody { data: Bytes::from_static(b"12345"), is_partial: true };
    let question = ask(&gate, &head, Some(&body));
    assert_eq!(question.body, "12345");
    assert_eq!(question.head.headers["x-envoy-auth-partial-body"], "true");
    assert_eq!(question.head.headers["content-type"], "text/plain");
}

#[test]
fn what_http_lets_pass_gets_its_headers_and_none_that_a_client_made_up() {
    let gate = by_http(json!({
        "headersToUpstreamOnAllow": ["x-user", "x-auth-*"], "headersToDownstreamOnAllow": ["set-cookie"],
    }));
    for status in [200, 202] {
        let answer = reply(
            status,
            &[("X-User", "alice"), ("x-else", "1"), ("set-cookie", "s=1"), ("x-auth-a", "1"), ("x-auth-a", "2")],
            "",
        );
        let allowed = allowed(gate.verdict(answer));
        let spoofed = [("x-user", "root"), ("x_user", "root"), ("x-auth-groups", "admins"), ("x-mine", "1")];
        let mut head = head("/", &spoofed);
        allowed.edit(&mut head);
        let mut left: Vec<String> =
            head.headers.iter().map(|(name, value)| format!("{name}={}", value.to_str().unwrap())).collect();
        left.sort();
        assert_eq!(left, ["x-auth-a=1", "x-auth-a=2", "x-mine=1", "x-user=alice"]);
        let mut answer = HeaderMap::new();
        answer.insert("set-cookie", "own=1".parse().unwrap());
        allowed.edit_answer(&mut answer);
        assert_eq!(answer.get_all("set-cookie").iter().count(), 2);
    }
}

#[test]
fn what_http_refuses_is_told_and_what_it_fails_at_is_not() {
    let gate = by_http(json!({}));
    let told = denied(gate.verdict(reply(
        302,
        &[("location", "https://login.example"), ("connection", "close"), ("x-a", "1")],
        "go",
    )));
    assert_eq!((told.status.as_u16(), &told.body[..]), (302, &b"go"[..]));
    assert_eq!(
        (told.headers["location"].to_str().unwrap(), told.headers.contains_key("connection")),
        ("https://login.example", false)
    );
    assert!(told.headers.contains_key("x-a"));
    let narrow = by_http(json!({"headersToDownstreamOnDeny": ["x-b"]}));
    let told = denied(narrow.verdict(reply(401, &[("www-authenticate", "Basic"), ("x-a", "1"), ("x-b", "1")], "")));
    assert_eq!(told.headers.keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["www-authenticate", "x-b"]);
    for status in [500, 503, 101] {
        assert!(matches!(gate.verdict(reply(status, &[], "")), Verdict::Failed(_)), "{status}");
    }
}

#[test]
fn a_filter_of_the_gateway_api_takes_200_alone_and_copies_what_it_names_or_all() {
    let mut gate = by_http(json!({}));
    let Protocol::Http(settings) = &mut gate.protocol else { panic!() };
    (settings.any_success, settings.to_upstream) = (false, None);
    assert_eq!(denied(gate.verdict(reply(202, &[], ""))).status, 403);
    let allowed = allowed(gate.verdict(reply(
        200,
        &[("x-user", "a"), ("content-type", "text/html"), ("host", "evil"), ("date", "now")],
        "",
    )));
    let mut head = head("/", &[("host", "cart"), ("x-user", "root"), ("content-type", "text/plain")]);
    allowed.edit(&mut head);
    let value = |name: &str| head.headers[name].to_str().unwrap();
    assert_eq!((value("host"), value("x-user"), value("content-type")), ("cart", "a", "text/plain"));
}

#[test]
fn grpc_is_asked_with_the_message_that_envoy_sends() {
    let gate = by_grpc();
    assert_eq!((gate.service.to_string().as_str(), gate.port), ("other/gate", 9000));
    let head = head(
        "/cart?id=1",
        &[("host", "cart"), ("x-a", "1"), ("x-a", "2"), ("x-request-id", "r"), ("content-length", "5")],
    );
    let body = CheckBody { data: Bytes::from_static(b"\xff\x00"), is_partial: false };
    let question = ask(&gate, &head, Some(&body));
    assert_eq!(question.head.uri, "/envoy.service.auth.v3.Authorization/Check");
    let (prefix, message) = question.body.split_at(5);
    assert_eq!((prefix[0], u32::from_be_bytes(prefix[1..].try_into().unwrap()) as usize), (0, message.len()));
    let attributes = CheckRequest::decode(message).unwrap().attributes.unwrap();
    assert_eq!(attributes.source.unwrap().principal, "spiffe://cluster.local/ns/a/sa/b");
    let request = attributes.request.unwrap().http.unwrap();
    assert_eq!((request.method.as_str(), request.path.as_str(), request.host.as_str()), ("POST", "/cart?id=1", "cart"));
    assert_eq!((request.id.as_str(), request.size, &request.raw_body[..]), ("r", 5, &b"\xff\x00"[..]));
    assert_eq!((request.headers["x-a"].as_str(), request.headers[":path"].as_str()), ("1,2", "/cart?id=1"));
}

/// The bytes by hand, from the encoding of Protocol Buffers.
#[test]
fn the_messages_have_the_bytes_of_the_published_protocol() {
    let option = |append| HeaderValueOption {
        header: Some(wire::HeaderValue { key: "k".into(), value: "v".into(), raw_value: Bytes::new() }),
        append,
        append_action: 0,
    };
    let response = CheckResponse {
        status: Some(Status { code: 7, message: String::new() }),
        http_response: Some(HttpResponse::Denied(DeniedHttpResponse {
            status: Some(HttpStatus { code: 401 }),
            headers: vec![option(Some(true))],
            body: "no".into(),
        })),
    };
    let mut wanted = vec![0x0a, 2, 0x08, 7, 0x12, 21];
    wanted.extend([0x0a, 3, 0x08, 0x91, 0x03]);
    wanted.extend([0x12, 10, 0x0a, 6, 0x0a, 1, b'k', 0x12, 1, b'v']);
    // BoolValue { value: true }
    wanted.splice(wanted.len()..wanted.len(), [0x12, 2, 0x08, 1]);
    wanted[12] = 12;
    wanted.extend([0x1a, 2, b'n', b'o']);
    wanted[5] = (wanted.len() - 6) as u8;
    assert_eq!(response.encode_to_vec(), wanted);
    assert_eq!(CheckResponse::decode(&wanted[..]).unwrap(), response);
}

fn grpc_reply(response: &CheckResponse) -> Reply {
    let message = response.encode_to_vec();
    let mut body = BytesMut::new();
    body.put_u8(0);
    body.put_u32(message.len() as u32);
    body.put_slice(&message);
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", "0".parse().unwrap());
    Reply { status: StatusCode::OK, headers: HeaderMap::new(), body: body.freeze(), trailers: Some(trailers) }
}

fn option(key: &str, value: &str, append: Option<bool>, append_action: i32) -> HeaderValueOption {
    let header = wire::HeaderValue { key: key.into(), value: value.into(), raw_value: Bytes::new() };
    HeaderValueOption { header: Some(header), append, append_action }
}

#[test]
fn what_grpc_lets_pass_is_edited_as_it_says() {
    let response = CheckResponse {
        status: Some(Status::default()),
        http_response: Some(HttpResponse::Ok(OkHttpResponse {
            headers: vec![
                option("x-user", "alice", None, 0),
                option("x-more", "2", Some(true), 0),
                option("x-here", "own", None, 1),
                option("x-absent", "no", None, 3),
                option(":path", "/evil", None, 0),
                option("content-length", "0", None, 0),
            ],
            headers_to_remove: vec!["authorization".into(), "host".into(), ":path".into()],
            response_headers_to_add: vec![option("x-seen", "1", None, 0)],
            query_parameters_to_set: vec![QueryParameter { key: "user".into(), value: "a b".into() }],
            query_parameters_to_remove: vec!["token".into()],
        })),
    };
    let allowed = allowed(by_grpc().verdict(grpc_reply(&response)));
    let mut head = head(
        "/x?token=1&a=b&user=root&token=2",
        &[
            ("host", "cart"),
            ("authorization", "x"),
            ("x-user", "root"),
            ("x-more", "1"),
            ("x-here", "client"),
            ("content-length", "5"),
        ],
    );
    allowed.edit(&mut head);
    assert_eq!(head.uri, "/x?a=b&user=a+b");
    let mut left: Vec<String> =
        head.headers.iter().map(|(name, value)| format!("{name}={}", value.to_str().unwrap())).collect();
    left.sort();
    assert_eq!(left, ["content-length=5", "host=cart", "x-here=client", "x-more=1", "x-more=2", "x-user=alice"]);
    assert!(allowed.changes_answer());
}

#[test]
fn what_grpc_denies_or_does_not_say_is_refused() {
    let gate = by_grpc();
    let deny = |code: i32, response: Option<HttpResponse>| CheckResponse {
        status: Some(Status { code, message: String::new() }),
        http_response: response,
    };
    let with = |code: i32| {
        HttpResponse::Denied(DeniedHttpResponse {
            status: Some(HttpStatus { code }),
            headers: vec![option("x-why", "because", None, 0)],
            body: "no".into(),
        })
    };
    for (response, wanted) in [
        (deny(7, None), 403),
        (deny(16, Some(with(401))), 401),
        (deny(7, Some(with(200))), 403),
        (deny(7, Some(with(0))), 403),
        (deny(7, Some(HttpResponse::Ok(OkHttpResponse::default()))), 403),
    ] {
        assert_eq!(denied(gate.verdict(grpc_reply(&response))).status, wanted, "{response:?}");
    }
    assert_eq!(denied(gate.verdict(grpc_reply(&deny(7, Some(with(401)))))).headers["x-why"], "because");
    let good = grpc_reply(&CheckResponse::default());
    assert!(matches!(gate.verdict(good.clone()), Verdict::Allow(_)));
    let failed = |change: fn(&mut Reply)| {
        let mut reply = good.clone();
        change(&mut reply);
        matches!(gate.verdict(reply), Verdict::Failed(_))
    };
    assert!(failed(|reply| reply.status = StatusCode::NOT_FOUND));
    assert!(failed(|reply| reply.trailers = None));
    assert!(failed(|reply| drop(reply.trailers.as_mut().unwrap().insert("grpc-status", "14".parse().unwrap()))));
    assert!(failed(|reply| reply.body = Bytes::new()));
    assert!(failed(|reply| reply.body = Bytes::from_static(b"\x01\0\0\0\0")));
    assert!(failed(|reply| reply.body = Bytes::from_static(b"\0\0\0\0\x01\xff")));
    assert!(matches!(gate.verdict(grpc_reply(&deny(0, Some(with(403))))), Verdict::Failed(_)));
}

#[test]
fn an_authorizer_that_is_not_written_as_it_must_be_is_refused_by_its_field() {
    let service = json!({"name": "gate", "port": 80});
    for (spec, field) in [
        (json!({"http": {}}), "spec"),
        (json!({"service": service}), "spec"),
        (json!({"service": service, "http": {}, "grpc": {}}), "spec"),
        (json!({"service": {"name": "gate"}, "http": {}}), "spec.service"),
        (json!({"service": service, "http": {}, "failOpen": true}), "spec.failOpen"),
        (json!({"service": service, "http": {"pathPrefx": "/a"}}), "spec.http.pathPrefx"),
        (json!({"service": service, "http": {"pathPrefix": "a b"}}), "spec.http.pathPrefix"),
        (
            json!({"service": service, "http": {"includeRequestHeadersInCheck": ["a", "b c"]}}),
            "spec.http.includeRequestHeadersInCheck[1]",
        ),
        (json!({"service": service, "grpc": {}, "timeout": "5"}), "spec.timeout"),
        (json!({"service": service, "grpc": {}, "timeout": "0s"}), "spec.timeout"),
        (json!({"service": service, "grpc": {}, "statusOnError": 200}), "spec.statusOnError"),
        (
            json!({"service": service, "grpc": {}, "includeRequestBodyInCheck": {"maxRequestBytes": 0}}),
            "spec.includeRequestBodyInCheck.maxRequestBytes",
        ),
    ] {
        let error = decode(spec.clone()).unwrap_err();
        assert_eq!(error.field, field, "{spec}: {error}");
    }
}

#[test]
fn a_policy_means_its_own_namespaces_authorizer_before_the_meshs() {
    let mut all = Authorizers::default();
    let of = |namespace: &str| Authorizer { name: NamespacedName::new(namespace, "gate"), ..by_grpc() };
    all.apply(Delta::Apply(of("root").into()));
    assert_eq!(all.find("shop", "gate", "root").unwrap().name.to_string(), "root/gate");
    all.apply(Delta::Apply(of("shop").into()));
    assert_eq!(all.find("shop", "gate", "root").unwrap().name.to_string(), "shop/gate");
    all.apply(Delta::Delete(NamespacedName::new("shop", "gate")));
    assert!(all.find("shop", "other", "root").is_none());
    assert_eq!(all.find("shop", "gate", "root").unwrap().name.to_string(), "root/gate");
}

mod random {
    use proptest::prelude::*;

    use super::*;
    use crate::mutation::mutated;

    proptest! {
        #[test]
        fn any_reply_is_read_or_refused_and_its_edits_leave_a_request(bytes in mutated(vec![
            grpc_reply(&CheckResponse::default()).body.to_vec(),
            grpc_reply(&CheckResponse {
                status: Some(Status::default()),
                http_response: Some(HttpResponse::Ok(OkHttpResponse {
                    headers: vec![option("x-user", "alice", None, 0)],
                    headers_to_remove: vec!["host".into()],
                    query_parameters_to_set: vec![QueryParameter { key: "u".into(), value: "v".into() }],
                    ..OkHttpResponse::default()
                })),
            }).body.to_vec(),
        ])) {
            let mut reply = grpc_reply(&CheckResponse::default());
            reply.body = bytes.into();
            if let Verdict::Allow(allowed) = by_grpc().verdict(reply) {
                let mut head = head("/x?y", &[("host", "cart"), ("content-length", "5")]);
                allowed.edit(&mut head);
                prop_assert_eq!((head.uri.path(), head.headers.get("host").unwrap()), ("/x", &"cart".parse().unwrap()));
                prop_assert_eq!(head.headers.get("content-length").unwrap(), "5");
            }
        }
    }
}
