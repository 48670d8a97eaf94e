//! Where requests are read.

use super::*;
use crate::mesh::Requests;

#[test]
fn requests_are_read_where_a_service_of_the_pods_own_namespace_asks_for_it() {
    let asking = |mut service: Service, waypoint: &str| {
        let keys = BTreeMap::from([("selvedge.dev/waypoint".to_owned(), waypoint.to_owned())]);
        service.settings = Settings::read(&keys, &BTreeMap::new()).0;
        service
    };
    let speaking = |mut service: Service, protocol: &str| {
        service.ports[0].app_protocol = Some(protocol.into());
        service.ports[0].name = "p".into();
        service
    };
    let at = |services: Vec<Service>, namespace: Option<Object>| {
        let mut mesh = mesh();
        mesh.apply(Delta::Apply(Object::Pod(pod("cart", "1", &["10.0.0.9"]))));
        namespace.into_iter().for_each(|namespace| drop(mesh.apply(Delta::Apply(namespace))));
        for service in services {
            let mut endpoints = slice(&service.name.name, &service.name.name, 8080, &["10.0.0.9"]);
            endpoints.name.namespace = service.name.namespace.clone();
            endpoints.service = service.name.clone();
            endpoints.ports[0].0 = service.ports[0].name.clone();
            mesh.apply(Delta::Apply(Object::Service(service)));
            mesh.apply(Delta::Apply(Object::EndpointSlice(endpoints)));
        }
        let workload = mesh.workload(&PodUid::new("1")).unwrap();
        let read = |port| mesh.requests_at(workload, SocketAddr::new("10.0.0.9".parse().unwrap(), port));
        assert_eq!(read(9090), Requests::Unread, "a port that nobody leads to");
        read(8080)
    };
    let cart = || service("cart", &["10.96.0.1"]);
    assert_eq!(at(vec![], None), Requests::Unread);
    assert_eq!(at(vec![cart()], None), Requests::Unread);
    assert_eq!(at(vec![asking(cart(), "node")], None), Requests::Declared);
    assert_eq!(at(vec![asking(cart(), "none")], None), Requests::Unread);
    assert_eq!(at(vec![speaking(asking(cart(), "node"), "example.com/own")], None), Requests::Guessed);
    for (protocol, wanted) in [("tcp", Requests::Unread), ("tls", Requests::Unread), ("grpc", Requests::Declared)] {
        assert_eq!(at(vec![speaking(asking(cart(), "node"), protocol)], None), wanted, "{protocol}");
    }
    // Another one of the same port that says it speaks HTTP.
    let tcp = speaking(asking(service("tcp", &["10.96.0.2"]), "node"), "tcp");
    assert_eq!(at(vec![tcp, asking(cart(), "node")], None), Requests::Declared);
    let mut theirs = asking(cart(), "node");
    theirs.name = NamespacedName::new("elsewhere", "cart");
    assert_eq!(at(vec![theirs], None), Requests::Unread, "somebody else's Service");
    let keys = BTreeMap::from([("selvedge.dev/waypoint".to_owned(), "node".to_owned())]);
    let shop = Namespace {
        name: "shop".into(),
        settings: Settings::read(&keys, &BTreeMap::new()).0,
        labels: Labels::default(),
    };
    assert_eq!(at(vec![cart()], Some(Object::Namespace(shop.clone()))), Requests::Declared);
    assert_eq!(at(vec![asking(cart(), "none")], Some(Object::Namespace(shop))), Requests::Unread);
}

#[test]
fn a_service_that_says_something_else_of_its_ports_touches_its_endpoints() {
    let mut mesh = mesh();
    let mut cart = service("cart", &["10.96.0.1"]);
    mesh.apply(Delta::Apply(Object::Service(cart.clone())));
    mesh.apply(Delta::Apply(Object::EndpointSlice(slice("cart", "cart", 8080, &["10.0.0.9"]))));
    cart.ports[0].app_protocol = Some("tcp".into());
    let change = mesh.apply(Delta::Apply(Object::Service(cart.clone())));
    assert_eq!(change.endpoints, BTreeSet::from(["10.0.0.9:8080".parse().unwrap()]));
    cart.session_affinity = Some(std::time::Duration::from_secs(1));
    assert!(mesh.apply(Delta::Apply(Object::Service(cart))).endpoints.is_empty());
}
