//! The suite's `grpcecho.proto` as far as it is told here, and gRPC's framing of one message each way
//! (<https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md>).

use std::convert::Infallible;

use anyhow::{Context as _, Result, bail, ensure};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Response, header};
use http_body_util::{BodyExt, Full};
use prost::Message;

use crate::answer::{Body, text};

#[derive(Clone, PartialEq, Message)]
pub struct EchoRequest {}

#[derive(Clone, PartialEq, Message)]
pub struct EchoResponse {
    #[prost(message, optional, tag = "1")]
    pub assertions: Option<Assertions>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Assertions {
    #[prost(string, tag = "1")]
    pub fully_qualified_method: String,
    #[prost(message, repeated, tag = "2")]
    pub headers: Vec<Header>,
    #[prost(string, tag = "3")]
    pub authority: String,
    #[prost(message, optional, tag = "4")]
    pub context: Option<Context>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Header {
    #[prost(string, tag = "1")]
    pub key: String,
    #[prost(string, tag = "2")]
    pub value: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct Context {
    #[prost(string, tag = "4")]
    pub pod: String,
}

pub const ECHO: &str = "/gateway_api_conformance.echo_basic.grpcecho.GrpcEcho/Echo";
/// The methods that answer. `EchoThree` of the same service is there to be unimplemented.
pub const METHODS: [&str; 2] = [ECHO, "/gateway_api_conformance.echo_basic.grpcecho.GrpcEcho/EchoTwo"];

/// The status codes in use: <https://grpc.io/docs/guides/status-codes/>.
#[derive(Clone, Copy)]
pub enum Code {
    Ok = 0,
    Unimplemented = 12,
}

pub fn is_grpc(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    kind == CONTENT_TYPE || kind.starts_with("application/grpc+") || kind.starts_with("application/grpc;")
}

/// The one message of a call that succeeded.
pub fn answer(assertions: &Assertions) -> Response<Body> {
    let message = frame(&EchoResponse { assertions: Some(assertions.clone()) });
    let trailers = HeaderMap::from_iter([(STATUS, HeaderValue::from(Code::Ok as u16))]);
    let body = Full::new(message).with_trailers(async { Some(Ok::<_, Infallible>(trailers)) });
    let mut response = Response::new(body.boxed_unsync());
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(CONTENT_TYPE));
    response
}

/// An answer without a message: headers alone, which are the trailers too.
pub fn refuse(code: Code, words: &'static str) -> Response<Body> {
    let mut response = Response::new(Full::default().boxed_unsync());
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(CONTENT_TYPE));
    headers.insert(STATUS, HeaderValue::from(code as u16));
    headers.insert(MESSAGE, HeaderValue::from_static(words));
    response
}

/// What a server said, once its status says that it is the answer.
pub fn read(headers: &HeaderMap, trailers: Option<&HeaderMap>, body: Bytes) -> Result<Assertions> {
    let ends = [trailers, Some(headers)];
    let find = |name: &HeaderName| ends.iter().flatten().find_map(|end| end.get(name)).map(text);
    let status = find(&STATUS).context("an answer without grpc-status")?;
    if status != "0" {
        bail!("grpc-status {status}: {}", find(&MESSAGE).unwrap_or_default());
    }
    let response = EchoResponse::decode(unframe(body)?).context("an answer that is no EchoResponse")?;
    response.assertions.context("an answer that tells nothing")
}

/// Not compressed, and prefixed with its length.
pub fn frame(message: &impl Message) -> Bytes {
    let length = message.encoded_len();
    let mut framed = BytesMut::with_capacity(PREFIX + length);
    framed.put_u8(0);
    framed.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    framed.put_slice(&message.encode_to_vec());
    framed.freeze()
}

fn unframe(mut body: Bytes) -> Result<Bytes> {
    ensure!(body.len() >= PREFIX, "an answer without a message");
    ensure!(body.get_u8() == 0, "a compressed message that was not asked for");
    let length = body.get_u32();
    ensure!(usize::try_from(length).is_ok_and(|length| length == body.len()), "not one message but parts or several");
    Ok(body)
}

pub const CONTENT_TYPE: &str = "application/grpc";
const STATUS: HeaderName = HeaderName::from_static("grpc-status");
const MESSAGE: HeaderName = HeaderName::from_static("grpc-message");
/// One byte that tells of compression, four of length.
const PREFIX: usize = 5;
