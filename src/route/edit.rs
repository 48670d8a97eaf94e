//! Heads of requests and answers, as filters change them.

use http::header::{HOST, HeaderMap, LOCATION};
use http::request::Parts;
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderValue, Uri};

use super::answer::is_grpc;
use super::{Answer, Because, HeaderEdits, PathMatch, PathRewrite, Place, Prefix, Redirect, Rewrite};

impl HeaderEdits {
    pub fn is_empty(&self) -> bool {
        self.set.is_empty() && self.add.is_empty() && self.remove.is_empty()
    }

    pub(super) fn edit_request(&self, head: &mut Parts) {
        if let Some((_, host)) = self.set.iter().find(|(name, _)| *name == HOST)
            && let Ok(host) = host.to_str()
        {
            set_host(head, host);
        }
        self.edit(&mut head.headers);
    }

    pub(super) fn edit(&self, headers: &mut HeaderMap) {
        for (name, value) in self.set.iter().filter(|(name, _)| *name != HOST) {
            headers.insert(name, value.clone());
        }
        for (name, value) in &self.add {
            headers.append(name, value.clone());
        }
        for name in &self.remove {
            headers.remove(name);
        }
    }
}

/// Gives a request another host: in `Host`, and in the authority where the request has one (HTTP/2).
pub fn set_host(head: &mut Parts, host: &str) {
    let Ok(authority) = Authority::try_from(host) else { return };
    let Ok(value) = HeaderValue::from_str(host) else { return };
    let had_authority = head.uri.authority().is_some();
    if had_authority {
        let mut parts = head.uri.clone().into_parts();
        parts.authority = Some(authority);
        if let Ok(uri) = Uri::from_parts(parts) {
            head.uri = uri;
        }
    }
    if !had_authority || head.headers.contains_key(HOST) {
        head.headers.insert(HOST, value);
    }
}

impl Rewrite {
    /// `over` says otherwise where it says something.
    pub(super) fn edit(&self, over: &Self, place: &Place, head: &mut Parts) {
        if let Some(path) = over.path.as_ref().or(self.path.as_ref()) {
            set_path(head, &path.of(head.uri.path(), place));
        }
        if let Some(hostname) = over.hostname.as_ref().or(self.hostname.as_ref()) {
            set_host(head, hostname);
        }
    }
}

impl PathRewrite {
    fn of(&self, path: &str, place: &Place) -> String {
        match (self, place) {
            (Self::Full(full), _) if full.is_empty() => "/".to_owned(),
            (Self::Full(full), _) => full.to_string(),
            (Self::Prefix(new), Place::Path(PathMatch::Prefix(prefix))) => prefix.replace(path, new),
            // Whoever reads routes has seen to it that only prefixes are replaced.
            (Self::Prefix(new), _) => Prefix::new("/").replace(path, new),
        }
    }
}

fn set_path(head: &mut Parts, path: &str) {
    let with_query = match head.uri.query() {
        Some(query) => format!("{path}?{query}"),
        None => path.to_owned(),
    };
    let Ok(new) = PathAndQuery::try_from(with_query) else { return };
    let mut parts = head.uri.clone().into_parts();
    parts.path_and_query = Some(new);
    if let Ok(uri) = Uri::from_parts(parts) {
        head.uri = uri;
    }
}

impl Redirect {
    /// The answer to a request that came to a port.
    pub(super) fn answer(&self, head: &Parts, place: &Place, port: u16) -> Answer {
        let mut answer = Answer::error(is_grpc(head), Because::Redirect);
        answer.status = self.status;
        if let Ok(location) = HeaderValue::try_from(self.location(head, place, port)) {
            answer.headers.insert(LOCATION, location);
        }
        answer
    }

    fn location(&self, head: &Parts, place: &Place, dialled: u16) -> String {
        let path = match &self.path {
            Some(path) => path.of(head.uri.path(), place),
            None => head.uri.path().to_owned(),
        };
        let query = head.uri.query().map(|query| format!("?{query}")).unwrap_or_default();
        let asked = head.headers.get(HOST).and_then(|host| Authority::try_from(host.as_bytes()).ok());
        let asked = asked.or_else(|| head.uri.authority().cloned());
        let host = self.hostname.as_deref().or(asked.as_ref().map(Authority::host));
        // A client of HTTP/1.0 may not say which host it wants: it stays there.
        let Some(host) = host else { return format!("{path}{query}") };
        let scheme = self.scheme.or(head.uri.scheme().map(Scheme::as_str)).unwrap_or("http");
        let well_known = if scheme == "https" { 443 } else { 80 };
        let port = self.port.unwrap_or(if self.scheme.is_some() { well_known } else { dialled });
        match port == well_known {
            true => format!("{scheme}://{host}{path}{query}"),
            false => format!("{scheme}://{host}:{port}{path}{query}"),
        }
    }
}
