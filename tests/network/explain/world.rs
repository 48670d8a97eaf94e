//! Random worlds, in which every call is made and explain is asked the same.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use selvedge::mesh::{MeshSettings, NamespacedName};
use selvedge::model::Model;
use selvedge::model::explain::{EndpointExplanation, Explanation, Party, Question, explain};
use selvedge::policy::Verdict;
use selvedge::source::directory;
use selvedge_lab::{Agent, AgentOptions, BOUND, Lab, Pod, PodSpec, Server, ServiceSpec, eventually};
use serde_json::{Value, json};

use super::policies::{TIERS, pick, policy};
use super::{SERVICES, run_explain, vips};
use crate::knock::{Ended, Knock, knock};
use crate::policy::enforce;

pub fn agrees_in_a_random_world(lab: &Lab, seed: u64) -> Result<()> {
    let mut random = StdRng::seed_from_u64(seed);
    let world = World::make(lab, &mut random)?;
    for round in 0..ROUNDS {
        world.write_services(&mut random)?;
        let count = random.random_range(0..=5);
        let policies: Vec<Value> = (0..count).map(|at| policy(&mut random, &format!("p{round}-{at}"))).collect();
        enforce(lab, &world.agents, &policies)?;
        lab.settle(&world.agents)?;
        world.compare(&mut random)?;
    }
    Ok(())
}

/// Pods in the mesh, outside it and with exclusions, each with a server on two ports.
struct World<'a> {
    lab: &'a Lab,
    pods: Vec<Pod>,
    agents: Vec<Agent>,
    _servers: Vec<Server>,
}

