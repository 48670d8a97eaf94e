//! `selvedge explain` and the agents are asked the same, and must agree.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use libtest_mimic::Trial;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use selvedge::mesh::{MeshSettings, NamespacedName};
use selvedge::model::Model;
use selvedge::model::explain::{EndpointExplanation, Explanation, Party, Question, explain};
use selvedge::policy::Verdict;
use selvedge::source::directory;
use selvedge_lab::{Agent, AgentOptions, BOUND, Lab, Pod, PodSpec, Server, ServiceSpec, eventually, trial_with};
use serde_json::{Value, json};

use crate::knock::{Ended, Knock, knock};
use crate::lab;
use crate::policy::enforce;

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![trial_with("explain::it_answers_people", lab(), it_answers_people)];
    trials.extend(seeds().into_iter().enumerate().map(|(world, seed)| {
        let name = format!("explain::it_agrees_with_the_agents_in_random_world_{}", world + 1);
        trial_with(&name, lab(), move |lab| {
            agrees_in_a_random_world(lab, seed)
                .with_context(|| format!("replay this world with {SEED}={seed}, manifests:\n{}", written(lab)))
        })
    }));
    trials
}

fn agrees_in_a_random_world(lab: &Lab, seed: u64) -> Result<()> {
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
            (Verdict::Deny, Ended::Reset) => {
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

fn policy(random: &mut StdRng, name: &str) -> Value {
    let namespace = *pick(random, &["shop", "shop", "bank", "selvedge-system"]);
    let scope = match random.random_range(0..4) {
        0 => json!({"selector": {"matchLabels": {"tier": pick(random, &TIERS)}}}),
        1 => json!({"targetRefs": [{"kind": "Service", "name": format!("service-{}", random.random_range(1..=3))}]}),
        _ => json!({}),
    };
    let (kind, mut spec) = match random.random_range(0..5) {
        0 => {
            let mut spec = json!({"mtls": {"mode": pick(random, &["STRICT", "PERMISSIVE", "UNSET"])}});
            if random.random_bool(0.4) {
                spec["portLevelMtls"] = json!({"9090": {"mode": pick(random, &["STRICT", "PERMISSIVE"])}});
            }
            ("PeerAuthentication", spec)
        }
        _ => {
            let rules: Vec<Value> = (0..random.random_range(0..3)).map(|_| rule(random)).collect();
            let action = *pick(random, &["ALLOW", "ALLOW", "DENY", "DENY", "DENY", "AUDIT", "CUSTOM", "PERMIT"]);
            ("AuthorizationPolicy", json!({"action": action, "rules": rules}))
        }
    };
    if kind == "AuthorizationPolicy" || scope.get("selector").is_some() {
        merge(&mut spec, scope);
    }
    json!({
        "apiVersion": "selvedge.dev/v1alpha1", "kind": kind,
        "metadata": {
            "namespace": namespace, "name": name,
            "annotations": {"selvedge.dev/dry-run": random.random_bool(0.1).to_string()},
        },
        "spec": spec,
    })
}

fn rule(random: &mut StdRng) -> Value {
    let mut rule = json!({});
    if random.random_bool(0.7) {
        let sources: Vec<Value> = (0..random.random_range(1..3))
            .map(|_| match random.random_range(0..8) {
                0 => json!({"principals": ["cluster.local/ns/shop/*"]}),
                1 => json!({"principals": ["*"]}),
                2 => json!({"notPrincipals": ["*/sa/web"]}),
                3 => json!({"namespaces": [pick(random, &["shop", "bank"])]}),
                4 => json!({"serviceAccounts": ["shop/web", "bank/teller"]}),
                5 => json!({"ipBlocks": [pick(random, &["10.244.1.0/24", "10.244.2.0/24", "fd00:10:244:1::/64"])]}),
                6 => json!({"notIpBlocks": [pick(random, &["10.244.1.0/24", "fd00:10:244:2::/64"])]}),
                _ => json!({"notNamespaces": ["bank"], "requestPrincipals": ["*"]}),
            })
            .map(|source| json!({"source": source}))
            .collect();
        rule["from"] = sources.into();
    }
    if random.random_bool(0.5) {
        let operation = match random.random_range(0..5) {
            0 | 1 => json!({"ports": ["8080"]}),
            2 | 3 => json!({"notPorts": ["8080"]}),
            _ => json!({"methods": ["GET"], "ports": ["9090"]}),
        };
        rule["to"] = json!([{"operation": operation}]);
    }
    if random.random_bool(0.2) {
        let key = *pick(random, &["source.namespace", "source.principal", "request.headers[x]", "source.nmespace"]);
        rule["when"] = json!([{"key": key, "values": ["shop", "*/sa/web"]}]);
    }
    rule
}

fn it_answers_people(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a").service_account("web"))?;
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b").service_account("cart").port("http", 8080))?;
    let old = lab.pod(PodSpec::new("shop/old", "node-b").outside())?;
    lab.service(&ServiceSpec::new("shop/cart-service").cluster_ip(vips(1)[0]).port("http", 80, 8080).endpoint(&cart))?;
    lab.put(&json!({
        "apiVersion": "selvedge.dev/v1alpha1", "kind": "AuthorizationPolicy",
        "metadata": {"namespace": "shop", "name": "web-only"},
        "spec": {"rules": [{"from": [{"source": {"serviceAccounts": ["web"]}}], "to": [{"operation": {"ports": ["8080"]}}]}]},
    }))?;
    let (web_ip, cart_ip, vip) = (web.ip().to_string(), cart.ip().to_string(), vips(1)[0].to_string());
    // Each name of one destination gives one answer, on the only port it has.
    for from in ["shop/web", &web_ip] {
        for to in ["shop/cart", &cart_ip, "shop/cart-service", &vip] {
            let output = run_explain(lab, &[from, to])?;
            ensure!(output.code == 0 && output.stdout.contains(": allowed"), "{from} to {to}: {output:?}");
            ensure!(output.stdout.contains("AuthorizationPolicy shop/web-only: rule 1"), "{from} to {to}: {output:?}");
        }
    }
    for (from, to, reason) in [
        ("shop/web", vec!["shop/cart", "--port", "9090"], "policy:shop/web-only"),
        ("shop/old", vec!["shop/cart"], "policy:shop/web-only"),
        ("shop/web", vec!["shop/cart-service", "--port", "81"], "no-endpoint"),
        ("shop/web", vec!["10.244.1.250", "--port", "80"], "unknown-destination"),
        ("shop/web", vec!["shop/cart", "--port", "15008"], "protocol"),
    ] {
        let output = run_explain(lab, &[&[from][..], &to, &["-o", "json"]].concat())?;
        let said: Value = serde_json::from_str(&output.stdout).with_context(|| format!("{output:?}"))?;
        ensure!(output.code == 0 && said["verdict"] == "deny" && said["reason"] == reason, "{from} to {to:?}: {said}");
    }
    for (arguments, wanted) in [
        (["shop/nobody", "shop/cart"], "there is no Pod shop/nobody"),
        (["shop/web", "shop/nobody"], "there is neither a Pod nor a Service shop/nobody"),
        (["shop/web", "nobody"], "neither an IP address nor of the form namespace/name"),
        (["shop/web", "shop/old"], "declares no port: give --port"),
        (["shop/web", "192.0.2.1"], "give --port"),
    ] {
        let output = run_explain(lab, &arguments)?;
        ensure!(output.code != 0 && output.stdout.is_empty() && output.stderr.contains(wanted), "{output:?}");
    }
    drop(old);
    Ok(())
}

#[derive(Debug)]
struct Said {
    code: i32,
    stdout: String,
    stderr: String,
}

fn run_explain(lab: &Lab, arguments: &[&str]) -> Result<Said> {
    let output =
        Command::new(lab.binary()?).arg("explain").arg("--manifests").arg(lab.manifests()).args(arguments).output()?;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ok(Said { code: output.status.code().unwrap_or(-1), stdout: text(output.stdout), stderr: text(output.stderr) })
}

fn written(lab: &Lab) -> String {
    let objects = selvedge_lab::read_documents(lab.manifests()).unwrap_or_default();
    objects.iter().map(|object| format!("{object}\n")).collect()
}

/// One seed a world: chosen anew each time, or the one that the environment names.
fn seeds() -> Vec<u64> {
    match std::env::var(SEED).ok().and_then(|seed| seed.parse().ok()) {
        Some(seed) => vec![seed],
        None => (0..WORLDS).map(|world| RandomState::new().hash_one(world)).collect(),
    }
}

fn pick<'a, T>(random: &mut StdRng, all: &'a [T]) -> &'a T {
    all.choose(random).unwrap_or_else(|| panic!("nothing to pick from"))
}

fn merge(one: &mut Value, other: Value) {
    if let (Some(fields), Value::Object(more)) = (one.as_object_mut(), other) {
        fields.extend(more);
    }
}

fn vips(number: u8) -> [IpAddr; 2] {
    let v6 = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, number.into());
    [Ipv4Addr::new(10, 96, 0, number).into(), v6.into()]
}

fn is_vip(ip: IpAddr) -> bool {
    (1..=SERVICES).any(|number| vips(number).contains(&ip))
}

const SEED: &str = "SELVEDGE_SEED";
const WORLDS: usize = 3;
const ROUNDS: usize = 4;
/// How many questions of a round the command itself is asked.
const COMMANDS: usize = 4;
const SERVICES: u8 = 3;
const PORTS: [u16; 2] = [8080, 9090];
const TIERS: [&str; 2] = ["front", "back"];
const PODS: [(&str, &str); 6] = [
    ("shop/web", "node-a"),
    ("shop/cart", "node-b"),
    ("bank/teller", "node-a"),
    ("bank/vault", "node-b"),
    ("old/stranger", "node-a"),
    ("old/ledger", "node-b"),
];
