use super::*;

fn gateway(annotations: &Value, listeners: Value) -> DynamicObject {
    serde_json::from_value(json!({
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "Gateway",
        "metadata": {
            "namespace": "infra", "name": "gw", "uid": "u1", "generation": 3, "annotations": annotations,
        },
        "spec": {
            "gatewayClassName": "selvedge-waypoint",
            "infrastructure": {"labels": {"team": "a"}},
            "listeners": listeners,
        },
    }))
    .unwrap()
}

fn tunnel() -> Value {
    json!([{"name": "mesh", "port": 15008, "protocol": "HBONE"}])
}

fn planned(object: &DynamicObject) -> (Plan, Vec<String>) {
    let (gateway, _) = read_gateway(serde_json::to_value(object).unwrap()).unwrap();
    plan(object, "u1", &gateway)
}

fn settings() -> WaypointSettings {
    WaypointSettings {
        image: "registry/selvedge:1".to_owned(),
        image_pull_policy: "IfNotPresent".to_owned(),
        namespace: "selvedge-system".to_owned(),
        trust_domain: "cluster.local".to_owned(),
        audience: "selvedge-ca".to_owned(),
    }
}

#[test]
fn a_gateway_gets_its_objects_each_of_its_own_and_named_after_it() {
    let (plan, notes) = planned(&gateway(&json!({}), tunnel()));
    assert!(notes.is_empty());
    let objects = plan.objects(&settings());
    let kinds: Vec<_> = objects.iter().map(|wanted| wanted.kind).collect();
    assert_eq!(kinds, ["ServiceAccount", "Service", "PodDisruptionBudget", "Deployment"]);
    for wanted in &objects {
        let metadata = &wanted.object["metadata"];
        assert_eq!(metadata["name"], "gw-selvedge-waypoint", "{}", wanted.kind);
        assert_eq!(metadata["ownerReferences"][0]["uid"], "u1");
        assert_eq!(metadata["labels"]["team"], "a");
    }
    let pod = &objects[3].object["spec"]["template"];
    assert_eq!(pod["metadata"]["labels"]["gateway.networking.k8s.io/gateway-name"], "gw");
    assert_eq!(pod["spec"]["serviceAccountName"], "gw-selvedge-waypoint");
    assert_eq!(pod["spec"]["containers"][0]["securityContext"]["capabilities"]["drop"], json!(["ALL"]));
    assert_eq!(objects[3].object["spec"]["replicas"], 2);
}

#[test]
fn replicas_are_fixed_or_follow_load_and_a_slip_is_told() {
    let of = |annotations: Value| planned(&gateway(&annotations, tunnel()));
    let (plan, _) = of(json!({"selvedge.dev/replicas": "3", "selvedge.dev/max-replicas": "9"}));
    let objects = plan.objects(&settings());
    let scaler = &objects.last().unwrap().object;
    assert_eq!((&scaler["kind"], &scaler["spec"]["maxReplicas"]), (&json!("HorizontalPodAutoscaler"), &json!(9)));
    assert!(objects[3].object["spec"]["replicas"].is_null(), "the autoscaler says how many");
    let (plan, notes) = of(json!({"selvedge.dev/replicas": "none"}));
    assert_eq!((plan.replicas, notes.len()), (2, 1));
    assert!(notes[0].starts_with("metadata.annotations[selvedge.dev/replicas]"), "{notes:?}");
}

#[test]
fn a_status_says_what_is_so_and_is_written_once() {
    let object = gateway(&json!({}), tunnel());
    let told = |before: &Value, findings: &Findings| gateway_status(&object, before, findings, "2026-01-01T00:00:00Z");
    let status_of = |status: &Value, kind: &str| {
        let conditions = status["conditions"].as_array().unwrap();
        let one = conditions.iter().find(|one| one["type"] == kind).unwrap();
        format!("{}/{}", one["status"].as_str().unwrap(), one["reason"].as_str().unwrap())
    };
    let pending = told(&json!({}), &Findings::default()).unwrap();
    assert_eq!(status_of(&pending, "Accepted"), "True/Accepted");
    assert_eq!(status_of(&pending, "Programmed"), "False/Pending");
    let ready = Findings { available: 1, ..Findings::default() };
    let programmed = told(&pending, &ready).unwrap();
    assert_eq!(status_of(&programmed, "Programmed"), "True/Programmed");
    assert_eq!(status_of(&programmed["listeners"][0], "Programmed"), "True/Programmed");
    assert_eq!(told(&programmed, &ready), None);
    let refused = Findings { refused: Some("no".to_owned()), ..Findings::default() };
    assert_eq!(status_of(&told(&programmed, &refused).unwrap(), "Accepted"), "False/Invalid");
    let http = gateway(&json!({}), json!([{"name": "web", "port": 80, "protocol": "HTTP"}]));
    let status = gateway_status(&http, &json!({}), &ready, "2026-01-01T00:00:00Z").unwrap();
    assert_eq!(status_of(&status["listeners"][0], "Accepted"), "False/UnsupportedProtocol");
}
