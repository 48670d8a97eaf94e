use serde_json::json;

use super::*;
use crate::mesh::{MeshSettings, NamespacedName, PodUid, ServicePort, TargetPort};
use crate::model::Model;
use crate::policy::{PolicyKind, PolicyObject, PolicyRef};

/// What the watches told, and the model that came of it.
struct World {
    objects: Objects,
    model: Model,
}

impl World {
    fn new() -> Self {
        let settings = MeshSettings { trust_domain: "cluster.local".parse().unwrap(), cluster_cidrs: Vec::new() };
        let model = Model::new(settings);
        model.update(|state| state.mesh.believe_mesh_nodes());
        Self { objects: Objects::new(Some("own".into())), model }
    }

    /// Says how many steps of the model it was.
    fn apply(&mut self, kind: Kind, value: Value) -> usize {
        self.apply_in(1, kind, value)
    }

    fn apply_in(&mut self, listing: u32, kind: Kind, value: Value) -> usize {
        let deltas = self.objects.apply(kind, value, listing);
        let count = deltas.len();
        self.model.apply(deltas);
        count
    }

    fn delete(&mut self, kind: Kind, namespace: &str, name: &str) {
        let deltas = self.objects.delete(kind, &NamespacedName::new(namespace, name));
        self.model.apply(deltas);
    }

    fn listed(&mut self, kind: Kind, listing: u32) {
        let deltas = self.objects.listed(kind, listing);
        self.model.apply(deltas);
    }

    fn has_pod(&self, name: &str) -> bool {
        self.model.read().mesh.workload_by_name(&NamespacedName::new("shop", name)).is_some()
    }

    fn policy(&self, name: &str) -> Option<PolicyObject> {
        let name = NamespacedName::new("shop", name);
        self.model.read().policies.get(&PolicyRef { kind: PolicyKind::AuthorizationPolicy, name }).cloned()
    }

    fn is_captured(&self, name: &str) -> bool {
        let state = self.model.read();
        state.mesh.workload_by_name(&NamespacedName::new("shop", name)).is_some_and(|workload| workload.captured)
    }

    fn problems(&mut self) -> Vec<String> {
        self.objects.problems().iter().map(ToString::to_string).collect()
    }
}

fn pod(name: &str, node: &str) -> Value {
    json!({
        "metadata": {
            "name": name, "namespace": "shop", "uid": format!("uid-{name}"),
            "annotations": {"selvedge.dev/mesh": "enabled"},
        },
        "spec": {"nodeName": node, "serviceAccountName": "default", "containers": []},
        "status": {"phase": "Running", "podIPs": [{"ip": "10.0.0.1"}]},
    })
}

fn policy(spec: Value) -> Value {
    json!({"metadata": {"name": "rules", "namespace": "shop", "generation": 3}, "spec": spec})
}

#[test]
fn a_route_comes_changes_breaks_and_goes() {
    let mut world = World::new();
    let route = |parent: Value| {
        let parents = json!([{"group": "", "kind": "Service", "name": "cart", "port": parent}]);
        json!({"metadata": {"name": "r", "namespace": "shop"}, "spec": {"parentRefs": parents}})
    };
    let rules = |world: &World, port: u16| {
        let port = ServicePort { name: "".into(), port, target: TargetPort::Number(port), app_protocol: None };
        world.model.read().routes.routes(&NamespacedName::new("shop", "cart"), &port, &"web".into()).is_some()
    };
    assert_eq!(world.apply(Kind::HttpRoute, route(json!(80))), 1);
    assert!(rules(&world, 80));
    assert_eq!(world.apply(Kind::HttpRoute, route(json!(81))), 1);
    assert!(!rules(&world, 80) && rules(&world, 81));
    assert_eq!(world.apply(Kind::HttpRoute, route(json!("http"))), 0);
    assert!(rules(&world, 81), "its last good version stays");
    assert!(world.problems()[0].contains("spec.parentRefs[0].port"), "{:?}", world.problems());
    world.delete(Kind::HttpRoute, "shop", "r");
    assert!(!rules(&world, 81));
    assert_eq!(world.problems(), Vec::<String>::new());
    world.apply_in(1, Kind::GrpcRoute, route(json!(80)));
    world.listed(Kind::GrpcRoute, 2);
    assert!(!rules(&world, 80), "a listing did not show it");
}

