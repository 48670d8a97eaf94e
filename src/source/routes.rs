//! What a folder's routes and policies about traffic lack around them. In a cluster the controller says it in their status.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::decode::{Item, Key, Kind};
use super::view::View;
use crate::mesh::{Namespace, NamespacedName, Object, Service, ServiceKind, Waypoint, WaypointProblem};
use crate::route::status::{GrpcClaims, ServiceFacts, ServiceShape, check_parent, missing_backends};
use crate::route::traffic::{self, Table, TrafficPolicy};
use crate::route::{Route, RouteKind, RouteRef};

/// Each route with the fields of it that have no effect, and why.
pub(super) fn unmet(view: &View) -> Vec<(&Key, String, String)> {
    let routes: Vec<(&Key, &Arc<Route>)> = view.iter().filter_map(|(key, item)| Some((key, route(item)?))).collect();
    let claims = GrpcClaims::of(routes.iter().map(|(_, route)| &***route));
    let facts = |name: &NamespacedName| facts(view, name);
    let mut told = Vec::new();
    for (key, route) in routes {
        for parent in &route.parents {
            if let Err((_, message)) = check_parent(route, parent, &claims, facts) {
                told.push((key, format!("spec.parentRefs[{}]", parent.index), message));
            }
        }
        let missing: BTreeSet<String> = missing_backends(route, facts).collect();
        let told_of = |message| (key, "spec.rules".to_owned(), format!("{message}; its share is answered with 500"));
        told.extend(missing.into_iter().map(told_of));
    }
    told
}

/// Each policy about traffic that is not in force as written because of what stands around it.
pub(super) fn ineffective(view: &View) -> Vec<(&Key, String, String)> {
    let policies: Vec<(&Key, &Arc<TrafficPolicy>)> =
        view.iter().filter_map(|(key, item)| Some((key, policy(item)?))).collect();
    let mut table = Table::default();
    policies.iter().for_each(|(_, policy)| drop(table.apply(traffic::Delta::Apply((*policy).clone()))));
    let mut told = Vec::new();
    for (key, policy) in policies {
        for target in &policy.targets {
            if let Err((_, message)) = traffic::status::look(
                &target.target,
                &policy.fields,
                |name| facts(view, name),
                |reference| find_route(view, reference).cloned(),
            ) {
                told.push((key, format!("spec.targetRefs[{}]", target.index), message));
            }
        }
        told.extend(table.lost(policy).into_iter().map(|lost| {
            let cause = format!("{} says it of {} already and is older; it has no effect", lost.to, lost.target);
            (key, format!("spec.{}", lost.field), cause)
        }));
    }
    told
}

fn policy(item: &Item) -> Option<&Arc<TrafficPolicy>> {
    if let Item::Traffic(policy) = item { Some(policy) } else { None }
}

fn find_route<'a>(view: &'a View, reference: &RouteRef) -> Option<&'a Arc<Route>> {
    let kind = if reference.kind == RouteKind::Grpc { Kind::GrpcRoute } else { Kind::HttpRoute };
    view.get(&Key { kind, name: reference.name.clone() }).and_then(|item| route(item))
}

fn route(item: &Item) -> Option<&Arc<Route>> {
    if let Item::Route(route) = item { Some(route) } else { None }
}

fn facts(view: &View, name: &NamespacedName) -> Option<ServiceFacts> {
    let service = view.get(&Key { kind: Kind::Service, name: name.clone() })?;
    let Item::Service(service, _) = &**service else { return None };
    let shape = match service.kind {
        ServiceKind::ClusterIp(_) => ServiceShape::ClusterIp,
        ServiceKind::Headless => ServiceShape::Headless,
        ServiceKind::ExternalName => ServiceShape::ExternalName,
    };
    let ports = service.ports.iter().map(|port| (port.port, port.name.clone())).collect();
    let waypoint = waypoint(view, service);
    let without = without(view, &service.name.namespace, &waypoint);
    Some(ServiceFacts { shape, ports, waypoint, without })
}

fn waypoint(view: &View, service: &Service) -> Waypoint {
    let of_namespace = || namespace(view, &service.name.namespace)?.settings.waypoint.clone();
    service.settings.waypoint.clone().or_else(of_namespace).unwrap_or(Waypoint::None)
}

fn without(view: &View, own: &Arc<str>, waypoint: &Waypoint) -> Option<WaypointProblem> {
    let labels = namespace(view, own).map(|namespace| namespace.labels.clone()).unwrap_or_default();
    waypoint.problem(own, &labels, |name| match &**view.get(&Key { kind: Kind::Gateway, name: name.clone() })? {
        Item::Other(Object::Gateway(gateway)) => Some(gateway.clone()),
        _ => None,
    })
}

fn namespace<'a>(view: &'a View, name: &Arc<str>) -> Option<&'a Namespace> {
    let name = NamespacedName { namespace: "".into(), name: name.clone() };
    match &**view.get(&Key { kind: Kind::Namespace, name })? {
        Item::Other(Object::Namespace(namespace)) => Some(namespace),
        _ => None,
    }
}
