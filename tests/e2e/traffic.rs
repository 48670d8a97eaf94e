//! What workloads of every kind do in the mesh, and who may talk to whom.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::eventually;
use serde_json::Value;

use crate::cluster::{get, kubectl, test_image};
use crate::controller::{account_and_pod, two_nodes};
use crate::mesh::{SYSTEM, agent_logs, agent_of, install, join, wait_captured};
use crate::scene::{BOUND, Scene, trial};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("traffic: policies decide by service account, across nodes and on one", by_service_account),
        trial("traffic: a policy changes under load, and costs nobody a request who may go on", policy_under_load),
        trial("traffic: pods of a headless StatefulSet are reached by their names", stateful_set),
        trial("traffic: a Job finishes as it would without the mesh", job),
        trial("traffic: pods of the host's network are reached, and reach", host_network),
        trial("traffic: a Deployment is rolled and scaled under load without a failed request", rolled_under_load),
    ]
}

fn by_service_account(scene: &Scene) -> Result<()> {
    let [first, second] = two_nodes()?;
    install()?;
    join(scene, true)?;
    scene.pod("server", &second, &["serve", "http:8080"])?;
    for (name, node) in [("cart", &first), ("cart-near", &second), ("thief", &first), ("thief-near", &second)] {
        scene.apply(&account_and_pod(name, node))?;
        scene.wait_for("condition=Ready", name)?;
        wait_captured(scene, name)?;
    }
    wait_captured(scene, "server")?;
    let to = format!("{}:8080", scene.pod_ip("server")?);
    let all = ["cart", "cart-near", "thief", "thief-near"];
    let carts = ["cart", "cart-near"];
    let allows_carts = "{rules: [{from: [{source: {serviceAccounts: [cart, cart-near]}}]}]}";
    let denies_thieves = "{action: DENY, rules: [{from: [{source: {serviceAccounts: [thief, thief-near]}}]}]}";
    only(scene, &to, &all, &all)?;
    let agent = agent_of(&second)?;
    is_told_of(scene, &to, &agent, &["verdict=allow"])?;
    for (what, spec, may) in
        [("DENY", denies_thieves, &carts[..]), ("ALLOW", allows_carts, &carts), ("default-deny", "{}", &[])]
    {
        scene.apply(&policy(spec))?;
        only(scene, &to, &all, may).with_context(|| format!("with a policy of {what}"))?;
    }
    let reason = format!("reason=policy:{}/decides", scene.namespace);
    is_told_of(scene, &to, &agent, &["verdict=deny", &reason])
}

/// The server's node tells who came, how, and what was decided.
fn is_told_of(scene: &Scene, to: &str, agent: &str, words: &[&str]) -> Result<()> {
    for (name, transport) in [("cart", "transport=fast"), ("cart-near", "transport=same-node")] {
        let identity = format!("source_identity=spiffe://cluster.local/ns/{}/sa/{name} ", scene.namespace);
        // Other tests fill the same log: a line is looked for as soon as it can be there.
        let told = || {
            let _ = scene.run(name, &["get", to, "/"]);
            let logs = ["logs", "--namespace", SYSTEM, agent, "--container=agent", "--since=60s"];
            let wanted = ["direction=inbound", &identity, transport];
            let is_it = |line: &str| wanted.iter().chain(words).all(|word| line.contains(word));
            kubectl(&logs).ok()?.lines().any(is_it).then_some(())
        };
        eventually(&format!("the access log tells of {name} {words:?}"), BOUND, told)?;
    }
    Ok(())
}

/// Waits until these may and all others may not. What was decided once stays so: it is tried again.
fn only(scene: &Scene, to: &str, all: &[&str], may: &[&str]) -> Result<()> {
    for _ in 0..2 {
        for pod in all {
            let wanted = may.contains(pod);
            let is_so = || (scene.run(pod, &["get", to, "/"]).is_ok() == wanted).then_some(());
            eventually(&format!("{pod} is let in: {wanted}"), BOUND, is_so)?;
        }
    }
    Ok(())
}

