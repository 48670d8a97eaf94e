//! What becomes of a route at each of its parents, for its status
//! ([RouteParentStatus](https://gateway-api.sigs.k8s.io/reference/spec/#routeparentstatus)).

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Action, BackendRef, Parent, ParentPort, Route, RouteKind, Why};
use crate::mesh::{NamespacedName, Waypoint, WaypointProblem};

/// What is known of a Service that routes speak of.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServiceFacts {
    pub shape: ServiceShape,
    /// Number and name of each TCP port.
    pub ports: Vec<(u16, Arc<str>)>,
    /// Its own, else its namespace's.
    pub waypoint: Waypoint,
    /// Why it has not got the waypoint in a process of its own that it names.
    pub without: Option<WaypointProblem>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ServiceShape {
    ClusterIp,
    Headless,
    ExternalName,
}

/// One condition of a route at a parent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Condition {
    pub kind: &'static str,
    pub is_true: bool,
    pub reason: &'static str,
    pub message: String,
}

/// Which Service ports GRPCRoutes take: HTTPRoutes of the same namespace lose these.
#[derive(Clone, Debug, Default)]
pub struct GrpcClaims(BTreeMap<(Arc<str>, NamespacedName), Vec<ParentPort>>);

impl GrpcClaims {
    pub fn of<'a>(routes: impl IntoIterator<Item = &'a Route>) -> Self {
        let mut claims = Self::default();
        let grpc = routes.into_iter().filter(|route| route.kind == RouteKind::Grpc && !route.rules.is_empty());
        for (route, parent) in grpc.flat_map(|route| route.parents.iter().map(move |parent| (route, parent))) {
            let scope = (route.name.namespace.clone(), parent.service.clone());
            claims.0.entry(scope).or_default().push(parent.port.clone());
        }
        claims
    }

    fn takes(&self, route: &Route, service: &NamespacedName, (number, name): &(u16, Arc<str>)) -> bool {
        let scope = (route.name.namespace.clone(), service.clone());
        let mut ports = self.0.get(&scope).into_iter().flatten();
        route.kind == RouteKind::Http && ports.any(|port| port.takes_port(*number, name))
    }
}

/// The conditions of a route at one of its parents.
pub fn conditions(
    route: &Route,
    parent: &Parent,
    claims: &GrpcClaims,
    service: impl Fn(&NamespacedName) -> Option<ServiceFacts>,
) -> Vec<Condition> {
    let parent = check_parent(route, parent, claims, &service);
    let accepted = match parent.and_then(|message| check_rules(route).map(|()| message)) {
        Ok(message) => Condition { kind: ACCEPTED, is_true: true, reason: "Accepted", message },
        Err((reason, message)) => Condition { kind: ACCEPTED, is_true: false, reason, message },
    };
    let invalid = invalid_rules(route);
    // "This condition MUST NOT be set if a Route is fully valid, fully invalid, or not accepted."
    let partially = accepted.is_true.then_some(invalid).flatten().map(|message| Condition {
        kind: PARTIALLY_INVALID,
        is_true: true,
        reason: "UnsupportedValue",
        message: format!("Dropped Rule: {message}"),
    });
    [accepted, resolve(route, &service)].into_iter().chain(partially).collect()
}