#[test]
fn an_object_that_says_what_it_said_is_no_step() {
    let mut world = World::new();
    assert_eq!(world.apply(Kind::Pod, pod("a", "one")), 1);
    assert_eq!(world.apply(Kind::Pod, pod("a", "one")), 0);
    assert_eq!(world.apply(Kind::Pod, pod("a", "two")), 1);
    world.delete(Kind::Pod, "shop", "a");
    assert!(!world.has_pod("a"));
    assert_eq!(world.apply(Kind::Pod, pod("a", "two")), 1, "one that was gone comes anew");
}

#[test]
fn what_went_while_nobody_watched_goes_with_the_next_listing() {
    let mut world = World::new();
    for name in ["a", "b"] {
        world.apply(Kind::Pod, pod(name, "one"));
    }
    world.listed(Kind::Pod, 1);
    world.apply_in(2, Kind::Pod, pod("b", "one"));
    assert!(world.has_pod("a"), "a listing that is not whole takes nothing away");
    world.listed(Kind::Pod, 2);
    assert!(!world.has_pod("a") && world.has_pod("b"));
    world.apply(
        Kind::Service,
        json!({"metadata": {"name": "s", "namespace": "shop"}, "spec": {"clusterIP": "10.9.0.1"}}),
    );
    world.listed(Kind::Pod, 3);
    let state = world.model.read();
    assert!(state.mesh.service(&NamespacedName::new("shop", "s")).is_some(), "a listing is of its own kind alone");
}

#[test]
fn a_policy_that_breaks_keeps_its_last_good_version_and_a_new_one_denies() {
    let mut world = World::new();
    world.apply(Kind::AuthorizationPolicy, policy(json!({"action": "MAYBE"})));
    assert!(matches!(world.policy("rules"), Some(PolicyObject::Malformed(_))));
    assert!(world.problems()[0].contains("until it can be read it denies"), "{:?}", world.problems());
    world.apply(Kind::AuthorizationPolicy, policy(json!({"action": "DENY", "rules": [{}]})));
    assert!(matches!(world.policy("rules"), Some(PolicyObject::Authorization(_))));
    assert_eq!(world.problems(), Vec::<String>::new());
    world.apply(Kind::AuthorizationPolicy, policy(json!({"action": "MAYBE"})));
    assert!(matches!(world.policy("rules"), Some(PolicyObject::Authorization(_))));
    assert!(world.problems()[0].contains("its last good version stays in force"), "{:?}", world.problems());
    world.delete(Kind::AuthorizationPolicy, "shop", "rules");
    assert_eq!((world.policy("rules"), world.problems()), (None, Vec::new()));
}

#[test]
fn a_network_policy_that_cannot_be_read_selects_all_unless_it_could_be() {
    let mut world = World::new();
    let written =
        |selector: Value| json!({"metadata": {"name": "n", "namespace": "shop"}, "spec": {"podSelector": selector}});
    let broken = || written(json!({"matchExpressions": [{"key": "a", "operator": "Like"}]}));
    world.apply(Kind::Pod, pod("a", "one"));
    let selects = |world: &World| world.model.read().mesh.is_under_network_policy(&PodUid::new("uid-a"));
    world.apply(Kind::NetworkPolicy, broken());
    assert!(selects(&world));
    world.apply(Kind::NetworkPolicy, written(json!({"matchLabels": {"app": "other"}})));
    assert!(!selects(&world));
    world.apply(Kind::NetworkPolicy, broken());
    assert!(!selects(&world), "its last good version stays");
}

