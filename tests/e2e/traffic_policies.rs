//! What the API server refuses of a TrafficPolicy, and what its status says became of it.

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::eventually;
use serde_json::{Value, json};

use crate::cluster::{get, kubectl};
use crate::gateway_api::{http_route, install_experimental_kind, install_kinds, service};
use crate::mesh::install;
use crate::policies::refused;
use crate::scene::{BOUND, Scene, is_said, trial};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("traffic policies: what a schema can judge is refused with its cure", refuses_malformed),
        trial("traffic policies: one says in its status whether what it is about is there", targets),
        trial("traffic policies: of two on one thing the older wins, field by field", the_older_wins),
        trial("traffic policies: the Gateway API's own says it at each Service", ancestors),
    ]
}

fn refuses_malformed(scene: &Scene) -> Result<()> {
    install()?;
    for (spec, wanted) in [
        ("{targetRefs: []}", "give it at least one entry, or leave the field out"),
        ("{targetRefs: [{kind: Pod, name: a}]}", "supported values: \"Service\", \"HTTPRoute\", \"GRPCRoute\""),
        (
            "{targetRefs: [{kind: HTTPRoute, name: a}]}",
            "name a Service of group \"\" without a sectionName, or an HTTPRoute",
        ),
        (
            "{targetRefs: [{kind: Service, name: a, sectionName: b}]}",
            "name a Service of group \"\" without a sectionName",
        ),
        (
            "{targetRefs: [{group: gateway.networking.k8s.io, kind: HTTPRoute, name: a}], circuitBreaker: {maxRequests: 1}}",
            "only a Service takes circuitBreaker, outlierDetection and loadBalancer",
        ),
        (
            "{targetRefs: [{kind: Service, name: a}], circuitBreaker: {}}",
            "write at least one of maxConnections, maxPendingRequests, maxRequests",
        ),
        (
            "{targetRefs: [{kind: Service, name: a}], faultInjection: {abort: {httpStatus: 503, grpcStatus: ABORTED}}}",
            "write one of httpStatus and grpcStatus",
        ),
        (
            "{targetRefs: [{kind: Service, name: a}], loadBalancer: {simple: RANDOM, consistentHash: {useSourceIp: true}}}",
            "simple and consistentHash exclude each other: write one",
        ),
        (
            "{targetRefs: [{kind: Service, name: a}], rateLimits: [{requests: 1, by: Header}]}",
            "by: Header goes with the name of a header, and nothing else does",
        ),
        ("{targetRefs: [{kind: Service, name: a}], timeouts: {request: soon}}", "spec.timeouts.request"),
        ("{targetRefs: [{kind: Service, name: a}], timeouts: {total: 1s}}", "spec.timeouts has no field total;"),
        ("{targetRefs: [{kind: Service, name: a}], retries: {}}", "spec has no field retries; correct the spelling"),
    ] {
        refused(scene, "TrafficPolicy", spec, wanted)?;
    }
    Ok(())
}

fn targets(scene: &Scene) -> Result<()> {
    prepare(scene)?;
    let apart =
        service("apart", "").replace("{name: apart}", "{name: apart, annotations: {selvedge.dev/waypoint: none}}");
    let retry = "retry: {attempts: 1}";
    scene.apply(
        &[
            apart,
            policy("of-cart", CART, retry),
            policy("of-nobody", "{kind: Service, name: nobody}", retry),
            policy("of-apart", "{kind: Service, name: apart}", retry),
            policy("balances-apart", "{kind: Service, name: apart}", "loadBalancer: {simple: RANDOM}"),
            policy("of-route", &route_ref("cart", ""), retry),
            policy("of-rule", &route_ref("cart", ", sectionName: api"), retry),
            policy("of-no-rule", &route_ref("cart", ", sectionName: rest"), retry),
            policy("of-no-route", &route_ref("nobody", ""), retry),
            policy("of-both", &format!("{CART}, {{kind: Service, name: nobody}}"), "timeouts: {request: 5s}"),
            policy("says-nothing", CART, ""),
        ]
        .join("---\n"),
    )?;
    for (name, accepted, enforced, words) in [
        ("of-cart", "True/Accepted", "True/Enforced", ""),
        ("of-nobody", "False/TargetNotFound", "False/TargetNotFound", "There is no Service"),
        ("of-apart", "False/NoWaypoint", "False/NoWaypoint", "selvedge.dev/waypoint=node"),
        ("balances-apart", "True/Accepted", "True/Enforced", ""),
        ("of-route", "True/Accepted", "True/Enforced", ""),
        ("of-rule", "True/Accepted", "True/Enforced", ""),
        ("of-no-rule", "False/TargetNotFound", "False/TargetNotFound", "has no rule of the name rest"),
        ("of-no-route", "False/TargetNotFound", "False/TargetNotFound", "There is no HTTPRoute"),
        ("of-both", "True/Accepted", "False/TargetNotFound", "There is no Service"),
        ("says-nothing", "False/Invalid", "True/Enforced", ""),
    ] {
        scene.says(
            "trafficpolicy",
            name,
            "Accepted",
            accepted,
            if accepted.starts_with("False/I") { "says nothing" } else { "" },
        )?;
        scene.says("trafficpolicy", name, "Enforced", enforced, words)?;
    }
    // What was missing comes, and the status follows without a change of the policy.
    scene.apply(&service("nobody", ""))?;
    scene.says("trafficpolicy", "of-nobody", "Accepted", "True/Accepted", "")?;
    scene.says("trafficpolicy", "of-both", "Enforced", "True/Enforced", "")?;
    kubectl(&["delete", "httproute", "cart", "--namespace", &scene.namespace])?;
    scene.says("trafficpolicy", "of-rule", "Accepted", "False/TargetNotFound", "There is no HTTPRoute")
}

