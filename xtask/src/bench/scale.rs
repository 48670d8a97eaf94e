//! How long a change takes, on a node with few pods and on one with many.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use selvedge_lab::{Agent, AgentOptions, BOUND, Pod, PodSpec, eventually};
use serde_json::{Value, json};

use crate::bench::progress;
use crate::bench::report::number;
use crate::bench::stage::{HTTP, NEAR, Stage};
use crate::bench::stats::Summary;
use crate::bench::usage::Carriers;
use crate::bench::variants::Place;
use crate::style::bold;

/// The word by which `--only` finds this.
pub const TITLE: &str = "scale";

/// What was seen with some number of pods.
pub struct Scale {
    pods: usize,
    capture: f64,
    join: Summary,
    policy: Summary,
    memory: f64,
}

/// Measures with the pods that are there, then with so many on the client's node, or as many as the machine takes.
pub fn measure(stage: &Stage, pods: usize, times: u32) -> Result<Scales> {
    let late = stage.lab.pod(PodSpec::new("bench/late", NEAR).outside())?;
    let mut crowd = Vec::new();
    let few = Scale::measure(stage, &late, &crowd, times)?;
    let mut short_of = None;
    while few.pods + crowd.len() < pods {
        progress(&format!("{TITLE}: making {pods} pods: {}", crowd.len()));
        match stage.lab.pod(PodSpec::new(&format!("bench/crowd-{}", crowd.len()), NEAR)) {
            Ok(pod) => crowd.push(pod),
            Err(error) => {
                short_of =
                    Some(format!("only {} of {pods} pods fit on this machine: {error:#}", few.pods + crowd.len()));
                break;
            }
        }
    }
    let many = Scale::measure(stage, &late, &crowd, times)?;
    crowd.into_iter().try_for_each(|pod| stage.lab.delete(pod))?;
    stage.lab.delete(late)?;
    Ok(Scales { few, many, short_of })
}

/// Few pods and many, side by side.
pub struct Scales {
    few: Scale,
    many: Scale,
    /// Why they are not as many as were asked for.
    short_of: Option<String>,
}

impl Scales {
    pub fn text(&self) -> String {
        let both = [&self.few, &self.many];
        let heads: String = both.iter().map(|scale| format!("{:>26}", format!("{} pods", scale.pods))).collect();
        let mut text = format!("{}\n", bold(format!("{:<46}{heads}", "Pods on the node")));
        let spread =
            |value: Summary| format!("{} ({}..{})", number(value.median), number(value.min), number(value.max));
        let mut row = |name: &str, of: &dyn Fn(&Scale) -> String| {
            text.push_str(&format!("  {name:<44}{:>26}{:>26}\n", of(&self.few), of(&self.many)));
        };
        row("all captured, from the agent's start s", &|scale| number(scale.capture));
        row("a pod has joined ms", &|scale| spread(scale.join));
        row("a policy change is in force ms", &|scale| spread(scale.policy));
        row("memory of the agent MB", &|scale| number(scale.memory));
        text.extend(self.short_of.iter().map(|why| format!("  {why}\n")));
        text
    }

    pub fn json(&self) -> Value {
        let of = |scale: &Scale| {
            json!({
                "pods": scale.pods,
                "captured_s": scale.capture,
                "join_ms": scale.join,
                "policy_ms": scale.policy,
                "memory_mb": scale.memory,
            })
        };
        json!({"few": of(&self.few), "many": of(&self.many), "short_of": self.short_of})
    }
}

impl Scale {
    fn measure(stage: &Stage, late: &Pod, crowd: &[Pod], times: u32) -> Result<Self> {
        let joined = crowd.len() + stage.pods().iter().filter(|pod| pod.node_name() == NEAR).count();
        progress(&format!("{TITLE}: {joined} pods"));
        let began = Instant::now();
        let options = AgentOptions::default().arg("--drain").arg("1s").without_access_log();
        let agent = stage.lab.node(NEAR).spawn_agent(&options)?;
        let captured = |count: usize| {
            eventually(&format!("{count} pods are captured"), LONG, || is_captured(&agent, count).then_some(()))
                .with_context(|| agent.log_tail())
        };
        captured(joined)?;
        let capture = began.elapsed().as_secs_f64();
        let mut join = Vec::new();
        for _ in 0..times {
            progress(&format!("{TITLE}: {joined} pods: joining another"));
            stage.lab.join(late, true)?;
            join.push(until("a pod joins", || is_captured(&agent, joined + 1).then_some(()))?);
            stage.lab.join(late, false)?;
            captured(joined)?;
        }
        let mut policy = Vec::new();
        for _ in 0..times {
            progress(&format!("{TITLE}: {joined} pods: changing a policy"));
            let mut connection = connect(stage)?;
            stage.lab.deny_all(stage.client.namespace_name())?;
            policy.push(until_cut(&mut connection)?);
            stage.lab.remove("authorizationpolicy-bench-deny-all.yaml")?;
        }
        let memory = Carriers::of([agent.pid()].into_iter().chain(agent.worker())).resident();
        agent.stop()?;
        let summary = |values: Vec<f64>| Summary::of(values).context("nothing was measured");
        Ok(Self { pods: joined, capture, join: summary(join)?, policy: summary(policy)?, memory })
    }
}

fn is_captured(agent: &Agent, count: usize) -> bool {
    agent.metrics().is_ok_and(|metrics| metrics.sum("selvedge_pods", &[("state", "captured")]) == count as f64)
}

/// A connection through the mesh that lives; made anew until the policy before is forgotten.
fn connect(stage: &Stage) -> Result<TcpStream> {
    eventually("the client may talk to the server", BOUND, || {
        let mut stream = stage.client.connect((stage.server(Place::OneNode).ip(), HTTP)).ok()?;
        stream.set_read_timeout(Some(BOUND)).ok()?;
        stream.write_all(b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n").ok()?;
        stream.read(&mut [0; 4096]).is_ok_and(|count| count > 0).then_some(stream)
    })
}

/// Milliseconds until the connection is no more.
fn until_cut(connection: &mut TcpStream) -> Result<f64> {
    let began = Instant::now();
    match connection.read(&mut [0; 16]) {
        Ok(0) => {}
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        Ok(_) => bail!("the server spoke instead of being cut off"),
        Err(error) => return Err(error).context("a policy change was not in force"),
    }
    Ok(began.elapsed().as_secs_f64() * 1000.0)
}

/// Milliseconds until something holds, to the millisecond.
fn until(what: &str, mut holds: impl FnMut() -> Option<()>) -> Result<f64> {
    let began = Instant::now();
    while holds().is_none() {
        if began.elapsed() > LONG {
            bail!("not within {LONG:?}: {what}");
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok(began.elapsed().as_secs_f64() * 1000.0)
}

/// A thousand pods take their time.
const LONG: Duration = Duration::from_secs(300);
