//! What a rule, or one of its backends, does to a request and its answer.

use std::sync::Arc;

use http::{HeaderName, HeaderValue, StatusCode};

use super::{BackendRef, Cors};
use crate::authorizer::Authorizer;

/// The filters of a rule or of one of its backends, but for a redirect, which is what a rule does.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Filters {
    pub request_headers: HeaderEdits,
    pub response_headers: HeaderEdits,
    pub rewrite: Rewrite,
    pub mirrors: Vec<Mirror>,
    pub cors: Option<Cors>,
    /// `ExternalAuth`.
    pub authorizer: Option<Arc<Authorizer>>,
}

impl Filters {
    pub const NONE: Self = Self {
        request_headers: HeaderEdits::NONE,
        response_headers: HeaderEdits::NONE,
        rewrite: Rewrite { hostname: None, path: None },
        mirrors: Vec::new(),
        cors: None,
        authorizer: None,
    };
}

/// `RequestHeaderModifier` or `ResponseHeaderModifier`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct HeaderEdits {
    pub set: Vec<(HeaderName, HeaderValue)>,
    pub add: Vec<(HeaderName, HeaderValue)>,
    pub remove: Vec<HeaderName>,
}

impl HeaderEdits {
    pub const NONE: Self = Self { set: Vec::new(), add: Vec::new(), remove: Vec::new() };
}

/// `URLRewrite`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Rewrite {
    pub hostname: Option<Arc<str>>,
    pub path: Option<PathRewrite>,
}

/// HTTPPathModifier.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PathRewrite {
    Full(Arc<str>),
    /// In place of the prefix that the rule matched.
    Prefix(Arc<str>),
}

/// `RequestRedirect`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Redirect {
    /// `http` or `https`.
    pub scheme: Option<&'static str>,
    pub hostname: Option<Arc<str>>,
    pub path: Option<PathRewrite>,
    pub port: Option<u16>,
    pub status: StatusCode,
}

/// `RequestMirror`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mirror {
    /// `None`: not of a kind that requests can be sent to; nothing is mirrored.
    pub to: Option<BackendRef>,
    pub share: Share,
}

/// How many of all requests.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Share {
    pub numerator: u32,
    /// Never 0.
    pub denominator: u32,
}

impl Share {
    pub const ALL: Self = Self { numerator: 1, denominator: 1 };

    pub(super) fn takes(self, random: u64) -> bool {
        random % u64::from(self.denominator.max(1)) < u64::from(self.numerator)
    }
}
