use std::borrow::Cow;
use std::cell::OnceCell;

use http::header::HOST;
use http::request::Parts;
use http::{HeaderName, Method};

/// A request's head as matches see it.
pub(super) struct Head<'a> {
    parts: &'a Parts,
    method: &'a Method,
    path: &'a str,
    query: OnceCell<Vec<(Cow<'a, str>, Cow<'a, str>)>>,
}

impl<'a> Head<'a> {
    pub fn new(parts: &'a Parts) -> Self {
        Self::with_method(parts, &parts.method)
    }

    /// As if it had another method: what a preflight request asks about.
    pub fn with_method(parts: &'a Parts, method: &'a Method) -> Self {
        Self { parts, method, path: parts.uri.path(), query: OnceCell::new() }
    }

    pub fn method(&self) -> &Method {
        self.method
    }

    pub fn path(&self) -> &'a str {
        self.path
    }

    /// The Service and the method that a gRPC request names in its path.
    pub fn rpc(&self) -> Option<(&'a str, &'a str)> {
        let (service, method) = self.path.strip_prefix('/')?.split_once('/')?;
        (!service.is_empty() && !method.is_empty() && !method.contains('/')).then_some((service, method))
    }

    /// A header's value; of several, all of them joined by commas (RFC 9110, section 5.2).
    pub fn header(&self, name: &HeaderName) -> Option<Cow<'a, [u8]>> {
        let mut values = self.parts.headers.get_all(name).iter();
        let Some(first) = values.next() else {
            // In HTTP/2 the host is `:authority` (RFC 9113, section 8.3.1).
            let authority = self.parts.uri.authority().filter(|_| name == HOST);
            return authority.map(|authority| authority.as_str().as_bytes().into());
        };
        let mut joined = Cow::Borrowed(first.as_bytes());
        for value in values {
            let joined = joined.to_mut();
            joined.extend_from_slice(b",");
            joined.extend_from_slice(value.as_bytes());
        }
        Some(joined)
    }

    /// A query parameter's value, decoded; of several, the first.
    pub fn query(&self, name: &str) -> Option<&str> {
        let pairs = self
            .query
            .get_or_init(|| form_urlencoded::parse(self.parts.uri.query().unwrap_or_default().as_bytes()).collect());
        pairs.iter().find(|(known, _)| known == name).map(|(_, value)| &**value)
    }
}
