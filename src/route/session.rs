//! Session persistence: a token that leads the requests of one session to one endpoint
//! ([GEP-1619](https://gateway-api.sigs.k8s.io/geps/gep-1619/)).
//!
//! It names the endpoint by a key that derives from its pod's UID alone, so that every agent reads the tokens of all
//! others, and it grants nothing: it chooses among the endpoints that a request could be sent to anyway.

use std::fmt;
use std::time::Duration;

use http::header::{COOKIE, HeaderMap, HeaderName, HeaderValue, SET_COOKIE};

use super::{Lifetime, SessionKind, SessionPersistence};
use crate::mesh::balance::stable_hash;

/// What a client is given, and shows again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Token {
    pub endpoint: u64,
    /// In seconds since 1970.
    pub begun: u64,
    /// When it was last given out.
    pub given: u64,
}

impl Token {
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('.');
        let mut number = || u64::from_str_radix(parts.next().filter(|part| (1..=16).contains(&part.len()))?, 16).ok();
        let token = Self { endpoint: number()?, begun: number()?, given: number()? };
        parts.next().is_none().then_some(token)
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}.{:x}.{:x}", self.endpoint, self.begun, self.given)
    }
}

impl SessionPersistence {
    /// The session that a request belongs to, if it has one that is not over. `scope` names what the session is of, such
    /// as one rule of a route.
    pub fn read(&self, scope: &str, headers: &HeaderMap, now: u64) -> Option<Token> {
        let name = self.name_in(scope);
        let text = match self.kind {
            SessionKind::Cookie(_) => cookie(headers, &name)?,
            SessionKind::Header => headers.get(name.as_str())?.to_str().ok()?,
        };
        let token = Token::parse(text)?;
        let is_within = |since: u64, limit: Option<Duration>| {
            limit.is_none_or(|limit| limit.is_zero() || now.saturating_sub(since) < limit.as_secs().max(1))
        };
        (is_within(token.begun, self.absolute_timeout) && is_within(token.given, self.idle_timeout)).then_some(token)
    }

    /// Tells the client where its session leads, where it does not know that already.
    pub fn write(&self, scope: &str, before: Option<Token>, endpoint: u64, now: u64, headers: &mut HeaderMap) {
        let before = before.filter(|before| before.endpoint == endpoint);
        let begun = before.map_or(now, |before| before.begun);
        let token = Token { endpoint, begun, given: now };
        let name = self.name_in(scope);
        match self.kind {
            SessionKind::Header => {
                let name = HeaderName::try_from(name.as_str());
                if let (Ok(name), Ok(value)) = (name, HeaderValue::try_from(token.to_string())) {
                    headers.insert(name, value);
                }
            }
            SessionKind::Cookie(lifetime) => {
                // One that is still fresh need not be said again.
                if before.is_some_and(|before| self.idle_timeout.is_none() || before.given == now) {
                    return;
                }
                let limit = self.absolute_timeout.filter(|limit| lifetime == Lifetime::Permanent && !limit.is_zero());
                let left = limit.map(|limit| limit.as_secs().saturating_sub(now.saturating_sub(begun)).max(1));
                append_cookie(headers, &name, &token.to_string(), Some("/"), left);
            }
        }
    }

    fn name_in(&self, scope: &str) -> String {
        match &self.name {
            Some(name) => name.to_string(),
            // Two sessions of one client do not meet.
            None => format!("selvedge-session-{:08x}", stable_hash(scope.as_bytes()) as u32),
        }
    }
}

/// The value of a cookie (RFC 6265, section 5.4).
pub fn cookie<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let lines = headers.get_all(COOKIE).iter().filter_map(|line| line.to_str().ok());
    let pairs = lines.flat_map(|line| line.split(';')).filter_map(|pair| pair.trim().split_once('='));
    pairs.filter(|(known, _)| *known == name).map(|(_, value)| value.trim_matches('"')).next()
}

