use std::time::Duration;

use bytes::Bytes;
use http::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HOST, ORIGIN};
use http::{HeaderValue, Method, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Body;
use hyper::{Request, Response};
use serde_json::{Value, json};

use super::{Server, Sources};

type Answer = Response<Full<Bytes>>;

/// Answers one request, whatever it is.
pub(super) async fn answer<B>(server: Server, sources: &Sources, request: Request<B>) -> Answer
where
    B: Body,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    if server == Server::Admin && !is_for_loopback(&request) {
        return text(StatusCode::FORBIDDEN, "ask for localhost, 127.0.0.1 or [::1]: no other Host is answered here\n");
    }
    let path = request.uri().path();
    let Some(page) = PAGES.iter().find(|page| page.path == path && page.servers.contains(&server)) else {
        return text(StatusCode::NOT_FOUND, &format!("there is no {path:?} here; there is:\n{}", pages(server)));
    };
    let changes = match *request.method() {
        Method::GET | Method::HEAD if page.shows => false,
        Method::POST | Method::PUT if page.changes => true,
        _ => return not_allowed(page),
    };
    if changes && request.headers().contains_key(ORIGIN) {
        return text(StatusCode::FORBIDDEN, "a web page may change nothing here\n");
    }

    match (page.path, changes) {
        ("/live", _) => text(StatusCode::OK, "live\n"),
        ("/ready", _) => ready(sources),
        ("/metrics", _) => {
            let metrics = sources.metrics.clone();
            computed("text/plain; version=0.0.4; charset=utf-8", move || metrics.render()).await
        }
        ("/dump", _) => {
            let dump = sources.dump.clone();
            computed("application/json", move || format!("{:#}\n", dump.dump())).await
        }
        ("/log", false) => log_level(sources),
        ("/log", true) => set_log_level(sources, request).await,
        // What is left is to drain: the table below names no other.
        _ => {
            sources.control.drain();
            text(StatusCode::ACCEPTED, "draining\n")
        }
    }
}

fn ready(sources: &Sources) -> Answer {
    let readiness = sources.control.readiness();
    let status = if readiness.is_ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    json(status, &json!({ "ready": readiness.is_ready(), "reasons": readiness.reasons }))
}

fn log_level(sources: &Sources) -> Answer {
    match sources.log.level() {
        Ok(level) => json(StatusCode::OK, &json!({ "level": level })),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, &format!("{error}\n")),
    }
}

// The level is in the query (`/log?level=debug`) or is the body.
async fn set_log_level<B>(sources: &Sources, request: Request<B>) -> Answer
where
    B: Body,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let query = request.uri().query().unwrap_or_default().split('&').find_map(|pair| pair.strip_prefix("level="));
    let level = match query {
        // What a level may hold needs no other escapes.
        Some(level) => level.replace("%2C", ",").replace("%3D", "=").replace("%3A", ":"),
        None => {
            let body = Limited::new(request.into_body(), MOST_BODY_BYTES).collect();
            match tokio::time::timeout(BODY_LIMIT, body).await {
                Ok(Ok(body)) => String::from_utf8_lossy(&body.to_bytes()).trim().to_owned(),
                Ok(Err(_)) => {
                    return text(StatusCode::PAYLOAD_TOO_LARGE, "the body is broken, or too long for a level\n");
                }
                Err(_) => return text(StatusCode::REQUEST_TIMEOUT, "the body did not come in time\n"),
            }
        }
    };
    match sources.log.set_level(&level) {
        Ok(()) => {
            tracing::info!(%level, "The log level was changed.");
            log_level(sources)
        }
        Err(error) => text(StatusCode::BAD_REQUEST, &format!("{error}\n")),
    }
}

// Off the runtime's thread, which may carry connections.
async fn computed(content_type: &'static str, compute: impl FnOnce() -> String + Send + 'static) -> Answer {
    match tokio::task::spawn_blocking(compute).await {
        Ok(body) => response(StatusCode::OK, content_type, body),
        Err(_) => text(StatusCode::INTERNAL_SERVER_ERROR, "the page could not be made; the log says why\n"),
    }
}

fn not_allowed(page: &Page) -> Answer {
    let methods = match (page.shows, page.changes) {
        (true, true) => "GET, HEAD, POST, PUT",
        (false, true) => "POST, PUT",
        _ => "GET, HEAD",
    };
    let mut answer = text(StatusCode::METHOD_NOT_ALLOWED, &format!("{} takes {methods}\n", page.path));
    answer.headers_mut().insert(ALLOW, HeaderValue::from_static(methods));
    answer
}

fn is_for_loopback<B>(request: &Request<B>) -> bool {
    let is_loopback = |host: &str| ["localhost", "127.0.0.1", "[::1]"].iter().any(|own| host.eq_ignore_ascii_case(own));
    let mut hosts = request.headers().get_all(HOST).iter();
    let (Some(host), None) = (hosts.next(), hosts.next()) else { return false };
    let host = host.to_str().ok().and_then(|host| host.parse::<http::uri::Authority>().ok());
    host.is_some_and(|host| is_loopback(host.host())) && request.uri().host().is_none_or(is_loopback)
}

fn pages(server: Server) -> String {
    PAGES
        .iter()
        .filter(|page| page.servers.contains(&server))
        .map(|page| format!("  {:<10}{}\n", page.path, page.meaning))
        .collect()
}

fn json(status: StatusCode, value: &Value) -> Answer {
    response(status, "application/json", format!("{value}\n"))
}

fn text(status: StatusCode, body: &str) -> Answer {
    response(status, "text/plain; charset=utf-8", body.to_owned())
}

fn response(status: StatusCode, content_type: &'static str, body: String) -> Answer {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

struct Page {
    path: &'static str,
    servers: &'static [Server],
    shows: bool,
    changes: bool,
    meaning: &'static str,
}

const PAGES: [Page; 6] = [
    Page {
        path: "/live",
        servers: &[Server::Admin, Server::Readiness],
        shows: true,
        changes: false,
        meaning: "whether the agent runs",
    },
    Page {
        path: "/ready",
        servers: &[Server::Admin, Server::Readiness],
        shows: true,
        changes: false,
        meaning: "whether it serves, and what speaks against it",
    },
    Page {
        path: "/metrics",
        servers: &[Server::Admin, Server::Metrics],
        shows: true,
        changes: false,
        meaning: "Prometheus metrics",
    },
    Page {
        path: "/dump",
        servers: &[Server::Admin],
        shows: true,
        changes: false,
        meaning: "what the agent knows and does, as JSON",
    },
    Page {
        path: "/log",
        servers: &[Server::Admin],
        shows: true,
        changes: true,
        meaning: "the log level; PUT /log?level=debug changes it",
    },
    Page {
        path: "/drain",
        servers: &[Server::Admin],
        shows: false,
        changes: true,
        meaning: "POST starts to drain, as SIGTERM does",
    },
];
const MOST_BODY_BYTES: usize = 4096;
const BODY_LIMIT: Duration = Duration::from_secs(5);
