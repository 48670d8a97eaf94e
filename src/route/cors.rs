//! Cross-origin requests: the filter `CORS` ([GEP-1767](https://gateway-api.sigs.k8s.io/geps/gep-1767/),
//! [Fetch](https://fetch.spec.whatwg.org/#http-cors-protocol)).

use std::sync::Arc;

use http::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_HEADERS,
    ACCESS_CONTROL_REQUEST_METHOD, ORIGIN, VARY,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method};

/// Who may call from where, and what a browser is told of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Cors {
    pub origins: Allowed<Origin>,
    pub credentials: bool,
    pub methods: Allowed<Method>,
    pub headers: Allowed<HeaderName>,
    pub exposed: Allowed<HeaderName>,
    /// How long a browser may remember the answer to a preflight request, in seconds.
    pub max_age: u32,
}

impl Cors {
    /// The headers of the answer to a preflight request; none for an origin that is not allowed.
    pub(super) fn preflight(&self, asked: &HeaderMap) -> HeaderMap {
        let mut answer = HeaderMap::new();
        let Some(grant) = self.grant(asked) else { return answer };
        grant.write_origin(&mut answer);
        let methods = self.methods.named(Method::as_str).or_else(|| asked.get(ACCESS_CONTROL_REQUEST_METHOD).cloned());
        if let Some(methods) = methods.filter(|methods| !methods.is_empty()) {
            answer.insert(ACCESS_CONTROL_ALLOW_METHODS, methods);
        }
        let headers =
            self.headers.named(HeaderName::as_str).or_else(|| asked.get(ACCESS_CONTROL_REQUEST_HEADERS).cloned());
        if let Some(headers) = headers.filter(|headers| !headers.is_empty()) {
            answer.insert(ACCESS_CONTROL_ALLOW_HEADERS, headers);
        }
        answer.insert(ACCESS_CONTROL_MAX_AGE, self.max_age.into());
        answer
    }

    /// What the answer to a request says to the browser; nothing where no browser asked or the origin is not allowed.
    pub(super) fn grant(&self, asked: &HeaderMap) -> Option<Grant<'_>> {
        let origin = asked.get(ORIGIN)?;
        let is_allowed = match &self.origins {
            Allowed::All => true,
            Allowed::These(origins) => {
                origin.to_str().is_ok_and(|asked| origins.iter().any(|allowed| allowed.takes(asked)))
            }
        };
        is_allowed.then(|| Grant { cors: self, origin: origin.clone() })
    }
}

/// Whether a request asks, ahead of another one, whether that is allowed; and of which method that is.
pub(super) fn asked_method(method: &Method, headers: &HeaderMap) -> Option<Method> {
    if method != Method::OPTIONS || !headers.contains_key(ORIGIN) {
        return None;
    }
    Method::from_bytes(headers.get(ACCESS_CONTROL_REQUEST_METHOD)?.as_bytes()).ok()
}

/// An origin that is allowed, and what it is allowed.
#[derive(Clone, Debug)]
pub(super) struct Grant<'a> {
    cors: &'a Cors,
    origin: HeaderValue,
}

impl Grant<'_> {
    pub fn write(&self, answer: &mut HeaderMap) {
        self.write_origin(answer);
        let exposed = match &self.cors.exposed {
            // With credentials `*` is no wildcard to a browser: the names themselves are told.
            Allowed::All if self.cors.credentials => {
                let names: Vec<&str> = answer.keys().map(HeaderName::as_str).collect();
                HeaderValue::from_str(&names.join(", ")).ok()
            }
            Allowed::All => Some(HeaderValue::from_static("*")),
            exposed => exposed.named(HeaderName::as_str),
        };
        if let Some(exposed) = exposed.filter(|exposed| !exposed.is_empty()) {
            answer.insert(ACCESS_CONTROL_EXPOSE_HEADERS, exposed);
        }
    }

    fn write_origin(&self, answer: &mut HeaderMap) {
        answer.insert(ACCESS_CONTROL_ALLOW_ORIGIN, self.origin.clone());
        if self.cors.credentials {
            answer.insert(ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
        }
        // The answer to another origin is another one: caches must know.
        answer.append(VARY, HeaderValue::from_static("origin"));
    }
}

/// A list, or `*`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Allowed<T> {
    All,
    These(Vec<T>),
}

impl<T> Allowed<T> {
    /// As a header has it, none where all is allowed.
    fn named(&self, name: fn(&T) -> &str) -> Option<HeaderValue> {
        match self {
            Self::All => None,
            Self::These(list) => HeaderValue::from_str(&list.iter().map(name).collect::<Vec<_>>().join(", ")).ok(),
        }
    }
}

/// One entry of `allowOrigins`: `https://*.example.com:8443`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Origin {
    scheme: Arc<str>,
    /// With `*` at its beginning: any number of labels.
    host: Arc<str>,
    port: Option<u16>,
}

impl Origin {
    /// `None` where it is none.
    pub fn parse(text: &str) -> Option<Self> {
        let (scheme, rest) = text.split_once("://")?;
        let is_name = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'-' | b'.');
        if !scheme.starts_with(|c: char| c.is_ascii_alphabetic()) || !scheme.bytes().all(is_name) {
            return None;
        }
        let (host, port) = match rest.rsplit_once(':') {
            Some((host, port)) if !host.ends_with(':') && !port.contains(']') => (host, Some(port.parse().ok()?)),
            _ => (rest, None),
        };
        let is_host = !host.is_empty() && !host.contains(['/', '?', '#', '@']) && !host[1..].contains('*');
        let scheme = scheme.to_ascii_lowercase();
        let port = port.or(match &*scheme {
            "http" => Some(80),
            "https" => Some(443),
            _ => None,
        });
        is_host.then(|| Self { scheme: scheme.into(), host: host.to_ascii_lowercase().into(), port })
    }

    fn takes(&self, asked: &str) -> bool {
        let Some(asked) = Self::parse(asked) else { return false };
        let host = match self.host.strip_prefix('*') {
            Some(end) => asked.host.len() > end.len() && asked.host.ends_with(end),
            None => asked.host == self.host,
        };
        host && asked.scheme == self.scheme && asked.port == self.port
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_are_taken_with_their_scheme_host_and_port() {
        for (allowed, asked, takes) in [
            ("https://example.com", "https://example.com", true),
            ("https://example.com", "https://example.com:443", true),
            ("https://example.com", "https://Example.com", true),
            ("https://example.com", "http://example.com", false),
            ("https://example.com", "https://example.com:8443", false),
            ("https://example.com", "https://www.example.com", false),
            ("http://example.com:8080", "http://example.com:8080", true),
            ("https://*.example.com", "https://a.b.example.com", true),
            ("https://*.example.com", "https://example.com", false),
            ("https://*.example.com", "https://evilexample.com", false),
            ("https://*", "https://anything", true),
            ("https://*", "http://anything", false),
            ("http://[::1]:80", "http://[::1]", true),
            ("https://example.com", "null", false),
        ] {
            assert_eq!(Origin::parse(allowed).unwrap().takes(asked), takes, "{allowed} {asked}");
        }
    }

    #[test]
    fn what_is_no_origin_is_refused() {
        for text in ["", "*", "example.com", "https://", "https://a/b", "https://a.*.b", "https://a:99999", "://a"] {
            assert_eq!(Origin::parse(text), None, "{text}");
        }
    }
}
