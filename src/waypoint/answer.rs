//! What is answered here, in place of an application.

use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER};
use http::{HeaderMap, Response, StatusCode};

use super::{Failure, LIMITED};
use crate::authentication::{Challenge, Fault};
use crate::authorizer::Denied;
use crate::mesh::{NamespacedName, Reason};
use crate::route::GrpcStatus;

/// Why a request got no answer of an application: what its client is told, and what metrics and the access log are.
#[derive(Debug)]
pub struct Refusal {
    pub status: StatusCode,
    grpc: GrpcStatus,
    pub reason: Reason,
    pub detail: String,
    /// When it is worth asking again.
    retry_after: Option<Duration>,
    /// What else its client is told.
    told: Option<Box<Told>>,
}

#[derive(Debug, Default)]
struct Told {
    headers: HeaderMap,
    body: Bytes,
}

impl Refusal {
    /// The client's request cannot be passed on as it is.
    pub fn malformed(status: StatusCode, detail: impl Into<String>) -> Self {
        Self { status, grpc: GrpcStatus::Internal, ..Self::unavailable(Reason::Protocol, detail) }
    }

    pub fn no_endpoint(detail: impl Into<String>) -> Self {
        Self::unavailable(Reason::NoEndpoint, detail)
    }

    /// No endpoint could be reached. Who policy holds back is told so.
    pub fn unreached(failure: Failure) -> Self {
        match failure.reason {
            Reason::Policy(_) | Reason::Plaintext(_) | Reason::Denied => Self {
                status: StatusCode::FORBIDDEN,
                grpc: GrpcStatus::PermissionDenied,
                ..Self::unavailable(failure.reason, failure.detail)
            },
            reason => Self::unavailable(reason, failure.detail),
        }
    }

    /// The application broke off before its answer.
    pub fn broken(detail: impl Into<String>) -> Self {
        Self { status: StatusCode::BAD_GATEWAY, ..Self::unavailable(Reason::Reset, detail) }
    }

    pub fn timeout(detail: impl Into<String>) -> Self {
        Self {
            status: StatusCode::GATEWAY_TIMEOUT,
            grpc: GrpcStatus::DeadlineExceeded,
            ..Self::unavailable(Reason::Timeout, detail)
        }
    }

    pub fn too_many(detail: impl Into<String>) -> Self {
        Self { grpc: GrpcStatus::ResourceExhausted, ..Self::unavailable(Reason::Limit, detail) }
    }

    /// The request's token does not hold.
    pub fn token(fault: &Fault) -> Self {
        let Challenge { status, headers, .. } = Challenge::of(fault);
        Self {
            status,
            grpc: GrpcStatus::Unauthenticated,
            reason: Reason::Token(fault.code()),
            detail: fault.to_string(),
            retry_after: None,
            told: Some(Box::new(Told { headers, body: Bytes::new() })),
        }
    }

    /// An external authorizer says no, in words of its own.
    pub fn denied(authorizer: &NamespacedName, denied: Denied) -> Self {
        let Denied { status, headers, body } = denied;
        Self {
            status,
            grpc: match status {
                StatusCode::UNAUTHORIZED => GrpcStatus::Unauthenticated,
                StatusCode::TOO_MANY_REQUESTS => GrpcStatus::ResourceExhausted,
                _ => GrpcStatus::PermissionDenied,
            },
            reason: Reason::Authorizer(authorizer.clone()),
            detail: format!("ExternalAuthorizer {authorizer} answered {status}"),
            retry_after: None,
            told: Some(Box::new(Told { headers, body })),
        }
    }

    /// An external authorizer could not be asked.
    pub fn unasked(authorizer: &NamespacedName, status: StatusCode, cause: &str) -> Self {
        Self {
            status,
            grpc: GrpcStatus::PermissionDenied,
            reason: Reason::Authorizer(authorizer.clone()),
            detail: format!("ExternalAuthorizer {authorizer} could not be asked, so the request is refused: {cause}"),
            retry_after: None,
            told: None,
        }
    }

    /// What its client reads, where there is anything.
    pub fn body(&self, is_grpc: bool) -> Bytes {
        self.told.as_ref().filter(|_| !is_grpc).map(|told| told.body.clone()).unwrap_or_default()
    }

    /// A defect of ours.
    pub fn internal(detail: impl Into<String>) -> Self {
        Self {
            status: StatusCode::INTERNAL_SERVER_ERROR,
            grpc: GrpcStatus::Internal,
            ..Self::unavailable(Reason::Internal, detail)
        }
    }

    /// It was worth another try, and too many others were.
    pub fn budget(last: &str) -> Self {
        Self::unavailable(Reason::RetryBudget, format!("too many requests were sent again already; {last}"))
    }

    /// A limit holds it back for so long.
    pub fn rate_limit(wait: Duration) -> Self {
        metrics::counter!(LIMITED).increment(1);
        Self {
            status: StatusCode::TOO_MANY_REQUESTS,
            grpc: GrpcStatus::ResourceExhausted,
            retry_after: Some(wait),
            ..Self::unavailable(Reason::RateLimit, "a rate limit holds it back")
        }
    }

    /// As a fault that is injected says.
    pub fn fault(status: StatusCode, grpc: GrpcStatus) -> Self {
        Self { status, grpc, ..Self::unavailable(Reason::Fault, "a fault was injected") }
    }

    /// Whether policy is it, and which one where that is known.
    pub fn denial(&self) -> Option<Option<&NamespacedName>> {
        match &self.reason {
            Reason::Policy(policy) => Some(Some(policy)),
            Reason::Plaintext(policy) => Some(policy.as_ref()),
            Reason::Denied => Some(None),
            _ => None,
        }
    }

    fn unavailable(reason: Reason, detail: impl Into<String>) -> Self {
        Self {
            status: StatusCode::SERVICE_UNAVAILABLE,
            grpc: GrpcStatus::Unavailable,
            reason,
            detail: detail.into(),
            retry_after: None,
            told: None,
        }
    }

    /// The head that is sent: to a gRPC client a response of trailers alone.
    pub fn head(&self, is_grpc: bool) -> http::response::Parts {
        let (mut head, ()) = Response::new(()).into_parts();
        head.status = self.status;
        if let Some(told) = &self.told {
            head.headers = told.headers.clone();
        }
        // Bounded, and without a word about policy beyond that there is one.
        head.headers.insert(REASON, HeaderValue::from_static(self.reason.code()));
        if let Some(wait) = self.retry_after {
            // RFC 9110, section 10.2.3: in whole seconds, and never too early.
            let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
            head.headers.insert(RETRY_AFTER, HeaderValue::from(seconds.max(1)));
        }
        if is_grpc {
            head.status = StatusCode::OK;
            head.headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            head.headers.insert("grpc-status", HeaderValue::from(self.grpc as u16));
            head.headers.insert("grpc-message", HeaderValue::from_static(self.reason.code()));
        }
        head
    }
}

/// Says that it was the mesh that answered, and why.
pub const REASON: HeaderName = HeaderName::from_static("selvedge-reason");
