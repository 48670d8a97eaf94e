//! The filter `ExternalAuth` ([GEP-1494](https://gateway-api.sigs.k8s.io/geps/gep-1494/)).

use std::time::Duration;

use http::StatusCode;
use http::uri::PathAndQuery;

use super::filter::Refused;
use super::rule::Reader;
use super::wire;
use crate::authorizer::{Authorizer, BodyLimit, GrpcSettings, HttpSettings, Names, Protocol};

pub(super) fn authorizer(
    reader: &mut Reader<'_>,
    field: &str,
    written: wire::ExternalAuth,
) -> Result<Authorizer, Refused> {
    let to = reader.backend_ref(&format!("{field}.backendRef"), written.backend_ref);
    let to = to.ok_or_else(|| ("externalAuth.backendRef", "nobody can be asked there".to_owned()))?;
    let protocol = match (&*written.protocol, written.http, written.grpc) {
        ("HTTP", http, None) => Protocol::Http(by_http(http.unwrap_or_default())?),
        ("GRPC", None, grpc) => {
            let allowed = grpc.and_then(|grpc| grpc.allowed_headers).unwrap_or_default();
            let names = names(&allowed, "externalAuth.grpc.allowedHeaders")?;
            Protocol::Grpc(GrpcSettings { request_headers: (!allowed.is_empty()).then_some(names) })
        }
        ("HTTP" | "GRPC", ..) => {
            return Err(("externalAuth", "what stands beside its protocol is of the other one".to_owned()));
        }
        (other, ..) => return Err(("externalAuth.protocol", format!("{other:?} is neither HTTP nor GRPC"))),
    };
    let most = written.forward_body.and_then(|body| body.max_size).filter(|most| *most > 0);
    Ok(Authorizer {
        name: to.service.clone(),
        service: to.service,
        port: to.port,
        protocol,
        // "Bodies over that size must be rejected with a 4xx series error."
        body: most.map(|most| BodyLimit { bytes: most.into(), partial: false }),
        timeout: TIMEOUT,
        status_on_error: StatusCode::FORBIDDEN,
    })
}

fn by_http(written: wire::ExternalHttp) -> Result<HttpSettings, Refused> {
    let path = written.path.unwrap_or_default();
    let prefix = path.trim_end_matches('/');
    if !prefix.is_empty()
        && (!prefix.starts_with('/') || prefix.contains(['?', '#']) || PathAndQuery::try_from(prefix).is_err())
    {
        return Err(("externalAuth.http.path", format!("{path:?} is no path; write one such as /check")));
    }
    let back = written.allowed_response_headers.unwrap_or_default();
    let to_upstream = names(&back, "externalAuth.http.allowedResponseHeaders")?;
    Ok(HttpSettings {
        path_prefix: prefix.into(),
        request_headers: names(&written.allowed_headers.unwrap_or_default(), "externalAuth.http.allowedHeaders")?,
        added: Vec::new(),
        to_upstream: (!back.is_empty()).then_some(to_upstream),
        to_downstream: Names::default(),
        of_denial: None,
        any_success: false,
    })
}

fn names(written: &[String], field: &'static str) -> Result<Names, Refused> {
    Names::parse(written).map_err(|at| (field, format!("{:?} is no name of a header", written[at])))
}

const TIMEOUT: Duration = Duration::from_secs(5);
