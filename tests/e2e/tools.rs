//! `selvedge check`, `status`, `workloads` and `explain`, as a person with a kubeconfig of their own runs them.

use std::os::unix::fs::symlink;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::eventually;
use serde_json::{Value, json};
use tempfile::NamedTempFile;

use crate::cluster::{agent_image, kubectl, kubectl_with_plugins, program, test_image};
use crate::controller::{account_and_pod, two_nodes};
use crate::mesh::{SYSTEM, install, join, roll_out, wait_captured};
use crate::policies::install_kinds;
use crate::scene::{BOUND, Scene, trial, trial_alone};

pub fn trials() -> Vec<Trial> {
    vec![
        trial_alone("tools: a mesh that is well is shown as it is", shows_what_is),
        trial_alone("tools: what is broken is named with its cure", names_what_is_broken),
        trial("tools: who may not read is told which rights are missing", without_rights),
        trial("tools: who asks no cluster, or a wrong one, is told so", without_cluster),
        trial("tools: kubectl finds them as its plugin", plugin_of_kubectl),
    ]
}

fn shows_what_is(scene: &Scene) -> Result<()> {
    install()?;
    let [first, second] = two_nodes()?;
    scene.pod("server", &second, &["serve", "http:8080"])?;
    scene.apply(&account_and_pod("cart", &first))?;
    scene.apply(&account_and_pod("thief", &first))?;
    scene.apply(POLICY_AND_SERVICE)?;
    join(scene, true)?;
    for pod in ["server", "cart", "thief"] {
        scene.wait_for("condition=Ready", pod)?;
        wait_captured(scene, pod)?;
    }
    let (person, namespace) = (Person::new()?, &*scene.namespace);
    // Namespaces of other tests may be on their way out.
    let passed = || person.run(&["check"]).ok().filter(|said| said.code == 0 && said.out.contains("checks passed."));
    let said = eventually("every check passes", BOUND, passed)?.out;
    ensure!(said.contains("✓ 2 of 2 agents are ready") && said.contains("agents trust this bundle"), "{said}");
    let said = person.run(&["check", "--pre"])?;
    ensure!(said.code == 0 && said.out.contains("an installation over it is an upgrade"), "{}", said.out);

    let status = person.json(&["status"])?;
    for node in [&first, &second] {
        let mut lines = status["nodes"].as_array().context("no nodes")?.iter();
        let line = lines.find(|line| line["node"] == **node).with_context(|| format!("{node} is not in {status}"))?;
        ensure!(line["agent"] == "ready" && line["capture"] == "tproxy" && line["failed"] == 0, "{line}");
    }
    let mut lines = status["namespaces"].as_array().context("no namespaces")?.iter();
    let wanted = json!({"namespace": namespace, "joined": 3, "captured": 3, "outside": 0});
    ensure!(lines.any(|line| *line == wanted), "{wanted} is not in {status}");
    let table = person.run(&["status"])?.out;
    ensure!(table.contains("Controller   2 of 2 ready, selvedge-controller-"), "{table}");
    ensure!(table.lines().any(|line| line.split_whitespace().eq([namespace, "3", "3", "0"])), "{table}");

    let workloads = person.json(&["workloads", "--joined", "--namespace", namespace])?;
    let workloads = workloads.as_array().context("no list")?;
    ensure!(workloads.len() == 3, "{workloads:?}");
    let cart = workloads.iter().find(|line| line["name"] == "cart").context("no cart")?;
    let identity = format!("spiffe://cluster.local/ns/{namespace}/sa/cart");
    ensure!(cart["mesh"] == "captured" && cart["identity"] == *identity && cart["node"] == *first, "{cart}");
    let table = person.run(&["workloads", "--namespace", namespace])?.out;
    ensure!(table.starts_with("NAMESPACE") && table.contains(&identity), "{table}");

    explains_what_happens(scene, &person)
}

/// What `explain` says is what the agents do.
fn explains_what_happens(scene: &Scene, person: &Person) -> Result<()> {
    let to = format!("{}/shop", scene.namespace);
    for (from, verdict) in [("cart", "allow"), ("thief", "deny")] {
        let asked = ["explain", &*format!("{}/{from}", scene.namespace), &to, "--port", "80"];
        let explained = person.json(&asked)?;
        ensure!(explained["verdict"] == verdict, "{explained}");
        let said = person.run(&asked)?.out;
        ensure!(said.contains(&format!("AuthorizationPolicy {}/carts-only", scene.namespace)), "{said}");
        let got = scene.run(from, &["get", "shop:80", "/"]);
        ensure!(got.is_ok() == (verdict == "allow"), "{from} is said to be {verdict}: {got:?}");
    }
    let said = person.run(&["explain", "nowhere/nobody", &to])?;
    ensure!(said.code == 2 && said.err.contains("there is no Pod nowhere/nobody"), "{}", said.err);
    Ok(())
}