fn the_older_wins(scene: &Scene) -> Result<()> {
    prepare(scene)?;
    // By name it would be the other way round.
    scene.apply(&policy("z-older", CART, "timeouts: {request: 5s}"))?;
    let younger = policy("a-younger", CART, "timeouts: {request: 9s}");
    make_younger(scene, "trafficpolicy", ["z-older", "a-younger"], &younger)?;
    scene.apply(&policy("b-younger", CART, "timeouts: {request: 9s, backendRequest: 1s}"))?;
    let words = format!("TrafficPolicy {}/z-older says, which is older", scene.namespace);
    scene.says("trafficpolicy", "z-older", "Accepted", "True/Accepted", "")?;
    scene.says("trafficpolicy", "a-younger", "Accepted", "False/Conflicted", &words)?;
    scene.says("trafficpolicy", "b-younger", "Accepted", "True/Accepted", "")?;
    scene.says("trafficpolicy", "b-younger", "Enforced", "False/Conflicted", "timeouts.request")?;
    kubectl(&["delete", "trafficpolicy", "z-older", "--namespace", &scene.namespace])?;
    scene.says("trafficpolicy", "a-younger", "Accepted", "True/Accepted", "")?;
    scene.says("trafficpolicy", "a-younger", "Enforced", "True/Enforced", "")
}

