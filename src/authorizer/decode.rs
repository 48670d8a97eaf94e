//! `ExternalAuthorizer`.

use std::time::Duration;

use http::uri::PathAndQuery;
use http::{HeaderName, HeaderValue, StatusCode};
use serde_json::Value;

use super::object::DEFAULT_TIMEOUT;
use super::{Authorizer, BodyLimit, GrpcSettings, HttpSettings, Names, Protocol};
use crate::api::{ExternalAuthorizerSpec, GrpcAuthorizer, HttpAuthorizer};
use crate::authentication::may_carry;
use crate::mesh::NamespacedName;
use crate::route::parse_duration;

/// Why an authorizer was refused: the field, what is wrong with it, and what would be right.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{field}: {cause}")]
pub struct DecodeError {
    /// `spec.service.port`
    pub field: String,
    pub cause: String,
}

impl Authorizer {
    /// Reads an `ExternalAuthorizer`. A field that is not known forbids it: it may have been what keeps a request out.
    pub fn decode(name: &NamespacedName, object: &Value) -> Result<Self, DecodeError> {
        let spec = object.get("spec").ok_or_else(|| refuse("spec", "it is missing; say which Service is asked"))?;
        let mut unknown = None;
        let mut track = serde_path_to_error::Track::new();
        let tracked = serde_path_to_error::Deserializer::new(spec, &mut track);
        let read: Result<ExternalAuthorizerSpec, _> = serde_ignored::deserialize(tracked, |path| {
            _ = unknown.get_or_insert_with(|| path.to_string().replace(".?", ""));
        });
        let spec = read.map_err(|error| match track.path().to_string().as_str() {
            "." => refuse("spec", &error.to_string()),
            within => refuse(&format!("spec.{within}"), &error.to_string()),
        })?;
        if let Some(field) = unknown {
            let cause = "the field is not known: misspelt, misplaced, or of another version; correct or remove it";
            return Err(refuse(&format!("spec.{field}"), cause));
        }
        let namespace = spec.service.namespace.as_deref().unwrap_or(&name.namespace);
        if spec.service.name.is_empty() || spec.service.port == 0 {
            return Err(refuse("spec.service", "it names no port of a Service; write name and port"));
        }
        let protocol = match (&spec.http, &spec.grpc) {
            (Some(http), None) => Protocol::Http(by_http(http)?),
            (None, Some(grpc)) => Protocol::Grpc(by_grpc(grpc)?),
            _ => return Err(refuse("spec", "it is asked in one way: give it http or grpc")),
        };
        Ok(Self {
            name: name.clone(),
            service: NamespacedName::new(namespace, spec.service.name.as_str()),
            port: spec.service.port,
            protocol,
            body: body(&spec)?,
            timeout: timeout(spec.timeout.as_deref())?,
            status_on_error: status(spec.status_on_error)?,
        })
    }
}

fn by_http(written: &HttpAuthorizer) -> Result<HttpSettings, DecodeError> {
    let names = |list: &Option<Vec<String>>, field: &str| names(list.as_deref(), &format!("spec.http.{field}"));
    let prefix = written.path_prefix.as_deref().unwrap_or_default().trim_end_matches('/');
    if !prefix.is_empty()
        && (!prefix.starts_with('/') || prefix.contains(['?', '#']) || PathAndQuery::try_from(prefix).is_err())
    {
        return Err(refuse("spec.http.pathPrefix", &format!("{prefix:?} is no path; write one such as /check")));
    }
    let mut added = Vec::new();
    for (at, header) in written.include_additional_headers_in_check.iter().flatten().enumerate() {
        let field = format!("spec.http.includeAdditionalHeadersInCheck[{at}]");
        let name = HeaderName::from_bytes(header.name.as_bytes()).ok().filter(may_carry);
        let name = name.ok_or_else(|| refuse(&field, &format!("{:?} is no header that can be added", header.name)))?;
        let value = HeaderValue::from_str(&header.value);
        added.push((name, value.map_err(|_| refuse(&field, &format!("{:?} is no value of a header", header.value)))?));
    }
    Ok(HttpSettings {
        path_prefix: prefix.into(),
        request_headers: names(&written.include_request_headers_in_check, "includeRequestHeadersInCheck")?
            .unwrap_or_default(),
        added,
        to_upstream: Some(
            names(&written.headers_to_upstream_on_allow, "headersToUpstreamOnAllow")?.unwrap_or_default(),
        ),
        to_downstream: names(&written.headers_to_downstream_on_allow, "headersToDownstreamOnAllow")?
            .unwrap_or_default(),
        of_denial: names(&written.headers_to_downstream_on_deny, "headersToDownstreamOnDeny")?,
        any_success: true,
    })
}

fn by_grpc(written: &GrpcAuthorizer) -> Result<GrpcSettings, DecodeError> {
    let list = written.include_request_headers_in_check.as_deref();
    Ok(GrpcSettings { request_headers: names(list, "spec.grpc.includeRequestHeadersInCheck")? })
}

fn names(list: Option<&[String]>, field: &str) -> Result<Option<Names>, DecodeError> {
    let Some(list) = list else { return Ok(None) };
    let refused = |at: usize| {
        refuse(
            &format!("{field}[{at}]"),
            &format!("{:?} is no name of a header; one '*' may stand first or last", list[at]),
        )
    };
    Names::parse(list).map(Some).map_err(refused)
}

fn body(spec: &ExternalAuthorizerSpec) -> Result<Option<BodyLimit>, DecodeError> {
    let Some(written) = &spec.include_request_body_in_check else { return Ok(None) };
    let bytes = written.max_request_bytes as usize;
    if !(1..=MOST_BODY).contains(&bytes) {
        let cause = format!("{bytes} is not from 1 to {MOST_BODY}: so much is held of each request");
        return Err(refuse("spec.includeRequestBodyInCheck.maxRequestBytes", &cause));
    }
    Ok(Some(BodyLimit { bytes, partial: written.allow_partial_message.unwrap_or(false) }))
}

fn timeout(written: Option<&str>) -> Result<Duration, DecodeError> {
    let Some(written) = written else { return Ok(DEFAULT_TIMEOUT) };
    let parsed = parse_duration(written).map_err(|error| refuse("spec.timeout", &error.to_string()))?;
    match parsed.is_zero() || parsed > MOST_TIMEOUT {
        true => Err(refuse("spec.timeout", "it is not from 1ms to 60s: nobody waits for ever")),
        false => Ok(parsed),
    }
}

fn status(written: Option<u16>) -> Result<StatusCode, DecodeError> {
    let code = written.unwrap_or(403);
    let status = StatusCode::from_u16(code).ok().filter(|status| status.is_client_error() || status.is_server_error());
    status.ok_or_else(|| refuse("spec.statusOnError", &format!("{code} is not from 400 to 599")))
}

fn refuse(field: &str, cause: &str) -> DecodeError {
    DecodeError { field: field.to_owned(), cause: cause.to_owned() }
}

const MOST_BODY: usize = 1 << 20;
const MOST_TIMEOUT: Duration = Duration::from_secs(60);
