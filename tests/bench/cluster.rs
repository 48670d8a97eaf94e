//! A cluster of a given size, as objects: a Deployment of ten pods and a Service each, on nodes of a hundred pods.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use selvedge::mesh::{
    self, ContainerPort, Endpoint, EndpointSlice, InternalTrafficPolicy, Labels, MeshSettings, Namespace,
    NamespacedName, Node, Object, Owner, Phase, Pod, PodUid, Probe, Service, ServiceKind, ServicePort, Settings,
    TargetPort,
};
use selvedge::model::Delta;
use selvedge::policy::{self, PolicyKind, PolicyObject};
use serde_json::{Value, json};

#[derive(Clone, Copy, Debug)]
pub struct Cluster {
    pub pods: usize,
    pub policies: usize,
}

impl Cluster {
    pub const SMALL: Self = Self { pods: 10, policies: 10 };
    pub const LARGE: Self = Self { pods: 100_000, policies: 10_000 };

    pub fn services(self) -> usize {
        self.pods / PODS_OF_SERVICE
    }

    pub fn settings() -> MeshSettings {
        MeshSettings {
            trust_domain: "cluster.local".parse().expect("it is one"),
            cluster_cidrs: vec!["10.0.0.0/8".parse().expect("it is one")],
        }
    }

    /// All of it, in the order in which a folder brings it.
    pub fn deltas(self) -> impl Iterator<Item = Delta> {
        let namespaces = (0..self.pods.div_ceil(PODS_OF_NAMESPACE)).map(namespace);
        let nodes = (0..self.pods.div_ceil(PODS_OF_NODE)).map(node);
        let services = (0..self.services()).flat_map(|n| [service(n), slice(n, PODS_OF_SERVICE)]);
        let objects = namespaces.chain(nodes).chain((0..self.pods).map(pod)).chain(services);
        let policies = (0..self.policies).map(|n| Delta::Policy(policy::Delta::Apply(policy(n))));
        objects.map(apply).chain(policies)
    }
}

pub fn apply(object: Object) -> Delta {
    Delta::Mesh(mesh::Delta::Apply(object))
}

pub fn pod(n: usize) -> Object {
    let app = n / PODS_OF_SERVICE;
    let labels = [
        ("app.kubernetes.io/name", format!("app-{app}")),
        ("app.kubernetes.io/part-of", "shop".to_owned()),
        ("app.kubernetes.io/managed-by", "Helm".to_owned()),
        ("app.kubernetes.io/version", "1.2.3".to_owned()),
        ("pod-template-hash", format!("{:010x}", app * 7919)),
    ];
    Object::Pod(Pod {
        uid: PodUid::new(format!("{n:08x}-52a5-4ce1-9c1d-0242ac120002")),
        name: NamespacedName::new(namespace_name(n), format!("app-{app}-{:010x}-{n:05x}", app * 7919)),
        node: Some(format!("node-{}", n / PODS_OF_NODE).into()),
        ips: vec![IpAddr::V4(pod_ip(n))],
        labels: labels.into_iter().map(|(key, value)| (key.into(), value.into())).collect(),
        service_account: format!("app-{app}").into(),
        phase: Phase::Running,
        host_network: false,
        host_users: true,
        deleting: false,
        settings: Settings::default(),
        container_ports: vec![ContainerPort { name: Some("http".into()), port: PORT }],
        probes: vec![Probe { port: PORT }],
        owner: Owner { kind: "Deployment".into(), name: format!("app-{app}").into() },
    })
}

pub fn service(n: usize) -> Object {
    Object::Service(Service {
        name: NamespacedName::new(namespace_name(n * PODS_OF_SERVICE), format!("app-{n}")),
        kind: ServiceKind::ClusterIp(vec![IpAddr::V4(service_ip(n))]),
        external_ips: Vec::new(),
        ports: vec![ServicePort {
            name: "http".into(),
            port: 80,
            target: TargetPort::Number(PORT),
            app_protocol: None,
        }],
        session_affinity: None,
        internal_traffic_policy: InternalTrafficPolicy::Cluster,
        traffic_distribution: None,
        publish_not_ready_addresses: false,
        settings: Settings::default(),
    })
}

/// The slice of a Service, with the first so many of its pods.
pub fn slice(n: usize, pods: usize) -> Object {
    let endpoint = |pod: usize| Endpoint {
        addresses: vec![IpAddr::V4(pod_ip(pod))],
        ready: true,
        serving: true,
        terminating: false,
        node: Some(format!("node-{}", pod / PODS_OF_NODE).into()),
        zone: Some("zone-a".into()),
        zone_hints: Vec::new(),
        node_hints: Vec::new(),
        pod: Some(NamespacedName::new(namespace_name(pod), format!("app-{n}-{:010x}-{pod:05x}", n * 7919))),
        pod_uid: Some(PodUid::new(format!("uid-{pod}"))),
    };
    let namespace = namespace_name(n * PODS_OF_SERVICE);
    Object::EndpointSlice(EndpointSlice {
        name: NamespacedName::new(namespace.clone(), format!("app-{n}-x7k2p")),
        service: NamespacedName::new(namespace, format!("app-{n}")),
        ports: vec![("http".into(), PORT)],
        endpoints: (n * PODS_OF_SERVICE..n * PODS_OF_SERVICE + pods).map(endpoint).collect(),
    })
}

/// A policy over one Deployment. All are in one namespace: the worst case for who would go through them.
pub fn policy(n: usize) -> PolicyObject {
    let spec = json!({
        "selector": { "matchLabels": { "app.kubernetes.io/name": format!("app-{n}") } },
        "action": "ALLOW",
        "rules": [{
            "from": [{ "source": { "principals": [format!("cluster.local/ns/ns-0/sa/app-{}", n + 1), "*/sa/web"] } }],
            "to": [{ "operation": { "ports": ["8080"] } }],
        }],
    });
    let value: Value = json!({
        "apiVersion": "selvedge.dev/v1alpha1",
        "kind": "AuthorizationPolicy",
        "metadata": { "namespace": "ns-0", "name": format!("app-{n}") },
        "spec": spec,
    });
    policy::decode(PolicyKind::AuthorizationPolicy, &value).expect("it is well formed")
}

pub fn pod_address(n: usize) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(pod_ip(n)), PORT)
}

pub fn service_address(n: usize) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(service_ip(n)), 80)
}

fn namespace(n: usize) -> Object {
    let settings = Settings { mesh: Some(mesh::MeshMode::Enabled), ..Settings::default() };
    Object::Namespace(Namespace { name: format!("ns-{n}").into(), settings, labels: Labels::default() })
}

fn node(n: usize) -> Object {
    Object::Node(Node {
        name: format!("node-{n}").into(),
        addresses: vec![IpAddr::V4(Ipv4Addr::from(0xc0a8_0000 + u32::try_from(n).expect("few")))],
        pod_cidrs: Vec::new(),
        zone: Some("zone-a".into()),
    })
}

fn namespace_name(pod: usize) -> String {
    format!("ns-{}", pod / PODS_OF_NAMESPACE)
}

fn pod_ip(n: usize) -> Ipv4Addr {
    Ipv4Addr::from(0x0a01_0000 + u32::try_from(n).expect("few"))
}

fn service_ip(n: usize) -> Ipv4Addr {
    Ipv4Addr::from(0x0a60_0000 + u32::try_from(n).expect("few"))
}

const PORT: u16 = 8080;
const PODS_OF_SERVICE: usize = 10;
const PODS_OF_NODE: usize = 100;
const PODS_OF_NAMESPACE: usize = 1_000;
