//! Waypoints in processes of their own: which stands before a Service, and which pods are one.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::super::{
    AppProtocol, Gateway, Identity, Labels, NamespacedName, OwnWaypoint, Pod, Service, ServiceDestination, ServicePort,
    TUNNEL_PORT, Waypoint, WaypointProblem, Workload,
};
use super::{Change, Mesh};

impl Mesh {
    /// The waypoint in a process of its own that a Service names; none where it names none.
    pub fn own_waypoint(&self, service: &Service) -> Option<Result<OwnWaypoint, WaypointProblem>> {
        let Waypoint::Gateway(written) = self.waypoint_of(service) else { return None };
        Some(self.find_waypoint(written, &service.name.namespace))
    }

    /// The same for one port: what declares another protocol than HTTP is nothing for a waypoint.
    pub fn own_waypoint_of(
        &self,
        service: &Service,
        port: &ServicePort,
    ) -> Option<Result<OwnWaypoint, WaypointProblem>> {
        port.protocol().is_none_or(AppProtocol::is_http).then(|| self.own_waypoint(service)).flatten()
    }

    /// The waypoints whose word about a client is believed at a pod's address: those of the Services that lead there.
    pub fn own_waypoints_at(&self, endpoint: SocketAddr) -> impl Iterator<Item = OwnWaypoint> {
        self.own_services_at(endpoint).filter_map(|service| self.own_waypoint(service)?.ok())
    }

    /// Whether somebody is believed at a pod's address about whom it speaks for.
    pub fn is_own_waypoint(&self, identity: &Identity, endpoint: SocketAddr) -> bool {
        self.own_waypoints_at(endpoint).any(|waypoint| waypoint.identity == *identity)
    }

    /// Whether a pod's address is behind a waypoint, be it there or not.
    pub fn is_behind_waypoint(&self, endpoint: SocketAddr) -> bool {
        self.own_services_at(endpoint).any(|service| self.own_waypoint(service).is_some())
    }

    /// The Services of the pod's own namespace that lead to an address of it. One of another namespace may list any address
    /// by hand, and has no say over it.
    fn own_services_at(&self, endpoint: SocketAddr) -> impl Iterator<Item = &Arc<Service>> {
        let pod = self.workload_by_ip(endpoint.ip());
        let services = self.services_at(endpoint).filter_map(|name| self.service(name));
        services.filter(move |service| pod.is_some_and(|pod| pod.name().namespace == service.name.namespace))
    }

    /// Every Gateway, of whatever class.
    pub fn gateways(&self) -> impl Iterator<Item = &Arc<Gateway>> {
        self.gateways.values()
    }

    /// A pod of a waypoint to which its Service leads, and which is ready.
    pub fn ready_pod_of(&self, waypoint: &OwnWaypoint, door: &ServiceDestination) -> Option<&Arc<Workload>> {
        let mut ready = door.candidates.iter().filter(|candidate| candidate.ready);
        ready.find_map(|candidate| self.pod_of(waypoint, candidate.addr.ip()))
    }

    /// The pod of a waypoint that has an address.
    pub fn pod_of(&self, waypoint: &OwnWaypoint, ip: IpAddr) -> Option<&Arc<Workload>> {
        self.workload_by_ip(ip).filter(|pod| self.gateway_of(&pod.pod).as_ref() == Some(&waypoint.gateway))
    }

    /// Where the pods of a waypoint are to be found.
    pub fn door_of(&self, waypoint: &OwnWaypoint) -> Result<ServiceDestination, WaypointProblem> {
        let door = self.service(&waypoint.service).and_then(|service| self.service_destination(service, TUNNEL_PORT));
        door.ok_or_else(|| WaypointProblem::NoDoor {
            gateway: waypoint.gateway.clone(),
            service: waypoint.service.clone(),
        })
    }

    /// The Gateway whose waypoint a pod is.
    pub fn gateway_of(&self, pod: &Pod) -> Option<NamespacedName> {
        let claimed = OwnWaypoint::claimed(pod)?;
        self.gateways.get(&claimed).is_some_and(|gateway| gateway.is_waypoint()).then_some(claimed)
    }

