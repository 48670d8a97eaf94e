//! Where in a request a token may be.

use std::fmt;
use std::sync::Arc;

use http::header::{AUTHORIZATION, HeaderValue};
use http::request::Parts;
use http::uri::PathAndQuery;
use http::{HeaderName, Uri};

use super::Fault;

/// A place that is searched for a token.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Place {
    /// With what stands before the token: `Bearer `, or nothing.
    Header(HeaderName, Arc<str>),
    /// A query parameter.
    Parameter(Arc<str>),
}

impl Place {
    /// RFC 6750, section 2.1: where a token is unless somebody says otherwise.
    pub fn bearer() -> Self {
        Self::Header(AUTHORIZATION, "Bearer ".into())
    }

    /// What is there; of a header or parameter that is there several times, all of them.
    pub(super) fn tokens(&self, head: &Parts) -> Result<Vec<String>, Fault> {
        let mut tokens = Vec::new();
        match self {
            Self::Header(name, prefix) => {
                for value in head.headers.get_all(name) {
                    if let Some(rest) = behind(value.as_bytes(), prefix) {
                        let text = std::str::from_utf8(rest).map_err(|_| Fault::Malformed("it is no text"))?;
                        tokens.push(text.to_owned());
                    }
                }
            }
            Self::Parameter(name) => {
                let query = head.uri.query().unwrap_or_default();
                let named = form_urlencoded::parse(query.as_bytes()).filter(|(key, _)| *key == **name);
                tokens.extend(named.map(|(_, value)| value.into_owned()));
            }
        }
        tokens.retain(|token| !token.is_empty());
        Ok(tokens)
    }

    /// Takes what is there out of the request.
    pub(super) fn clear(&self, head: &mut Parts) {
        match self {
            Self::Header(name, prefix) => {
                let others =
                    head.headers.get_all(name).iter().filter(|value| behind(value.as_bytes(), prefix).is_none());
                let others: Vec<HeaderValue> = others.cloned().collect();
                head.headers.remove(name);
                for value in others {
                    head.headers.append(name, value);
                }
            }
            Self::Parameter(name) => clear_parameter(name, head),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header(name, prefix) if prefix.is_empty() => write!(f, "header {name}"),
            Self::Header(name, prefix) => write!(f, "header {name} ({})", prefix.trim_end()),
            Self::Parameter(name) => write!(f, "query parameter {name}"),
        }
    }
}

/// What stands behind the prefix, if it is there. A prefix of a word and a space is a scheme (RFC 9110, section 11.1): it is
/// in either case, and any white space follows, for so applications read it.
fn behind<'a>(value: &'a [u8], prefix: &str) -> Option<&'a [u8]> {
    let value = value.trim_ascii();
    let word = prefix.trim_end();
    let (start, rest) = value.split_at_checked(word.len())?;
    if !start.eq_ignore_ascii_case(word.as_bytes()) {
        return None;
    }
    let is_scheme = prefix.len() > word.len();
    if is_scheme && !rest.is_empty() && !rest[0].is_ascii_whitespace() {
        return None;
    }
    Some(rest.trim_ascii())
}

fn clear_parameter(name: &str, head: &mut Parts) {
    let Some(query) = head.uri.query() else { return };
    let is_it = |pair: &&str| form_urlencoded::parse(pair.as_bytes()).next().is_some_and(|(key, _)| key == name);
    let kept: Vec<&str> = query.split('&').filter(|pair| !is_it(pair)).collect();
    let path = head.uri.path();
    let text = if kept.is_empty() { path.to_owned() } else { format!("{path}?{}", kept.join("&")) };
    let Ok(target) = PathAndQuery::try_from(text) else { return };
    let mut parts = std::mem::take(&mut head.uri).into_parts();
    parts.path_and_query = Some(target);
    head.uri = Uri::from_parts(parts).unwrap_or_default();
}
