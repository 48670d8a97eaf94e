use serde_json::json;

use super::super::connections::{Opening, Registered};
use super::*;
use crate::mesh::{self, Object, fixture};
use crate::model::{Delta, Model};
use crate::policy::{self, PolicyKind};
use crate::telemetry::{AccessLog, ConnectionInfo, MetricsSettings, Party, Telemetry, Traces, Transport};

/// A model with the pods `a` and `b` of namespace `shop`, at 10.1.0.1 and 10.1.0.2, and a connection to each.
struct Scene {
    model: Model,
    connections: Arc<Connections>,
    _live: Vec<Registered>,
}

impl Scene {
    fn new() -> Self {
        let settings = crate::mesh::MeshSettings {
            trust_domain: "cluster.local".parse().unwrap(),
            cluster_cidrs: vec!["10.0.0.0/8".parse().unwrap()],
        };
        let (model, connections) = (Model::new(settings), Arc::new(Connections::default()));
        model.apply([pod("a", "10.1.0.1"), pod("b", "10.1.0.2")]);
        let telemetry = Telemetry::new(&MetricsSettings::default(), 100, AccessLog::off(), Traces::default());
        let live = [("a", "10.1.0.1:8080"), ("b", "10.1.0.2:8080")];
        let live = live.map(|(pod, to)| {
            let to = to.parse().unwrap();
            let info = ConnectionInfo {
                direction: Direction::Inbound,
                transport: Transport::Plaintext,
                source: Party::stranger("10.1.0.9:1".parse().unwrap()),
                destination: Party::stranger(to),
                service: None,
                requested: None,
                key_exchange: None,
            };
            let source = "10.1.0.9:1".parse().unwrap();
            let opening = Opening { pod: &PodUid::new(pod), source, dialled: to, peer: None, via: None, info };
            connections.register(&telemetry, opening)
        });
        Self { model, connections, _live: live.into() }
    }

    /// The pods whose connections one step has decided again.
    fn affected_by(&self, deltas: impl IntoIterator<Item = Delta>) -> Vec<String> {
        let mut steps = self.model.steps();
        self.model.apply(deltas);
        let step = steps.try_recv().unwrap();
        let found = affected(&self.connections, &self.model.read().mesh, &step);
        found.iter().map(|connection| connection.pod.to_string()).collect()
    }
}

fn pod(name: &str, ip: &str) -> Delta {
    apply(Object::Pod(fixture::pod(name, name, &[ip])))
}

fn apply(object: Object) -> Delta {
    Delta::Mesh(mesh::Delta::Apply(object))
}

fn policy(namespace: &str, spec: serde_json::Value) -> Delta {
    let metadata = json!({ "namespace": namespace, "name": "p" });
    let value = json!({
        "apiVersion": "selvedge.dev/v1alpha1", "kind": "AuthorizationPolicy", "metadata": metadata, "spec": spec,
    });
    Delta::Policy(policy::Delta::Apply(policy::decode(PolicyKind::AuthorizationPolicy, &value).unwrap()))
}

fn labelled(name: &str, ip: &str, app: &str) -> Delta {
    let labels = [("app".into(), app.into())].into_iter().collect();
    apply(Object::Pod(crate::mesh::Pod { labels, ..fixture::pod(name, name, &[ip]) }))
}

#[test]
fn a_pod_has_its_own_connections_decided_again_and_no_others() {
    let scene = Scene::new();
    assert_eq!(scene.affected_by([pod("c", "10.1.0.3")]), [""; 0], "an unrelated pod came");
    assert_eq!(scene.affected_by([labelled("c", "10.1.0.3", "c")]), [""; 0], "an unrelated pod changed");
    assert_eq!(scene.affected_by([pod("a", "10.1.0.1")]), [""; 0], "nothing changed");
    assert_eq!(scene.affected_by([labelled("a", "10.1.0.1", "a")]), ["a"]);
    assert_eq!(scene.affected_by([apply(fixture::namespace(Some("enabled")))]), ["a", "b"]);
}

#[test]
fn an_endpoint_that_comes_or_goes_has_the_connections_to_it_decided_again() {
    let scene = Scene::new();
    let slice = |ips: &[&str]| apply(Object::EndpointSlice(fixture::slice("s", "cart", 8080, ips)));
    assert_eq!(scene.affected_by([apply(Object::Service(fixture::service("cart", &["10.96.0.1"])))]), [""; 0]);
    assert_eq!(scene.affected_by([slice(&["10.1.0.1"])]), ["a"]);
    assert_eq!(scene.affected_by([slice(&["10.1.0.1", "10.1.0.7"])]), [""; 0]);
    assert_eq!(scene.affected_by([slice(&["10.1.0.2"])]), ["a", "b"]);
    let other_port = fixture::slice("t", "cart", 9090, &["10.1.0.1"]);
    assert_eq!(scene.affected_by([apply(Object::EndpointSlice(other_port))]), [""; 0]);
}

#[test]
fn a_policy_has_the_connections_decided_again_that_it_stood_or_stands_over() {
    let scene = Scene::new();
    scene.affected_by([labelled("a", "10.1.0.1", "a"), labelled("b", "10.1.0.2", "b")]);
    let over = |app: &str| json!({ "selector": { "matchLabels": { "app": app } } });
    assert_eq!(scene.affected_by([policy("shop", over("a"))]), ["a"]);
    assert_eq!(scene.affected_by([policy("shop", over("a"))]), [""; 0], "nothing changed");
    assert_eq!(scene.affected_by([policy("shop", over("b"))]), ["a", "b"], "it left one for the other");
    assert_eq!(scene.affected_by([policy("elsewhere", json!({}))]), [""; 0]);
    assert_eq!(scene.affected_by([policy("selvedge-system", json!({}))]), ["a", "b"]);
    let at_service = json!({ "targetRefs": [{ "group": "", "kind": "Service", "name": "cart" }] });
    assert_eq!(scene.affected_by([policy("shop", at_service)]), ["a", "b"], "it may stand over an address of either");
}
