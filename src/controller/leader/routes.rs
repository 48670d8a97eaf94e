//! What became of a route at each Service that is its parent, in its `status.parents`.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use futures_util::FutureExt;
use k8s_openapi::api::core::v1::{Namespace, Service};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::DynamicObject;
use kube::core::ApiResource;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::{Client, Resource};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::status::{ByGeneration, Told, list, merged, now};
use crate::api::StatusCondition;
use crate::mesh::{AppProtocol, Gateway, Labels, NamespacedName, Settings, Waypoint};
use crate::route::status::{Condition, GrpcClaims, ServiceFacts, ServiceShape, conditions};
use crate::route::{Route, RouteKind, RouteRef, decode};
use crate::source::decode::read_gateway;

/// Writes our entries of `status.parents` where they say something else than what is so; those of other controllers
/// stay as they are.
pub struct RouteStatuses {
    client: Client,
    services: Store<RoutedService>,
    namespaces: Store<RoutedNamespace>,
    gateways: Store<DynamicObject>,
    /// What the decoder made of them.
    read: ByGeneration<Option<Arc<Route>>>,
    rounds: u32,
    /// Of everything that the last round looked at, if it wrote all that it wanted to.
    told: Option<u64>,
}

/// The routes of one kind.
pub struct RoutesOf {
    pub kind: RouteKind,
    pub resource: ApiResource,
    pub store: Store<DynamicObject>,
}