fn policy_under_load(scene: &Scene) -> Result<()> {
    let [first, second] = two_nodes()?;
    install()?;
    join(scene, true)?;
    scene.pod("server", &second, &["serve", "http:8080"])?;
    for name in ["cart", "thief"] {
        scene.apply(&account_and_pod(name, &first))?;
        scene.wait_for("condition=Ready", name)?;
        wait_captured(scene, name)?;
    }
    wait_captured(scene, "server")?;
    let to = format!("{}:8080", scene.pod_ip("server")?);
    let told = under_load(scene, "cart", &to, || {
        for accounts in ["cart, thief", "cart", "thief, cart", "cart"] {
            scene.apply(&policy(&format!("{{rules: [{{from: [{{source: {{serviceAccounts: [{accounts}]}}}}]}}]}}")))?;
            let wanted = accounts.contains("thief");
            let is_so = || (scene.run("thief", &["get", &to, "/"]).is_ok() == wanted).then_some(());
            eventually(&format!("the thief is let in: {wanted}"), BOUND, is_so)?;
        }
        Ok(())
    })?;
    ensure!(told.failures.is_empty() && told.answered > 100, "{told:?}");
    scene.apply(&policy("{}"))?;
    let refused = || scene.run("cart", &["get", &to, "/"]).err().map(drop);
    eventually("a policy turns away who went on until now", BOUND, refused)
}

fn stateful_set(scene: &Scene) -> Result<()> {
    let [first, _] = two_nodes()?;
    install()?;
    join(scene, true)?;
    scene.apply(STRICT)?;
    scene.apply(&format!(
        "apiVersion: v1\n\
         kind: Service\n\
         metadata: {{name: db}}\n\
         spec: {{clusterIP: None, selector: {{app: db}}, ports: [{{port: 8080}}]}}\n---\n\
         apiVersion: apps/v1\n\
         kind: StatefulSet\n\
         metadata: {{name: db}}\n\
         spec:\n  \
           serviceName: db\n  \
           replicas: 2\n  \
           podManagementPolicy: Parallel\n  \
           selector: {{matchLabels: {{app: db}}}}\n  \
           template:\n{}",
        template("db", 1, "")?
    ))?;
    let bound = format!("--timeout={}s", BOUND.as_secs());
    kubectl(&["rollout", "status", "--namespace", &scene.namespace, "statefulset/db", &bound])?;
    scene.pod("client", &first, &["pause"])?;
    wait_captured(scene, "client")?;
    for member in ["db-0", "db-1"] {
        wait_captured(scene, member)?;
        // STRICT: what is answered came through the mesh.
        let ask = || scene.run("client", &["get", &format!("{member}.db:8080"), "/"]).ok();
        let answer: Value = serde_json::from_str(&eventually(&format!("{member} answers"), BOUND, ask)?)?;
        ensure!(answer["pod"] == member, "{member} is another: {answer}");
    }
    // Members reach each other, and themselves.
    scene.run("db-0", &["get", "db-1.db:8080", "/"])?;
    scene.run("db-1", &["get", "db-1.db:8080", "/"]).map(drop)
}

fn job(scene: &Scene) -> Result<()> {
    let [first, second] = two_nodes()?;
    install()?;
    join(scene, true)?;
    scene.apply(STRICT)?;
    scene.pod("server", &second, &["serve", "http:8080"])?;
    wait_captured(scene, "server")?;
    scene.apply(&format!(
        "apiVersion: batch/v1\n\
         kind: Job\n\
         metadata: {{name: asks}}\n\
         spec:\n  \
           completions: 3\n  \
           backoffLimit: 0\n  \
           template:\n    \
             spec:\n      \
               nodeName: {first}\n      \
               restartPolicy: Never\n      \
               containers:\n      \
               - {{name: main, image: \"{}\", imagePullPolicy: Never, args: [get, \"{}:8080\", /]}}\n",
        test_image()?,
        scene.pod_ip("server")?
    ))?;
    let bound = format!("--timeout={}s", BOUND.as_secs());
    kubectl(&["wait", "--namespace", &scene.namespace, "--for=condition=Complete", "job/asks", &bound])?;
    let pods = get(&["--namespace", &scene.namespace, "pods", "--selector=job-name=asks"])?;
    let pods = pods["items"].as_array().context("no pods")?;
    ensure!(pods.len() == 3 && pods.iter().all(|pod| pod["status"]["phase"] == "Succeeded"), "{pods:?}");
    Ok(())
}

