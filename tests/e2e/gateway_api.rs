//! The Gateway API in a cluster: its kinds when they come, its routes on the wire, and what their status says.

use std::env;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::eventually;
use serde_json::Value;

use crate::cluster::{get, kubectl};
use crate::mesh::{SYSTEM, install, join, roll_out, two_nodes, wait_captured};
use crate::scene::{BOUND, Scene, trial, trial_alone};

pub fn trials() -> Vec<Trial> {
    vec![
        trial_alone("gateway API: kinds that come after the agents are watched then", kinds_that_come_late),
        trial("gateway API: a route says in its status what became of it", status_of_routes),
    ]
}

fn kinds_that_come_late(scene: &Scene) -> Result<()> {
    install()?;
    kubectl(&["delete", "--ignore-not-found", "--filename", &kinds()?])?;
    for what in ["daemonset/selvedge-agent", "deployment/selvedge-controller"] {
        kubectl(&["rollout", "restart", "--namespace", SYSTEM, what])?;
    }
    roll_out()?;
    let (first, second) = two_nodes()?;
    scene.pod("one", &first, &["serve", "http:8080"])?;
    scene.pod("two", &second, &["serve", "http:8080"])?;
    scene.pod("client", &first, &["pause"])?;
    scene.apply(&format!("{}---\n{}", service("one", ""), service("two", "")))?;
    join(scene, true)?;
    kubectl(&["annotate", "namespace", &scene.namespace, WAYPOINT])?;
    ["one", "two", "client"].iter().try_for_each(|pod| wait_captured(scene, pod))?;
    answers(scene, "one")?;
    install_kinds()?;
    scene.apply(&http_route("canary", "one", "two"))?;
    answers(scene, "two")?;
    let accepted = condition(scene, "httproute", "canary", "Accepted", |accepted| accepted["status"] == "True");
    accepted.context("the controller watches them too")?;
    kubectl(&["delete", "httproute", "canary", "--namespace", &scene.namespace])?;
    answers(scene, "one")
}

/// Waits until the Service `one` is answered for by this pod.
fn answers(scene: &Scene, pod: &str) -> Result<()> {
    let is_it = || {
        let answer: Value = serde_json::from_str(&scene.run("client", &["get", "one:80", "/"]).ok()?).ok()?;
        (answer["pod"] == pod).then_some(())
    };
    eventually(&format!("{pod} answers for the Service one"), BOUND, is_it)
}

fn status_of_routes(scene: &Scene) -> Result<()> {
    install()?;
    install_kinds()?;
    kubectl(&["annotate", "namespace", &scene.namespace, WAYPOINT])?;
    let objects = [
        service("cart", ""),
        service("cart-v2", ""),
        service("headless", "clusterIP: None, "),
        service("apart", "").replace("{name: apart}", "{name: apart, annotations: {selvedge.dev/waypoint: none}}"),
        http_route("good", "cart", "cart-v2"),
        http_route("of-nobody", "nobody", "cart"),
        http_route("of-headless", "headless", "cart"),
        http_route("of-none", "apart", "cart"),
        http_route("to-nobody", "cart-v2", "nobody"),
    ];
    scene.apply(&objects.join("---\n"))?;
    for (route, kind, status, reason) in [
        ("good", "Accepted", "True", "Accepted"),
        ("good", "ResolvedRefs", "True", "ResolvedRefs"),
        ("of-nobody", "Accepted", "False", "NoMatchingParent"),
        ("of-headless", "Accepted", "False", "UnsupportedValue"),
        ("of-none", "Accepted", "False", "NoWaypoint"),
        ("to-nobody", "Accepted", "True", "Accepted"),
        ("to-nobody", "ResolvedRefs", "False", "BackendNotFound"),
    ] {
        let is_it = |condition: &Value| condition["status"] == status && condition["reason"] == reason;
        let condition = condition(scene, "httproute", route, kind, is_it)?;
        ensure!(condition["observedGeneration"] == 1, "{route}: {condition}");
    }
    // What was missing comes, and the status follows without a change of the route.
    scene.apply(&service("nobody", ""))?;
    condition(scene, "httproute", "to-nobody", "ResolvedRefs", |resolved| resolved["status"] == "True")?;
    condition(scene, "httproute", "of-nobody", "Accepted", |accepted| accepted["status"] == "True")?;
    // Of one port, GRPCRoutes rule and HTTPRoutes do not, until the GRPCRoute is gone.
    scene.apply(&http_route("calls", "cart", "cart-v2").replace("HTTPRoute", "GRPCRoute"))?;
    condition(scene, "grpcroute", "calls", "Accepted", |accepted| accepted["status"] == "True")?;
    condition(scene, "httproute", "good", "Accepted", |accepted| accepted["reason"] == "Conflicted")?;
    kubectl(&["delete", "grpcroute", "calls", "--namespace", &scene.namespace])?;
    condition(scene, "httproute", "good", "Accepted", |accepted| accepted["status"] == "True").map(drop)
}

