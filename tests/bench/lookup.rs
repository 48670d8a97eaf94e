//! What a connection asks of the model, and what one changed object costs, in a small cluster and in a large one.
//!
//! `cargo bench --bench lookup`

mod cluster;

use std::hint::black_box;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use cluster::Cluster;
use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use rand::SeedableRng;
use rand::rngs::StdRng;
use selvedge::mesh::balance::{Balancer, Client};
use selvedge::mesh::{Destination, Identity, NamespacedName, ServiceDestination, ServicePort, TargetPort, Workload};
use selvedge::model::{Delta, Model, State};
use selvedge::policy::{self, Query};
use selvedge::route::{self, Decision, Route, RouteKind};
use serde_json::json;

fn look_ups(criterion: &mut Criterion) {
    for size in [Cluster::SMALL, Cluster::LARGE] {
        let model = Model::new(Cluster::settings());
        model.apply(size.deltas());
        let mut asks = |name: &str, ask: &mut dyn FnMut()| {
            criterion.bench_function(&format!("{name}/{}", size.pods), |bencher| bencher.iter(&mut *ask));
        };
        let state = model.read();
        // What one node talks to: the same few, again and again.
        let few: Vec<usize> = (0..8).map(|n| n * size.pods / 8).collect();
        let mut turn = few.iter().cycle().copied();
        let mut next = move || turn.next().unwrap_or(0);

        asks("read", &mut || drop(black_box(model.read())));
        asks("destination/pod", &mut || {
            black_box(state.mesh.destination(cluster::pod_address(next())));
        });
        asks("destination/service", &mut || {
            black_box(state.mesh.destination(cluster::service_address(next() / 10)));
        });
        asks("services_at", &mut || {
            black_box(state.mesh.services_at(cluster::pod_address(next())).count());
        });
        let workloads: Vec<Arrival> = few.iter().map(|n| Arrival::at(&state, *n)).collect();
        let mut turn = workloads.iter().cycle();
        asks("decide", &mut || {
            black_box(turn.next().map(|arrival| state.policies.decide(&arrival.query())));
        });
        asks("peer_mode", &mut || {
            black_box(turn.next().map(|arrival| state.policies.peer_mode(&arrival.workload, 8080)));
        });

        let services: Vec<ServiceDestination> = few.iter().map(|n| service_at(&state, n / 10)).collect();
        let mut turn = services.iter().cycle();
        let (balancer, client, now) = (Balancer::new(), client(), Instant::now());
        let mut random = StdRng::seed_from_u64(1);
        asks("pick", &mut || {
            let picked = turn.next().and_then(|service| balancer.pick(service, &client, &[], now, &mut random));
            if let Some(addr) = black_box(picked) {
                balancer.opened(addr);
                balancer.closed(addr);
            }
        });
    }
}

fn steps(criterion: &mut Criterion) {
    for size in [Cluster::SMALL, Cluster::LARGE] {
        let model = Model::new(Cluster::settings());
        model.apply(size.deltas());
        // Each step is followed by the one that undoes it, so that every one changes something.
        let mut applies = |name: &str, one: Delta, other: Delta| {
            let mut turn = [one, other].into_iter().cycle();
            let mut next = || turn.next();
            criterion.bench_function(&format!("{name}/{}", size.pods), |bencher| {
                bencher.iter_batched(&mut next, |delta| model.apply(delta), BatchSize::SmallInput);
            });
        };
        let selvedge::mesh::Object::Pod(pod) = cluster::pod(7) else { return };
        let moved = selvedge::mesh::Pod { ips: vec![IpAddr::from([10, 200, 0, 1])], ..pod.clone() };
        let object = selvedge::mesh::Object::Pod;
        applies("apply/pod", cluster::apply(object(moved)), cluster::apply(object(pod)));
        applies("apply/slice", cluster::apply(cluster::slice(0, 9)), cluster::apply(cluster::slice(0, 10)));
        let service = cluster::service(0);
        let gone = Delta::Mesh(selvedge::mesh::Delta::Delete(service.reference()));
        applies("apply/service", gone, cluster::apply(service));
        let policy = cluster::policy(0);
        let gone = Delta::Policy(policy::Delta::Delete(policy.reference()));
        applies("apply/policy", gone, Delta::Policy(policy::Delta::Apply(policy)));
    }
}