/// The reason, and a sentence.
pub type Refused = (&'static str, String);

/// Whether a route rules at a parent, as far as that is the parent's doing.
///
/// # Errors
/// The reason in one word, and a sentence.
pub fn check_parent(
    route: &Route,
    parent: &Parent,
    claims: &GrpcClaims,
    service: impl Fn(&NamespacedName) -> Option<ServiceFacts>,
) -> Result<String, Refused> {
    let name = &parent.service;
    let no_parent = |message: String| Err(("NoMatchingParent", message));
    let Some(facts) = service(name) else { return no_parent(format!("There is no Service {name}.")) };
    match facts.shape {
        ServiceShape::ClusterIp => {}
        ServiceShape::Headless => {
            let message = format!("Service {name} is headless: its clients dial pods, and routes rule a ClusterIP.");
            return Err(("UnsupportedValue", message));
        }
        ServiceShape::ExternalName => {
            let message = format!("Service {name} is an ExternalName: it has no ClusterIP that routes could rule.");
            return Err(("UnsupportedValue", message));
        }
    }
    let ports: Vec<_> = facts.ports.iter().filter(|(port, name)| parent.port.takes_port(*port, name)).collect();
    if ports.is_empty() {
        return no_parent(format!("Service {name} has no such TCP port."));
    }
    let cure = "annotate it, or its namespace, with selvedge.dev/waypoint=node, or with the name of a waypoint";
    match (facts.waypoint, facts.without) {
        (Waypoint::Node | Waypoint::Gateway(_), None) => {}
        (Waypoint::None, _) => {
            return Err(("NoWaypoint", format!("Nobody routes requests to Service {name}: {cure}.")));
        }
        (_, Some(problem)) => {
            return Err((
                "NoWaypoint",
                format!("Service {name} has not got the waypoint that it asks for: {problem}."),
            ));
        }
    }
    let lost: Vec<_> = ports.iter().filter(|port| claims.takes(route, name, port)).map(|(port, _)| port).collect();
    let lost_ports = lost.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    if lost.len() == ports.len() {
        let message = format!("GRPCRoutes of namespace {} rule port {lost_ports}.", route.name.namespace);
        return Err(("Conflicted", message));
    }
    Ok(match lost_ports.as_str() {
        "" => "The route is accepted.".to_owned(),
        ports => format!("The route is accepted, but for port {ports}, which GRPCRoutes rule."),
    })
}

/// Backends and mirrors that are not there, each in words.
pub fn missing_backends(
    route: &Route,
    service: impl Fn(&NamespacedName) -> Option<ServiceFacts>,
) -> impl Iterator<Item = String> {
    references(route).filter_map(move |to| match service(&to.service) {
        None => Some(format!("There is no Service {}", to.service)),
        Some(facts) if facts.shape == ServiceShape::ExternalName => {
            Some(format!("Service {} is an ExternalName, which has no endpoints", to.service))
        }
        Some(facts) if facts.ports.iter().all(|(port, _)| *port != to.port) => {
            Some(format!("Service {} has no TCP port {}", to.service, to.port))
        }
        Some(_) => None,
    })
}

fn check_rules(route: &Route) -> Result<(), Refused> {
    if route.rules.iter().any(|rule| rule.action != Action::Refuse) {
        return Ok(());
    }
    let invalid = invalid_rules(route).unwrap_or_else(|| "it has no rule".to_owned());
    Err(("UnsupportedValue", format!("No rule can be honoured as written: {invalid}")))
}

/// Which rules do not do what they say, and why.
fn invalid_rules(route: &Route) -> Option<String> {
    let told = route.notes.iter().filter_map(|note| match note.why {
        Why::Dropped(_) | Why::Refused(_) => Some(format!("{}: {}", note.field, note.cause)),
        // A filter of another kind: what it would take is answered with 500.
        Why::InvalidKind if note.field.ends_with(".extensionRef") => Some(format!("{}: {}", note.field, note.cause)),
        _ => None,
    });
    let told: Vec<_> = told.collect();
    (!told.is_empty()).then(|| told.join("; "))
}

fn resolve(route: &Route, service: impl Fn(&NamespacedName) -> Option<ServiceFacts>) -> Condition {
    let failed = |reason, message| Condition { kind: RESOLVED_REFS, is_true: false, reason, message };
    let noted = |why: Why| {
        let told = route.notes.iter().filter(|note| note.why == why);
        told.map(|note| format!("{}: {}", note.field, note.cause)).collect::<Vec<_>>().join("; ")
    };
    let of_kind = noted(Why::InvalidKind);
    if !of_kind.is_empty() {
        return failed("InvalidKind", of_kind);
    }
    let mut missing: Vec<String> = Some(noted(Why::Backend)).filter(|told| !told.is_empty()).into_iter().collect();
    for told in missing_backends(route, service) {
        if !missing.contains(&told) {
            missing.push(told);
        }
    }
    match missing.is_empty() {
        true => Condition {
            kind: RESOLVED_REFS,
            is_true: true,
            reason: "ResolvedRefs",
            message: "Every backend is there.".to_owned(),
        },
        false => failed("BackendNotFound", format!("{}; its share is answered with 500.", missing.join("; "))),
    }
}

/// Every Service port that the route sends requests to, or copies of them.
fn references(route: &Route) -> impl Iterator<Item = &BackendRef> {
    route.rules.iter().flat_map(|rule| {
        let backends = if let Action::Backends(backends) = &rule.action { backends.as_slice() } else { &[] };
        let mirrors = backends.iter().map(|backend| &backend.filters).chain([&rule.filters]);
        let mirrors = mirrors.flat_map(|filters| filters.mirrors.iter().filter_map(|mirror| mirror.to.as_ref()));
        backends.iter().filter_map(|backend| backend.to.as_ref()).chain(mirrors)
    })
}

const ACCEPTED: &str = "Accepted";
const RESOLVED_REFS: &str = "ResolvedRefs";
const PARTIALLY_INVALID: &str = "PartiallyInvalid";

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::tests::route_of;
    use super::*;

    fn facts(shape: ServiceShape, waypoint: Waypoint) -> ServiceFacts {
        let ports = vec![(80, "http".into()), (81, "grpc".into())];
        ServiceFacts { shape, ports, waypoint, without: None }
    }

    fn service(name: &NamespacedName) -> Option<ServiceFacts> {
        Some(match &*name.name {
            "cart" | "a" => facts(ServiceShape::ClusterIp, Waypoint::Node),
            "plain" => facts(ServiceShape::ClusterIp, Waypoint::None),
            "apart" => facts(ServiceShape::ClusterIp, Waypoint::Gateway("gw".into())),
            "alone" => ServiceFacts {
                without: Some(WaypointProblem::Missing(NamespacedName::new("shop", "gw"))),
                ..facts(ServiceShape::ClusterIp, Waypoint::Gateway("gw".into()))
            },
            "headless" => facts(ServiceShape::Headless, Waypoint::Node),
            "elsewhere" => facts(ServiceShape::ExternalName, Waypoint::Node),
            _ => return None,
        })
    }

    /// `Accepted=True/Accepted`, each condition so.
    fn told(route: &Route, others: &[Route]) -> Vec<String> {
        let all = || others.iter().chain([route]);
        let told = conditions(route, &route.parents[0], &GrpcClaims::of(all()), service);
        told.iter()
            .map(|one| format!("{}={}/{}", one.kind, if one.is_true { "True" } else { "False" }, one.reason))
            .collect()
    }

    fn http(parent: Value, rules: Value) -> Route {
        route_of(RouteKind::Http, "r", parent, rules)
    }

    const YES: &str = "Accepted=True/Accepted";
    const REFS: &str = "ResolvedRefs=True/ResolvedRefs";

    #[test]
    fn a_parent_takes_routes_if_somebody_rules_requests_to_it() {
        for (parent, wanted) in [
            (json!({"name": "cart"}), YES),
            (json!({"name": "cart", "port": 81}), YES),
            (json!({"name": "cart", "sectionName": "http"}), YES),
            (json!({"name": "cart", "port": 82}), "Accepted=False/NoMatchingParent"),
            (json!({"name": "cart", "port": 80, "sectionName": "grpc"}), "Accepted=False/NoMatchingParent"),
            (json!({"name": "nobody"}), "Accepted=False/NoMatchingParent"),
            (json!({"name": "plain"}), "Accepted=False/NoWaypoint"),
            (json!({"name": "apart"}), YES),
            (json!({"name": "alone"}), "Accepted=False/NoWaypoint"),
            (json!({"name": "headless"}), "Accepted=False/UnsupportedValue"),
            (json!({"name": "elsewhere"}), "Accepted=False/UnsupportedValue"),
        ] {
            assert_eq!(told(&http(parent.clone(), json!(null)), &[]), [wanted, REFS], "{parent}");
        }
    }

    #[test]
    fn backends_that_are_not_there_are_named() {
        for (backend, wanted) in [
            (json!({"name": "a", "port": 80}), REFS),
            (json!({"name": "headless", "port": 80}), REFS),
            (json!({"name": "nobody", "port": 80}), "ResolvedRefs=False/BackendNotFound"),
            (json!({"name": "a", "port": 99}), "ResolvedRefs=False/BackendNotFound"),
            (json!({"name": "a"}), "ResolvedRefs=False/BackendNotFound"),
            (json!({"name": "elsewhere", "port": 80}), "ResolvedRefs=False/BackendNotFound"),
            (json!({"group": "x", "kind": "Bucket", "name": "a"}), "ResolvedRefs=False/InvalidKind"),
        ] {
            let route = http(json!({"name": "cart"}), json!([{"backendRefs": [backend]}]));
            assert_eq!(told(&route, &[]), [YES, wanted], "{backend}");
        }
        let mirror =
            json!([{"type": "RequestMirror", "requestMirror": {"backendRef": {"name": "nobody", "port": 80}}}]);
        let route = http(json!({"name": "cart"}), json!([{"filters": mirror}]));
        assert_eq!(told(&route, &[]), [YES, "ResolvedRefs=False/BackendNotFound"]);
    }

    #[test]
    fn rules_that_do_not_hold_make_a_route_partially_or_wholly_invalid() {
        let dropped = json!({"matches": [{"method": "BREW"}]});
        let refused = json!({"filters": [{"type": "Unheard"}]});
        let partially = "PartiallyInvalid=True/UnsupportedValue";
        let cart = || json!({"name": "cart"});
        assert_eq!(told(&http(cart(), json!([dropped, {}])), &[]), [YES, REFS, partially]);
        assert_eq!(told(&http(cart(), json!([refused, {}])), &[]), [YES, REFS, partially]);
        for rules in [json!([dropped]), json!([refused]), json!([dropped, refused])] {
            assert_eq!(told(&http(cart(), rules), &[]), ["Accepted=False/UnsupportedValue", REFS]);
        }
        let extension = json!([{}, {"filters": [{"type": "ExtensionRef", "extensionRef": {"kind": "A"}}]}]);
        assert_eq!(told(&http(cart(), extension), &[]), [YES, "ResolvedRefs=False/InvalidKind", partially]);
        let message = |rules| {
            let route = http(cart(), rules);
            conditions(&route, &route.parents[0], &GrpcClaims::default(), service).pop().unwrap().message
        };
        assert!(message(json!([dropped, {}])).starts_with("Dropped Rule"), "as the Gateway API wants it");
    }

    #[test]
    fn http_routes_lose_the_ports_that_grpc_routes_of_their_namespace_take() {
        let grpc = |name: &str, parent: Value| route_of(RouteKind::Grpc, name, parent, json!(null));
        let route = |parent: Value| http(parent, json!(null));
        let all = json!({"name": "cart"});
        let one = json!({"name": "cart", "port": 81});
        let lost = "Accepted=False/Conflicted";
        assert_eq!(told(&route(all.clone()), &[grpc("g", all.clone())]), [lost, REFS]);
        assert_eq!(told(&route(one.clone()), &[grpc("g", one.clone())]), [lost, REFS]);
        assert_eq!(told(&route(all.clone()), &[grpc("g", one.clone())]), [YES, REFS], "port 80 is left to it");
        assert_eq!(told(&route(json!({"name": "cart", "port": 80})), &[grpc("g", one)]), [YES, REFS]);
        let elsewhere = grpc("web/g", json!({"name": "cart", "namespace": "shop"}));
        assert_eq!(told(&route(all.clone()), &[elsewhere]), [YES, REFS]);
        assert_eq!(told(&grpc("g", all.clone()), &[route(all)]), [YES, REFS]);
    }
}
