//! HTTP for those who ask for it: requests in, requests out, on the node of the client.
//!
//! A connection to a Service under `selvedge.dev/waypoint: node` is accepted at once, for each of its requests decides
//! for itself. `proxy` hears what the client speaks ([`wire`]) and hands it over as a [`Client`], with the [`Place`]
//! that it is served in; hyper reads requests from it, behind a check of the raw bytes that forgives nothing ([`wire`] again).
//! Each request is decided by `route` on the model of that moment, edited, and sent to a ready endpoint of its backend
//! over a connection of this thread's [`Pool`]: made as any TCP connection of the pod's, through the mesh, under the same
//! identity and policy, and kept for the next request of the same pod to the same endpoint. Bodies are streamed, never
//! held; what is held for a mirror or another try is bounded. Here is I/O and what HTTP asks of an intermediary (RFC 9110,
//! section 7.6); what becomes of a request is `route`'s to say. A panic costs one request, a broken client its connection.

#![forbid(unsafe_code)]

mod answer;
mod authenticate;
mod authorize;
mod body;
mod cause;
mod client;
mod executor;
mod forward;
mod gate;
mod guard;
mod head;
mod interim;
mod mirror;
mod place;
mod plan;
mod pool;
mod rates;
mod record;
mod request;
mod room;
mod serve;
mod session;
mod tee;
mod tries;
mod upgrade;
mod upstream;
pub mod wire;

pub use answer::Refusal;
pub use authenticate::authenticate;
pub use client::{Client, Version};
pub use guard::{Guard, GuardKey, Guards};
pub use head::settle_path;
pub use place::{Look, Permit, Place, Receiver, View};
pub use pool::Pool;
pub use rates::Rates;
pub use room::{ROOM_OF_POD, ROOM_OF_WAYPOINT, Room};
pub use serve::serve;

use crate::proxy::{Bond, Failure, Line};

pub fn describe_metrics() {
    metrics::describe_counter!(
        MIRRORED,
        metrics::Unit::Count,
        "Copies of requests for mirrors, by what became of them: sent, oversize, crowded, unfinished, busy or failed."
    );
    metrics::describe_gauge!(
        HELD,
        metrics::Unit::Bytes,
        "Bytes held for requests: heads, bodies that are kept, windows of HTTP/2, and answers on their way over it."
    );
    metrics::describe_gauge!(
        POOLED,
        metrics::Unit::Count,
        "Connections to applications that wait for their next request, or carry some over HTTP/2."
    );
    metrics::describe_counter!(
        authenticate::TOKENS,
        metrics::Unit::Count,
        "Requests to where a RequestAuthentication stands, by what their token is."
    );
    metrics::describe_counter!(
        authorize::ASKED,
        metrics::Unit::Count,
        "Requests that an external authorizer was asked about, by what it said."
    );
    metrics::describe_counter!(
        RETRIED,
        metrics::Unit::Count,
        "Requests that were sent once more, by why: unsent (nothing of them had reached anybody), unanswered, status or \
         grpc-status."
    );
    let counter = |name, text| metrics::describe_counter!(name, metrics::Unit::Count, text);
    counter(WITHHELD, "Requests that were worth another try and got none: their backend's retry budget was spent.");
    counter(REFUSED, "Requests that a circuit breaker refused, by what there was too much of.");
    counter(EJECTED, "Endpoints that were left out for a while because they failed where others did not.");
    counter(CROWDED, "Times that a pod's requests held as many bytes as they may, by what there was no room for.");
    counter(LIMITED, "Requests that a rate limit held back.");
    counter(FAULTED, "Faults that were injected, by kind: delay or abort.");
}

const HELD: &str = "selvedge_http_held_bytes";
const CROWDED: &str = "selvedge_http_crowded_total";
const MIRRORED: &str = "selvedge_http_mirrored_total";
const POOLED: &str = "selvedge_http_pooled_connections";
const RETRIED: &str = "selvedge_http_retries_total";
const WITHHELD: &str = "selvedge_http_retries_withheld_total";
const REFUSED: &str = "selvedge_http_circuit_breaker_refused_total";
const EJECTED: &str = "selvedge_http_ejections_total";
const LIMITED: &str = "selvedge_http_rate_limited_total";
const FAULTED: &str = "selvedge_http_faults_total";