impl<'a> World<'a> {
    fn make(lab: &'a Lab, random: &mut StdRng) -> Result<Self> {
        lab.namespace("old", false)?;
        let mode = *pick(random, &["enabled", "required"]);
        lab.put(&json!({
            "apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": "bank", "annotations": {"selvedge.dev/mesh": mode}},
        }))?;
        let mut pods = Vec::new();
        let mut servers = Vec::new();
        for (name, node) in PODS {
            let account = name.split('/').next_back().unwrap_or(name);
            let account = if random.random_bool(0.1) { "" } else { account };
            let mut spec =
                PodSpec::new(name, node).service_account(account).label("tier", pick::<&str>(random, &TIERS));
            for (key, value, chance) in [
                ("selvedge.dev/mesh", "disabled", 0.15),
                ("selvedge.dev/exclude-inbound-ports", "9090", 0.15),
                ("selvedge.dev/exclude-outbound-ports", "8080,81", 0.15),
                ("selvedge.dev/exclude-outbound-cidrs", "10.244.2.0/24", 0.1),
            ] {
                if random.random_bool(chance) {
                    spec = spec.annotation(key, value);
                }
            }
            let pod = lab.pod(spec)?;
            for port in PORTS {
                servers.push(pod.serve_greeting(port, &pod.full_name())?);
            }
            pods.push(pod);
        }
        let agents = lab.start_agents(&AgentOptions::default())?;
        Ok(Self { lab, pods, agents, _servers: servers })
    }

    fn write_services(&self, random: &mut StdRng) -> Result<()> {
        for number in 1..=SERVICES {
            let namespace = if number == 1 { "shop" } else { "bank" };
            let mut spec = ServiceSpec::new(&format!("{namespace}/service-{number}"));
            spec = vips(number).into_iter().fold(spec, ServiceSpec::cluster_ip);
            spec = spec.port("http", 80, PORTS[0]).port("admin", 81, PORTS[1]);
            for pod in &self.pods {
                if random.random_bool(0.4) {
                    let condition = pick(random, &[[true, true, false], [false, false, false], [false, true, true]]);
                    let [ready, serving, terminating] = *condition;
                    let conditions = json!({"ready": ready, "serving": serving, "terminating": terminating});
                    spec = spec.endpoint_with(pod, conditions);
                }
            }
            for (pointer, value) in [
                ("/spec/internalTrafficPolicy", "Local"),
                ("/spec/trafficDistribution", "PreferSameNode"),
                ("/spec/sessionAffinity", "ClientIP"),
            ] {
                if random.random_bool(0.2) {
                    spec = spec.field(pointer, value.into());
                }
            }
            self.lab.service(&spec)?;
        }
        Ok(())
    }

    /// Every pod calls every pod and every Service, and explain is asked the same.
    fn compare(&self, random: &mut StdRng) -> Result<()> {
        let model = model(self.lab)?;
        let state = model.read();
        let mut calls = Vec::new();
        for (caller, pod) in self.pods.iter().enumerate() {
            for to in self.destinations(random) {
                // Nobody leads an uncaptured call from a Service's address to its endpoints here.
                let name = NamespacedName::new(pod.namespace_name(), pod.name());
                let workload = state.mesh.workload_by_name(&name).context("a pod that the model has")?;
                let captured = matches!(&workload.membership, selvedge::mesh::Membership::Joined(exclusions)
                    if !exclusions.exclude_outbound(to));
                if !captured && is_vip(to.ip()) {
                    continue;
                }
                let question =
                    Question { from: Party::Named(name), to: Party::Address(to.ip()), port: Some(to.port()) };
                let explanation = explain(&state, &question).map_err(anyhow::Error::msg)?;
                calls.push(Call { caller, to, captured, explanation });
            }
        }
        drop(state);
        let before = self.lines()?;
        let knocks = self.knock(&calls)?;
        for call in (0..COMMANDS).filter_map(|_| calls.choose(random)) {
            let said = self.ask_the_command(call)?;
            ensure!(said == serde_json::to_value(&call.explanation)?, "the command says {said}");
        }
        calls.iter().zip(&knocks).try_for_each(|(call, knock)| {
            self.check(call, knock, &before).with_context(|| {
                let from = self.pods[call.caller].full_name();
                format!("{from} to {}: {knock:?}, and explain says\n{}", call.to, call.explanation)
            })
        })
    }

    fn destinations(&self, random: &mut StdRng) -> Vec<SocketAddr> {
        let mut destinations = Vec::new();
        for pod in &self.pods {
            destinations.extend(PORTS.map(|port| SocketAddr::new(*pick(random, pod.ips()), port)));
        }
        for number in 1..=SERVICES {
            let vips: Vec<IpAddr> = vips(number).into_iter().filter(|ip| self.lab.families().has(*ip)).collect();
            destinations.extend([80, 81, 82].map(|port| SocketAddr::new(*pick(random, &vips), port)));
        }
        destinations
    }

    /// Makes the calls, those of each pod one after the other.
    fn knock(&self, calls: &[Call]) -> Result<Vec<Knock>> {
        let mut made: BTreeMap<usize, Knock> = BTreeMap::new();
        thread::scope(|scope| {
            let of_pod = |pod: usize| {
                let mine = calls.iter().enumerate().filter(move |(_, call)| call.caller == pod);
                mine.map(|(at, call)| Ok((at, knock(&self.pods[pod], call.to)?))).collect::<Result<Vec<_>>>()
            };
            let threads: Vec<_> = (0..self.pods.len()).map(|pod| scope.spawn(move || of_pod(pod))).collect();
            for thread in threads {
                made.extend(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
            }
            Ok::<_, anyhow::Error>(())
        })?;
        Ok(made.into_values().collect())
    }

    fn check(&self, call: &Call, knock: &Knock, before: &[usize]) -> Result<()> {
        let (verdict, reason) = match &call.explanation.endpoints[..] {
            [] | [_] => (call.explanation.verdict, call.explanation.reason.clone()),
            several => {
                let line = self.line(self.pods[call.caller].node_name(), call, knock, before)?;
                let chosen = |endpoint: &&EndpointExplanation| line["destination_addr"] == endpoint.address.to_string();
                let endpoint =
                    several.iter().find(chosen).with_context(|| format!("an endpoint unheard of: {line}"))?;
                (endpoint.verdict, endpoint.reason.clone())
            }
        };
        match (verdict, &knock.ended) {
            (Verdict::Allow, Ended::Greeted(_)) => Ok(()),
            (Verdict::Deny, Ended::Refused) => {
                let logger =
                    if call.captured { self.pods[call.caller].node_name() } else { self.node_of(call.to.ip())? };
                let line = self.line(logger, call, knock, before)?;
                ensure!(line["reason"].as_str() == reason.as_deref(), "the agent says {line}");
                Ok(())
            }
            _ => bail!("they disagree"),
        }
    }

    /// The line of a call among those that its agent has written since: ports are used again.
    fn line(&self, node: &str, call: &Call, knock: &Knock, before: &[usize]) -> Result<Value> {
        let at = self.agents.iter().position(|agent| agent.node() == node).context("a node without an agent")?;
        let (from, to) = (knock.from.to_string(), call.to.to_string());
        let is_it = |line: &Value| {
            line["source_addr"] == from && (line["destination_addr"] == to || line["requested_addr"] == to)
        };
        eventually("the call's line", BOUND, || {
            self.agents[at].access_log().ok()?.into_iter().skip(before[at]).find(is_it)
        })
    }

    /// How many lines each agent has written.
    fn lines(&self) -> Result<Vec<usize>> {
        self.agents.iter().map(|agent| Ok(agent.access_log()?.len())).collect()
    }

    fn node_of(&self, ip: IpAddr) -> Result<&str> {
        let pod = self.pods.iter().find(|pod| pod.ips().contains(&ip)).context("nobody has that address")?;
        Ok(pod.node_name())
    }

    fn ask_the_command(&self, call: &Call) -> Result<Value> {
        let from = self.pods[call.caller].full_name();
        let (to, port) = (call.to.ip().to_string(), call.to.port().to_string());
        let output = run_explain(self.lab, &[&from, &to, "--port", &port, "-o", "json"])?;
        ensure!(output.code == 0, "explain ended with {}: {}", output.code, output.stderr);
        Ok(serde_json::from_str(&output.stdout)?)
    }
}

struct Call {
    caller: usize,
    to: SocketAddr,
    captured: bool,
    explanation: Explanation,
}

fn model(lab: &Lab) -> Result<Model> {
    let trust_domain = "cluster.local".parse().map_err(|error| anyhow::anyhow!("{error}"))?;
    let model = Model::new(MeshSettings { trust_domain, cluster_cidrs: Vec::new() });
    model.apply(directory::load(lab.manifests())?.deltas);
    Ok(model)
}

fn is_vip(ip: IpAddr) -> bool {
    (1..=SERVICES).any(|number| vips(number).contains(&ip))
}

const ROUNDS: usize = 4;
/// How many questions of a round the command itself is asked.
const COMMANDS: usize = 4;
const PORTS: [u16; 2] = [8080, 9090];
const PODS: [(&str, &str); 6] = [
    ("shop/web", "node-a"),
    ("shop/cart", "node-b"),
    ("bank/teller", "node-a"),
    ("bank/vault", "node-b"),
    ("old/stranger", "node-a"),
    ("old/ledger", "node-b"),
];