fn ancestors(scene: &Scene) -> Result<()> {
    prepare(scene)?;
    let kind = "xbackendtrafficpolicies.gateway.networking.x-k8s.io";
    install_experimental_kind("gateway.networking.x-k8s.io_xbackendtrafficpolicies.yaml", kind)?;
    let apart =
        service("apart", "").replace("{name: apart}", "{name: apart, annotations: {selvedge.dev/waypoint: none}}");
    let budget = "retryConstraint: {budget: {percent: 20, interval: 10s}, minRetryRate: {count: 10, interval: 1s}}";
    let import = "{group: multicluster.x-k8s.io, kind: ServiceImport, name: cart}";
    let targets = format!("{}, {}, {}, {import}", core("cart"), core("apart"), core("nobody"));
    scene.apply(&[apart, backend_policy("three", &targets, budget)].join("---\n"))?;
    for (service, wanted, words) in [
        ("cart", "True/Accepted", ""),
        ("apart", "False/TargetNotFound", "selvedge.dev/waypoint=node"),
        ("nobody", "False/TargetNotFound", "There is no Service"),
    ] {
        says_of(scene, "three", service, wanted, words)?;
    }
    let three = get(&["--namespace", &scene.namespace, "xbackendtrafficpolicy", "three"])?;
    let entries = three["status"]["ancestors"].as_array().context("no ancestors")?;
    ensure!(entries.len() == 3, "an entry for what is no Service: {entries:?}");

    // Another controller's entry stays, and so does what others add to ours; the API server checks all of it.
    let mut told = entries.clone();
    let seen = json!({
        "type": "example.com/Seen", "status": "True", "reason": "Seen", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z",
    });
    told[0]["conditions"].as_array_mut().context("no conditions")?.push(seen.clone());
    let other = json!({
        "ancestorRef": {"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "edge"},
        "controllerName": "example.com/gateway", "conditions": [seen],
    });
    told.insert(0, other.clone());
    let patch = json!({"status": {"ancestors": told}}).to_string();
    let of = ["--namespace", &scene.namespace, "xbackendtrafficpolicy", "three"];
    kubectl(&[&["patch"], &of[..], &["--subresource=status", "--type=merge", "--patch", &patch]].concat())?;
    scene.apply(&service("nobody", ""))?;
    says_of(scene, "three", "nobody", "True/Accepted", "")?;
    let three = get(&of)?;
    let told = three["status"]["ancestors"].as_array().context("no ancestors")?;
    ensure!(told.contains(&other), "another controller's entry is gone: {told:?}");
    let kinds = |entry: &Value| entry["conditions"].as_array().is_some_and(|all| all.contains(&seen));
    ensure!(told.iter().any(|entry| entry["ancestorRef"]["name"] == "cart" && kinds(entry)), "{told:?}");

    // The older says all that a younger one does.
    let younger = backend_policy("younger", &core("cart"), budget);
    make_younger(scene, "xbackendtrafficpolicy", ["three", "younger"], &younger)?;
    says_of(scene, "younger", "cart", "False/Conflicted", "XBackendTrafficPolicy")?;
    // Its generation moves, and the entry of a target that it names no more goes.
    scene.apply(&backend_policy("three", &core("apart"), budget))?;
    says_of(scene, "younger", "cart", "True/Accepted", "")?;
    eventually("what is not named any more has no entry", BOUND, || {
        let three = get(&of).ok()?;
        let mut entries = three["status"]["ancestors"].as_array()?.iter();
        entries.all(|entry| entry["controllerName"] != OURS || entry["ancestorRef"]["name"] == "apart").then_some(())
    })
}

fn core(name: &str) -> String {
    format!("{{group: \"\", kind: Service, name: {name}}}")
}

/// Waits until an XBackendTrafficPolicy says this of its present generation at a Service, in an entry of ours alone.
fn says_of(scene: &Scene, name: &str, service: &str, wanted: &str, words: &str) -> Result<()> {
    let mut seen = Value::Null;
    let said = eventually(&format!("{name} says Accepted={wanted} {words:?} of {service}"), BOUND, || {
        let policy = get(&["--namespace", &scene.namespace, "xbackendtrafficpolicy", name]).ok()?;
        seen = policy["status"].clone();
        let reference = json!({"group": "", "kind": "Service", "name": service});
        let is_ours = |entry: &&Value| entry["controllerName"] == OURS && entry["ancestorRef"] == reference;
        let mut entries = seen["ancestors"].as_array()?.iter().filter(is_ours);
        let (entry, None) = (entries.next()?, entries.next()) else { return None };
        is_said(entry, "Accepted", wanted, words, &policy).then_some(())
    });
    said.with_context(|| format!("its status is {seen}"))
}

/// A Service that is routed, with a route that has a rule of a name.
fn prepare(scene: &Scene) -> Result<()> {
    install()?;
    install_kinds()?;
    kubectl(&["annotate", "namespace", &scene.namespace, "selvedge.dev/waypoint=node"])?;
    let route = http_route("cart", "cart", "cart").replace("rules: [{", "rules: [{name: api, ");
    scene.apply(&format!("{}---\n{route}", service("cart", "")))
}

/// Makes a policy that is younger than another: they are told apart by the second.
fn make_younger(scene: &Scene, kind: &str, [older, younger]: [&str; 2], manifest: &str) -> Result<()> {
    eventually("a policy is younger than the other", BOUND, || {
        scene.apply(manifest).ok()?;
        if created(scene, kind, younger).ok()? > created(scene, kind, older).ok()? {
            return Some(());
        }
        kubectl(&["delete", kind, younger, "--namespace", &scene.namespace]).ok()?;
        None
    })
}

fn created(scene: &Scene, kind: &str, name: &str) -> Result<String> {
    let policy = get(&["--namespace", &scene.namespace, kind, name])?;
    Ok(policy["metadata"]["creationTimestamp"].as_str().context("no time")?.to_owned())
}

fn policy(name: &str, targets: &str, says: &str) -> String {
    manifest("selvedge.dev/v1alpha1\nkind: TrafficPolicy", name, targets, says)
}

fn backend_policy(name: &str, targets: &str, says: &str) -> String {
    manifest("gateway.networking.x-k8s.io/v1alpha1\nkind: XBackendTrafficPolicy", name, targets, says)
}

fn manifest(kind: &str, name: &str, targets: &str, says: &str) -> String {
    format!(
        "apiVersion: {kind}\n\
         metadata: {{name: {name}}}\n\
         spec:\n  \
           targetRefs: [{targets}]\n  \
           {says}\n"
    )
}

fn route_ref(name: &str, more: &str) -> String {
    format!("{{group: gateway.networking.k8s.io, kind: HTTPRoute, name: {name}{more}}}")
}

const OURS: &str = "selvedge.dev/mesh";
const CART: &str = "{kind: Service, name: cart}";
