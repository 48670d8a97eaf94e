//! What others release step by step by the weights of an HTTPRoute, with the manifests of `docs/canaries.md`: whom
//! requests reach meanwhile, and that none fails.

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::eventually;
use serde_json::{Value, json};

use crate::cluster::{apply, get, kubectl, test_image};
use crate::gateway_api::install_kinds;
use crate::mesh::{AGENTS, SYSTEM, install, join, root, two_nodes, wait_captured};
use crate::scene::{BOUND, Scene, trial_alone};
use crate::traffic::{Told, under_load};

pub fn trials() -> Vec<Trial> {
    vec![
        trial_alone("canaries: Argo Rollouts promotes one step by step", argo_rollouts),
        trial_alone("canaries: Flagger promotes one that is well and takes back one that is not", flagger),
    ]
}

fn argo_rollouts(scene: &Scene) -> Result<()> {
    shop(scene)?;
    install_argo_rollouts()?;
    let container =
        format!("image: {}\n          imagePullPolicy: Never\n          args: [serve, \"http:8080\"]", test_image()?);
    scene.apply(&page(scene, "## Argo Rollouts")?.replace("image: example.com/cart:1", &container))?;
    phase(scene, "rollout/cart", "Healthy")?;
    let cart = address(scene, "cart")?;
    answers(scene, &cart)?;
    let told = under_load(scene, "client", &cart, || {
        change(scene, "rollout/cart", json!({"metadata": {"labels": {"version": "second"}}}))?;
        for (at, weight) in [(1, 20), (3, 50), (5, 80)] {
            eventually(&format!("it pauses at {weight}"), BOUND, || {
                let status = &object(scene, "rollout/cart").ok()?["status"];
                (status["currentStepIndex"] == at && status["pauseConditions"].is_array()).then_some(())
            })?;
            ensure!(weight_of(scene, "cart", "cart-canary")? == weight, "the route has another weight than {weight}");
            share(scene, &cart, "version=second", weight)?;
            // As `kubectl argo rollouts promote` does.
            let go_on = r#"{"status":{"pauseConditions":null}}"#;
            let patch = ["patch", "rollout/cart", "--subresource=status", "--type=merge", "--patch", go_on];
            kubectl(&[&patch[..], &["--namespace", &scene.namespace]].concat())?;
        }
        phase(scene, "rollout/cart", "Healthy")?;
        share(scene, &cart, "version=second", 100)
    })?;
    ensure!(told.failures.is_empty() && told.answered > 100, "{told:?}");
    Ok(())
}

fn flagger(scene: &Scene) -> Result<()> {
    shop(scene)?;
    install_flagger()?;
    scene.apply(&deployment()?)?;
    scene.apply(&page(scene, "## Flagger")?)?;
    phase(scene, "canary/web", "Initialized")?;
    let web = address(scene, "web")?;
    answers(scene, &web)?;
    let told = under_load(scene, "client", &web, || {
        change(scene, "deployment/web", json!({"metadata": {"labels": {"version": "second"}}}))?;
        each_step_is_followed(scene, &web, &[20, 50, 80])?;
        phase(scene, "canary/web", "Succeeded")?;
        let second = names(scene, "app=web-primary,version=second")?;
        ensure!(!second.is_empty(), "what was promoted is not the second version");
        share(scene, &web, "app=web-primary", 100)
    })?;
    ensure!(told.failures.is_empty() && told.answered > 100, "{told:?}");

    let fails = json!({"spec": {"containers": [{"name": "web", "args": ["serve", "failing-http:8080"]}]}});
    change(scene, "deployment/web", fails)?;
    let mut failures = 0;
    eventually("it is taken back", RELEASE, || {
        failures += load(scene, &web).ok()?.failures.len();
        (object(scene, "canary/web").ok()?["status"]["phase"] == "Failed").then_some(())
    })?;
    ensure!(failures > 0, "nobody met the version that fails");
    ensure!(weight_of(scene, "web", "web-canary")? == 0, "the version that fails has a share");
    let well = || load(scene, &web).ok().filter(|told| told.failures.is_empty() && told.answered > 0).map(drop);
    eventually("all is well again", BOUND, well)
}

/// While it goes from step to step by itself: requests that were made between two looks at the same weight go by that.
fn each_step_is_followed(scene: &Scene, to: &str, weights: &[u64]) -> Result<()> {
    let (mut followed, mut seen) = (BTreeSet::new(), Vec::new());
    let all = eventually("the requests follow every step", RELEASE, || {
        let before = weight_of(scene, "web", "web-canary").ok()?;
        let canary = names(scene, "app=web").ok()?;
        let told = load(scene, to).ok()?;
        let after = weight_of(scene, "web", "web-canary").ok()?;
        seen.push((before, percent(&told, &canary), after));
        if before == after && is_near(percent(&told, &canary), before) {
            followed.insert(before);
        }
        weights.iter().all(|weight| followed.contains(weight)).then_some(())
    });
    all.with_context(|| format!("weight before, percent, weight after: {seen:?}"))
}

