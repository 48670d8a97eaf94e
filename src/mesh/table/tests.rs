use std::collections::{BTreeMap, BTreeSet};

use super::super::{
    ContainerPort, Endpoint, EndpointSlice, InternalTrafficPolicy, LabelSelector, Labels, NetworkPolicy, Owner, Phase,
    Pod, PodSelection, ServiceKind, ServicePort, Settings, TargetPort,
};
use super::*;

mod requests;

pub(crate) fn mesh() -> Mesh {
    Mesh::new(MeshSettings {
        trust_domain: "cluster.local".parse().unwrap(),
        cluster_cidrs: vec!["10.0.0.0/8".parse().unwrap()],
    })
}

pub(crate) fn pod(name: &str, uid: &str, ips: &[&str]) -> Pod {
    Pod {
        uid: PodUid::new(uid),
        name: NamespacedName::new("shop", name),
        node: Some("one".into()),
        ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
        labels: Labels::default(),
        service_account: name.into(),
        phase: Phase::Running,
        host_network: false,
        host_users: true,
        deleting: false,
        settings: Settings::default(),
        container_ports: vec![ContainerPort { name: Some("http".into()), port: 8080 }],
        probes: Vec::new(),
        owner: Owner { kind: "Pod".into(), name: name.into() },
    }
}

pub(crate) fn namespace(mode: Option<&str>) -> Object {
    let keys = mode.map(|mode| ("selvedge.dev/mesh".to_owned(), mode.to_owned())).into_iter().collect();
    Object::Namespace(Namespace {
        name: "shop".into(),
        settings: Settings::read(&keys, &BTreeMap::new()).0,
        labels: Labels::default(),
    })
}

pub(crate) fn node(addresses: &[&str], zone: &str) -> Object {
    Object::Node(Node {
        name: "one".into(),
        addresses: addresses.iter().map(|ip| ip.parse().unwrap()).collect(),
        pod_cidrs: vec!["172.20.0.0/24".parse().unwrap()],
        zone: Some(zone.into()),
    })
}

pub(crate) fn service(name: &str, ips: &[&str]) -> Service {
    Service {
        name: NamespacedName::new("shop", name),
        kind: ServiceKind::ClusterIp(ips.iter().map(|ip| ip.parse().unwrap()).collect()),
        external_ips: Vec::new(),
        ports: vec![ServicePort {
            name: "http".into(),
            port: 80,
            target: TargetPort::Number(8080),
            app_protocol: None,
        }],
        session_affinity: None,
        internal_traffic_policy: InternalTrafficPolicy::Cluster,
        traffic_distribution: None,
        publish_not_ready_addresses: false,
        settings: Settings::default(),
    }
}

pub(crate) fn slice(name: &str, service: &str, port: u16, ips: &[&str]) -> EndpointSlice {
    let endpoint = |ip: &&str| Endpoint {
        addresses: vec![ip.parse().unwrap()],
        ready: true,
        serving: true,
        terminating: false,
        node: None,
        zone: None,
        zone_hints: Vec::new(),
        node_hints: Vec::new(),
        pod: None,
        pod_uid: None,
    };
    EndpointSlice {
        name: NamespacedName::new("shop", name),
        service: NamespacedName::new("shop", service),
        ports: vec![("http".into(), port)],
        endpoints: ips.iter().map(endpoint).collect(),
    }
}

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn apply(mesh: &mut Mesh, object: Object) -> Change {
    mesh.apply(Delta::Apply(object))
}

fn delete(mesh: &mut Mesh, kind: ObjectKind, name: &str) -> Change {
    let namespace =
        if matches!(kind, ObjectKind::Namespace | ObjectKind::Node | ObjectKind::ServiceCidr) { "" } else { "shop" };
    mesh.apply(Delta::Delete(ObjectRef { kind, name: NamespacedName::new(namespace, name) }))
}

fn holder(mesh: &Mesh, ip: &str) -> Option<String> {
    mesh.workload_by_ip(ip.parse().unwrap()).map(|workload| workload.uid().to_string())
}

fn endpoints(mesh: &Mesh, at: &str) -> Vec<String> {
    match mesh.destination(addr(at)) {
        Destination::Service(found) => found.candidates.iter().map(|candidate| candidate.addr.to_string()).collect(),
        other => panic!("{at} is no Service: {other:?}"),
    }
}

fn services_at(mesh: &Mesh, at: &str) -> Vec<String> {
    mesh.services_at(addr(at)).map(|name| name.name.to_string()).collect()
}

