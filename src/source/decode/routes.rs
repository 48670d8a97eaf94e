//! Routes of the Gateway API.

use std::sync::Arc;

use serde_json::Value;

use super::field::{Fault, SUBDOMAIN, check_namespaced, is_subdomain};
use super::{Item, Key, Kind, Read};
use crate::route::{self, RouteKind};

/// Reads a route; what of it is not in force as written is told.
pub(super) fn route(key: &Key, value: &Value) -> Result<Read, Fault> {
    check_namespaced(key, is_subdomain, SUBDOMAIN)?;
    let kind = if key.kind == Kind::GrpcRoute { RouteKind::Grpc } else { RouteKind::Http };
    let route = route::decode(kind, value).map_err(|error| Fault::new(error.field, error.cause))?;
    let notes = route.notes.iter().map(|note| Fault::new(note.field.clone(), note.cause.clone())).collect();
    Ok((Item::Route(Arc::new(route)), notes))
}

#[cfg(test)]
mod tests;