/// A namespace whose Services are routed, and a client.
fn shop(scene: &Scene) -> Result<()> {
    install()?;
    install_kinds()?;
    let (first, _) = two_nodes()?;
    join(scene, true)?;
    kubectl(&["annotate", "namespace", &scene.namespace, "selvedge.dev/waypoint=node"])?;
    scene.pod("client", &first, &["pause"])?;
    wait_captured(scene, "client")
}

/// As its manifests say, with the image of the tests, and the plugin in it.
fn install_argo_rollouts() -> Result<()> {
    let manifest = folder("SELVEDGE_ARGO_ROLLOUTS")?.join("install.yaml").display().to_string();
    apply("default", "apiVersion: v1\nkind: Namespace\nmetadata: {name: argo-rollouts}\n")?;
    // On the server's side: its kinds are too long for the annotation that the other way needs.
    kubectl(&["apply", "--server-side", "--force-conflicts", "--namespace=argo-rollouts", "--filename", &manifest])?;
    apply("argo-rollouts", PLUGIN)?;
    let container = json!({
        "name": "argo-rollouts",
        "image": "localhost/argo-rollouts:test",
        "imagePullPolicy": "Never",
        "workingDir": "/home/argo-rollouts",
        // The nodes here account for no disk.
        "resources": null,
    });
    let more = json!({"securityContext": {"runAsUser": 999}, "containers": [container]});
    start("argo-rollouts", "argo-rollouts", &more)
}

/// As its manifests say, with a Prometheus, and with images of the tests, in which there is nothing that its probes could call.
fn install_flagger() -> Result<()> {
    let manifests = folder("SELVEDGE_FLAGGER")?.join("kustomize/gatewayapi").display().to_string();
    apply("flagger-system", &kubectl(&["kustomize", &manifests])?)?;
    let container = json!({
        "name": "flagger",
        "image": "localhost/flagger:test",
        "imagePullPolicy": "Never",
        "livenessProbe": null,
        "readinessProbe": null,
    });
    start("flagger-system", "flagger", &json!({"containers": [container]}))?;
    // Debian's Prometheus does not know Kubernetes: it is told where the agents are.
    let agents = get(&["pods", "--namespace", SYSTEM, "--selector", AGENTS])?;
    let agents = agents["items"].as_array().context("no list of pods")?.iter();
    let targets: Vec<String> =
        agents.filter_map(|agent| Some(format!("{}:15020", agent["status"]["podIP"].as_str()?))).collect();
    let config = json!({
        "global": {"scrape_interval": "5s"},
        "scrape_configs": [{"job_name": "selvedge", "static_configs": [{"targets": targets}]}],
    });
    let map = json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "agents"},
        "data": {"prometheus.yml": config.to_string()},
    });
    apply("flagger-system", &map.to_string())?;
    let container = json!({"name": "prometheus", "image": "localhost/prometheus:test", "imagePullPolicy": "Never"});
    let volume = json!({"name": "config-volume", "configMap": {"name": "agents"}});
    start("flagger-system", "flagger-prometheus", &json!({"containers": [container], "volumes": [volume]}))
}

/// Changes the pods of a Deployment, and waits until they are ready.
fn start(namespace: &str, deployment: &str, pod: &Value) -> Result<()> {
    let patch = json!({"spec": {"template": {"spec": pod}}}).to_string();
    kubectl(&["patch", "deployment", deployment, "--namespace", namespace, "--patch", &patch])?;
    let (deployment, bound) = (format!("deployment/{deployment}"), format!("--timeout={}s", BOUND.as_secs()));
    kubectl(&["rollout", "status", &deployment, "--namespace", namespace, &bound]).map(drop)
}

/// The manifests of a section of the page, in the test's own namespace.
fn page(scene: &Scene, section: &str) -> Result<String> {
    let page = fs::read_to_string(root().join("docs/canaries.md"))?;
    let (_, section) = page.split_once(&format!("\n{section}\n")).context("no such section")?;
    let (_, manifests) = section.split_once("```yaml\n").context("a section without manifests")?;
    let (manifests, _) = manifests.split_once("```").context("manifests without an end")?;
    Ok(manifests.replace("namespace: shop", &format!("namespace: {}", scene.namespace)))
}

/// What Flagger releases. It is of a time before `preStop: {sleep: ...}`, and would lose that on the way.
fn deployment() -> Result<String> {
    Ok(format!(
        "apiVersion: apps/v1\n\
         kind: Deployment\n\
         metadata: {{name: web}}\n\
         spec:\n  \
           replicas: 2\n  \
           selector: {{matchLabels: {{app: web}}}}\n  \
           template:\n    \
             metadata: {{labels: {{app: web}}}}\n    \
             spec:\n      \
               containers:\n      \
               - name: web\n        \
                 image: \"{}\"\n        \
                 imagePullPolicy: Never\n        \
                 args: [serve, \"http:8080\"]\n        \
                 readinessProbe: {{tcpSocket: {{port: 8080}}, periodSeconds: 1}}\n        \
                 lifecycle: {{preStop: {{exec: {{command: [selvedge-pod, sleep, \"5\"]}}}}}}\n",
        test_image()?
    ))
}