/// Waits until a route has such a condition at its parent, from our controller.
fn condition(scene: &Scene, kind: &str, route: &str, wanted: &str, is_it: impl Fn(&Value) -> bool) -> Result<Value> {
    let mut seen = Value::Null;
    let found = eventually(&format!("{route} has the awaited condition {wanted}"), BOUND, || {
        let route = get(&["--namespace", &scene.namespace, kind, route]).ok()?;
        seen = route["status"].clone();
        let mut parents = seen["parents"].as_array()?.iter();
        let ours = parents.find(|parent| parent["controllerName"] == "selvedge.dev/mesh")?;
        let mut conditions = ours["conditions"].as_array()?.iter();
        conditions.find(|condition| condition["type"] == wanted && is_it(condition)).cloned()
    });
    found.with_context(|| format!("its status is {seen}"))
}

/// Makes the Gateway API's kinds known to the cluster, those of the standard channel.
pub fn install_kinds() -> Result<()> {
    // On the server's side: they are too long for the annotation that the other way needs.
    kubectl(&["apply", "--server-side", "--force-conflicts", "--filename", &kinds()?])?;
    let kinds = ["customresourcedefinition/httproutes.gateway.networking.k8s.io", "--for=condition=Established"];
    kubectl(&[&["wait", "--timeout=60s"], &kinds[..]].concat()).map(drop)
}

/// The same for one kind of the experimental channel.
pub fn install_experimental_kind(file: &str, kind: &str) -> Result<()> {
    install_kinds()?;
    let file = Path::new(&kinds()?).with_file_name("experimental").join(file);
    kubectl(&["apply", "--server-side", "--force-conflicts", "--filename", &file.to_string_lossy()])?;
    let kind = format!("customresourcedefinition/{kind}");
    kubectl(&["wait", "--timeout=60s", &kind, "--for=condition=Established"]).map(drop)
}

fn kinds() -> Result<String> {
    env::var("SELVEDGE_GATEWAY_API").context("SELVEDGE_GATEWAY_API is not set: these tests run as cargo xtask e2e")
}

/// A Service of the pods with its name as their label.
pub fn service(name: &str, spec: &str) -> String {
    format!(
        "apiVersion: v1\n\
         kind: Service\n\
         metadata: {{name: {name}}}\n\
         spec: {{{spec}selector: {{app: {name}}}, ports: [{{name: http, port: 80, targetPort: 8080}}]}}\n"
    )
}

/// A route that sends everything for one Service to another.
pub fn http_route(name: &str, parent: &str, backend: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\n\
         kind: HTTPRoute\n\
         metadata: {{name: {name}}}\n\
         spec:\n  \
           parentRefs: [{{group: \"\", kind: Service, name: {parent}, port: 80}}]\n  \
           rules: [{{backendRefs: [{{name: {backend}, port: 80}}]}}]\n"
    )
}

const WAYPOINT: &str = "selvedge.dev/waypoint=node";