#[test]
fn pods_under_a_network_policy_are_known_as_policies_and_pods_change() {
    let mut mesh = mesh();
    let labelled = |name: &str, app: &str| {
        let mut pod = pod(name, name, &[]);
        pod.labels = [("app".into(), app.into())].into_iter().collect();
        Object::Pod(pod)
    };
    let policy = |namespace: &str, name: &str, selects| {
        Object::NetworkPolicy(NetworkPolicy { name: NamespacedName::new(namespace, name), selects })
    };
    let matching = |app: &str| {
        let labels = BTreeMap::from([("app".to_owned(), app.to_owned())]);
        PodSelection::Matching(LabelSelector { labels, expressions: Vec::new() })
    };
    let under = |mesh: &Mesh| {
        ["a", "b"].into_iter().filter(|uid| mesh.is_under_network_policy(&PodUid::new(*uid))).collect::<String>()
    };
    let pods = |change: Change| change.pods.iter().map(ToString::to_string).collect::<String>();
    apply(&mut mesh, labelled("a", "web"));
    apply(&mut mesh, labelled("b", "cart"));
    assert_eq!(pods(apply(&mut mesh, policy("shop", "one", matching("web")))), "a");
    assert_eq!(pods(apply(&mut mesh, policy("shop", "two", PodSelection::All))), "b", "one was selected already");
    assert_eq!(under(&mesh), "ab");
    assert_eq!(pods(apply(&mut mesh, policy("shop", "one", matching("cart")))), "");
    assert_eq!(pods(delete(&mut mesh, ObjectKind::NetworkPolicy, "two")), "a");
    assert_eq!(under(&mesh), "b");
    apply(&mut mesh, labelled("a", "cart"));
    apply(&mut mesh, labelled("b", "other"));
    assert_eq!(under(&mesh), "a", "labels decide anew");
    delete(&mut mesh, ObjectKind::Pod, "a");
    apply(&mut mesh, labelled("a", "web"));
    assert_eq!(under(&mesh), "");
    assert_eq!(pods(apply(&mut mesh, policy("bank", "elsewhere", PodSelection::All))), "");
    assert_eq!(pods(apply(&mut mesh, policy("", "cluster", PodSelection::All))), "ab");
    assert_eq!(pods(apply(&mut mesh, policy("", "another", PodSelection::All))), "");
    assert_eq!(under(&mesh), "ab");
    for (name, changed) in [("cluster", ""), ("another", "ab")] {
        let name = NamespacedName::new("", name);
        let gone = mesh.apply(Delta::Delete(ObjectRef { kind: ObjectKind::NetworkPolicy, name }));
        assert_eq!(pods(gone), changed);
    }
    assert_eq!(under(&mesh), "");
}

#[test]
fn an_address_of_the_outside_holds_on_its_ports_where_nobody_else_has_it() {
    let mut mesh = mesh();
    let outside = |name: &str, port: u16, ips: &[&str]| {
        let mut service = service(name, &[]);
        service.external_ips = ips.iter().map(|ip| ip.parse().unwrap()).collect();
        service.ports[0].port = port;
        Object::Service(service)
    };
    let found = |mesh: &Mesh, at: &str| match mesh.destination(addr(at)) {
        Destination::Service(found) => found.service.name.name.to_string(),
        other => format!("{other:?}").split(['(', ' ']).next().unwrap().to_owned(),
    };
    apply(&mut mesh, outside("a", 80, &["10.1.0.1", "10.96.0.1", "192.168.0.1", "192.0.2.1"]));
    apply(&mut mesh, outside("b", 81, &["192.168.0.1"]));
    apply(&mut mesh, node(&["192.168.0.1"], "a"));
    apply(&mut mesh, Object::Pod(pod("cart", "u1", &["10.1.0.1"])));
    apply(&mut mesh, Object::Service(service("cart", &["10.96.0.1"])));
    assert_eq!(found(&mesh, "10.1.0.1:80"), "Workload", "a pod's address was taken from it");
    assert_eq!(found(&mesh, "10.96.0.1:80"), "cart", "a ClusterIP was taken from its Service");
    assert_eq!(found(&mesh, "192.0.2.1:80"), "a");
    assert_eq!(found(&mesh, "192.168.0.1:80"), "a");
    assert_eq!(found(&mesh, "192.168.0.1:81"), "b", "two Services share an address by their ports");
    assert_eq!(found(&mesh, "192.168.0.1:10250"), "Node", "the node keeps its other ports");
    apply(&mut mesh, outside("a", 80, &["192.0.2.1"]));
    assert_eq!(found(&mesh, "192.168.0.1:80"), "Node");
    delete(&mut mesh, ObjectKind::Service, "a");
    assert_eq!(found(&mesh, "192.0.2.1:80"), "Outside");
}

