//! Routes of the Gateway API, and policies about traffic.

use std::sync::Arc;

use serde_json::Value;

use super::field::{Fault, SUBDOMAIN, check_namespaced, is_subdomain};
use super::{Item, Key, Kind, Read};
use crate::route::traffic::{self, TrafficKind};
use crate::route::{self, RouteKind};

/// Reads a route; what of it is not in force as written is told.
pub(super) fn route(key: &Key, value: &Value) -> Result<Read, Fault> {
    check_namespaced(key, is_subdomain, SUBDOMAIN)?;
    let kind = if key.kind == Kind::GrpcRoute { RouteKind::Grpc } else { RouteKind::Http };
    let route = route::decode(kind, value).map_err(|error| Fault::new(error.field, error.cause))?;
    let notes = route.notes.iter().map(|note| Fault::new(note.field.clone(), note.cause.clone())).collect();
    Ok((Item::Route(Arc::new(route)), notes))
}

/// Reads a policy about traffic, likewise.
pub(super) fn traffic(key: &Key, value: &Value) -> Result<Read, Fault> {
    check_namespaced(key, is_subdomain, SUBDOMAIN)?;
    let kind = if key.kind == Kind::TrafficPolicy { TrafficKind::Traffic } else { TrafficKind::Backend };
    let policy = traffic::decode(kind, value).map_err(|error| Fault::new(error.field, error.cause))?;
    let notes = policy.notes.iter().map(|note| Fault::new(note.field.clone(), note.cause.clone())).collect();
    Ok((Item::Traffic(Arc::new(policy)), notes))
}

#[cfg(test)]
mod tests;
