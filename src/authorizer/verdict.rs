use bytes::Bytes;
use http::request::Parts;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri};

use super::Names;
use crate::authentication::may_carry;

/// What an authorizer says of a request.
#[derive(Clone, PartialEq, Debug)]
pub enum Verdict {
    Allow(Allowed),
    Deny(Denied),
    /// Nothing that could be understood, and why: the request is refused.
    Failed(String),
}

/// What becomes of a request that passes.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Allowed {
    /// What the client wrote here never arrives.
    pub(super) stripped: Names,
    pub(super) headers: Vec<(HeaderName, HeaderValue, How)>,
    pub(super) removed: Vec<HeaderName>,
    pub(super) query: Vec<(String, Option<String>)>,
    pub(super) downstream: Vec<(HeaderName, HeaderValue, How)>,
}

/// How a header meets one that is there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum How {
    Replace,
    Append,
    IfAbsent,
    IfPresent,
}

/// What a client is told that is refused.
#[derive(Clone, PartialEq, Debug)]
pub struct Denied {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Allowed {
    /// Changes the request as the authorizer has it.
    pub fn edit(&self, head: &mut Parts) {
        let stripped: Vec<HeaderName> =
            head.headers.keys().filter(|name| may_carry(name) && self.stripped.has_alike(name)).cloned().collect();
        for name in stripped.iter().chain(self.removed.iter().filter(|name| may_carry(name))) {
            head.headers.remove(name);
        }
        write(&self.headers, &mut head.headers);
        if !self.query.is_empty() {
            self.edit_query(head);
        }
    }

    /// Changes the application's answer as the authorizer has it.
    pub fn edit_answer(&self, headers: &mut HeaderMap) {
        write(&self.downstream, headers);
    }

    /// Whether it says anything that an answer is changed by.
    pub fn changes_answer(&self) -> bool {
        !self.downstream.is_empty()
    }

    fn edit_query(&self, head: &mut Parts) {
        let is_edited = |pair: &&str| {
            let key = form_urlencoded::parse(pair.as_bytes()).next().map(|(key, _)| key.into_owned());
            key.is_some_and(|key| self.query.iter().any(|(name, _)| *name == key))
        };
        let query = head.uri.query().unwrap_or_default();
        let mut pairs: Vec<String> =
            query.split('&').filter(|pair| !pair.is_empty() && !is_edited(pair)).map(str::to_owned).collect();
        for (name, value) in self.query.iter().filter_map(|(name, value)| Some((name, value.as_ref()?))) {
            pairs.push(form_urlencoded::Serializer::new(String::new()).append_pair(name, value).finish());
        }
        let path = head.uri.path();
        let target = if pairs.is_empty() { path.to_owned() } else { format!("{path}?{}", pairs.join("&")) };
        let Ok(target) = PathAndQuery::try_from(target) else { return };
        let mut parts = std::mem::take(&mut head.uri).into_parts();
        parts.path_and_query = Some(target);
        head.uri = Uri::from_parts(parts).unwrap_or_default();
    }
}

fn write(edits: &[(HeaderName, HeaderValue, How)], headers: &mut HeaderMap) {
    for (name, value, how) in edits.iter().filter(|(name, ..)| may_carry(name)) {
        match how {
            How::Append => drop(headers.append(name, value.clone())),
            How::IfAbsent if headers.contains_key(name) => {}
            How::IfPresent if !headers.contains_key(name) => {}
            How::Replace | How::IfAbsent | How::IfPresent => drop(headers.insert(name, value.clone())),
        }
    }
}