#[test]
fn a_policy_over_a_service_is_closed_until_the_service_is_there() {
    let mut world = World::new();
    let spec =
        json!({"targetRefs": [{"group": "", "kind": "Service", "name": "cart"}], "action": "DENY", "rules": [{}]});
    world.apply(Kind::AuthorizationPolicy, policy(spec));
    let is_open = |world: &World| world.policy("rules").unwrap().unenforced().is_empty();
    assert!(!is_open(&world));
    assert!(world.problems()[0].contains("there is no Service shop/cart"), "{:?}", world.problems());
    world.apply(
        Kind::Service,
        json!({"metadata": {"name": "cart", "namespace": "shop"}, "spec": {"clusterIP": "10.9.0.1"}}),
    );
    assert!(is_open(&world) && world.problems().is_empty());
    world.delete(Kind::Service, "shop", "cart");
    assert!(!is_open(&world) && world.problems().len() == 1);
}

#[test]
fn a_joined_pod_is_captured_where_the_mesh_node_of_its_node_lists_it() {
    let mut world = World::new();
    let mesh_node = |name: &str, uids: &[&str]| json!({"metadata": {"name": name}, "status": {"captured": uids}});
    world.apply(Kind::Pod, pod("a", "one"));
    assert!(!world.is_captured("a"));
    world.apply(Kind::MeshNode, mesh_node("two", &["uid-a"]));
    assert!(!world.is_captured("a"), "another node's word counts nothing");
    world.apply(Kind::MeshNode, mesh_node("one", &["uid-a", "uid-b"]));
    assert!(world.is_captured("a"));
    world.apply(Kind::MeshNode, mesh_node("one", &["uid-b"]));
    assert!(!world.is_captured("a"));
    world.apply(Kind::Pod, pod("b", "one"));
    assert!(world.is_captured("b"), "the list may come before the pod");
    world.delete(Kind::MeshNode, "", "one");
    assert!(!world.is_captured("b"));
}

#[test]
fn what_the_api_server_says_of_the_own_node_is_told_and_changes_nothing() {
    let mut world = World::new();
    world.apply(Kind::Pod, pod("a", "own"));
    world.apply(Kind::MeshNode, json!({"metadata": {"name": "own"}, "status": {"captured": ["uid-a"]}}));
    assert!(!world.is_captured("a"));
    assert_eq!(world.objects.take_own_node(), Some(Some(BTreeSet::from([PodUid::new("uid-a")]))));
    world.delete(Kind::MeshNode, "", "own");
    assert_eq!(world.objects.take_own_node(), Some(None));
    assert_eq!(world.objects.take_own_node(), None);
}

#[test]
fn the_model_is_whole_once_every_kind_was_listed() {
    let mut unsynced = Unsynced::all();
    let kinds = Kind::ALL;
    kinds[1..].iter().for_each(|kind| assert!(unsynced.remove(*kind)));
    assert!(!unsynced.is_empty() && !unsynced.remove(kinds[1]));
    unsynced.remove(kinds[0]);
    assert!(unsynced.is_empty());
}

#[test]
fn agents_and_waypoints_may_watch_every_kind_that_is_read() {
    for (file, role) in [("rbac.yaml", "selvedge-agent"), ("waypoints.yaml", "selvedge-waypoint")] {
        let path = format!("{}/daemonset/base/{file}", env!("CARGO_MANIFEST_DIR"));
        let text = std::fs::read_to_string(path).unwrap();
        let documents = serde_yaml::Deserializer::from_str(&text);
        let mut documents = documents.map(|document| <Value as serde::Deserialize>::deserialize(document).unwrap());
        let is_it = |object: &Value| object["kind"] == "ClusterRole" && object["metadata"]["name"] == role;
        let rules = documents.find(is_it).unwrap()["rules"].as_array().unwrap().clone();
        for kind in Kind::ALL {
            let group = kind.api_version().and_then(|version| version.rsplit_once('/')).map_or("", |(group, _)| group);
            let name = kind.as_str().to_lowercase();
            let plural = name.strip_suffix("cy").map_or_else(|| format!("{name}s"), |stem| format!("{stem}cies"));
            let holds =
                |list: &Value, wanted: &str| list.as_array().unwrap().iter().any(|one| one == wanted || one == "*");
            let may = rules.iter().any(|rule| {
                holds(&rule["apiGroups"], group)
                    && holds(&rule["resources"], &plural)
                    && ["list", "watch"].iter().all(|verb| holds(&rule["verbs"], verb))
            });
            assert!(may, "ClusterRole {role} may not watch {plural} of {group:?}");
        }
    }
}
