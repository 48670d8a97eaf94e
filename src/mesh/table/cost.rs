//! What look-ups and steps cost, counted: nodes of maps visited and copied, workloads and candidates built.

use super::super::{EndpointSlice, Labels, Pod, work};
use super::tests::{mesh, namespace, node, pod, service, slice};
use super::*;

/// So many pods, each an endpoint of one of a tenth as many Services.
fn mesh_of(pods: usize) -> Mesh {
    let mut mesh = mesh();
    mesh.apply(Delta::Apply(node(&["192.168.0.1"], "a")));
    for service in 0..pods / 10 {
        mesh.apply(Delta::Apply(Object::Service(numbered_service(service))));
        let ips: Vec<String> = (service * 10..service * 10 + 10).map(pod_ip).collect();
        mesh.apply(Delta::Apply(Object::EndpointSlice(numbered_slice(service, &ips))));
    }
    for n in 0..pods {
        mesh.apply(Delta::Apply(Object::Pod(numbered_pod(n))));
    }
    mesh
}

fn pod_ip(n: usize) -> String {
    format!("10.1.{}.{}", n / 250, n % 250)
}

fn numbered_pod(n: usize) -> Pod {
    Pod { node: Some(format!("n{}", n % 100).into()), ..pod(&format!("p{n}"), &format!("u{n}"), &[&pod_ip(n)]) }
}

fn numbered_service(n: usize) -> Service {
    service(&format!("s{n}"), &[&format!("10.96.{}.{}", n / 250, n % 250)])
}

fn numbered_slice(service: usize, ips: &[String]) -> EndpointSlice {
    let ips: Vec<&str> = ips.iter().map(String::as_str).collect();
    slice(&format!("s{service}-1"), &format!("s{service}"), 8080, &ips)
}

/// The work of a step on a mesh that somebody else reads too, as the model does it.
fn work_of(mesh: &Mesh, delta: Delta) -> usize {
    let mut next = mesh.clone();
    work::of(|| next.apply(delta))
}

#[test]
fn a_look_up_costs_in_a_large_mesh_what_it_costs_in_a_small_one() {
    let (small, large) = (mesh_of(10), mesh_of(20_000));
    for at in ["10.1.0.3:8080", "10.96.0.0:80", "10.1.0.3:1", "192.168.0.1:1", "10.200.0.1:1", "1.1.1.1:443"] {
        let at: SocketAddr = at.parse().unwrap();
        let cost = |mesh: &Mesh| work::of(|| (mesh.destination(at), mesh.services_at(at).count()));
        // Two thousand times the pods: two more nodes in each of up to eight maps, and some where hashes meet.
        let (few, many) = (cost(&small), cost(&large));
        assert!(many <= few + 32, "{at}: {many} instead of {few}");
    }
}

#[test]
fn a_step_costs_what_its_object_does_and_not_what_the_mesh_has() {
    let (small, large) = (mesh_of(1_000), mesh_of(20_000));
    let labels: Labels = [("app".into(), "other".into())].into_iter().collect();
    let ips: Vec<String> = (1..10).map(pod_ip).collect();
    let changes = [
        Object::Pod(Pod { labels, ..numbered_pod(7) }),
        Object::Pod(pod("new", "new", &["10.99.0.1"])),
        Object::Service(Service { publish_not_ready_addresses: true, ..numbered_service(7) }),
        Object::EndpointSlice(numbered_slice(0, &ips)),
        Object::ServiceCidr { name: "more".into(), cidrs: vec!["172.30.0.0/16".parse().unwrap()] },
        node(&["192.168.0.7"], "a"),
    ];
    for object in changes {
        let deltas = [Delta::Apply(object.clone()), Delta::Delete(object.reference())];
        for delta in deltas {
            let (few, many) = (work_of(&small, delta.clone()), work_of(&large, delta.clone()));
            // Twenty times the pods: a node more to copy in each map that changes.
            assert!(many <= few * 3 + 256, "{delta:?}: {many} instead of {few}");
        }
    }
}

#[test]
fn a_namespace_or_a_node_that_says_nothing_new_of_its_pods_leaves_them_alone() {
    let mesh = mesh_of(1_000);
    let (few, all) = (500, 1_000);
    assert!(work_of(&mesh, Delta::Apply(namespace(None))) < few, "it came, and asks for nothing");
    let mut joined = mesh.clone();
    let cost = work::of(|| joined.apply(Delta::Apply(namespace(Some("enabled")))));
    assert!(cost >= all, "its pods join");
    assert!(work_of(&joined, Delta::Apply(namespace(Some("enabled")))) < few);
    assert!(work_of(&joined, Delta::Delete(node(&[], "a").reference())) < few, "no pod runs there");
}

#[test]
fn a_slice_costs_its_own_endpoints_however_many_slices_the_service_has() {
    let mut mesh = mesh();
    mesh.apply(Delta::Apply(Object::Service(service("cart", &["10.96.0.1"]))));
    let numbered = |n: usize, count: usize| {
        let ips: Vec<String> = (n * 100..n * 100 + count).map(pod_ip).collect();
        let ips: Vec<&str> = ips.iter().map(String::as_str).collect();
        Delta::Apply(Object::EndpointSlice(slice(&format!("cart-{n}"), "cart", 8080, &ips)))
    };
    (0..2).for_each(|n| drop(mesh.apply(numbered(n, 100))));
    let few = work_of(&mesh, numbered(0, 99));
    (2..100).for_each(|n| drop(mesh.apply(numbered(n, 100))));
    let many = work_of(&mesh, numbered(0, 99));
    assert!(many <= few * 3 + 256, "{many} with a hundred slices, {few} with two");
}

#[test]
fn an_address_that_all_services_share_is_found_by_its_port() {
    let mut mesh = mesh();
    for n in 0..1_000u16 {
        let mut service = service(&format!("s{n}"), &[]);
        service.external_ips = vec!["192.0.2.1".parse().unwrap()];
        service.ports[0].port = 1_000 + n;
        mesh.apply(Delta::Apply(Object::Service(service)));
    }
    let cost = work::of(|| {
        let found = mesh.destination("192.0.2.1:1999".parse().unwrap());
        assert!(matches!(found, Destination::Service(found) if &*found.service.name.name == "s999"));
    });
    assert!(cost < 50, "{cost} of a thousand");
}
