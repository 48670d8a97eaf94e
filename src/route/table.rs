//! Which routes rule which Service port for which client namespace.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::index::RuleSet;
use super::{ParentPort, Route, RouteKind, RouteRef, Routes};
use crate::mesh::{NamespacedName, ServicePort, SharedMap, Vacant};

/// All routes. One route applied costs in proportion to that route; a clone shares what neither side changes.
#[derive(Clone, Debug, Default)]
pub struct Table {
    routes: SharedMap<RouteRef, Arc<Route>>,
    scopes: SharedMap<Scope, SharedMap<(RouteKind, ParentPort), Rules>>,
}

/// One step of the table.
#[derive(Clone, PartialEq, Debug)]
pub enum Delta {
    Apply(Arc<Route>),
    Delete(RouteRef),
}

impl Table {
    pub fn apply(&mut self, delta: Delta) {
        let (name, new) = match delta {
            Delta::Apply(route) => (route.reference(), Some(route)),
            Delta::Delete(name) => (name, None),
        };
        let old = self.routes.get(&name).cloned();
        if old == new {
            return;
        }
        if let Some(old) = &old {
            self.attach(old, |rules| rules.remove(old));
        }
        match new {
            Some(new) => {
                self.attach(&new, |rules| rules.add(&new));
                self.routes.insert(name, new);
            }
            None => drop(self.routes.remove(&name)),
        }
    }

    /// What rules the requests of one namespace's clients to a Service port; none where no route does, and requests go
    /// to the Service itself. Costs the same however many routes there are.
    ///
    /// Routes of the client's own namespace replace those of the Service's (GEP-1294, "Multiple routes for a
    /// Service"), and routes of other namespaces are nobody's business. Of GRPCRoute and HTTPRoute the first rules.
    pub fn routes(&self, service: &NamespacedName, port: &ServicePort, client: &Arc<str>) -> Option<Arc<Routes>> {
        let scope = |of: &Arc<str>| Scope { service: service.clone(), of: of.clone() };
        let consumer = Some(client).filter(|client| **client != service.namespace);
        let mut scopes = consumer.into_iter().chain([&service.namespace]).filter_map(|of| self.scopes.get(&scope(of)));
        scopes.find_map(|rules| {
            [RouteKind::Grpc, RouteKind::Http].into_iter().find_map(|kind| {
                let ports = [
                    ParentPort::All,
                    ParentPort::Number(port.port),
                    ParentPort::Name(port.name.clone()),
                    ParentPort::Both(port.port, port.name.clone()),
                ];
                let sets: Vec<_> =
                    ports.into_iter().filter_map(|port| rules.get(&(kind, port))).map(|r| r.0.clone()).collect();
                (!sets.is_empty()).then(|| Arc::new(Routes::new(kind, port.port, sets)))
            })
        })
    }

    pub fn route(&self, name: &RouteRef) -> Option<&Arc<Route>> {
        self.routes.get(name)
    }

    /// Every route, in no order.
    pub fn all(&self) -> impl Iterator<Item = &Arc<Route>> {
        self.routes.values()
    }

    fn attach(&mut self, route: &Route, change: impl Fn(&mut RuleSet)) {
        let parents: BTreeSet<_> = route.parents.iter().map(|parent| (&parent.service, &parent.port)).collect();
        for (service, port) in parents {
            let scope = Scope { service: service.clone(), of: route.name.namespace.clone() };
            self.scopes.change(&scope, |scope| {
                scope.change(&(route.kind, port.clone()), |rules| change(Arc::make_mut(&mut rules.0)));
            });
        }
    }
}

/// The routes of one namespace about one Service.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Scope {
    service: NamespacedName,
    of: Arc<str>,
}

#[derive(Clone, Debug, Default)]
struct Rules(Arc<RuleSet>);

impl Vacant for Rules {
    fn is_vacant(&self) -> bool {
        self.0.is_vacant()
    }
}
