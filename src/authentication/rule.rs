//! What is taken of one issuer, and what becomes of a request that bears its token.

use std::fmt;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::header::{CONTENT_LENGTH, HOST, HeaderValue, TE, TRAILER, TRANSFER_ENCODING, UPGRADE};
use http::request::Parts;
use http::{HeaderMap, HeaderName};
use serde_json::{Map, Value};

use super::SKEW;
use super::fault::Fault;
use super::jwk::KeySet;
use super::place::Place;
use super::token::{Token, shown};

/// One of `jwtRules`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rule {
    pub issuer: Arc<str>,
    /// One of these must be the token's; none: whomever it is for.
    pub audiences: Vec<Arc<str>>,
    pub keys: Keys,
    /// Where it is looked for; never none.
    pub places: Vec<Place>,
    /// Whether the application gets the token too.
    pub forward: bool,
    pub claim_headers: Vec<ClaimHeader>,
    /// The header that gets all claims, as they were sent.
    pub payload_header: Option<HeaderName>,
    /// It has a field that is not known: no token is taken.
    pub opaque: bool,
}

/// One of `outputClaimToHeaders`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ClaimHeader {
    pub header: HeaderName,
    /// The claim's name, or names with dots between them for one within another.
    pub claim: Arc<str>,
}

/// The keys of an issuer, and where they are from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Keys {
    pub source: KeySource,
    pub found: Option<Found>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum KeySource {
    Inline,
    /// A ConfigMap of the rule's own namespace, and the key in it.
    ConfigMap {
        name: Arc<str>,
        key: Arc<str>,
    },
    Url(Arc<str>),
}

/// As it is written down beside keys that were fetched from it.
impl fmt::Display for KeySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inline => f.write_str("inline"),
            Self::ConfigMap { name, key } => write!(f, "configmap/{name}/{key}"),
            Self::Url(url) => f.write_str(url),
        }
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Found {
    pub set: Arc<KeySet>,
    /// In seconds since 1970; none: for as long as they are there.
    pub until: Option<i64>,
}

/// Who a request is from, as a token says that was verified.
#[derive(Clone, PartialEq, Debug)]
pub struct Principal {
    /// Claim `iss`.
    pub issuer: Arc<str>,
    /// Claim `sub`; empty where the token has none.
    pub subject: Arc<str>,
    /// All of the token's claims, these two among them.
    pub claims: Map<String, Value>,
}

impl Principal {
    /// `<issuer>/<subject>`, as policies name it; none without a subject.
    pub fn name(&self) -> Option<String> {
        (!self.subject.is_empty()).then(|| format!("{}/{}", self.issuer, self.subject))
    }
}

/// What becomes of a request's token, and which of the rules says so, by its place among them; none where no rule is for such
/// a token, or there is none.
#[derive(Debug)]
pub struct Judged {
    pub outcome: Result<Option<Principal>, Fault>,
    pub rule: Option<usize>,
}

/// Finds the token of a request, verifies it, and makes of the request what its application is to see: the headers that claims
/// are written to hold claims that were verified or are not there, and the token is gone unless it is forwarded.
///
/// A request without a token has no principal, and that is no fault.
pub fn authenticate(rules: &[Arc<Rule>], head: &mut Parts, now: i64) -> Result<Option<Principal>, Fault> {
    judge(rules, head, now).outcome
}

/// The same, for who wants to know which rule it was.
pub fn judge(rules: &[Arc<Rule>], head: &mut Parts, now: i64) -> Judged {
    let mut rule = None;
    let outcome = verify(rules, head, now, &mut rule);
    Judged { outcome, rule }
}

fn verify(rules: &[Arc<Rule>], head: &mut Parts, now: i64, by: &mut Option<usize>) -> Result<Option<Principal>, Fault> {
    let found = find(rules, head);
    for rule in rules {
        rule.strip(&mut head.headers);
    }
    let tokens = found?;
    let Some((text, _)) = tokens.first() else { return Ok(None) };
    // RFC 6750, section 2: not more than one. The same one in two places is one.
    if tokens.iter().any(|(other, _)| other != text) {
        return Err(Fault::Several);
    }
    let token = Token::parse(text)?;
    let issuer = token.issuer().unwrap_or_default();
    let mut fault = Fault::Issuer(shown(issuer));
    for (at, rule) in rules.iter().enumerate().filter(|(_, rule)| *rule.issuer == *issuer) {
        if !tokens.iter().any(|(_, place)| rule.places.contains(place)) {
            continue;
        }
        *by = Some(at);
        match rule.verify(&token, now) {
            Ok(principal) => {
                rule.write(&token, &mut head.headers);
                if !rule.forward {
                    tokens.iter().for_each(|(_, place)| place.clear(head));
                }
                return Ok(Some(principal));
            }
            Err(found) => fault = found,
        }
    }
    Err(fault)
}

/// Every token of a request, at every place where a rule looks for one.
fn find<'a>(rules: &'a [Arc<Rule>], head: &Parts) -> Result<Vec<(String, &'a Place)>, Fault> {
    let mut tokens: Vec<(String, &Place)> = Vec::new();
    let mut searched: Vec<&Place> = Vec::new();
    for place in rules.iter().flat_map(|rule| &rule.places) {
        if !searched.contains(&place) {
            searched.push(place);
            tokens.extend(place.tokens(head)?.into_iter().map(|token| (token, place)));
        }
    }
    Ok(tokens)
}