#[test]
fn every_address_is_something() {
    let mut mesh = mesh();
    apply(&mut mesh, node(&["192.168.0.1"], "a"));
    apply(&mut mesh, Object::Pod(pod("cart", "u1", &["10.1.0.1", "fd00::1"])));
    apply(&mut mesh, Object::Service(service("cart", &["10.96.0.1"])));
    apply(&mut mesh, Object::ServiceCidr { name: "default".into(), cidrs: vec!["172.30.0.0/16".parse().unwrap()] });
    mesh.set_local_addresses(HashSet::from(["192.168.0.2".parse().unwrap()]));
    assert!(matches!(mesh.destination(addr("10.96.0.1:80")), Destination::Service(_)));
    assert!(matches!(mesh.destination(addr("10.96.0.1:81")), Destination::NoSuchPort(_)));
    for at in ["10.1.0.1:1", "[fd00::1]:1", "[::ffff:10.1.0.1]:1"] {
        assert!(matches!(mesh.destination(addr(at)), Destination::Workload(_)), "{at}");
    }
    for at in ["192.168.0.1:1", "192.168.0.2:1"] {
        assert!(matches!(mesh.destination(addr(at)), Destination::Node), "{at}");
    }
    for at in ["10.2.0.1:1", "172.20.0.9:1", "172.30.0.1:1"] {
        assert!(matches!(mesh.destination(addr(at)), Destination::Unknown), "{at}");
    }
    assert!(matches!(mesh.destination(addr("1.1.1.1:443")), Destination::Outside));
    delete(&mut mesh, ObjectKind::ServiceCidr, "default");
    delete(&mut mesh, ObjectKind::Node, "one");
    for at in ["172.30.0.1:1", "172.20.0.9:1", "192.168.0.1:1"] {
        assert!(matches!(mesh.destination(addr(at)), Destination::Outside), "{at}");
    }
}

#[test]
fn an_address_claimed_twice_stays_with_its_first_live_holder() {
    let mut mesh = mesh();
    apply(&mut mesh, Object::Pod(pod("a", "u1", &["10.1.0.1"])));
    apply(&mut mesh, Object::Pod(pod("b", "u2", &["10.1.0.1"])));
    assert_eq!(holder(&mesh, "10.1.0.1").as_deref(), Some("u1"));
    apply(&mut mesh, Object::Pod(Pod { deleting: true, ..pod("a", "u1", &["10.1.0.1"]) }));
    assert_eq!(holder(&mesh, "10.1.0.1").as_deref(), Some("u1"), "a pod that is being deleted still holds it");
    apply(&mut mesh, Object::Pod(Pod { phase: Phase::Succeeded, ..pod("a", "u1", &["10.1.0.1"]) }));
    assert_eq!(holder(&mesh, "10.1.0.1").as_deref(), Some("u2"));
    delete(&mut mesh, ObjectKind::Pod, "a");
    delete(&mut mesh, ObjectKind::Pod, "b");
    assert_eq!(holder(&mesh, "10.1.0.1"), None);
}

#[test]
fn a_finished_holder_gives_its_place_up_for_good() {
    let mut mesh = mesh();
    apply(&mut mesh, Object::Pod(pod("a", "u1", &["10.1.0.1"])));
    apply(&mut mesh, Object::Pod(Pod { phase: Phase::Failed, ..pod("a", "u1", &["10.1.0.1"]) }));
    apply(&mut mesh, Object::Pod(pod("b", "u2", &["10.1.0.1"])));
    apply(&mut mesh, Object::Pod(pod("a", "u1", &["10.1.0.1"])));
    assert_eq!(holder(&mesh, "10.1.0.1").as_deref(), Some("u2"));
}

#[test]
fn a_new_pod_of_the_same_name_replaces_the_old_one_and_its_addresses() {
    let mut mesh = mesh();
    apply(&mut mesh, Object::Pod(pod("a", "u1", &["10.1.0.1"])));
    let change = apply(&mut mesh, Object::Pod(pod("a", "u2", &["10.1.0.2"])));
    assert_eq!(change.pods, BTreeSet::from([PodUid::new("u1"), PodUid::new("u2")]));
    assert_eq!(holder(&mesh, "10.1.0.1"), None);
    assert_eq!(mesh.workload_by_name(&NamespacedName::new("shop", "a")).unwrap().uid().as_str(), "u2");
    assert_eq!(mesh.workloads_on("one").count(), 1);
    assert_eq!(mesh.workloads().count(), 1);
}

