//! What the leading controller writes for people: conditions on policies, Events on pods, and taints that it takes off.

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::eventually;
use serde_json::Value;

use crate::cluster::{get, kubectl};
use crate::controller::{Ca, account_and_pod, two_nodes};
use crate::policies::install;
use crate::scene::{BOUND, Scene, trial, trial_alone};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("controller: a policy says in its status what became of it", policy_status),
        trial("controller: another replica takes over when the leader goes", takes_over),
        trial_alone("controller: a node whose agent is ready loses the start-up taint", taint_goes),
    ]
}

fn policy_status(scene: &Scene) -> Result<()> {
    install()?;
    let _ca = Ca::open(scene, 1)?;
    scene.apply(
        "apiVersion: selvedge.dev/v1alpha1\n\
         kind: AuthorizationPolicy\n\
         metadata: {name: good}\n\
         spec: {rules: [{from: [{source: {namespaces: [shop]}}]}]}\n---\n\
         apiVersion: selvedge.dev/v1alpha1\n\
         kind: AuthorizationPolicy\n\
         metadata: {name: unknown-key}\n\
         spec: {rules: [{when: [{key: request.colour, values: [red]}]}]}\n---\n\
         apiVersion: selvedge.dev/v1alpha1\n\
         kind: PeerAuthentication\n\
         metadata: {name: strict}\n\
         spec: {mtls: {mode: STRICT}}\n",
    )?;
    let condition = |kind: &str, name: &str, wanted: &str| -> Result<Value> {
        let found = || {
            let policy = get(&["--namespace", &scene.namespace, kind, name]).ok()?;
            let mut conditions = policy["status"]["conditions"].as_array()?.clone().into_iter();
            conditions.find(|condition| condition["type"] == wanted)
        };
        eventually(&format!("{kind} {name} has condition {wanted}"), BOUND, found)
    };
    for (kind, name) in [("authorizationpolicy", "good"), ("peerauthentication", "strict")] {
        let accepted = condition(kind, name, "Accepted")?;
        ensure!(accepted["status"] == "True" && accepted["observedGeneration"] == 1, "{name}: {accepted}");
        let enforced = condition(kind, name, "Enforced")?;
        ensure!(enforced["status"] != "False", "{name}: {enforced}");
    }
    let enforced = condition("authorizationpolicy", "unknown-key", "Enforced")?;
    let message = enforced["message"].as_str().context("no message")?;
    ensure!(enforced["status"] == "False" && message.contains("request.colour"), "{enforced}");
    // Mended: the condition follows, with the new generation.
    scene.apply(
        "apiVersion: selvedge.dev/v1alpha1\n\
         kind: AuthorizationPolicy\n\
         metadata: {name: unknown-key}\n\
         spec: {rules: [{to: [{operation: {ports: [\"80\"]}}]}]}\n",
    )?;
    let mended =
        || condition("authorizationpolicy", "unknown-key", "Enforced").ok().filter(|one| one["status"] != "False");
    let mended = eventually("the mended policy is enforced", BOUND, mended)?;
    ensure!(mended["observedGeneration"] == 2, "{mended}");
    Ok(())
}

fn takes_over(scene: &Scene) -> Result<()> {
    let _ca = Ca::open(scene, 2)?;
    let holder = || -> Option<String> {
        let lease = get(&["--namespace", &scene.namespace, "lease", "selvedge-controller"]).ok()?;
        Some(lease["spec"]["holderIdentity"].as_str()?.to_owned())
    };
    let first = eventually("somebody leads", BOUND, holder)?;
    let (pod, _) = first.rsplit_once('_').context("a holder without a pod's name")?;
    // Killed, so that it cannot give the Lease back.
    kubectl(&["delete", "pod", pod, "--namespace", &scene.namespace, "--grace-period=0", "--force"])?;
    eventually("another leads", BOUND, || holder().filter(|now| *now != first))?;
    Ok(())
}

fn taint_goes(scene: &Scene) -> Result<()> {
    let [node, _] = two_nodes()?;
    let _ca = Ca::open(scene, 1)?;
    kubectl(&[
        "taint",
        "node",
        &node,
        "selvedge.dev/agent-not-ready=:NoSchedule",
        "example.com/stays=:PreferNoSchedule",
    ])?;
    let taints = || -> Option<Vec<String>> {
        let node = get(&["node", &node]).ok()?;
        let taints = node["spec"]["taints"].as_array()?.iter();
        Some(taints.filter_map(|taint| taint["key"].as_str().map(str::to_owned)).collect())
    };
    let gone = || taints().filter(|keys| !keys.iter().any(|key| key == "selvedge.dev/agent-not-ready"));
    let rest = eventually("the taint is taken off", BOUND, gone);
    kubectl(&["taint", "node", &node, "example.com/stays-"])?;
    ensure!(rest?.iter().any(|key| key == "example.com/stays"), "another taint went with it");
    // A node that is usable takes pods.
    scene.apply(&account_and_pod("after", &node))?;
    scene.wait_for("condition=Ready", "after")
}
