//! The filters of a rule, or of one of its backends. What cannot be honoured is never skipped: it refuses.

use std::sync::Arc;

use http::header::{CONNECTION, CONTENT_LENGTH, HOST, TE, TRAILER, TRANSFER_ENCODING, UPGRADE};
use http::uri::{Authority, PathAndQuery};
use http::{HeaderName, HeaderValue, Method, StatusCode};
use serde_json::Value;

use super::external;
use super::rule::Reader;
use super::{passed_over, read, wire};
use crate::route::{
    Allowed, Cors, Filters, HeaderEdits, Mirror, Origin, PathRewrite, Redirect, Rewrite, RouteKind, Share, Why,
};

/// What filters make of a rule beside what they change.
pub(super) enum Asked {
    Nothing,
    Redirect(Redirect),
    Refuse,
}

/// Why a filter is refused: the field below it, and the cause.
pub(super) type Refused = (&'static str, String);

pub(super) fn filters(reader: &mut Reader<'_>, field: &str, written: &[Value]) -> (Filters, Asked) {
    let mut filters = Filters::default();
    let mut redirect = None;
    let mut is_refused = false;
    for (at, value) in written.iter().enumerate() {
        let field = format!("{field}[{at}]");
        let mut unknown = Vec::new();
        let filter: wire::Filter = match read(value, &field, &mut unknown) {
            Ok(filter) => filter,
            Err(error) => {
                is_refused = true;
                reader.refuse(error.field, &error.cause, Why::Refused(reader.index));
                continue;
            }
        };
        is_refused |= !unknown.is_empty();
        reader.notes.extend(unknown.into_iter().map(|field| passed_over(field, Why::Refused(reader.index))));
        if let Err((name, cause)) = add(reader, &field, filter, &mut filters, &mut redirect) {
            is_refused = true;
            let why = if name == EXTENSION { Why::InvalidKind } else { Why::Refused(reader.index) };
            reader.refuse(format!("{field}.{name}"), &cause, why);
        }
    }
    if redirect.is_some() && filters.rewrite != Rewrite::default() {
        is_refused = true;
        let cause = "RequestRedirect and URLRewrite do not go together";
        reader.refuse(field.to_owned(), cause, Why::Refused(reader.index));
    }
    let asked = match redirect {
        _ if is_refused => Asked::Refuse,
        Some(redirect) => Asked::Redirect(redirect),
        None => Asked::Nothing,
    };
    (filters, asked)
}

fn add(
    reader: &mut Reader<'_>,
    field: &str,
    written: wire::Filter,
    filters: &mut Filters,
    redirect: &mut Option<Redirect>,
) -> Result<(), Refused> {
    let is_http = reader.kind == RouteKind::Http;
    let twice = || ("type", format!("a filter {} stands here already", written.kind));
    match &*written.kind {
        "RequestHeaderModifier" => {
            let said = said(written.request_header_modifier, "requestHeaderModifier")?;
            if filters.request_headers != HeaderEdits::NONE {
                return Err(twice());
            }
            filters.request_headers = edits(said, "requestHeaderModifier")?;
        }
        "ResponseHeaderModifier" => {
            let said = said(written.response_header_modifier, "responseHeaderModifier")?;
            if filters.response_headers != HeaderEdits::NONE {
                return Err(twice());
            }
            filters.response_headers = edits(said, "responseHeaderModifier")?;
        }
        "RequestMirror" => {
            let said = said(written.request_mirror, "requestMirror")?;
            let share = share(&said)?;
            let to = reader.backend_ref(&format!("{field}.requestMirror.backendRef"), said.backend_ref);
            filters.mirrors.push(Mirror { to, share });
        }
        "RequestRedirect" if is_http => {
            let said = said(written.request_redirect, "requestRedirect")?;
            if redirect.replace(read_redirect(said)?).is_some() {
                return Err(twice());
            }
        }
        "URLRewrite" if is_http => {
            let said = said(written.url_rewrite, "urlRewrite")?;
            if filters.rewrite != Rewrite::default() {
                return Err(twice());
            }
            filters.rewrite = Rewrite {
                hostname: said.hostname.map(|name| hostname("urlRewrite.hostname", &name)).transpose()?,
                path: said.path.map(|path| modifier("urlRewrite.path", path)).transpose()?,
            };
        }
        "CORS" if is_http => {
            let said = said(written.cors, "cors")?;
            if filters.cors.replace(cors(said)?).is_some() {
                return Err(twice());
            }
        }
        "ExternalAuth" if is_http => {
            let said = said(written.external_auth, "externalAuth")?;
            let authorizer = external::authorizer(reader, &format!("{field}.externalAuth"), said)?;
            if filters.authorizer.replace(Arc::new(authorizer)).is_some() {
                return Err(twice());
            }
        }
        "ExtensionRef" => {
            return Err((EXTENSION, "no kind of filter beside those of the Gateway API is known here".to_owned()));
        }
        other => {
            let known = match reader.kind {
                RouteKind::Http => {
                    "RequestHeaderModifier, ResponseHeaderModifier, RequestMirror, RequestRedirect, URLRewrite, CORS, \
                     ExternalAuth"
                }
                RouteKind::Grpc => "RequestHeaderModifier, ResponseHeaderModifier, RequestMirror",
            };
            return Err(("type", format!("{other:?} is none of {known}")));
        }
    }
    Ok(())
}

fn said<T>(part: Option<T>, name: &'static str) -> Result<T, Refused> {
    part.ok_or_else(|| (name, "a filter of this type says here what it does".to_owned()))
}

fn edits(written: wire::HeaderFilter, field: &'static str) -> Result<HeaderEdits, Refused> {
    let name = |text: &str| match HeaderName::from_bytes(text.as_bytes()) {
        Ok(name) if FRAMING.contains(&name) || HOP_BY_HOP.contains(&name.as_str()) => {
            Err((field, format!("{text:?} is between two neighbours, and none of a filter's business")))
        }
        Ok(name) => Ok(name),
        Err(_) => Err((field, format!("{text:?} is no name of a header"))),
    };
    let header = |header: wire::Header| {
        let value = HeaderValue::from_str(&header.value);
        let value = value.map_err(|_| (field, format!("{:?} is no value of a header", header.value)))?;
        Ok((name(&header.name)?, value))
    };
    let headers = |list: Option<Vec<wire::Header>>| list.into_iter().flatten().map(header).collect::<Result<_, _>>();
    let removed = |text: String| name(&text);
    let edits = HeaderEdits {
        set: headers(written.set)?,
        add: headers(written.add)?,
        remove: written.remove.into_iter().flatten().map(removed).collect::<Result<_, _>>()?,
    };
    let is_request = field == "requestHeaderModifier";
    let bad_host = |(name, value): &(HeaderName, HeaderValue)| {
        *name == HOST && (!is_request || Authority::try_from(value.as_bytes()).is_err())
    };
    if edits.set.iter().any(bad_host) || edits.add.iter().any(|(name, _)| *name == HOST) || edits.remove.contains(&HOST)
    {
        return Err((field, "a request has one Host: it can be set to another, and nothing else".to_owned()));
    }
    Ok(edits)
}

fn share(written: &wire::RequestMirror) -> Result<Share, Refused> {
    let share = match (written.percent, &written.fraction) {
        (None, None) => return Ok(Share::ALL),
        (Some(percent), None) => Share { numerator: percent, denominator: 100 },
        (None, Some(fraction)) => {
            Share { numerator: fraction.numerator, denominator: fraction.denominator.unwrap_or(100) }
        }
        (Some(_), Some(_)) => {
            return Err(("requestMirror", "percent and fraction say the same thing: write one".to_owned()));
        }
    };
    match share.denominator > 0 && share.numerator <= share.denominator {
        true => Ok(share),
        false => {
            Err(("requestMirror", format!("{} of {} is no share of all requests", share.numerator, share.denominator)))
        }
    }
}

fn read_redirect(written: wire::RequestRedirect) -> Result<Redirect, Refused> {
    let scheme = match written.scheme.as_deref() {
        None => None,
        Some("http") => Some("http"),
        Some("https") => Some("https"),
        Some(other) => return Err(("requestRedirect.scheme", format!("{other:?} is neither http nor https"))),
    };
    let code = written.status_code.unwrap_or(302);
    let status = [301, 302, 303, 307, 308].contains(&code).then(|| StatusCode::from_u16(code).ok()).flatten();
    let cause = || ("requestRedirect.statusCode", format!("{code} is none of 301, 302, 303, 307, 308"));
    if written.port == Some(0) {
        return Err(("requestRedirect.port", "0 is no port; write a number from 1 to 65535".to_owned()));
    }
    Ok(Redirect {
        scheme,
        hostname: written.hostname.map(|name| hostname("requestRedirect.hostname", &name)).transpose()?,
        path: written.path.map(|path| modifier("requestRedirect.path", path)).transpose()?,
        port: written.port,
        status: status.ok_or_else(cause)?,
    })
}

// PreciseHostname: a DNS name, no wildcard, no address, no port.
fn hostname(field: &'static str, text: &str) -> Result<std::sync::Arc<str>, Refused> {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let label = |part: &str| !part.is_empty() && part.bytes().all(allowed);
    match (1..=253).contains(&text.len()) && text.split('.').all(label) {
        true => Ok(text.into()),
        false => Err((field, format!("{text:?} is no host name; write one such as cart.example.com"))),
    }
}

fn modifier(field: &'static str, written: wire::PathModifier) -> Result<PathRewrite, Refused> {
    let (rewrite, text) = match (&*written.kind, written.replace_full_path, written.replace_prefix_match) {
        ("ReplaceFullPath", Some(full), None) => (PathRewrite::Full(full.as_str().into()), full),
        ("ReplacePrefixMatch", None, Some(prefix)) => (PathRewrite::Prefix(prefix.as_str().into()), prefix),
        ("ReplaceFullPath" | "ReplacePrefixMatch", ..) => {
            let cause = "its type and the one of replaceFullPath and replacePrefixMatch that is written do not agree";
            return Err((field, cause.to_owned()));
        }
        (other, ..) => return Err((field, format!("{other:?} is none of ReplaceFullPath, ReplacePrefixMatch"))),
    };
    let is_path = text.is_empty()
        || text.starts_with('/') && !text.contains(['?', '#']) && PathAndQuery::try_from(text.as_str()).is_ok();
    match is_path {
        true => Ok(rewrite),
        false => Err((field, format!("{text:?} is no path; write one such as /shop, with spaces as %20"))),
    }
}

fn cors(written: wire::Cors) -> Result<Cors, Refused> {
    let headers = |list: Option<Vec<String>>, field: &'static str| {
        allowed(list, |name| HeaderName::from_bytes(name.as_bytes()).ok(), field)
    };
    Ok(Cors {
        origins: allowed(written.allow_origins, Origin::parse, "cors.allowOrigins")?,
        credentials: written.allow_credentials.unwrap_or(false),
        methods: allowed(written.allow_methods, |name| Method::from_bytes(name.as_bytes()).ok(), "cors.allowMethods")?,
        headers: headers(written.allow_headers, "cors.allowHeaders")?,
        exposed: headers(written.expose_headers, "cors.exposeHeaders")?,
        max_age: written.max_age.unwrap_or(5),
    })
}

fn allowed<T>(
    written: Option<Vec<String>>,
    parse: impl Fn(&str) -> Option<T>,
    field: &'static str,
) -> Result<Allowed<T>, Refused> {
    let list = written.unwrap_or_default();
    if list.iter().any(|text| text == "*") {
        return Ok(Allowed::All);
    }
    let one = |text: String| parse(&text).ok_or_else(|| (field, format!("{text:?} cannot be read")));
    Ok(Allowed::These(list.into_iter().map(one).collect::<Result<_, _>>()?))
}

const EXTENSION: &str = "extensionRef";
/// What tells where a message ends, or what a connection becomes.
const FRAMING: [HeaderName; 6] = [CONNECTION, CONTENT_LENGTH, TE, TRAILER, TRANSFER_ENCODING, UPGRADE];
const HOP_BY_HOP: [&str; 3] = ["keep-alive", "proxy-connection", "http2-settings"];