#[test]
fn a_pod_that_changes_addresses_or_node_leaves_the_old_ones() {
    let mut mesh = mesh();
    apply(&mut mesh, Object::Pod(pod("a", "u1", &["10.1.0.1", "fd00::1"])));
    apply(&mut mesh, Object::Pod(Pod { node: Some("two".into()), ..pod("a", "u1", &["fd00::1", "10.1.0.3"]) }));
    assert_eq!(holder(&mesh, "10.1.0.1"), None);
    assert_eq!(holder(&mesh, "fd00::1").as_deref(), Some("u1"));
    assert_eq!(holder(&mesh, "10.1.0.3").as_deref(), Some("u1"));
    assert_eq!((mesh.workloads_on("one").count(), mesh.workloads_on("two").count()), (0, 1));
}

#[test]
fn an_object_applied_twice_changes_nothing() {
    let mut mesh = mesh();
    let objects = [
        Object::Pod(pod("a", "u1", &["10.1.0.1"])),
        Object::Service(service("cart", &["10.96.0.1"])),
        Object::EndpointSlice(slice("cart-1", "cart", 8080, &["10.1.0.1"])),
    ];
    for object in objects {
        assert!(!apply(&mut mesh, object.clone()).is_empty());
        assert!(apply(&mut mesh, object.clone()).is_empty(), "{object:?}");
    }
}

#[test]
fn a_host_network_pod_claims_no_address() {
    let mut mesh = mesh();
    apply(&mut mesh, node(&["192.168.0.1"], "a"));
    apply(&mut mesh, Object::Pod(Pod { host_network: true, ..pod("a", "u1", &["192.168.0.1"]) }));
    assert!(matches!(mesh.destination(addr("192.168.0.1:1")), Destination::Node));
}

#[test]
fn a_pod_that_turns_to_the_host_network_gives_its_claim_back() {
    let mut mesh = mesh();
    apply(&mut mesh, Object::Pod(pod("a", "u1", &["10.1.0.1"])));
    apply(&mut mesh, Object::Pod(Pod { host_network: true, ..pod("a", "u1", &["10.1.0.1"]) }));
    assert_eq!(holder(&mesh, "10.1.0.1"), None);
}

#[test]
fn an_ipv4_mapped_address_of_a_pod_is_its_ipv4_address() {
    let mut mesh = mesh();
    apply(&mut mesh, Object::Pod(pod("a", "u1", &["::ffff:10.1.0.1"])));
    assert_eq!(holder(&mesh, "10.1.0.1").as_deref(), Some("u1"));
    delete(&mut mesh, ObjectKind::Pod, "a");
    assert_eq!(holder(&mesh, "10.1.0.1"), None);
}

#[test]
fn pods_follow_their_namespace_and_node() {
    let mut mesh = mesh();
    let uid = PodUid::new("u1");
    apply(&mut mesh, Object::Pod(pod("a", "u1", &["10.1.0.1"])));
    assert!(!mesh.workload(&uid).unwrap().membership.is_joined());
    assert_eq!(apply(&mut mesh, namespace(Some("enabled"))).pods, BTreeSet::from([uid.clone()]));
    assert!(mesh.workload(&uid).unwrap().membership.is_joined());
    assert!(mesh.workload(&uid).unwrap().captured);
    assert!(apply(&mut mesh, namespace(Some("enabled"))).is_empty());
    assert!(!apply(&mut mesh, node(&[], "a")).is_empty());
    assert_eq!(mesh.workload(&uid).unwrap().zone.as_deref(), Some("a"));
    delete(&mut mesh, ObjectKind::Namespace, "shop");
    assert!(!mesh.workload(&uid).unwrap().membership.is_joined());
    delete(&mut mesh, ObjectKind::Node, "one");
    assert_eq!(mesh.workload(&uid).unwrap().zone, None);
}

#[test]
fn endpoints_are_joined_over_slices_and_count_once() {
    let mut mesh = mesh();
    apply(&mut mesh, Object::EndpointSlice(slice("cart-1", "cart", 8080, &["10.1.0.1", "10.1.0.2"])));
    apply(&mut mesh, Object::Service(service("cart", &["10.96.0.1"])));
    apply(&mut mesh, Object::EndpointSlice(slice("cart-2", "cart", 8080, &["10.1.0.2", "10.1.0.3"])));
    assert_eq!(endpoints(&mesh, "10.96.0.1:80"), ["10.1.0.1:8080", "10.1.0.2:8080", "10.1.0.3:8080"]);
    assert_eq!(services_at(&mesh, "10.1.0.2:8080"), ["cart"]);
    delete(&mut mesh, ObjectKind::EndpointSlice, "cart-1");
    assert_eq!(endpoints(&mesh, "10.96.0.1:80"), ["10.1.0.2:8080", "10.1.0.3:8080"]);
    assert_eq!(services_at(&mesh, "10.1.0.1:8080"), [""; 0]);
    assert_eq!(services_at(&mesh, "10.1.0.2:8080"), ["cart"]);
    delete(&mut mesh, ObjectKind::EndpointSlice, "cart-2");
    assert_eq!(endpoints(&mesh, "10.96.0.1:80"), [""; 0]);
    assert_eq!(services_at(&mesh, "10.1.0.2:8080"), [""; 0]);
}

