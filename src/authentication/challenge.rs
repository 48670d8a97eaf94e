use http::header::{HeaderValue, WWW_AUTHENTICATE};
use http::{HeaderMap, StatusCode};

use super::Fault;

/// What a client with a token that does not hold is told: RFC 6750, section 3.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Challenge {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub message: &'static str,
}

impl Challenge {
    pub fn of(fault: &Fault) -> Self {
        // Section 3.1: a request with more than one token is malformed; of a token that does not hold, another may be had.
        let (status, error) = match fault {
            Fault::Several => (StatusCode::BAD_REQUEST, "invalid_request"),
            _ => (StatusCode::UNAUTHORIZED, "invalid_token"),
        };
        let message = fault.message();
        let mut headers = HeaderMap::new();
        let text = format!("Bearer realm=\"{REALM}\", error=\"{error}\", error_description=\"{message}\"");
        if let Ok(value) = HeaderValue::try_from(text) {
            headers.insert(WWW_AUTHENTICATE, value);
        }
        Self { status, headers, message }
    }
}

const REALM: &str = "selvedge";
