//! Waypoints in processes of their own: what a Gateway becomes, and requests that go through it.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::eventually;
use serde_json::Value;

use crate::cluster::{get, kubectl};
use crate::gateway_api::{http_route, install_kinds, service};
use crate::mesh::{install, join, two_nodes, wait_captured};
use crate::scene::{BOUND, Scene, trial};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("waypoints: a Gateway becomes one, and goes with all of it", a_gateway_becomes_one),
        trial("waypoints: rolling one fails no request", rolling_one),
    ]
}

fn a_gateway_becomes_one(scene: &Scene) -> Result<()> {
    shop(scene)?;
    let class = get(&["gatewayclass", "selvedge-waypoint"])?;
    ensure!(class["status"]["conditions"][0]["status"] == "True", "{class}");
    scene.apply(&http_route("to-two", "one", "two"))?;
    answered(scene, "two")?;
    let logs = kubectl(&["logs", "--namespace", &scene.namespace, "--selector", OF_IT, "--tail=-1"])?;
    let line = logs.lines().find(|line| line.contains("/through") && line.contains("relayed"));
    let line = line.with_context(|| format!("no line of the request in\n{logs}"))?;
    ensure!(line.contains(&format!("/ns/{}/sa/default", scene.namespace)), "{line}");

    // What somebody removes comes back.
    kubectl(&["delete", "deployment", NAME, "--namespace", &scene.namespace])?;
    eventually("the Deployment is made again", BOUND, || {
        get(&["deployment", NAME, "--namespace", &scene.namespace]).ok()
    })?;
    programmed(scene)?;
    answered(scene, "two")?;

    kubectl(&["delete", "gateway", "gw", "--namespace", &scene.namespace])?;
    for kind in ["deployment", "service", "serviceaccount", "poddisruptionbudget"] {
        eventually(&format!("the {kind} goes with the Gateway"), BOUND, || {
            get(&[kind, NAME, "--namespace", &scene.namespace]).is_err().then_some(())
        })?;
    }
    // Nothing goes round a waypoint that is not there.
    eventually("the Service is refused", BOUND, || {
        scene.run("client", &["get", "one:80", "/through"]).is_err().then_some(())
    })
}

fn rolling_one(scene: &Scene) -> Result<()> {
    shop(scene)?;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| -> Result<usize> {
            let mut answered = 0;
            while !stop.load(Ordering::Relaxed) {
                scene.run("client", &["get", "one:80", "/through"]).context("a request failed")?;
                answered += 1;
            }
            Ok(answered)
        });
        let deployment = format!("deployment/{NAME}");
        let rolled = ["restart", "status"]
            .iter()
            .try_for_each(|step| kubectl(&["rollout", step, &deployment, "--namespace", &scene.namespace]).map(drop));
        stop.store(true, Ordering::Relaxed);
        let answered = asking.join().map_err(|_| anyhow::anyhow!("the client panicked"))??;
        rolled?;
        ensure!(answered > 5, "only {answered} requests were made meanwhile");
        Ok(())
    })
}

/// A client, two Services with a pod each, and a waypoint before both.
fn shop(scene: &Scene) -> Result<()> {
    install()?;
    install_kinds()?;
    let (first, second) = two_nodes()?;
    scene.pod("one", &first, &["serve", "http:8080"])?;
    scene.pod("two", &second, &["serve", "http:8080"])?;
    scene.pod("client", &first, &["pause"])?;
    let gateway = "apiVersion: gateway.networking.k8s.io/v1\n\
                   kind: Gateway\n\
                   metadata: {name: gw}\n\
                   spec:\n  \
                     gatewayClassName: selvedge-waypoint\n  \
                     listeners: [{name: mesh, port: 15008, protocol: HBONE}]\n";
    scene.apply(&[service("one", "").as_str(), &service("two", ""), gateway].join("---\n"))?;
    join(scene, true)?;
    kubectl(&["annotate", "namespace", &scene.namespace, "selvedge.dev/waypoint=gw"])?;
    ["one", "two", "client"].iter().try_for_each(|pod| wait_captured(scene, pod))?;
    programmed(scene)?;
    answered(scene, "one")
}

fn programmed(scene: &Scene) -> Result<()> {
    let wait = ["wait", "--for=condition=Programmed", "--timeout=120s", "gateway/gw", "--namespace", &scene.namespace];
    kubectl(&wait).map(drop)
}

/// Waits until the Service `one` is answered for by this pod.
fn answered(scene: &Scene, pod: &str) -> Result<()> {
    eventually(&format!("{pod} answers for the Service one"), BOUND, || {
        let answer = scene.run("client", &["get", "one:80", "/through"]).ok()?;
        (serde_json::from_str::<Value>(&answer).ok()?["pod"] == pod).then_some(())
    })
}

const NAME: &str = "gw-selvedge-waypoint";
const OF_IT: &str = "gateway.networking.k8s.io/gateway-name=gw";
