//! `RequestAuthentication`: whose tokens are taken, and what becomes of them.

use std::sync::Arc;

use http::HeaderName;
use http::uri::{Scheme, Uri};
use k8s_openapi::jiff::Timestamp;
use serde_json::Value;

use super::field::{Fields, items, kind, refuse, text, texts};
use super::{DecodeError, object_at};
use crate::authentication::{
    ClaimHeader, Found, KEYS_HOLD, KeySet, KeySource, Keys, Place, Rule, ServiceUrl, may_carry,
};
use crate::mesh::NamespacedName;
use crate::policy::object::Unenforced;
use crate::policy::{RequestAuthentication, Scope};

/// Reads what stands below `spec`, but for its scope, and the keys that were fetched for it in `status`.
pub(super) fn authentication(
    name: NamespacedName,
    scope: Scope,
    spec: &mut Fields<'_>,
    status: Option<&Value>,
    mut notes: Vec<Unenforced>,
) -> Result<RequestAuthentication, DecodeError> {
    let written = spec.take("jwtRules");
    notes.extend(spec.rest());
    // What nobody knows beside the rules may have been meant for each of them.
    let is_opaque = !notes.is_empty();
    let (mut rules, mut lacking) = (Vec::new(), Vec::new());
    for (path, value) in written.map(|(path, value)| items(value, &path)).transpose()?.unwrap_or_default() {
        let before = notes.len();
        let mut rule = rule(value, &path, status, &mut notes)?;
        rule.opaque = is_opaque || notes.len() > before;
        if rule.keys.found.is_none() {
            lacking.push(without_keys(&rule, &path));
        }
        rules.push(Arc::new(rule));
    }
    Ok(RequestAuthentication { name, scope, rules, lacking, unenforced: notes })
}

fn rule(value: &Value, path: &str, status: Option<&Value>, notes: &mut Vec<Unenforced>) -> Result<Rule, DecodeError> {
    let mut fields = Fields::new(object_at(value, path)?, path);
    let issuer = match fields.take("issuer") {
        Some((path, value)) => match text(value, &path)? {
            "" => return Err(refuse(&path, "it is empty; write the iss of the tokens".into())),
            issuer => issuer,
        },
        None => return Err(refuse(&format!("{path}.issuer"), "it is missing; write the iss of the tokens".into())),
    };
    let audiences = match fields.take("audiences") {
        Some((path, value)) => texts(value, &path)?.into_iter().map(|(_, text)| text.into()).collect(),
        None => Vec::new(),
    };
    let keys = keys(&mut fields, path, status, notes)?;
    let places = places(&mut fields, notes)?;
    let forward = match fields.take("forwardOriginalToken") {
        Some((path, value)) => {
            value.as_bool().ok_or_else(|| refuse(&path, format!("{} is neither true nor false", kind(value))))?
        }
        None => false,
    };
    let mut claim_headers = Vec::new();
    if let Some((path, value)) = fields.take("outputClaimToHeaders") {
        for (path, value) in items(value, &path)? {
            claim_headers.push(claim_header(value, &path, notes)?);
        }
    }
    let payload_header = match fields.take("outputPayloadToHeader") {
        Some((path, value)) => Some(output(text(value, &path)?, &path)?),
        None => None,
    };
    notes.extend(fields.rest());
    Ok(Rule { issuer: issuer.into(), audiences, keys, places, forward, claim_headers, payload_header, opaque: false })
}

fn keys(
    fields: &mut Fields<'_>,
    path: &str,
    status: Option<&Value>,
    notes: &mut Vec<Unenforced>,
) -> Result<Keys, DecodeError> {
    // Whoever fetches the keys reads it.
    if let Some((path, bundle)) = fields.take("jwksCaBundle") {
        let bundle = text(bundle, &path)?;
        if !pem::parse_many(bundle).is_ok_and(|parts| parts.iter().any(|part| part.tag() == "CERTIFICATE")) {
            return Err(refuse(&path, "there is no certificate in it; write them as PEM".into()));
        }
    }
    match (fields.take("jwks"), fields.take("jwksConfigMap"), fields.take("jwksUri")) {
        (Some((path, value)), None, None) => {
            let set = KeySet::parse(text(value, &path)?).map_err(|error| refuse(&path, error.to_string()))?;
            Ok(Keys { source: KeySource::Inline, found: Some(Found { set: Arc::new(set), until: None }) })
        }
        (None, Some((path, value)), None) => {
            let mut inner = Fields::new(object_at(value, &path)?, &path);
            let name = match inner.take("name") {
                Some((path, value)) => text(value, &path)?,
                None => return Err(refuse(&format!("{path}.name"), "it is missing; name the ConfigMap".into())),
            };
            let key = match inner.take("key") {
                Some((path, value)) => text(value, &path)?,
                None => DEFAULT_KEY,
            };
            notes.extend(inner.rest());
            let source = KeySource::ConfigMap { name: name.into(), key: key.into() };
            Ok(Keys { found: fetched(&source, status), source })
        }
        (None, None, Some((path, value))) => {
            let url = text(value, &path)?;
            if !is_fetched(url) {
                let cause = format!(
                    "{url:?} is not fetched: write https://..., with jwksCaBundle where its certificate is not of a public \
                     CA, or http://NAME.NAMESPACE.svc/... of a Service in the mesh"
                );
                return Err(refuse(&path, cause));
            }
            let source = KeySource::Url(url.into());
            Ok(Keys { found: fetched(&source, status), source })
        }
        (None, None, None) => Err(refuse(
            path,
            "it says nowhere where its keys are; give it one of jwks, jwksConfigMap and jwksUri".into(),
        )),
        _ => Err(refuse(path, "its keys are in one place: give it one of jwks, jwksConfigMap and jwksUri".into())),
    }
}