/// A Service without what routes do not need.
#[derive(Resource, Clone, Debug, Deserialize)]
#[resource(inherit = Service)]
pub struct RoutedService {
    metadata: ObjectMeta,
    #[serde(default)]
    spec: Spec,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct Spec {
    #[serde(rename = "type")]
    kind: Option<String>,
    #[serde(rename = "clusterIP")]
    cluster_ip: Option<String>,
    #[serde(default)]
    ports: Vec<Port>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Port {
    name: Option<String>,
    port: u16,
    protocol: Option<String>,
    app_protocol: Option<String>,
}

#[derive(Resource, Clone, Debug, Deserialize)]
#[resource(inherit = Namespace)]
pub struct RoutedNamespace {
    metadata: ObjectMeta,
}

impl RouteStatuses {
    pub fn new(
        client: Client,
        services: Store<RoutedService>,
        namespaces: Store<RoutedNamespace>,
        gateways: Store<DynamicObject>,
    ) -> Self {
        Self { client, services, namespaces, gateways, read: ByGeneration::default(), rounds: 0, told: None }
    }

    pub async fn tell(&mut self, all: &[RoutesOf]) {
        self.rounds = self.rounds.saturating_add(1);
        // What has not been listed yet is not missing. A cluster may lack one of the kinds of routes for good.
        let listed = is_ready(&self.services) && is_ready(&self.namespaces);
        if !listed
            || self.rounds < PATIENCE && !(is_ready(&self.gateways) && all.iter().all(|routes| is_ready(&routes.store)))
        {
            return;
        }
        let seen = all.iter().map(|of_kind| versions(&of_kind.store)).chain([
            versions(&self.services),
            versions(&self.namespaces),
            versions(&self.gateways),
        ]);
        let seen = Some(seen.fold(u64::from(self.rounds < PATIENCE), |sum, of_kind| sum.rotate_left(7) ^ of_kind));
        if self.told == seen {
            return;
        }
        let mut routes = Vec::new();
        for of_kind in all {
            for object in of_kind.store.state() {
                if let Some(route) = self.read(of_kind.kind, &object) {
                    routes.push((of_kind, object, route));
                }
            }
        }
        self.read.keep(routes.iter().map(|(_, object, _)| &**object));
        let claims = GrpcClaims::of(routes.iter().map(|(_, _, route)| &**route));
        let mut is_told = true;
        for (of_kind, object, route) in &routes {
            is_told &= self.tell_one(of_kind, object, route, &claims).await;
        }
        self.told = seen.filter(|_| is_told);
    }

    /// Whether its status says what is so.
    async fn tell_one(&self, of_kind: &RoutesOf, object: &DynamicObject, route: &Route, claims: &GrpcClaims) -> bool {
        let before: Vec<Value> = list(&object.data, "/status/parents").to_vec();
        let generation = object.metadata.generation.unwrap_or_default();
        let references = list(&object.data, "/spec/parentRefs");
        let said = route.parents.iter().filter_map(|parent| {
            let reference = references.get(parent.index)?;
            let conditions = conditions(route, parent, claims, |service| self.facts(service));
            Some((reference, conditions))
        });
        let Some(parents) = parents(&before, said, generation, &now()) else { return true };
        let told = Told { client: &self.client, resource: &of_kind.resource, object, what: "route" };
        told.merge(json!({"parents": parents})).await
    }

    /// The route as agents read it; one that they cannot read has no parents that we could speak of.
    fn read(&mut self, kind: RouteKind, object: &DynamicObject) -> Option<Arc<Route>> {
        let read = || Some(Arc::new(decode(kind, &serde_json::to_value(object).ok()?).ok()?));
        self.read.of(object, read).flatten()
    }

    /// Changes with everything that routes are told of; none before that has all been listed.
    pub fn told(&self) -> Option<u64> {
        self.told
    }

    /// A route as the last round knew it.
    pub fn find(&self, all: &[RoutesOf], route: &RouteRef) -> Option<Arc<Route>> {
        let of_kind = all.iter().find(|of_kind| of_kind.kind == route.kind)?;
        let reference = ObjectRef::new_with(&route.name.name, of_kind.resource.clone());
        let object = of_kind.store.get(&reference.within(&route.name.namespace))?;
        self.read.known(&object).cloned().flatten()
    }

    fn gateway(&self, name: &NamespacedName) -> Option<Gateway> {
        let named = |object: &DynamicObject| {
            object.metadata.namespace.as_deref() == Some(&*name.namespace)
                && object.metadata.name.as_deref() == Some(&*name.name)
        };
        let object = self.gateways.find(named)?;
        read_gateway(serde_json::to_value(&*object).ok()?).ok().map(|(gateway, _)| gateway)
    }

    fn labels(&self, namespace: &str) -> Labels {
        let namespace = self.namespaces.get(&ObjectRef::new(namespace));
        namespace.and_then(|namespace| namespace.metadata.labels.clone()).unwrap_or_default().into()
    }

    pub fn facts(&self, name: &NamespacedName) -> Option<ServiceFacts> {
        let service = self.services.get(&ObjectRef::new(&name.name).within(&name.namespace))?;
        let spec = &service.spec;
        let shape = match (spec.kind.as_deref(), spec.cluster_ip.as_deref()) {
            (Some("ExternalName"), _) => ServiceShape::ExternalName,
            (_, Some("None")) => ServiceShape::Headless,
            _ => ServiceShape::ClusterIp,
        };
        let is_tcp = |port: &&Port| port.protocol.as_deref().is_none_or(|protocol| protocol == "TCP");
        let ports = spec.ports.iter().filter(is_tcp);
        let ports = ports.map(|port| (port.port, port.name.as_deref().unwrap_or_default().into())).collect();
        let of_namespace = || waypoint(&self.namespaces.get(&ObjectRef::new(&name.namespace))?.metadata);
        let waypoint = waypoint(&service.metadata).or_else(of_namespace).unwrap_or(Waypoint::None);
        let without = waypoint.problem(&name.namespace, &self.labels(&name.namespace), |gateway| self.gateway(gateway));
        Some(ServiceFacts { shape, ports, waypoint, without })
    }

    /// What a Service says that one of its ports speaks.
    pub fn protocol(&self, name: &NamespacedName, port: u16) -> Option<AppProtocol> {
        let service = self.services.get(&ObjectRef::new(&name.name).within(&name.namespace))?;
        let port = service.spec.ports.iter().find(|one| one.port == port)?;
        AppProtocol::declared(port.app_protocol.as_deref(), port.name.as_deref().unwrap_or_default())
    }
}

fn waypoint(metadata: &ObjectMeta) -> Option<Waypoint> {
    let (annotations, labels) = (metadata.annotations.clone(), metadata.labels.clone());
    Settings::read(&annotations.unwrap_or_default(), &labels.unwrap_or_default()).0.waypoint
}

/// Whether all objects of a kind have been listed once.
pub(super) fn is_ready<K>(store: &Store<K>) -> bool
where
    K: Resource + kube::runtime::reflector::Lookup<DynamicType = <K as Resource>::DynamicType> + Clone + 'static,
    <K as Resource>::DynamicType: Eq + std::hash::Hash + Clone,
{
    store.wait_until_ready().now_or_never().is_some_and(|ready| ready.is_ok())
}

/// Of all objects of a kind, in whatever order: another number where one of them came, changed or went.
pub fn versions<K>(store: &Store<K>) -> u64
where
    K: Resource + kube::runtime::reflector::Lookup<DynamicType = <K as Resource>::DynamicType> + Clone + 'static,
    <K as Resource>::DynamicType: Eq + std::hash::Hash + Clone,
{
    let of_one = |object: &Arc<K>| {
        let mut hasher = DefaultHasher::new();
        (&object.meta().uid, &object.meta().resource_version).hash(&mut hasher);
        hasher.finish()
    };
    store.state().iter().fold(0, |sum, object| sum.wrapping_add(of_one(object)))
}

/// `status.parents` as it shall be; `None` where it says so already.
fn parents<'a>(
    before: &[Value],
    said: impl Iterator<Item = (&'a Value, Vec<Condition>)>,
    generation: i64,
    now: &str,
) -> Option<Vec<Value>> {
    let is_ours = |entry: &&Value| entry["controllerName"] == CONTROLLER;
    let read = |entry: &Value| serde_json::from_value::<Entry>(entry.clone()).ok();
    let own: Vec<Option<Entry>> = before.iter().filter(is_ours).map(read).collect();
    let entry = |(reference, conditions): (&Value, Vec<Condition>)| {
        let former = own.iter().flatten().find(|entry| entry.parent_ref == *reference);
        let former = former.map_or(&[][..], |entry| &entry.conditions);
        let conditions = merged(conditions, former, generation, now);
        Entry { parent_ref: reference.clone(), controller_name: CONTROLLER.to_owned(), conditions }
    };
    let wanted: Vec<Entry> = said.map(entry).collect();
    // A time moves only with a status, so that equal entries say the same.
    if own.len() == wanted.len() && own.iter().zip(&wanted).all(|(own, wanted)| own.as_ref() == Some(wanted)) {
        return None;
    }
    let others = before.iter().filter(|entry| !is_ours(entry)).cloned();
    Some(others.chain(wanted.iter().filter_map(|entry| serde_json::to_value(entry).ok())).collect())
}

/// One of our entries (RouteParentStatus).
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    parent_ref: Value,
    controller_name: String,
    #[serde(default)]
    conditions: Vec<StatusCondition>,
}

pub const CONTROLLER: &str = "selvedge.dev/mesh";
/// Rounds until a kind of routes that has not been listed counts as one that the cluster does not have.
const PATIENCE: u32 = 10;

#[cfg(test)]
mod tests {
    use super::*;