fn host_network(scene: &Scene) -> Result<()> {
    let [first, second] = two_nodes()?;
    install()?;
    join(scene, true)?;
    scene.pod("server", &second, &["serve", "http:8080"])?;
    scene.pod("far", &first, &["pause"])?;
    scene.pod("near", &second, &["pause"])?;
    let port = 18_080;
    for (name, node) in [("host-far", &first), ("host-near", &second)] {
        scene.apply(&format!(
            "apiVersion: v1\n\
             kind: Pod\n\
             metadata: {{name: {name}}}\n\
             spec:\n  \
               nodeName: {node}\n  \
               hostNetwork: true\n  \
               terminationGracePeriodSeconds: 1\n  \
               containers:\n  \
               - {{name: main, image: \"{}\", imagePullPolicy: Never, args: [serve, \"http:{port}\"]}}\n",
            test_image()?
        ))?;
        scene.wait_for("condition=Ready", name)?;
    }
    for pod in ["server", "far", "near"] {
        wait_captured(scene, pod)?;
    }
    let (server, near) =
        (format!("{}:8080", scene.pod_ip("server")?), format!("{}:{port}", scene.pod_ip("host-near")?));
    for pod in ["far", "near"] {
        scene.run(pod, &["get", &near, "/"]).with_context(|| format!("{pod} does not reach the host"))?;
    }
    for pod in ["host-far", "host-near"] {
        scene.run(pod, &["get", &server, "/"]).with_context(|| format!("{pod} does not reach a joined pod"))?;
    }
    // They prove no identity.
    scene.apply(STRICT)?;
    let refused = || scene.run("host-far", &["get", &server, "/"]).err().map(drop);
    eventually("who asks for proof turns them away", BOUND, refused)?;
    scene.run("far", &["get", &server, "/"]).map(drop)
}

fn rolled_under_load(scene: &Scene) -> Result<()> {
    let [first, _] = two_nodes()?;
    install()?;
    join(scene, true)?;
    // Pods that are told to end serve on until everybody knows, as every Deployment should have it.
    let probe_and_pause = "\
        readinessProbe: {httpGet: {port: 8080, path: /}, periodSeconds: 1}\n        \
        lifecycle: {preStop: {sleep: {seconds: 5}}}\n";
    scene.apply(&format!(
        "apiVersion: v1\n\
         kind: Service\n\
         metadata: {{name: web}}\n\
         spec: {{selector: {{app: web}}, ports: [{{port: 80, targetPort: 8080}}]}}\n---\n\
         apiVersion: apps/v1\n\
         kind: Deployment\n\
         metadata: {{name: web}}\n\
         spec:\n  \
           replicas: 2\n  \
           selector: {{matchLabels: {{app: web}}}}\n  \
           template:\n{}",
        template("web", 30, probe_and_pause)?
    ))?;
    scene.pod("client", &first, &["pause"])?;
    wait_captured(scene, "client")?;
    let bound = format!("--timeout={}s", BOUND.as_secs());
    let on_web = |words: &[&str]| {
        let (namespace, deployment) = (["--namespace", &*scene.namespace], ["deployment/web"]);
        kubectl(&[words, &namespace, &deployment].concat())?;
        kubectl(&[&["rollout", "status", &bound][..], &namespace, &deployment].concat())
    };
    on_web(&["rollout", "status"])?;
    let service = get(&["--namespace", &scene.namespace, "service", "web"])?;
    let to = format!("{}:80", service["spec"]["clusterIP"].as_str().context("a Service without an address")?);
    let ready = || scene.run("client", &["get", &to, "/"]).ok();
    eventually("the Service answers", BOUND, ready)?;
    let told = under_load(scene, "client", &to, || {
        on_web(&["rollout", "restart"])?;
        on_web(&["scale", "--replicas=4"])?;
        on_web(&["scale", "--replicas=1"])?;
        let alone = || {
            let pods = get(&["--namespace", &scene.namespace, "pods", "--selector=app=web"]).ok()?;
            (pods["items"].as_array()?.len() == 1).then_some(())
        };
        eventually("one pod is left", BOUND, alone)
    })?;
    ensure!(told.failures.is_empty() && told.answered > 100, "{told:?}");
    Ok(())
}

