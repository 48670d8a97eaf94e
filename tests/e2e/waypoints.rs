//! Waypoints in processes of their own: what a Gateway becomes, and requests that go through it.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::eventually;
use serde_json::Value;

use crate::cluster::{get, kubectl};
use crate::gateway_api::{http_route, install_kinds, service};
use crate::mesh::{agent_logs, install, join, two_nodes, wait_captured};
use crate::scene::{BOUND, Scene, trial};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("waypoints: a Gateway becomes one, and goes with all of it", a_gateway_becomes_one),
        trial("waypoints: rolling one fails no request", rolling_one),
        trial("waypoints: nobody comes round one that holds policy, by whatever address", nobody_comes_round),
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

fn nobody_comes_round(scene: &Scene) -> Result<()> {
    shop(scene)?;
    let (first, _) = two_nodes()?;
    let outside = scene.another("outside")?;
    outside.pod("stranger", &first, &["pause"])?;
    scene.apply(&service("one", "type: NodePort, "))?;
    let headless = service("one", "clusterIP: None, ").replace("{name: one}", "{name: headless}");
    scene.apply(&headless.replace("port: 80, targetPort: 8080", "port: 8080"))?;
    let round = ways_round(scene)?;
    let (own, others) = ("one:80".to_owned(), format!("one.{}:80", scene.namespace));
    let callers = [(scene, "client"), (&outside, "stranger")];

    // Without a policy that speaks of requests they lead to the pod, so that what refuses them below is the policy.
    let by_all_ways = |wanted: bool| {
        for (from, client) in callers {
            for to in &round {
                reached(from, client, to, wanted)?;
            }
        }
        // Without an agent at the client's side the Service's own address is one more.
        reached(&outside, "stranger", &others, wanted)
    };
    by_all_ways(true)?;
    scene.apply(
        "apiVersion: selvedge.dev/v1alpha1\n\
         kind: AuthorizationPolicy\n\
         metadata: {name: through}\n\
         spec:\n  \
           targetRefs: [{kind: Service, name: one}]\n  \
           rules: [{to: [{operation: {paths: [/through]}}]}]\n",
    )?;
    by_all_ways(false)?;
    reached(scene, "client", &own, true)?;
    // The waypoint holds the policy, and says which reason it is.
    let denied = scene.run("client", &["get", &own, "/elsewhere"]);
    let denied = denied.err().context("the waypoint let a request pass that the policy does not allow")?;
    ensure!(format!("{denied:#}").contains("403"), "{denied:#}");
    let node = get(&["--namespace", &scene.namespace, "pod", "one"])?;
    let node = node["spec"]["nodeName"].as_str().context("a pod without a node")?;
    let logs = agent_logs(node)?;
    let name = format!("{}/one", scene.namespace);
    let told = logs.lines().filter(|line| line.contains(&name) && line.contains("reason=waypoint")).count();
    ensure!(
        told >= callers.len() * round.len(),
        "the server's agent tells of {told} connections that went round:\n{logs}"
    );

    kubectl(&["delete", "authorizationpolicy", "through", "--namespace", &scene.namespace])?;
    by_all_ways(true)
}

/// Every address of the Service `one` that does not lead by its waypoint: of each node, the headless name, the pod's own.
fn ways_round(scene: &Scene) -> Result<Vec<String>> {
    let service = get(&["--namespace", &scene.namespace, "service", "one"])?;
    let port = service["spec"]["ports"][0]["nodePort"].as_u64().context("no nodePort")?;
    let nodes = get(&["nodes"])?;
    let addresses = nodes["items"].as_array().into_iter().flatten().flat_map(|node| {
        let addresses = node["status"]["addresses"].as_array().into_iter().flatten();
        addresses.filter(|address| address["type"] == "InternalIP").filter_map(|address| address["address"].as_str())
    });
    let mut ways: Vec<String> = addresses.map(|address| format!("{address}:{port}")).collect();
    ensure!(ways.len() > 1, "two nodes have {ways:?}");
    ways.push(format!("headless.{}:8080", scene.namespace));
    ways.push(format!("{}:8080", scene.pod_ip("one")?));
    Ok(ways)
}

/// Waits until a client reaches the pod `one` at an address, or is refused there.
fn reached(from: &Scene, client: &str, to: &str, wanted: bool) -> Result<()> {
    let what = if wanted { "reaches" } else { "is refused at" };
    let mut last = String::new();
    let settled = eventually(&format!("{client} {what} {to}"), BOUND, || {
        let answer = from.run(client, &["get", to, "/through"]);
        let came = answer
            .as_ref()
            .is_ok_and(|answer| serde_json::from_str::<Value>(answer).is_ok_and(|answer| answer["pod"] == "one"));
        last = format!("{answer:?}");
        (if wanted { came } else { answer.is_err() }).then_some(())
    });
    settled.with_context(|| format!("the last answer was {last}"))
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