/// What the controller wrote down of a source, if it is of use.
fn fetched(source: &KeySource, status: Option<&Value>) -> Option<Found> {
    let written = status?.get("keys")?.as_array()?;
    let of_source = written.iter().find(|entry| entry["source"] == source.to_string())?;
    let set = KeySet::parse(of_source["jwks"].as_str()?).ok()?;
    let until = match source {
        KeySource::Url(_) => {
            let fetched: Timestamp = of_source["fetchTime"].as_str()?.parse().ok()?;
            Some(fetched.as_second().saturating_add(KEYS_HOLD))
        }
        // A ConfigMap that goes takes its keys with it.
        KeySource::ConfigMap { .. } | KeySource::Inline => None,
    };
    Some(Found { set: Arc::new(set), until })
}

/// By https, or from a Service through a tunnel: in plaintext a key could be anybody's.
fn is_fetched(url: &str) -> bool {
    let Ok(uri) = url.parse::<Uri>() else { return false };
    let has_user = uri.authority().is_some_and(|authority| authority.as_str().contains('@'));
    let by_https = uri.scheme() == Some(&Scheme::HTTPS) && !has_user && uri.host().is_some_and(|host| !host.is_empty());
    by_https || ServiceUrl::parse(url).is_some()
}

fn places(fields: &mut Fields<'_>, notes: &mut Vec<Unenforced>) -> Result<Vec<Place>, DecodeError> {
    let mut places = Vec::new();
    if let Some((path, value)) = fields.take("fromHeaders") {
        for (path, value) in items(value, &path)? {
            let mut inner = Fields::new(object_at(value, &path)?, &path);
            let Some((name_path, name)) = inner.take("name") else {
                return Err(refuse(&format!("{path}.name"), "it is missing; name the header".into()));
            };
            let name = header(text(name, &name_path)?, &name_path)?;
            let prefix = match inner.take("prefix") {
                Some((path, value)) => text(value, &path)?,
                None => "",
            };
            notes.extend(inner.rest());
            places.push(Place::Header(name, prefix.into()));
        }
    }
    if let Some((path, value)) = fields.take("fromParams") {
        places.extend(texts(value, &path)?.into_iter().map(|(_, name)| Place::Parameter(name.into())));
    }
    if places.is_empty() {
        places.push(Place::bearer());
    }
    Ok(places)
}

fn claim_header(value: &Value, path: &str, notes: &mut Vec<Unenforced>) -> Result<ClaimHeader, DecodeError> {
    let mut fields = Fields::new(object_at(value, path)?, path);
    let mut word = |key: &str| match fields.take(key) {
        Some((path, value)) => match text(value, &path)? {
            "" => Err(refuse(&path, "it is empty".into())),
            text => Ok((path, text)),
        },
        None => Err(refuse(&format!("{path}.{key}"), "it is missing".into())),
    };
    let ((header_path, header), (_, claim)) = (word("header")?, word("claim")?);
    notes.extend(fields.rest());
    Ok(ClaimHeader { header: output(header, &header_path)?, claim: claim.into() })
}

fn output(name: &str, path: &str) -> Result<HeaderName, DecodeError> {
    let name = header(name, path)?;
    match may_carry(&name) {
        true => Ok(name),
        false => Err(refuse(path, format!("{name:?} is between two neighbours, and carries no claim; take another"))),
    }
}

fn header(name: &str, path: &str) -> Result<HeaderName, DecodeError> {
    HeaderName::from_bytes(name.as_bytes()).map_err(|_| refuse(path, format!("{name:?} is no name of a header")))
}

fn without_keys(rule: &Rule, path: &str) -> Unenforced {
    let until = "until they are there, no token of its issuer is accepted";
    let (field, cause) = match &rule.keys.source {
        KeySource::Url(_) => (
            "jwksUri",
            format!(
                "its keys have not been fetched, which the controller of a cluster does; {until}. Without a controller, write them into jwks or a ConfigMap"
            ),
        ),
        KeySource::ConfigMap { name, key } => (
            "jwksConfigMap",
            format!("key {key:?} of ConfigMap {name:?} is not there, or holds no key that can be used; {until}"),
        ),
        KeySource::Inline => ("jwks", until.to_owned()),
    };
    Unenforced { field: format!("{path}.{field}"), cause }
}

const DEFAULT_KEY: &str = "jwks.json";
