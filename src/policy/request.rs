use std::sync::Arc;

use http::header::HOST;
use http::{HeaderMap, Request};

use crate::authentication::Principal;

/// One request, as the application will get it.
#[derive(Clone, Copy, Debug)]
pub struct RequestHead<'a> {
    pub method: &'a str,
    /// As the request says it, with its port if it says one; empty where it says none.
    pub host: &'a str,
    /// Without the query.
    pub path: &'a str,
    pub headers: &'a HeaderMap,
    /// Who a token says that it is from, where one was there and is valid.
    pub principal: Option<&'a Principal>,
}

impl<'a> RequestHead<'a> {
    /// Of a request on its way. Whoever has checked its token has put an `Arc<Principal>` into the extensions.
    pub fn of<B>(request: &'a Request<B>) -> Self {
        let said = request.headers().get(HOST).and_then(|host| host.to_str().ok());
        Self {
            method: request.method().as_str(),
            // RFC 9113, section 8.3.1: in HTTP/2 the host is the authority's.
            host: request.uri().authority().map(|authority| authority.as_str()).or(said).unwrap_or_default(),
            path: request.uri().path(),
            headers: request.headers(),
            principal: request.extensions().get::<Arc<Principal>>().map(|principal| &**principal),
        }
    }
}
