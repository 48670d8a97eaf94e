//! One test's place in the cluster: a namespace that is there for the test and goes with it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use libtest_mimic::{Failed, Trial};
use selvedge_lab::eventually;
use serde_json::Value;

use crate::cluster::{Running, apply, get, kubectl, test_image};

/// Long enough for anything that is going to happen in a cluster, on a slow and busy machine too.
pub const BOUND: Duration = Duration::from_secs(120);

/// A test in a namespace of its own.
pub struct Scene {
    pub namespace: String,
}

/// Makes a test of a function. Its namespace is called as the test is, in Kubernetes' letters.
pub fn trial(name: &str, body: impl FnOnce(&Scene) -> Result<()> + Send + 'static) -> Trial {
    make(name, body, || Turn::WithOthers(TURNS.read().unwrap_or_else(PoisonError::into_inner)))
}

/// A test that disturbs the cluster, and so has it to itself.
pub fn trial_alone(name: &str, body: impl FnOnce(&Scene) -> Result<()> + Send + 'static) -> Trial {
    make(name, body, || Turn::Alone(TURNS.write().unwrap_or_else(PoisonError::into_inner)))
}

static TURNS: RwLock<()> = RwLock::new(());

/// Held while a test runs.
#[expect(dead_code, reason = "what is held is held by being there")]
enum Turn {
    WithOthers(RwLockReadGuard<'static, ()>),
    Alone(RwLockWriteGuard<'static, ()>),
}

fn make(
    name: &str,
    body: impl FnOnce(&Scene) -> Result<()> + Send + 'static,
    turn: impl FnOnce() -> Turn + Send + 'static,
) -> Trial {
    let named = name.to_owned();
    Trial::test(name, move || {
        let _turn = turn();
        let scene = Scene::open(&named).map_err(|error| Failed::from(format!("{error:#}")))?;
        let failure = match catch_unwind(AssertUnwindSafe(|| body(&scene))) {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => format!("{error:#}"),
            Err(_) => "it panicked".to_owned(),
        };
        Err(Failed::from(format!("{failure}\n{}", scene.tell())))
    })
}

/// Whether a list of conditions has this one, of the present generation of its object.
pub fn is_said(list: &Value, kind: &str, wanted: &str, words: &str, of: &Value) -> bool {
    let mut conditions = list["conditions"].as_array().into_iter().flatten();
    let Some(condition) = conditions.find(|condition| condition["type"] == kind) else { return false };
    let word = |field: &str| condition[field].as_str().unwrap_or_default();
    condition["observedGeneration"] == of["metadata"]["generation"]
        && format!("{}/{}", word("status"), word("reason")) == wanted
        && word("message").contains(words)
}

impl Scene {
    fn open(name: &str) -> Result<Self> {
        let letters = name.chars().map(|letter| if letter.is_ascii_alphanumeric() { letter } else { '-' });
        let name = letters.collect::<String>().to_ascii_lowercase();
        Self::make(name[..name.len().min(LONGEST_NAME)].trim_matches('-').to_owned())
    }

    /// A further namespace for the same test.
    pub fn another(&self, called: &str) -> Result<Self> {
        let own = &self.namespace[..self.namespace.len().min(LONGEST_NAME - called.len() - 1)];
        Self::make(format!("{}-{called}", own.trim_matches('-')))
    }

    fn make(name: String) -> Result<Self> {
        // One of the same name may be on its way out.
        kubectl(&["delete", "namespace", &name, "--ignore-not-found"])?;
        kubectl(&["create", "namespace", &name])?;
        let account = || kubectl(&["get", "serviceaccount", "default", "--namespace", &name]).ok();
        eventually("the namespace has its service account", BOUND, account)?;
        Ok(Self { namespace: name })
    }

    /// Waits until an object has a condition that says this of its present generation: `wanted` is `STATUS/REASON`, and
    /// `words` are in the message.
    pub fn says(&self, kind: &str, name: &str, condition: &str, wanted: &str, words: &str) -> Result<()> {
        let mut seen = Value::Null;
        let said = eventually(&format!("{kind} {name} says {condition}={wanted} {words:?}"), BOUND, || {
            let object = get(&["--namespace", &self.namespace, kind, name]).ok()?;
            seen = object["status"].clone();
            is_said(&seen, condition, wanted, words, &object).then_some(())
        });
        said.with_context(|| format!("its status is {seen}"))
    }

    /// Makes or changes objects, given as YAML.
    pub fn apply(&self, manifest: &str) -> Result<()> {
        apply(&self.namespace, manifest)
    }

    /// A pod of the test image, with a label `app` of its name; returns once it is Ready.
    pub fn pod(&self, name: &str, node: &str, arguments: &[&str]) -> Result<()> {
        self.pod_with(name, node, "", arguments)?;
        self.wait_for("condition=Ready", name)
    }

    /// The same with more in its spec, in YAML's short form (`restartPolicy: Never, hostNetwork: true`), and without
    /// waiting for it.
    pub fn pod_with(&self, name: &str, node: &str, spec: &str, arguments: &[&str]) -> Result<()> {
        let (arguments, image) = (serde_json::to_string(arguments)?, test_image()?);
        let container = format!("{{name: main, image: \"{image}\", imagePullPolicy: Never, args: {arguments}}}");
        let more = if spec.is_empty() { String::new() } else { format!("{spec}, ") };
        self.apply(&format!(
            "apiVersion: v1\n\
             kind: Pod\n\
             metadata: {{name: {name}, labels: {{app: {name}}}}}\n\
             spec: {{nodeName: {node}, terminationGracePeriodSeconds: 1, {more}containers: [{container}]}}\n"
        ))
    }

    /// Waits as `kubectl wait --for` does: `condition=Ready`, `jsonpath={.status.phase}=Succeeded`.
    pub fn wait_for(&self, state: &str, pod: &str) -> Result<()> {
        let state = format!("--for={state}");
        let bound = format!("--timeout={}s", BOUND.as_secs());
        kubectl(&["wait", "--namespace", &self.namespace, &state, &bound, &format!("pod/{pod}")]).map(drop)
    }

    /// Runs the test program in a pod, and returns what it prints.
    pub fn run(&self, pod: &str, arguments: &[&str]) -> Result<String> {
        let front = ["exec", "--namespace", &self.namespace, pod, "--", "selvedge-pod"];
        Ok(kubectl(&[&front, arguments].concat())?.trim().to_owned())
    }

    /// Starts the test program in a pod; it goes on beside the test.
    pub fn start(&self, pod: &str, arguments: &[&str]) -> Result<Running> {
        let front = ["exec", "--stdin", "--namespace", &self.namespace, pod, "--", "selvedge-pod"];
        Running::start(&[&front, arguments].concat())
    }

    /// Starts a conversation with an echo server; returns once it is under way.
    pub fn talk(&self, pod: &str, to: &str) -> Result<Running> {
        let mut talk = self.start(pod, &["talk", to])?;
        let line = talk.line()?;
        if line != "under way" {
            bail!("{pod} cannot talk with {to}: {line}{}", talk.end()?);
        }
        Ok(talk)
    }

    pub fn logs(&self, pod: &str) -> Result<String> {
        kubectl(&["logs", "--namespace", &self.namespace, pod])
    }

    pub fn pod_ip(&self, pod: &str) -> Result<String> {
        let pod = get(&["--namespace", &self.namespace, "pod", pod])?;
        let ip = pod["status"]["podIP"].as_str().context("a pod without an address")?;
        ensure!(!ip.is_empty(), "a pod with an empty address");
        Ok(ip.to_owned())
    }

    /// What a person would look at first: events, pods and their logs, and what the agents and the controller said.
    fn tell(&self) -> String {
        let mut told = String::new();
        for namespace in [self.namespace.as_str(), "selvedge-system"] {
            let asked = ["events", "pods"].map(|what| vec!["get", what, "--output", "wide"]);
            for mut arguments in asked {
                arguments.extend(["--namespace", namespace]);
                told.push_str(&section(&arguments));
            }
            let pods = kubectl(&["get", "pods", "--namespace", namespace, "--output", "name"]).unwrap_or_default();
            for pod in pods.lines() {
                let logs = ["logs", pod, "--namespace", namespace, "--all-containers", "--prefix", "--tail=60"];
                told.push_str(&section(&logs));
                told.push_str(&section(&[&logs[..], &["--previous"]].concat()));
            }
        }
        told
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        // The next test need not wait for it; what stays is removed with the cluster.
        let _ = kubectl(&["delete", "namespace", &self.namespace, "--ignore-not-found", "--wait=false"]);
    }
}

/// What kubectl says, if it says anything.
fn section(arguments: &[&str]) -> String {
    match kubectl(arguments) {
        Ok(text) if !text.trim().is_empty() => format!("\n--- kubectl {}\n{}\n", arguments.join(" "), text.trim_end()),
        _ => String::new(),
    }
}

/// RFC 1123 labels have at most 63 characters.
const LONGEST_NAME: usize = 63;