    const THEN: &str = "2026-01-01T00:00:00Z";
    const NOW: &str = "2026-06-01T00:00:00Z";

    fn condition(is_true: bool) -> Vec<Condition> {
        vec![Condition { kind: "Accepted", is_true, reason: "Why", message: "so".to_owned() }]
    }

    fn of(before: &[Value], said: &[(Value, bool)], generation: i64, now: &str) -> Option<Vec<Value>> {
        let said = said.iter().map(|(reference, is_true)| (reference, condition(*is_true)));
        parents(before, said, generation, now)
    }

    #[test]
    fn the_entries_of_other_controllers_stay_and_ours_follow_the_route() {
        let (cart, web) = (json!({"kind": "Service", "name": "cart"}), json!({"kind": "Service", "name": "web"}));
        let other =
            json!({"parentRef": {"name": "gateway"}, "controllerName": "example.com/gw", "conditions": [{"x": 1}]});
        let first = of(std::slice::from_ref(&other), &[(cart.clone(), true), (web.clone(), false)], 1, THEN).unwrap();
        assert_eq!(first.len(), 3);
        assert_eq!(first[0], other);
        assert_eq!((&first[1]["parentRef"], &first[1]["controllerName"]), (&cart, &json!("selvedge.dev/mesh")));
        assert_eq!(first[1]["conditions"][0]["status"], "True");
        assert_eq!(of(&first, &[(cart.clone(), true), (web.clone(), false)], 1, NOW), None, "nothing changed");
        let next = of(&first, &[(web.clone(), false)], 1, NOW).unwrap();
        assert_eq!(next, [other.clone(), first[2].clone()], "a parent that is gone is forgotten");
        assert_eq!(of(&next, &[], 1, NOW).unwrap(), [other]);
    }

    #[test]
    fn a_new_generation_is_told_and_the_time_moves_only_with_the_status() {
        let cart = json!({"kind": "Service", "name": "cart"});
        let first = of(&[], &[(cart.clone(), true)], 1, THEN).unwrap();
        let next = of(&first, &[(cart.clone(), true)], 2, NOW).unwrap();
        let condition = &next[0]["conditions"][0];
        assert_eq!((&condition["observedGeneration"], &condition["lastTransitionTime"]), (&json!(2), &json!(THEN)));
        let next = of(&first, &[(cart, false)], 1, NOW).unwrap();
        assert_eq!(next[0]["conditions"][0]["lastTransitionTime"], NOW);
    }

    #[test]
    fn a_condition_that_somebody_else_wrote_into_our_entry_stays_in_its_place() {
        let cart = json!({"kind": "Service", "name": "cart"});
        let mut before = of(&[], &[(cart.clone(), true)], 1, THEN).unwrap();
        let condition = |kind: &str| json!({"type": kind, "status": "True", "reason": "A", "message": "", "lastTransitionTime": THEN});
        let conditions = before[0]["conditions"].as_array_mut().unwrap();
        conditions.insert(0, condition("example.com/Seen"));
        conditions.push(condition("PartiallyInvalid"));
        let next = of(&before, &[(cart, false)], 2, NOW).unwrap();
        let kinds: Vec<_> = next[0]["conditions"].as_array().unwrap().iter().map(|one| &one["type"]).collect();
        assert_eq!(kinds, ["example.com/Seen", "Accepted"], "and what of ours is over goes");
        assert_eq!(next[0]["conditions"][0]["lastTransitionTime"], THEN);
    }

    #[test]
    fn a_route_of_gateways_alone_is_left_alone() {
        let other = json!({"parentRef": {"name": "gateway"}, "controllerName": "example.com/gw"});
        assert_eq!(of(&[other], &[], 1, NOW), None);
        assert_eq!(of(&[], &[], 1, NOW), None);
    }
}