/// What became of the requests of a load.
#[derive(Debug, Default)]
pub struct Told {
    pub answered: u64,
    /// How many each pod answered.
    pub pods: BTreeMap<String, u64>,
    pub failures: Vec<String>,
}

impl Told {
    /// Adds what `selvedge-pod load` printed.
    pub fn add(&mut self, printed: &str) -> Result<()> {
        let told: Value = serde_json::from_str(printed).with_context(|| format!("not what a load tells: {printed}"))?;
        self.answered += told["answered"].as_u64().context("answered")?;
        for (pod, answered) in told["pods"].as_object().context("pods")? {
            *self.pods.entry(pod.clone()).or_default() += answered.as_u64().context("answered")?;
        }
        let failures = told["failures"].as_array().context("failures")?.iter();
        self.failures.extend(failures.map(|failure| failure.as_str().unwrap_or_default().to_owned()));
        Ok(())
    }
}

/// Asks without a pause, one connection after the other, for as long as something is done.
pub fn under_load(scene: &Scene, pod: &str, to: &str, what: impl FnOnce() -> Result<()>) -> Result<Told> {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let load = scope.spawn(|| {
            let mut told = Told::default();
            while !done.load(Ordering::Relaxed) {
                told.add(&scene.run(pod, &["load", to, "2"])?)?;
            }
            Ok::<_, anyhow::Error>(told)
        });
        let result = what();
        done.store(true, Ordering::Relaxed);
        let told = load.join().map_err(|_| anyhow::anyhow!("the load panicked"))?;
        result?;
        let mut told = told?;
        if !told.failures.is_empty() {
            told.failures.extend(what_agents_say(scene, pod)?);
        }
        Ok(told)
    })
}

/// The lines of the agents about connections of a pod that ended badly: the last of each agent.
fn what_agents_say(scene: &Scene, pod: &str) -> Result<Vec<String>> {
    let name = format!("{}/{pod}", scene.namespace);
    let mut said = Vec::new();
    for node in two_nodes()? {
        let logs = agent_logs(&node)?;
        let about: Vec<_> = logs.lines().filter(|line| line.contains(&name) && line.contains("reason")).collect();
        said.extend(about.iter().rev().take(SAID).map(|line| format!("{node}: {line}")));
    }
    Ok(said)
}

/// The pods of a StatefulSet or a Deployment: servers with a label.
fn template(app: &str, grace: u32, more: &str) -> Result<String> {
    let more = if more.is_empty() { String::new() } else { format!("        {more}") };
    Ok(format!(
        "    metadata: {{labels: {{app: {app}}}}}\n    \
             spec:\n      \
               terminationGracePeriodSeconds: {grace}\n      \
               containers:\n      \
               - name: main\n        \
                 image: \"{}\"\n        \
                 imagePullPolicy: Never\n        \
                 args: [serve, \"http:8080\"]\n{more}",
        test_image()?
    ))
}

fn policy(spec: &str) -> String {
    format!("apiVersion: selvedge.dev/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: decides}}\nspec: {spec}\n")
}

/// Lines of an agent.
const SAID: usize = 20;
const STRICT: &str = "apiVersion: selvedge.dev/v1alpha1
kind: PeerAuthentication
metadata: {name: strict}
spec: {mtls: {mode: STRICT}}
";
