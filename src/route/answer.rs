//! What is answered here, in place of a backend.

use http::header::{CONTENT_TYPE, HeaderMap};
use http::request::Parts;
use http::{HeaderName, HeaderValue, Response, StatusCode, response};

use super::RouteRef;

/// An answer without a body.
#[derive(Clone, PartialEq, Debug)]
pub struct Answer {
    pub because: Because,
    /// What it is in HTTP; a gRPC client gets 200 and the other status.
    pub status: StatusCode,
    pub grpc: Option<GrpcStatus>,
    /// More headers, such as `location`.
    pub headers: HeaderMap,
    /// Which route says so; none where no rule was met.
    pub route: Option<RouteRef>,
}

impl Answer {
    /// To a request, in the words that its client understands.
    pub fn to(head: &Parts, because: Because) -> Self {
        Self::error(is_grpc(head), because)
    }

    pub(super) fn error(is_grpc: bool, because: Because) -> Self {
        let (status, grpc) = because.statuses();
        Self { because, status, grpc: is_grpc.then_some(grpc), headers: HeaderMap::new(), route: None }
    }

    /// As it is sent: to a gRPC client as a response of trailers alone
    /// ([gRPC over HTTP/2](https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md)).
    pub fn into_head(self) -> response::Parts {
        let (mut head, ()) = Response::new(()).into_parts();
        head.headers = self.headers;
        head.status = self.status;
        if let Some(grpc) = self.grpc {
            head.status = StatusCode::OK;
            head.headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            head.headers.insert(GRPC_STATUS, HeaderValue::from(grpc as u16));
            head.headers.insert(GRPC_MESSAGE, HeaderValue::from_static(self.because.message()));
        }
        head
    }
}

/// Why a request is answered here.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Because {
    /// No rule of the routes is met.
    NoMatch,
    /// The backend is not there, or of a kind that requests cannot be sent to.
    NoBackend,
    /// The rule has a filter that cannot be honoured.
    Filter,
    /// The backend has no endpoint that is ready.
    NoEndpoint,
    /// No endpoint could be reached.
    Connect,
    /// The request or its last try took too long.
    Timeout,
    /// The rule redirects.
    Redirect,
    /// A preflight request is answered by the filter `CORS`.
    Preflight,
}

impl Because {
    /// One word, for a label.
    pub fn name(self) -> &'static str {
        match self {
            Self::NoMatch => "no-match",
            Self::NoBackend => "no-backend",
            Self::Filter => "filter",
            Self::NoEndpoint => "no-endpoint",
            Self::Connect => "connect",
            Self::Timeout => "timeout",
            Self::Redirect => "redirect",
            Self::Preflight => "preflight",
        }
    }

    /// A few words for the client: visible ASCII without `%`, as `grpc-message` wants it.
    pub fn message(self) -> &'static str {
        match self {
            Self::NoMatch => "no rule of the route is met",
            Self::NoBackend => "the backend of the route is not there",
            Self::Filter => "the rule of the route has a filter that cannot be honoured",
            Self::NoEndpoint => "the backend has no ready endpoint",
            Self::Connect => "no endpoint of the backend can be reached",
            Self::Timeout => "the request took too long",
            Self::Redirect => "the route redirects",
            Self::Preflight => "cross-origin requests are answered by the route",
        }
    }

    fn statuses(self) -> (StatusCode, GrpcStatus) {
        match self {
            Self::NoMatch => (StatusCode::NOT_FOUND, GrpcStatus::Unimplemented),
            Self::NoBackend | Self::Filter => (StatusCode::INTERNAL_SERVER_ERROR, GrpcStatus::Unavailable),
            Self::NoEndpoint | Self::Connect => (StatusCode::SERVICE_UNAVAILABLE, GrpcStatus::Unavailable),
            Self::Timeout => (StatusCode::GATEWAY_TIMEOUT, GrpcStatus::DeadlineExceeded),
            Self::Redirect => (StatusCode::FOUND, GrpcStatus::Unimplemented),
            Self::Preflight => (StatusCode::NO_CONTENT, GrpcStatus::Unimplemented),
        }
    }
}

/// [Status codes of gRPC](https://grpc.io/docs/guides/status-codes/), those of errors.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
#[repr(u16)]
pub enum GrpcStatus {
    Cancelled = 1,
    Unknown = 2,
    InvalidArgument = 3,
    DeadlineExceeded = 4,
    NotFound = 5,
    AlreadyExists = 6,
    PermissionDenied = 7,
    ResourceExhausted = 8,
    FailedPrecondition = 9,
    Aborted = 10,
    OutOfRange = 11,
    Unimplemented = 12,
    Internal = 13,
    Unavailable = 14,
    DataLoss = 15,
    Unauthenticated = 16,
}

impl GrpcStatus {
    /// By their names, as policies write them.
    pub const ALL: [(&'static str, Self); 16] = [
        ("CANCELLED", Self::Cancelled),
        ("UNKNOWN", Self::Unknown),
        ("INVALID_ARGUMENT", Self::InvalidArgument),
        ("DEADLINE_EXCEEDED", Self::DeadlineExceeded),
        ("NOT_FOUND", Self::NotFound),
        ("ALREADY_EXISTS", Self::AlreadyExists),
        ("PERMISSION_DENIED", Self::PermissionDenied),
        ("RESOURCE_EXHAUSTED", Self::ResourceExhausted),
        ("FAILED_PRECONDITION", Self::FailedPrecondition),
        ("ABORTED", Self::Aborted),
        ("OUT_OF_RANGE", Self::OutOfRange),
        ("UNIMPLEMENTED", Self::Unimplemented),
        ("INTERNAL", Self::Internal),
        ("UNAVAILABLE", Self::Unavailable),
        ("DATA_LOSS", Self::DataLoss),
        ("UNAUTHENTICATED", Self::Unauthenticated),
    ];

    /// What a client of gRPC makes of an answer of HTTP ([HTTP to gRPC status code
    /// mapping](https://github.com/grpc/grpc/blob/master/doc/http-grpc-status-mapping.md)).
    pub fn of_http(status: StatusCode) -> Self {
        match status.as_u16() {
            400 => Self::Internal,
            401 => Self::Unauthenticated,
            403 => Self::PermissionDenied,
            404 => Self::Unimplemented,
            429 | 502..=504 => Self::Unavailable,
            _ => Self::Unknown,
        }
    }
}

/// Whether a gRPC client asks. gRPC-Web is another protocol.
pub fn is_grpc(head: &Parts) -> bool {
    let Some(kind) = head.headers.get(CONTENT_TYPE) else { return false };
    let rest = kind.as_bytes().get(..GRPC.len()).filter(|start| start.eq_ignore_ascii_case(GRPC.as_bytes()));
    rest.is_some() && matches!(kind.as_bytes().get(GRPC.len()), None | Some(b'+' | b';' | b' '))
}

const GRPC: &str = "application/grpc";
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");
