//! What the server tells of a request: `Name=value` lines over HTTP, a message over gRPC.

use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, header};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};

use crate::grpc::{self, Assertions, Code};

/// The connection that a request came over.
pub struct Arrival {
    pub peer: IpAddr,
    pub port: u16,
    /// What the TLS handshake agreed on, where there was one.
    pub alpn: Option<String>,
    pub hostname: Arc<str>,
}

pub type Body = UnsyncBoxBody<Bytes, Infallible>;

impl Arrival {
    pub fn answer<B>(&self, request: &Request<B>) -> Response<Body> {
        if grpc::is_grpc(request.headers()) {
            return self.answer_grpc(request);
        }
        let mut response = Response::new(Full::new(self.tell(request).into()).boxed_unsync());
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        response
    }

    /// The lines of the suite's `echo.Response`. Headers come last: what a header says must not pass for another line.
    fn tell<B>(&self, request: &Request<B>) -> String {
        let mut told = format!(
            "Hostname={}\nServicePort={}\nHost={}\nURL={}\nMethod={}\nProto={:?}\nIP={}\n",
            self.hostname,
            self.port,
            authority(request),
            request.uri().path_and_query().map_or("/", |url| url.as_str()),
            request.method(),
            request.version(),
            self.peer,
        );
        if let Some(alpn) = &self.alpn {
            told.push_str(&format!("Alpn={alpn}\n"));
        }
        for (name, value) in request.headers() {
            told.push_str(&format!("RequestHeader={name}:{}\n", text(value)));
        }
        told
    }

    fn answer_grpc<B>(&self, request: &Request<B>) -> Response<Body> {
        if !grpc::METHODS.contains(&request.uri().path()) {
            return grpc::refuse(Code::Unimplemented, "there is no such method");
        }
        let headers = request.headers().iter();
        grpc::answer(&Assertions {
            fully_qualified_method: request.uri().path().to_owned(),
            headers: headers.map(|(key, value)| grpc::Header { key: key.to_string(), value: text(value) }).collect(),
            authority: authority(request),
            context: Some(grpc::Context { pod: self.hostname.to_string() }),
        })
    }
}

/// The host that was asked for: `:authority` of HTTP/2, `Host` of HTTP/1.1.
fn authority<B>(request: &Request<B>) -> String {
    let of_uri = request.uri().authority().map(ToString::to_string);
    of_uri.or_else(|| host(request.headers())).unwrap_or_default()
}

fn host(headers: &HeaderMap) -> Option<String> {
    headers.get(header::HOST).map(text)
}

/// A header's value in one line of text.
pub fn text(value: &HeaderValue) -> String {
    String::from_utf8_lossy(value.as_bytes()).into_owned()
}
