//! What the API server refuses of a TrafficPolicy, and what its status says became of it.

use anyhow::{Context, Result};
use libtest_mimic::Trial;
use selvedge_lab::eventually;

use crate::cluster::{get, kubectl};
use crate::gateway_api::{http_route, install_kinds, service};
use crate::mesh::install;
use crate::policies::refused;
use crate::scene::{BOUND, Scene, trial};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("traffic policies: what a schema can judge is refused with its cure", refuses_malformed),
        trial("traffic policies: one says in its status whether what it is about is there", targets),
        trial("traffic policies: of two on one thing the older wins, field by field", the_older_wins),
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
    let younger = || {
        scene.apply(&policy("a-younger", CART, "timeouts: {request: 9s}")).ok()?;
        if created(scene, "a-younger").ok()? > created(scene, "z-older").ok()? {
            return Some(());
        }
        // They are told apart by the second.
        kubectl(&["delete", "trafficpolicy", "a-younger", "--namespace", &scene.namespace]).ok()?;
        None
    };
    eventually("a policy is younger than the other", BOUND, younger)?;
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

/// A Service that is routed, with a route that has a rule of a name.
fn prepare(scene: &Scene) -> Result<()> {
    install()?;
    install_kinds()?;
    kubectl(&["annotate", "namespace", &scene.namespace, "selvedge.dev/waypoint=node"])?;
    let route = http_route("cart", "cart", "cart").replace("rules: [{", "rules: [{name: api, ");
    scene.apply(&format!("{}---\n{route}", service("cart", "")))
}

fn created(scene: &Scene, name: &str) -> Result<String> {
    let policy = get(&["--namespace", &scene.namespace, "trafficpolicy", name])?;
    Ok(policy["metadata"]["creationTimestamp"].as_str().context("no time")?.to_owned())
}

fn policy(name: &str, targets: &str, says: &str) -> String {
    format!(
        "apiVersion: selvedge.dev/v1alpha1\n\
         kind: TrafficPolicy\n\
         metadata: {{name: {name}}}\n\
         spec:\n  \
           targetRefs: [{targets}]\n  \
           {says}\n"
    )
}

fn route_ref(name: &str, more: &str) -> String {
    format!("{{group: gateway.networking.k8s.io, kind: HTTPRoute, name: {name}{more}}}")
}

const CART: &str = "{kind: Service, name: cart}";