    fn find_waypoint(&self, written: &Arc<str>, namespace: &Arc<str>) -> Result<OwnWaypoint, WaypointProblem> {
        let name = Waypoint::gateway_name(written, namespace);
        let name = name.ok_or_else(|| WaypointProblem::Malformed(written.clone()))?;
        let Some(gateway) = self.gateways.get(&name) else { return Err(WaypointProblem::Missing(name)) };
        let none = Labels::default();
        let labels = self.namespace(namespace).map_or(&none, |namespace| &namespace.labels);
        gateway.admits(namespace, labels)?;
        OwnWaypoint::of(&name, self.trust_domain()).ok_or(WaypointProblem::Name(name))
    }

    /// Takes a Gateway, or takes it away. The pods that say they are its waypoint are made anew.
    pub(super) fn set_gateway(&mut self, name: &NamespacedName, gateway: Option<Gateway>) -> Change {
        if self.gateways.get(name).map(|old| &**old) == gateway.as_ref() {
            return Change::default();
        }
        match gateway {
            Some(gateway) => drop(self.gateways.insert(name.clone(), Arc::new(gateway))),
            None => drop(self.gateways.remove(name)),
        }
        let uids = self.pods_by_namespace.get(&name.namespace).into_iter().flat_map(|pods| pods.keys());
        let claims = |uid: &&_| {
            let pod = self.pods.get(uid).map(|workload| &*workload.pod);
            pod.and_then(OwnWaypoint::claimed).is_some_and(|claimed| claimed == *name)
        };
        let uids = uids.filter(claims).cloned().collect();
        self.rebuild(uids)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::tests::{mesh, pod, service, slice};
    use super::super::{Delta, Object, ObjectKind, ObjectRef};
    use super::*;
    use crate::mesh::{AllowedNamespaces, LabelSelector, Listener, Namespace, PodUid, Settings};

    fn gateway(class: &str, from: AllowedNamespaces) -> Gateway {
        let listener = Listener { name: "mesh".into(), port: TUNNEL_PORT, protocol: "HBONE".into(), from };
        Gateway { name: NamespacedName::new("infra", "gw"), class: class.into(), listeners: vec![listener] }
    }

    fn apply(mesh: &mut Mesh, object: Object) -> Change {
        mesh.apply(Delta::Apply(object))
    }

    fn asking(name: &str, waypoint: &str) -> Service {
        let keys = BTreeMap::from([("selvedge.dev/waypoint".to_owned(), waypoint.to_owned())]);
        Service { settings: Settings::read(&keys, &BTreeMap::new()).0, ..service(name, &["10.96.0.9"]) }
    }

    fn found(mesh: &Mesh) -> Option<Result<OwnWaypoint, WaypointProblem>> {
        mesh.own_waypoint(mesh.service(&NamespacedName::new("shop", "cart")).unwrap())
    }

    #[test]
    fn a_service_has_the_waypoint_that_it_names_if_that_one_admits_it() {
        let mut mesh = mesh();
        apply(&mut mesh, Object::Service(asking("cart", "infra/gw")));
        let name = NamespacedName::new("infra", "gw");
        assert_eq!(found(&mesh), Some(Err(WaypointProblem::Missing(name.clone()))));
        apply(&mut mesh, Object::Gateway(gateway("istio", AllowedNamespaces::All)));
        assert!(matches!(found(&mesh), Some(Err(WaypointProblem::Class { .. }))));
        apply(&mut mesh, Object::Gateway(gateway("selvedge-waypoint", AllowedNamespaces::Same)));
        assert!(matches!(found(&mesh), Some(Err(WaypointProblem::NotAllowed { .. }))));
        let labels = BTreeMap::from([("team".to_owned(), "a".to_owned())]);
        let selector =
            AllowedNamespaces::Labelled(LabelSelector { labels: labels.clone(), ..LabelSelector::default() });
        apply(&mut mesh, Object::Gateway(gateway("selvedge-waypoint", selector)));
        assert!(matches!(found(&mesh), Some(Err(WaypointProblem::NotAllowed { .. }))));
        let labelled = Namespace { name: "shop".into(), settings: Settings::default(), labels: labels.into() };
        apply(&mut mesh, Object::Namespace(labelled));
        let waypoint = found(&mesh).unwrap().unwrap();
        assert_eq!(waypoint.identity.to_string(), "spiffe://cluster.local/ns/infra/sa/gw-selvedge-waypoint");
        assert_eq!(waypoint.service, NamespacedName::new("infra", "gw-selvedge-waypoint"));
        mesh.apply(Delta::Delete(ObjectRef { kind: ObjectKind::Gateway, name }));
        assert!(matches!(found(&mesh), Some(Err(WaypointProblem::Missing(_)))));
    }

    #[test]
    fn a_name_alone_is_of_the_services_own_namespace_and_a_riddle_is_nobodys() {
        let mut mesh = mesh();
        for (written, wanted) in [
            ("gw", WaypointProblem::Missing(NamespacedName::new("shop", "gw"))),
            ("a/b/c", WaypointProblem::Malformed("a/b/c".into())),
            ("/b", WaypointProblem::Malformed("/b".into())),
            ("", WaypointProblem::Malformed("".into())),
        ] {
            apply(&mut mesh, Object::Service(asking("cart", written)));
            assert_eq!(found(&mesh), Some(Err(wanted)), "{written:?}");
        }
        apply(&mut mesh, Object::Service(asking("cart", "node")));
        assert_eq!(found(&mesh), None);
    }

    #[test]
    fn a_waypoints_word_is_believed_where_a_service_of_its_own_leads() {
        let mut mesh = mesh();
        apply(&mut mesh, Object::Gateway(gateway("selvedge-waypoint", AllowedNamespaces::All)));
        apply(&mut mesh, Object::Service(asking("cart", "infra/gw")));
        apply(&mut mesh, Object::EndpointSlice(slice("cart-1", "cart", 8080, &["10.1.0.1"])));
        apply(&mut mesh, Object::Pod(pod("cart", "u1", &["10.1.0.1"])));
        let at = |mesh: &Mesh, addr: &str| mesh.own_waypoints_at(addr.parse().unwrap()).count();
        assert_eq!((at(&mesh, "10.1.0.1:8080"), at(&mesh, "10.1.0.1:8081"), at(&mesh, "10.1.0.2:8080")), (1, 0, 0));
        apply(&mut mesh, Object::Service(asking("cart", "none")));
        assert_eq!(at(&mesh, "10.1.0.1:8080"), 0);
        // A stranger lists the pod's address by hand.
        let theirs = NamespacedName::new("elsewhere", "cart");
        apply(&mut mesh, Object::Service(Service { name: theirs.clone(), ..asking("cart", "infra/gw") }));
        let mut listed = slice("cart-2", "cart", 8080, &["10.1.0.1"]);
        (listed.name.namespace, listed.service) = ("elsewhere".into(), theirs);
        apply(&mut mesh, Object::EndpointSlice(listed));
        assert_eq!(at(&mesh, "10.1.0.1:8080"), 0);
        assert!(!mesh.is_behind_waypoint("10.1.0.1:8080".parse().unwrap()));
    }

    #[test]
    fn a_waypoints_pod_is_never_captured_and_no_label_alone_makes_one() {
        let mut mesh = mesh();
        let namespace = |mode: &str| {
            let keys = BTreeMap::from([("selvedge.dev/mesh".to_owned(), mode.to_owned())]);
            let settings = Settings::read(&keys, &BTreeMap::new()).0;
            Object::Namespace(Namespace { name: "shop".into(), settings, labels: Labels::default() })
        };
        apply(&mut mesh, namespace("required"));
        let labels = BTreeMap::from([("gateway.networking.k8s.io/gateway-name".to_owned(), "gw".to_owned())]);
        let of = |account: &str| Pod {
            labels: labels.clone().into(),
            service_account: account.into(),
            ..pod("w", "u1", &["10.1.0.1"])
        };
        let joined = |mesh: &Mesh| mesh.workload(&PodUid::new("u1")).unwrap().membership.is_joined();
        apply(&mut mesh, Object::Pod(of("gw-selvedge-waypoint")));
        assert!(joined(&mesh), "there is no such Gateway");
        let own = Gateway {
            name: NamespacedName::new("shop", "gw"),
            ..gateway("selvedge-waypoint", AllowedNamespaces::Same)
        };
        let change = apply(&mut mesh, Object::Gateway(own.clone()));
        assert_eq!(change.pods.len(), 1);
        assert!(!joined(&mesh));
        apply(&mut mesh, Object::Pod(of("default")));
        assert!(joined(&mesh), "its service account is another");
        apply(&mut mesh, Object::Pod(of("gw-selvedge-waypoint")));
        apply(&mut mesh, Object::Gateway(Gateway { class: "istio".into(), ..own }));
        assert!(joined(&mesh), "the Gateway is another mesh's");
    }
}