fn change(scene: &Scene, what: &str, template: Value) -> Result<()> {
    let patch = json!({"spec": {"template": template}}).to_string();
    // A kind that is not Kubernetes' own knows no other way.
    let way = if what.starts_with("rollout/") { "--type=merge" } else { "--type=strategic" };
    kubectl(&["patch", what, way, "--namespace", &scene.namespace, "--patch", &patch]).map(drop)
}

fn phase(scene: &Scene, what: &str, wanted: &str) -> Result<()> {
    let mut last = Value::Null;
    let reached = eventually(&format!("{what} is {wanted}"), RELEASE, || {
        last = object(scene, what).ok()?["status"].clone();
        (last["phase"] == wanted).then_some(())
    });
    reached.with_context(|| format!("its status is {last}"))
}

fn object(scene: &Scene, what: &str) -> Result<Value> {
    get(&[what, "--namespace", &scene.namespace])
}

fn address(scene: &Scene, service: &str) -> Result<String> {
    let service = object(scene, &format!("service/{service}"))?;
    Ok(format!("{}:80", service["spec"]["clusterIP"].as_str().context("a Service without an address")?))
}

fn answers(scene: &Scene, to: &str) -> Result<()> {
    eventually(&format!("{to} answers"), BOUND, || scene.run("client", &["get", to, "/"]).ok().map(drop))
}

/// The weight that a route gives a backend.
fn weight_of(scene: &Scene, route: &str, backend: &str) -> Result<u64> {
    let route = object(scene, &format!("httproute/{route}"))?;
    let mut backends = route["spec"]["rules"][0]["backendRefs"].as_array().context("no backends")?.iter();
    let found = backends.find(|entry| entry["name"] == backend).context("no such backend")?;
    found["weight"].as_u64().context("no weight")
}

/// Waits until pods get their share.
fn share(scene: &Scene, to: &str, pods: &str, wanted: u64) -> Result<()> {
    let mut seen = Vec::new();
    let reached = eventually(&format!("pods {pods} get {wanted} of 100 requests"), BOUND, || {
        let names = names(scene, pods).ok()?;
        let got = percent(&load(scene, to).ok()?, &names);
        seen.push(got);
        is_near(got, wanted).then_some(())
    });
    reached.with_context(|| format!("they got {seen:?}"))
}

/// Two seconds of requests.
fn load(scene: &Scene, to: &str) -> Result<Told> {
    let mut told = Told::default();
    told.add(&scene.run("client", &["load", to, "2"])?)?;
    Ok(told)
}

fn names(scene: &Scene, labels: &str) -> Result<BTreeSet<String>> {
    let pods = get(&["pods", "--namespace", &scene.namespace, "--selector", labels])?;
    let pods = pods["items"].as_array().context("no list of pods")?;
    Ok(pods.iter().filter_map(|pod| pod["metadata"]["name"].as_str().map(str::to_owned)).collect())
}

fn percent(told: &Told, pods: &BTreeSet<String>) -> u64 {
    let of_these: u64 = told.pods.iter().filter(|(pod, _)| pods.contains(*pod)).map(|(_, answered)| answered).sum();
    of_these * 100 / told.answered.max(1)
}

/// None of them where none is wanted, all where all are; between them chance has its part.
fn is_near(percent: u64, wanted: u64) -> bool {
    if wanted == 0 || wanted == 100 { percent == wanted } else { percent.abs_diff(wanted) <= 8 }
}

fn folder(variable: &str) -> Result<PathBuf> {
    env::var_os(variable)
        .map(PathBuf::from)
        .with_context(|| format!("{variable} is not set: run cargo xtask e2e --canaries"))
}

/// As its installation says: where the plugin is, and what it may do.
const PLUGIN: &str = "apiVersion: v1
kind: ConfigMap
metadata: {name: argo-rollouts-config}
data:
  trafficRouterPlugins: |-
    - name: argoproj-labs/gatewayAPI
      location: file:///usr/local/bin/gateway-api
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: argo-rollouts-gateway-api-plugin}
rules:
- {apiGroups: [gateway.networking.k8s.io], resources: [httproutes], verbs: [get, list, update, patch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: argo-rollouts-gateway-api-plugin}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: argo-rollouts-gateway-api-plugin}
subjects: [{kind: ServiceAccount, name: argo-rollouts, namespace: argo-rollouts}]
";
/// A release takes its time.
const RELEASE: Duration = Duration::from_secs(600);
