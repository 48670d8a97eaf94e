//! What a request must be for a rule to apply.

use std::sync::Arc;

use http::{HeaderName, Method};

use super::head::Head;
use super::{Pattern, Prefix};

/// One entry of a rule's `matches`: all of it must be met.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Match {
    pub place: Place,
    pub method: Option<Method>,
    /// Each name once: of several entries with one name only the first counts (Gateway API, HTTPHeaderMatch).
    pub headers: Vec<HeaderMatch>,
    pub query: Vec<QueryMatch>,
}

impl Match {
    pub(super) fn takes(&self, head: &Head<'_>) -> bool {
        self.method.as_ref().is_none_or(|method| method == head.method())
            && self.place.takes(head)
            && self.headers.iter().all(|header| header.takes(head))
            && self.query.iter().all(|query| query.takes(head))
    }

    /// How specific it is: the greater goes first. For HTTPRoute: exact path, characters of the prefix, method, number
    /// of headers, number of query parameters; for GRPCRoute: characters of the service, of the method, number of
    /// headers. Where a regular expression stands among paths is left to implementations: here between exact paths
    /// and prefixes, the longer expression first.
    pub(super) fn specificity(&self) -> [u32; 5] {
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        let headers = count(self.headers.len());
        match &self.place {
            Place::Path(path) => {
                let (class, length) = match path {
                    PathMatch::Exact(_) => (2, 0),
                    PathMatch::Pattern(pattern) => (1, count(pattern.as_str().len())),
                    PathMatch::Prefix(prefix) => (0, count(prefix.written_len())),
                };
                [class, length, u32::from(self.method.is_some()), headers, count(self.query.len())]
            }
            Place::Rpc(rpc) => {
                let length = |text: &Option<TextMatch>| text.as_ref().map_or(0, |text| count(text.len()));
                [length(&rpc.service), length(&rpc.method), headers, 0, 0]
            }
        }
    }
}

/// Where a request goes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Place {
    Path(PathMatch),
    Rpc(RpcMatch),
}

impl Place {
    fn takes(&self, head: &Head<'_>) -> bool {
        match self {
            Self::Path(PathMatch::Exact(path)) => **path == *head.path(),
            Self::Path(PathMatch::Prefix(prefix)) => prefix.takes(head.path()),
            Self::Path(PathMatch::Pattern(pattern)) => pattern.takes(head.path().as_bytes()),
            Self::Rpc(RpcMatch { service: None, method: None }) => true,
            Self::Rpc(rpc) => head.rpc().is_some_and(|(service, method)| {
                let takes = |wanted: &Option<TextMatch>, text: &str| {
                    wanted.as_ref().is_none_or(|wanted| wanted.takes(text.as_bytes()))
                };
                takes(&rpc.service, service) && takes(&rpc.method, method)
            }),
        }
    }
}

/// `path` of an HTTPRoute's match.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PathMatch {
    Exact(Arc<str>),
    Prefix(Prefix),
    Pattern(Pattern),
}

/// `method` of a GRPCRoute's match; what is absent is any.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RpcMatch {
    pub service: Option<TextMatch>,
    pub method: Option<TextMatch>,
}

/// `type` and `value`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TextMatch {
    Exact(Arc<str>),
    Pattern(Pattern),
}

impl TextMatch {
    pub fn takes(&self, text: &[u8]) -> bool {
        match self {
            Self::Exact(wanted) => wanted.as_bytes() == text,
            Self::Pattern(pattern) => pattern.takes(text),
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::Exact(text) => text.len(),
            Self::Pattern(pattern) => pattern.as_str().len(),
        }
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HeaderMatch {
    pub name: HeaderName,
    pub value: TextMatch,
}

impl HeaderMatch {
    fn takes(&self, head: &Head<'_>) -> bool {
        head.header(&self.name).is_some_and(|value| self.value.takes(&value))
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct QueryMatch {
    pub name: Arc<str>,
    pub value: TextMatch,
}

impl QueryMatch {
    fn takes(&self, head: &Head<'_>) -> bool {
        head.query(&self.name).is_some_and(|value| self.value.takes(value.as_bytes()))
    }
}