fn names_what_is_broken(scene: &Scene) -> Result<()> {
    install()?;
    let [first, second] = two_nodes()?;
    let person = Person::new()?;
    // A pod with the rules of another mesh, which joins afterwards.
    scene.apply(&format!(
        "apiVersion: v1\n\
         kind: Pod\n\
         metadata: {{name: of-another-mesh}}\n\
         spec:\n  \
           nodeName: {second}\n  \
           terminationGracePeriodSeconds: 1\n  \
           initContainers:\n  \
           - name: rules\n    \
             image: \"{}\"\n    \
             imagePullPolicy: Never\n    \
             command: [iptables-nft, -t, nat, -N, ISTIO_OUTPUT]\n    \
             securityContext: {{capabilities: {{add: [NET_ADMIN]}}}}\n  \
           containers:\n  \
           - {{name: main, image: \"{}\", imagePullPolicy: Never, args: [pause]}}\n",
        agent_image()?,
        test_image()?
    ))?;
    scene.wait_for("condition=Ready", "of-another-mesh")?;
    join(scene, true)?;
    scene.apply(LAYER_SEVEN)?;
    let only =
        format!(r#"{{"spec":{{"template":{{"spec":{{"nodeSelector":{{"kubernetes.io/hostname":"{second}"}}}}}}}}}}"#);
    let everywhere = r#"{"spec":{"template":{"spec":{"nodeSelector":{"kubernetes.io/hostname":null}}}}}"#;
    let patch = |text: &str| kubectl(&["patch", "daemonset", "selvedge-agent", "--namespace", SYSTEM, "--patch", text]);
    let broken = patch(&only)
        .and_then(|_| kubectl(&["delete", "crd", "peerauthentications.selvedge.dev"]))
        .and_then(|_| tells_of_all(scene, &person, &first));
    patch(everywhere)?;
    install_kinds()?;
    roll_out()?;
    broken?;
    kubectl(&["delete", "pod", "of-another-mesh", "--namespace", &scene.namespace])?;
    kubectl(&["delete", "sap", "layer-seven", "--namespace", &scene.namespace])?;
    let passed = || person.run(&["check"]).ok().filter(|said| said.code == 0);
    eventually("it is well again", BOUND, passed).map(drop)
}

fn tells_of_all(scene: &Scene, person: &Person, bare: &str) -> Result<()> {
    let namespace = &scene.namespace;
    for (text, cure) in [
        (
            "CustomResourceDefinitions are missing: peerauthentications.selvedge.dev",
            "kubectl apply --server-side -k crd",
        ),
        (&format!("no agent runs on {bare}"), "give the DaemonSet their tolerations and selectors"),
        (
            &format!("pod {namespace}/of-another-mesh is not captured: rules of Istio are in the pod"),
            "docs/troubleshooting.md",
        ),
        (&format!("AuthorizationPolicy {namespace}/layer-seven: spec.rules[0]"), "annotate a Service that leads there"),
    ] {
        let found = || {
            let said = person.run(&["check", "--output=json"]).ok().filter(|said| said.code == 1)?;
            let findings: Value = serde_json::from_str(&said.out).ok()?;
            let mut errors = findings.as_array()?.iter().filter(|finding| finding["verdict"] == "error");
            let is_it = |finding: &&Value| finding["text"].as_str().is_some_and(|said| said.starts_with(text));
            errors.find(is_it)?["cure"].as_str().map(str::to_owned)
        };
        let said = eventually(&format!("check says {text:?}"), BOUND, found)?;
        ensure!(said.contains(cure), "{text:?} has the cure {said:?}");
    }
    let status = person.run(&["status"])?.out;
    ensure!(status.lines().any(|line| line.starts_with(bare) && line.contains(" none ")), "{status}");
    let workloads = person.run(&["workloads", "--namespace", namespace])?.out;
    ensure!(workloads.contains("pending: node"), "{workloads}");
    Ok(())
}

fn without_rights(scene: &Scene) -> Result<()> {
    kubectl(&["create", "serviceaccount", "nobody", "--namespace", &scene.namespace])?;
    let token = kubectl(&["create", "token", "nobody", "--namespace", &scene.namespace])?;
    let nobody = Person::with_token(token.trim())?;
    for (verb, code, wanted) in [
        (&["check"][..], 1, "nodes is forbidden"),
        (&["check", "--pre"], 1, "you may not create namespaces, serviceaccounts"),
        (&["status"], 0, "Controller   unknown"),
        (&["workloads"], 1, "you may not list and watch all of these: "),
        (&["explain", "a/b", "a/c"], 1, "ask for the rights that ClusterRole selvedge-agent has"),
    ] {
        let said = nobody.run(verb)?;
        let all = said.out + &said.err;
        ensure!(all.contains(wanted), "{verb:?} says {all}");
        ensure!(said.code == code, "{verb:?} ended with {}: {all}", said.code);
        // What Rust would show of an answer is no sentence.
        ensure!(!all.contains("Status {") && !all.contains("Some("), "{verb:?} says {all}");
    }
    Ok(())
}

fn without_cluster(_: &Scene) -> Result<()> {
    let nowhere = Person::of(&json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "a",
        "clusters": [{"name": "a", "cluster": {"server": "https://127.0.0.1:1"}}],
        "users": [{"name": "a", "user": {}}],
        "contexts": [{"name": "a", "context": {"cluster": "a", "user": "a"}}],
    }))?;
    let stranger = Person::with_token("made-up")?;
    for verb in [&["check"][..], &["status"], &["workloads"], &["explain", "a/b", "a/c"]] {
        let said = nowhere.run(verb)?;
        ensure!(said.code == 1 && said.err.contains("the API server does not answer: "), "{verb:?}: {}", said.err);
        ensure!(said.err.contains("Connection refused"), "{verb:?}: {}", said.err);
        let said = stranger.run(verb)?;
        ensure!(said.code == 1 && said.err.contains("the API server does not know you"), "{verb:?}: {}", said.err);
    }
    Ok(())
}