/// One balancer, asked by one thread and by two at once: the cost of a pick to each.
fn threads(criterion: &mut Criterion) {
    let model = Model::new(Cluster::settings());
    model.apply(Cluster::SMALL.deltas());
    let (service, client) = (service_at(&model.read(), 0), client());
    for threads in [1, 2] {
        let balancer = Balancer::new();
        criterion.bench_function(&format!("pick/threads/{threads}"), |bencher| {
            bencher.iter_custom(|picks| {
                let begun = Instant::now();
                std::thread::scope(|scope| {
                    for seed in 0..threads {
                        let (balancer, service, client) = (&balancer, &service, &client);
                        scope.spawn(move || {
                            let (now, mut random) = (Instant::now(), StdRng::seed_from_u64(seed));
                            for _ in 0..picks {
                                let picked = balancer.pick(service, client, &[], now, &mut random);
                                if let Some(addr) = picked {
                                    balancer.opened(addr);
                                    balancer.closed(addr);
                                }
                            }
                        });
                    }
                });
                begun.elapsed()
            });
        });
    }
}

/// One request among ten routes of a Service and among five thousand, each of a path of its own.
fn routes(criterion: &mut Criterion) {
    let named = NamespacedName::new("shop", "cart");
    let port = ServicePort { name: "http".into(), port: 80, target: TargetPort::Number(80), app_protocol: None };
    let (client, head) = ("web".into(), request("/tenant-7/api/items?page=2"));
    for count in [10, 5_000] {
        let mut table = route::Table::default();
        (0..count).for_each(|n| table.apply(route::Delta::Apply(tenant(n))));
        criterion.bench_function(&format!("route/{count}"), |bencher| {
            bencher.iter(|| {
                let routes = table.routes(&named, &port, &client);
                black_box(routes.is_some_and(|routes| matches!(routes.decide(&head, 7), Decision::Forward(_))))
            });
        });
        let changed = |created| route::Delta::Apply(Arc::new(Route { created: Some(created), ..(*tenant(7)).clone() }));
        let mut turn = [changed(1), changed(2)].into_iter().cycle();
        let mut next = || turn.next();
        criterion.bench_function(&format!("apply/route/{count}"), |bencher| {
            let apply = |delta: Option<route::Delta>| delta.into_iter().for_each(|delta| table.apply(delta));
            bencher.iter_batched(&mut next, apply, BatchSize::SmallInput);
        });
    }
}

/// A route of one tenant's path.
fn tenant(n: usize) -> Arc<Route> {
    let route = json!({
        "metadata": {"name": format!("tenant-{n}"), "namespace": "shop"},
        "spec": {
            "parentRefs": [{"group": "", "kind": "Service", "name": "cart"}],
            "rules": [{
                "matches": [{"path": {"value": format!("/tenant-{n}/api")}}],
                "backendRefs": [{"name": format!("cart-{n}"), "port": 80}],
            }],
        },
    });
    Arc::new(route::decode(RouteKind::Http, &route).expect("it is one"))
}

fn request(uri: &str) -> http::request::Parts {
    http::Request::builder().uri(uri).body(()).expect("it is one").into_parts().0
}

/// What an arrival at a pod asks policy about.
struct Arrival {
    source: Identity,
    workload: Arc<Workload>,
    to: SocketAddr,
    services: Vec<NamespacedName>,
}

impl Arrival {
    fn at(state: &State, pod: usize) -> Self {
        let to = cluster::pod_address(pod);
        let Destination::Workload(workload) = state.mesh.destination(to) else { panic!("{to} is no pod") };
        let source = "spiffe://cluster.local/ns/ns-0/sa/web".parse().expect("it is one");
        Self { source, workload, to, services: state.mesh.services_at(to).cloned().collect() }
    }

    fn query(&self) -> Query<'_> {
        Query {
            source_ip: IpAddr::from([10, 1, 0, 200]),
            source_identity: Some(&self.source),
            destination: &self.workload,
            destination_addr: self.to,
            services: &self.services,
            requests: false,
        }
    }
}

fn service_at(state: &State, n: usize) -> ServiceDestination {
    match state.mesh.destination(cluster::service_address(n)) {
        Destination::Service(found) => found,
        other => panic!("Service {n} is not there: {other:?}"),
    }
}

fn client() -> Client {
    Client { ip: IpAddr::from([10, 1, 0, 200]), node: Some("node-0".into()), zone: Some("zone-a".into()) }
}

criterion_group!(benches, look_ups, steps, threads, routes);
criterion_main!(benches);