/// Gives the client a cookie; `lasts` is in seconds.
pub fn append_cookie(headers: &mut HeaderMap, name: &str, value: &str, path: Option<&str>, lasts: Option<u64>) {
    let mut text = format!("{name}={value}");
    path.into_iter().for_each(|path| text.push_str(&format!("; Path={path}")));
    lasts.into_iter().for_each(|lasts| text.push_str(&format!("; Max-Age={lasts}")));
    text.push_str("; HttpOnly; SameSite=Strict");
    if let Ok(value) = HeaderValue::try_from(text) {
        headers.append(SET_COOKIE, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(kind: SessionKind) -> SessionPersistence {
        SessionPersistence { name: None, absolute_timeout: None, idle_timeout: None, kind }
    }

    /// The request that a client sends after this answer.
    fn shown(answer: &HeaderMap) -> HeaderMap {
        let mut request = HeaderMap::new();
        request.append(COOKIE, HeaderValue::from_static("a=b; c"));
        for set in answer.get_all(SET_COOKIE) {
            let pair = set.to_str().unwrap().split(';').next().unwrap();
            request.append(COOKIE, HeaderValue::try_from(pair).unwrap());
        }
        request
    }

    #[test]
    fn a_cookie_leads_back_to_its_endpoint() {
        let session = session(SessionKind::Cookie(Lifetime::Session));
        let mut answer = HeaderMap::new();
        session.write("x", None, 7, 100, &mut answer);
        assert!(!answer[SET_COOKIE].to_str().unwrap().contains("Max-Age"), "{answer:?}");
        let token = session.read("x", &shown(&answer), 200).unwrap();
        assert_eq!((token.endpoint, token.begun), (7, 100));
        assert_eq!(session.read("y", &shown(&answer), 200), None, "another session has another cookie");
        let mut again = HeaderMap::new();
        session.write("x", Some(token), 7, 200, &mut again);
        assert!(again.is_empty(), "nothing new: {again:?}");
        session.write("x", Some(token), 8, 200, &mut again);
        assert_eq!(session.read("x", &shown(&again), 200).unwrap().endpoint, 8);
    }

    #[test]
    fn a_header_is_said_each_time() {
        let session = SessionPersistence { name: Some("X-Session".into()), ..session(SessionKind::Header) };
        let mut answer = HeaderMap::new();
        session.write("x", None, 7, 100, &mut answer);
        let token = session.read("x", &answer, 200);
        session.write("x", token, 7, 200, &mut answer);
        assert_eq!(session.read("x", &answer, 300).unwrap().begun, 100);
        assert_eq!(answer.len(), 1);
    }

    #[test]
    fn a_session_ends_in_time() {
        let limits = SessionPersistence {
            absolute_timeout: Some(Duration::from_secs(100)),
            idle_timeout: Some(Duration::from_secs(10)),
            ..session(SessionKind::Cookie(Lifetime::Permanent))
        };
        let mut answer = HeaderMap::new();
        limits.write("x", None, 7, 1000, &mut answer);
        assert!(answer[SET_COOKIE].to_str().unwrap().contains("Max-Age=100"), "{answer:?}");
        assert!(limits.read("x", &shown(&answer), 1009).is_some());
        assert!(limits.read("x", &shown(&answer), 1010).is_none(), "idle for too long");
        let mut now = 1000;
        let mut token = limits.read("x", &shown(&answer), now);
        while token.is_some() {
            now += 5;
            let mut answer = HeaderMap::new();
            limits.write("x", token, 7, now, &mut answer);
            token = limits.read("x", &shown(&answer), now);
        }
        assert_eq!(now, 1100, "in all");
    }

    #[test]
    fn what_is_no_token_is_none() {
        for text in ["", ".", "7", "7.1", "7.1.2.3", "x.1.2", "11112222333344445.1.1", "-1.1.1"] {
            assert_eq!(Token::parse(text), None, "{text}");
        }
        let token = Token { endpoint: 7, begun: 1, given: 2 };
        assert_eq!(Token::parse(&token.to_string()), Some(token));
    }
}