fn plugin_of_kubectl(_: &Scene) -> Result<()> {
    install()?;
    let folder = tempfile::tempdir()?;
    symlink(program()?, folder.path().join("kubectl-selvedge"))?;
    let said = kubectl_with_plugins(folder.path(), &["selvedge", "status"])?;
    let out = String::from_utf8_lossy(&said.stdout);
    ensure!(said.status.success() && out.contains("Kubernetes   v1."), "{said:?}");
    let said = kubectl_with_plugins(folder.path(), &["selvedge", "status", "--nosuch"])?;
    let err = String::from_utf8_lossy(&said.stderr);
    ensure!(err.contains("Usage: kubectl selvedge status"), "{err}");
    Ok(())
}

/// Somebody outside of the cluster, with a kubeconfig.
struct Person {
    kubeconfig: NamedTempFile,
}

/// What the program answered.
struct Said {
    code: i32,
    out: String,
    err: String,
}

impl Person {
    fn new() -> Result<Self> {
        Self::of(&kubeconfig()?)
    }

    fn with_token(token: &str) -> Result<Self> {
        let mut written = kubeconfig()?;
        written["users"][0]["user"] = json!({"token": token});
        Self::of(&written)
    }

    fn of(written: &Value) -> Result<Self> {
        let kubeconfig = NamedTempFile::new()?;
        std::fs::write(&kubeconfig, written.to_string())?;
        Ok(Self { kubeconfig })
    }

    fn run(&self, arguments: &[&str]) -> Result<Said> {
        let mut command = Command::new(program()?);
        command.args(arguments).env("KUBECONFIG", self.kubeconfig.path()).stdin(Stdio::null());
        let output = command.output().context("cannot run selvedge")?;
        Ok(Said {
            code: output.status.code().context("it was ended by a signal")?,
            out: String::from_utf8(output.stdout)?,
            err: String::from_utf8(output.stderr)?,
        })
    }

    fn json(&self, arguments: &[&str]) -> Result<Value> {
        let said = self.run(&[arguments, &["--output=json"]].concat())?;
        serde_json::from_str(&said.out).with_context(|| format!("{arguments:?} said {:?}, {}", said.out, said.err))
    }
}

fn kubeconfig() -> Result<Value> {
    Ok(serde_json::from_str(&kubectl(&["config", "view", "--raw", "--output=json"])?)?)
}

const POLICY_AND_SERVICE: &str = "apiVersion: selvedge.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: carts-only}
spec:
  selector: {matchLabels: {app: server}}
  rules: [{from: [{source: {serviceAccounts: [cart]}}]}]
---
apiVersion: v1
kind: Service
metadata: {name: shop}
spec: {selector: {app: server}, ports: [{port: 80, targetPort: 8080}]}
";
const LAYER_SEVEN: &str = "apiVersion: selvedge.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: layer-seven}
spec: {rules: [{to: [{operation: {methods: [GET]}}]}]}
";
