use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

use super::{Check, Names, Verdict, by_grpc, by_http};
use crate::mesh::NamespacedName;

/// Who is asked, and how.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Authorizer {
    /// Of the object, or of the route, that says so.
    pub name: NamespacedName,
    pub service: NamespacedName,
    pub port: u16,
    pub protocol: Protocol,
    pub body: Option<BodyLimit>,
    pub timeout: Duration,
    /// What a client is told where nobody can be asked.
    pub status_on_error: StatusCode,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Protocol {
    Http(HttpSettings),
    Grpc(GrpcSettings),
}

/// How much of a body is sent along.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BodyLimit {
    pub bytes: usize,
    /// Whether the first part of a longer one will do; else it is refused.
    pub partial: bool,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HttpSettings {
    /// Stands before the path of the request; empty, or a path.
    pub path_prefix: Arc<str>,
    /// Which headers are sent, beside Host and Authorization.
    pub request_headers: Names,
    /// Sent with every question.
    pub added: Vec<(HeaderName, HeaderValue)>,
    /// Which headers of the answer go to the application; none: all.
    pub to_upstream: Option<Names>,
    /// Which go to the client with the application's answer.
    pub to_downstream: Names,
    /// Which go to a client that is refused; none: all.
    pub of_denial: Option<Names>,
    /// Whether any 2xx lets a request pass; else 200 alone does.
    pub any_success: bool,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GrpcSettings {
    /// Which headers are sent; none: all.
    pub request_headers: Option<Names>,
}

/// What is sent to an authorizer.
#[derive(Debug)]
pub struct Question {
    pub head: Parts,
    pub body: Bytes,
}

/// What came back, whole.
#[derive(Clone, Debug)]
pub struct Reply {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
    pub trailers: Option<HeaderMap>,
}

impl Authorizer {
    /// What it is asked about a request; none where that cannot be said in its protocol.
    pub fn question(&self, check: &Check<'_>) -> Option<Question> {
        match &self.protocol {
            Protocol::Http(settings) => by_http::question(settings, check),
            Protocol::Grpc(settings) => by_grpc::question(settings, check),
        }
    }

    /// What its reply says.
    pub fn verdict(&self, reply: Reply) -> Verdict {
        match &self.protocol {
            Protocol::Http(settings) => by_http::verdict(settings, reply),
            Protocol::Grpc(_) => by_grpc::verdict(&reply),
        }
    }

    pub fn is_grpc(&self) -> bool {
        matches!(self.protocol, Protocol::Grpc(_))
    }
}

/// For how long an answer is waited for where nobody says.
pub(super) const DEFAULT_TIMEOUT: Duration = Duration::from_secs(5);