impl Rule {
    /// Whether a token that says to be of this issuer holds at a time, in seconds since 1970.
    pub fn verify(&self, token: &Token<'_>, now: i64) -> Result<Principal, Fault> {
        if self.opaque {
            return Err(Fault::Unenforced(self.issuer.to_string()));
        }
        let found = self.keys.found.as_ref().filter(|found| found.until.is_none_or(|until| now < until));
        let found = found.ok_or_else(|| Fault::NoKeys(self.issuer.to_string()))?;
        let mut candidates = found.set.candidates(token.key_id.as_deref(), token.algorithm).peekable();
        if candidates.peek().is_none() {
            return Err(Fault::UnknownKey(token.key_id.as_deref().map(shown), token.algorithm));
        }
        if !candidates.any(|key| key.verify_sig(token.signed, &token.signature).is_ok()) {
            return Err(Fault::Signature);
        }
        self.check_claims(token, now)
    }

    /// RFC 7519, section 4.1. What a claim of the wrong type means nobody knows.
    fn check_claims(&self, token: &Token<'_>, now: i64) -> Result<Principal, Fault> {
        let claims = &token.claims;
        if token.issuer() != Some(&*self.issuer) {
            return Err(Fault::Issuer(shown(token.issuer().unwrap_or_default())));
        }
        let expires = time(claims, "exp")?.ok_or(Fault::NoExpiry)?;
        if now >= expires.saturating_add(SKEW) {
            return Err(Fault::Expired(expires));
        }
        for name in ["nbf", "iat"] {
            if let Some(begins) = time(claims, name)?.filter(|begins| *begins > now.saturating_add(SKEW)) {
                return Err(Fault::NotYet(begins));
            }
        }
        let audiences = audiences(claims)?;
        if !self.audiences.is_empty()
            && !audiences.iter().any(|one| self.audiences.iter().any(|taken| **taken == **one))
        {
            return Err(Fault::Audience);
        }
        Ok(Principal { issuer: self.issuer.clone(), subject: subject(claims)?.into(), claims: claims.clone() })
    }

    /// Takes out what a client may have written where claims are to stand.
    fn strip(&self, headers: &mut HeaderMap) {
        for name in self.claim_headers.iter().map(|one| &one.header).chain(&self.payload_header) {
            headers.remove(name);
            // Applications of the CGI tradition take `_` and `-` for one another (RFC 3875, section 4.1.18).
            let alike: Vec<HeaderName> = headers
                .keys()
                .filter(|other| other.as_str().replace('_', "-") == *name.as_str().replace('_', "-"))
                .cloned()
                .collect();
            alike.iter().for_each(|name| drop(headers.remove(name)));
        }
    }

    fn write(&self, token: &Token<'_>, headers: &mut HeaderMap) {
        for ClaimHeader { header, claim } in &self.claim_headers {
            let text = claim_at(&token.claims, claim).and_then(claim_text);
            if let Some(value) = text.and_then(|text| HeaderValue::try_from(text).ok()) {
                headers.insert(header, value);
            }
        }
        if let Some(header) = &self.payload_header
            && let Ok(value) = HeaderValue::from_str(token.payload)
        {
            headers.insert(header, value);
        }
    }
}

/// A claim by its name; names with dots between them lead into objects.
fn claim_at<'a>(claims: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    let within = || {
        let mut names = name.split('.');
        let first = claims.get(names.next()?)?;
        names.try_fold(first, |value, name| value.as_object()?.get(name))
    };
    claims.get(name).or_else(within)
}

/// A claim as a header has it: text, numbers and truth as they are, lists and objects as JSON in base64url.
pub fn claim_text(claim: &Value) -> Option<String> {
    match claim {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        Value::Bool(_) | Value::Number(_) => Some(claim.to_string()),
        Value::Array(_) | Value::Object(_) => Some(URL_SAFE_NO_PAD.encode(claim.to_string())),
    }
}

/// Whether a claim may be written to a header of this name: not to one that says where a message ends or whom it is for.
pub fn may_carry(name: &HeaderName) -> bool {
    const FRAMING: [HeaderName; 6] = [CONTENT_LENGTH, HOST, TE, TRAILER, TRANSFER_ENCODING, UPGRADE];
    const HOPS: [&str; 5] = ["connection", "keep-alive", "proxy-connection", "http2-settings", "expect"];
    !FRAMING.contains(name) && !HOPS.contains(&name.as_str())
}

/// NumericDate: RFC 7519, section 2. A part of a second may be there.
fn time(claims: &Map<String, Value>, name: &'static str) -> Result<Option<i64>, Fault> {
    let Some(value) = claims.get(name) else { return Ok(None) };
    let whole = value.as_i64().or_else(|| value.as_f64().filter(|at| at.abs() < 1e15).map(|at| at.floor() as i64));
    whole.map(Some).ok_or(Fault::Malformed("a time in its claims is none"))
}

fn audiences(claims: &Map<String, Value>) -> Result<Vec<String>, Fault> {
    let wrong = Fault::Malformed("its aud is neither text nor a list of texts");
    match claims.get("aud") {
        None => Ok(Vec::new()),
        Some(Value::String(one)) => Ok(vec![one.clone()]),
        Some(Value::Array(several)) => {
            several.iter().map(|one| one.as_str().map(str::to_owned).ok_or_else(|| wrong.clone())).collect()
        }
        Some(_) => Err(wrong),
    }
}

fn subject(claims: &Map<String, Value>) -> Result<&str, Fault> {
    match claims.get("sub") {
        None => Ok(""),
        Some(Value::String(subject)) => Ok(subject),
        Some(_) => Err(Fault::Malformed("its sub is no text")),
    }
}