#[test]
fn a_slice_that_moves_to_another_service_leaves_the_first() {
    let mut mesh = mesh();
    apply(&mut mesh, Object::EndpointSlice(slice("s", "cart", 8080, &["10.1.0.1"])));
    let change = apply(&mut mesh, Object::EndpointSlice(slice("s", "web", 8080, &["10.1.0.1"])));
    assert_eq!(change.services.len(), 2);
    assert_eq!(services_at(&mesh, "10.1.0.1:8080"), ["web"]);
}

#[test]
fn an_endpoint_of_two_services_is_found_by_both() {
    let mut mesh = mesh();
    apply(&mut mesh, Object::EndpointSlice(slice("a", "cart", 8080, &["10.1.0.1"])));
    apply(&mut mesh, Object::EndpointSlice(slice("b", "web", 8080, &["10.1.0.1"])));
    assert_eq!(services_at(&mesh, "10.1.0.1:8080"), ["cart", "web"]);
    assert_eq!(services_at(&mesh, "[::ffff:10.1.0.1]:8080"), ["cart", "web"]);
}

#[test]
fn an_address_that_two_services_claim_passes_on_when_the_first_leaves_or_changes() {
    let mut mesh = mesh();
    let at = |mesh: &Mesh| match mesh.destination(addr("10.96.0.1:80")) {
        Destination::Service(found) => found.service.name.name.to_string(),
        other => panic!("{other:?}"),
    };
    apply(&mut mesh, Object::Service(service("a", &["10.96.0.1"])));
    apply(&mut mesh, Object::Service(service("b", &["10.96.0.1"])));
    assert_eq!(at(&mesh), "a");
    apply(&mut mesh, Object::Service(Service { publish_not_ready_addresses: true, ..service("a", &["10.96.0.1"]) }));
    assert_eq!(at(&mesh), "a", "the first keeps it through a change of its own");
    apply(&mut mesh, Object::Service(service("a", &["10.96.0.2"])));
    assert_eq!(at(&mesh), "b");
    delete(&mut mesh, ObjectKind::Service, "b");
    assert!(matches!(mesh.destination(addr("10.96.0.1:80")), Destination::Unknown));
}

#[test]
fn what_the_runtime_gave_a_pod_counts_until_its_object_says_something_new() {
    let mut mesh = mesh();
    let ips = |mesh: &Mesh| mesh.workload(&PodUid::new("u")).unwrap().pod.ips.clone();
    let parse = |ip: &str| vec![ip.parse::<IpAddr>().unwrap()];
    let say = |mesh: &mut Mesh, ips: &[&str]| drop(mesh.apply(Delta::Apply(Object::Pod(pod("web", "u", ips)))));
    say(&mut mesh, &[]);
    mesh.hand_over(&PodUid::new("u"), "first", parse("10.1.0.5"));
    say(&mut mesh, &[]);
    assert_eq!(ips(&mesh), parse("10.1.0.5"));
    assert!(mesh.workload_by_ip("10.1.0.5".parse().unwrap()).is_some());
    say(&mut mesh, &["10.1.0.5"]);
    // A new sandbox, while the object still says the old one's address.
    mesh.hand_over(&PodUid::new("u"), "second", parse("10.1.0.6"));
    mesh.take_back(&PodUid::new("u"), "first");
    say(&mut mesh, &["10.1.0.5"]);
    assert_eq!(ips(&mesh), parse("10.1.0.6"));
    assert!(mesh.workload_by_ip("10.1.0.5".parse().unwrap()).is_none());
    say(&mut mesh, &["10.1.0.6"]);
    say(&mut mesh, &["10.1.0.5"]);
    assert_eq!(ips(&mesh), parse("10.1.0.5"), "its object's word is the last one");
    // A sandbox that came to nothing.
    mesh.hand_over(&PodUid::new("u"), "third", parse("10.1.0.7"));
    mesh.take_back(&PodUid::new("u"), "third");
    assert_eq!(ips(&mesh), parse("10.1.0.5"));
}
