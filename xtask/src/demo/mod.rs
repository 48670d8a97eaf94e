//! `cargo xtask demo`: two nodes, five pods, one folder of manifests; real traffic, and what was seen of it.

mod calls;
mod report;
mod stay;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{self, Command, ExitCode};
use std::thread;

use anyhow::{Context, Result, ensure};
use clap::Args;
use nix::sys::signal::{SigSet, Signal};
use selvedge_lab::{Agent, AgentOptions, BOUND, Capture, Lab, Pod, Server, enter, eventually, read_documents};
use serde_json::Value;

use crate::demo::calls::{CALLS, Call, Expected};
use crate::demo::report::Report;
use crate::style::{bold, dim};
use crate::{build, tools};

/// What `cargo xtask demo` takes.
#[derive(Args)]
pub struct Options {
    /// Prints one JSON object, {"held": bool, "expectations": [{"name", "held", "detail"}]}, and nothing else.
    #[arg(long)]
    json: bool,
    /// Leaves everything running and prints commands to play with; Ctrl-C ends it.
    #[arg(long, conflicts_with = "json")]
    stay: bool,
    /// Uses the binary that is there instead of building one.
    #[arg(long)]
    skip_build: bool,
    /// Runs this binary instead of building one.
    #[arg(long, env = "SELVEDGE_BIN", value_name = "FILE")]
    binary: Option<PathBuf>,
    /// The folder of manifests; the agents watch it in place.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/demo/manifests"), value_name = "DIR")]
    manifests: PathBuf,
}

pub fn run(options: &Options) -> Result<ExitCode> {
    tools::require(&[&tools::IPTABLES, &tools::IPROUTE2])?;
    let binary = match (&options.binary, options.skip_build) {
        (Some(binary), _) => binary.clone(),
        (None, true) => build::release_path()?,
        (None, false) => build::release()?,
    };
    // From here on everything lives in a world that ends with this process, so that nothing needs to be undone.
    let world = enter();
    end_on_signals()?;
    let mut report = Report::new(options.json);
    let told = Stage::set(&binary, options).and_then(|mut stage| {
        stage.play(&mut report)?;
        if options.stay {
            stay::stay(&stage, &world, &binary);
        }
        Ok(())
    });
    Ok(report.close(told.err().as_ref()))
}

/// The lab with its pods and servers, and the agents once they run.
struct Stage {
    lab: Lab,
    pods: BTreeMap<String, Pod>,
    services: BTreeMap<String, String>,
    servers: BTreeMap<&'static str, Server>,
    agents: Vec<Agent>,
    binary: PathBuf,
}

impl Stage {
    fn set(binary: &std::path::Path, options: &Options) -> Result<Self> {
        let (lab, pods) = Lab::from_manifests(&options.manifests, Some(binary.into()))?;
        let pods: BTreeMap<_, _> = pods.into_iter().map(|pod| (pod.full_name(), pod)).collect();
        let objects = read_documents(&options.manifests)?;
        let services = objects.iter().filter(|object| object["kind"] == "Service");
        let address = |service: &Value| {
            let text = |pointer: &str| service.pointer(pointer).and_then(Value::as_str).map(str::to_owned);
            let name = format!("{}/{}", text("/metadata/namespace")?, text("/metadata/name")?);
            Some((name, format!("{}:{}", text("/spec/clusterIP")?, service["spec"]["ports"][0]["port"])))
        };
        let services = services.filter_map(address).collect();
        let mut stage =
            Self { lab, pods, services, servers: BTreeMap::new(), agents: Vec::new(), binary: binary.into() };
        stage.servers.insert("shop/catalog", stage.pod("shop/catalog")?.serve_http(8080, "catalog")?);
        stage.servers.insert("shop/ledger", stage.pod("shop/ledger")?.serve_echo(9000)?);
        Ok(stage)
    }

    fn play(&mut self, report: &mut Report) -> Result<()> {
        report.line(&format!("{}: two nodes, five pods, one folder of manifests", bold("Selvedge")));
        report.line(&dim(format!("  {}", self.lab.manifests().display())));
        for node in self.lab.nodes() {
            report.line(&format!("\n  {} {}", bold(node.name()), dim(node.ip())));
            for pod in self.pods.values().filter(|pod| pod.node_name() == node.name()) {
                let place = if self.is_joined(pod) { "in the mesh" } else { "outside the mesh" };
                report.line(&format!("    {:<14} {:<12} {}", pod.full_name(), pod.ip(), dim(place)));
            }
        }
        self.play_without_mesh(report)?;
        self.start_agents(report)?;
        let link = self.lab.link()?;
        let outcomes = self.play_calls(report)?;
        self.tell_link(report, &link, &outcomes)?;
        self.tell_identities(report);
        self.tell_metrics(report)
    }

    /// The control: what the search finds while nothing protects the link.
    fn play_without_mesh(&self, report: &mut Report) -> Result<()> {
        report.section("Without the mesh");
        let link = self.lab.link()?;
        for call in CALLS.iter().filter(|call| call.crosses_link && call.is_allowed()) {
            let needle = call.needle("before")?;
            let answer = call.make(self, &needle, self.pod_address(call)?);
            let found = link.find(needle.as_bytes())?;
            report.expect(
                &format!("{}: the link shows what was sent", call.title()),
                answer.answered && found.is_found(),
                format!("{needle:?} is in {} packets on the link ({})", found.packets, answer.detail),
            );
        }
        Ok(())
    }

    fn start_agents(&mut self, report: &mut Report) -> Result<()> {
        report.section("One agent a node: the pods are captured as they are");
        self.agents = self.lab.start_agents(&AgentOptions::default())?;
        for agent in &self.agents {
            let wanted: BTreeSet<_> = self.joined_on(agent.node()).map(Pod::full_name).collect();
            let capture = eventually("all joined pods are captured, and no other", BOUND, || {
                let capture = agent.dump().ok()?["capture"].take();
                (captured(&capture) == wanted).then_some(capture)
            });
            let counted = || agent.metrics().map(|metrics| metrics.sum("selvedge_pods", &[("state", "captured")]));
            let result = capture.and_then(|capture| Ok((capture, counted()?)));
            let name = format!("{} has captured its joined pods, and no other", agent.node());
            report.attempt(&name, result, |(capture, counted)| {
                let names = wanted.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
                let way = capture["mode"].as_str().unwrap_or("an unknown way");
                let detail = format!("by {way}: {names}; selvedge_pods{{state=\"captured\"}} {counted}");
                (*counted == wanted.len() as f64, detail)
            });
        }
        Ok(())
    }

    fn play_calls(&self, report: &mut Report) -> Result<Vec<(&'static Call, String)>> {
        report.section("Who may talk to whom");
        let mut sent = Vec::new();
        for call in &CALLS {
            let needle = call.needle("meshed")?;
            let heard_before = self.heard(call.to);
            let outcome = call.make(self, &needle, self.address(call)?);
            let explained = self.explain(call)?;
            let why = format!("{}; {}", outcome.detail, explained.why);
            match call.expected {
                Expected::Allowed => {
                    report.expect(&format!("{}: allowed", call.title()), outcome.answered && explained.allowed, why);
                    let client = self.pod(call.from)?.ip();
                    let saw = outcome.saw.map_or_else(|| "nobody".to_owned(), |ip| ip.to_string());
                    let name = format!("{}: the server saw the client's own address", call.title());
                    report.expect(&name, outcome.saw == Some(client), format!("{} saw {saw}", call.to));
                }
                Expected::Denied(reason) => {
                    let unheard = self.heard(call.to) == heard_before;
                    let held = !outcome.answered && unheard && !explained.allowed;
                    report.expect(&format!("{}: denied, and the server never heard of it", call.title()), held, why);
                    let name = format!("{}: the access log says why", call.title());
                    report.attempt(&name, self.find_denial(call, reason), |(node, line)| {
                        let detail = line["detail"].as_str().unwrap_or_default();
                        (explained.reason == reason, format!("{node}: reason {reason}: {detail}"))
                    });
                }
            }
            sent.push((call, needle));
        }
        Ok(sent)
    }

    fn tell_link(&self, report: &mut Report, link: &Capture, sent: &[(&Call, String)]) -> Result<()> {
        report.section("What the link between the nodes shows");
        for (call, needle) in sent.iter().filter(|(call, _)| call.crosses_link) {
            let found = link.find(needle.as_bytes())?;
            let detail = format!(
                "{needle:?} searched in {} packets, {} bytes, and in every TCP stream: {}",
                found.searched_packets,
                found.searched_bytes,
                if found.is_found() { "found" } else { "not found" }
            );
            let name = match call.plaintext {
                false => format!("{}: no readable byte", call.title()),
                true => format!("{}: readable, for {} is outside the mesh (the search works)", call.title(), call.from),
            };
            report.expect(&name, found.is_found() == call.plaintext, detail);
        }
        let outsider = self.pod("legacy/cron")?.ip();
        let tunnel = |address: &SocketAddr| address.port() == TUNNEL;
        let streams = link.streams()?;
        let (tunnelled, beside): (Vec<_>, Vec<_>) = streams.keys().partition(|(from, to)| tunnel(from) || tunnel(to));
        let strays = beside.iter().filter(|(from, to)| from.ip() != outsider && to.ip() != outsider).count();
        let detail = format!("{} streams through port {TUNNEL}, {} of legacy/cron", tunnelled.len(), beside.len());
        let held = !tunnelled.is_empty() && strays == 0;
        report.expect("nothing of the mesh's pods crosses beside the tunnel", held, detail);
        Ok(())
    }

    fn tell_identities(&self, report: &mut Report) {
        report.section("Which identity each side saw");
        for call in CALLS.iter().filter(|call| call.is_allowed() && !call.plaintext) {
            let (source, destination) = (identity(call.from), identity(call.to));
            for (direction, side, pod) in [("outbound", "client", call.from), ("inbound", "server", call.to)] {
                let node = self.pods.get(pod).map_or("", Pod::node_name);
                let agent = self.agents.iter().find(|agent| agent.node() == node);
                let line = agent.with_context(|| format!("no agent on {node}")).and_then(|agent| {
                    agent.access_line(&call.title(), |line| {
                        line["direction"] == direction
                            && line["source_identity"] == source
                            && line["destination_identity"] == destination
                    })
                });
                report.attempt(&format!("{}: the {side}'s node knows both ends", call.title()), line, |line| {
                    let key_exchange = line.get("key_exchange").and_then(Value::as_str);
                    let exchange = key_exchange.map(|name| format!(" by {name}")).unwrap_or_default();
                    (true, format!("{node}: {source} -> {destination}{exchange}"))
                });
            }
        }
    }

    fn tell_metrics(&self, report: &mut Report) -> Result<()> {
        report.section("The metrics that came of it");
        for agent in &self.agents {
            let metrics = agent.metrics()?;
            let opened = metrics.sum("selvedge_tcp_connections_opened_total", &[]);
            let failed = metrics.sum("selvedge_connections_failed_total", &[]);
            let seen = metrics.names().into_iter().filter(|name| name.starts_with("selvedge_")).count();
            let sent = metrics.sum("selvedge_tcp_sent_bytes_total", &[]);
            let received = metrics.sum("selvedge_tcp_received_bytes_total", &[]);
            report.expect(
                &format!("{} counts connections, bytes and refusals", agent.node()),
                opened > 0.0 && failed > 0.0,
                format!("{opened} opened, {failed} failed, {sent} bytes sent, {received} received, in {seen} metrics"),
            );
        }
        Ok(())
    }

    fn pod(&self, name: &str) -> Result<&Pod> {
        self.pods.get(name).with_context(|| format!("the manifests have no pod {name}; the demo needs it"))
    }

    fn joined_on<'a>(&'a self, node: &'a str) -> impl Iterator<Item = &'a Pod> {
        self.pods.values().filter(move |pod| pod.node_name() == node && self.is_joined(pod))
    }

    fn is_joined(&self, pod: &Pod) -> bool {
        pod.namespace_name() == "shop"
    }

    /// The pod's own address: what works with no mesh and no kube-proxy.
    fn pod_address(&self, call: &Call) -> Result<String> {
        Ok(format!("{}:{}", self.pod(call.to)?.ip(), call.protocol.port()))
    }

    /// The Service's address from inside the mesh, the pod's from outside.
    fn address(&self, call: &Call) -> Result<String> {
        if call.plaintext {
            return self.pod_address(call);
        }
        self.services.get(call.to).cloned().with_context(|| format!("the manifests have no Service {}", call.to))
    }

    fn heard(&self, server: &str) -> usize {
        self.servers.get(server).map_or(0, |server| server.peers().len())
    }

    fn explain(&self, call: &Call) -> Result<Explained> {
        let mut command = Command::new(&self.binary);
        command.arg("explain").arg("--manifests").arg(self.lab.manifests());
        command.args([
            call.from,
            &format!("pod/{}", call.to),
            "--port",
            &call.protocol.port().to_string(),
            "-o",
            "json",
        ]);
        let output = command.output().context("cannot run selvedge explain")?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "selvedge explain failed: {}", errors.trim());
        let said: Value = serde_json::from_slice(&output.stdout).context("selvedge explain -o json")?;
        let text = |field: &str| said[field].as_str().unwrap_or_default().to_owned();
        let summary = text("summary");
        // Who dials whom is known by then; the policy, the rule and the clause are what is of interest.
        let why = [" is allowed by ", " is denied by "].iter().find_map(|verb| Some(summary.split_once(verb)?.1));
        Ok(Explained {
            allowed: text("verdict") == "allow",
            reason: text("reason"),
            why: why.unwrap_or(&summary).to_owned(),
        })
    }

    /// Who an access log names as the source: its identity, or its address where it can prove none.
    fn source_of(&self, call: &Call) -> String {
        match (call.plaintext, self.pods.get(call.from)) {
            (true, Some(pod)) => pod.ip().to_string(),
            _ => identity(call.from),
        }
    }

    /// The access log line of a refusal, where the destination lives.
    fn find_denial(&self, call: &Call, reason: &str) -> Result<(String, Value)> {
        let (node, source) = (self.pod(call.to)?.node_name(), self.source_of(call));
        let agent = self.agents.iter().find(|agent| agent.node() == node);
        let line = agent.with_context(|| format!("no agent on {node}"))?.access_line(&call.title(), |line| {
            line["reason"] == reason && line["verdict"] == "deny" && line.to_string().contains(&source)
        })?;
        Ok((node.to_owned(), line))
    }
}

/// What `selvedge explain` said.
struct Explained {
    allowed: bool,
    reason: String,
    /// The policy, rule and clause, in words.
    why: String,
}

/// The names of the pods that a dump's `capture` calls captured.
fn captured(capture: &Value) -> BTreeSet<String> {
    let pods = capture["pods"].as_array().into_iter().flatten().filter(|pod| pod["state"] == "captured");
    pods.filter_map(|pod| pod["pod"].as_str().map(str::to_owned)).collect()
}

/// The identity of a pod whose service account is called as the pod is.
fn identity(pod: &str) -> String {
    let (namespace, account) = pod.split_once('/').unwrap_or_default();
    format!("spiffe://cluster.local/ns/{namespace}/sa/{account}")
}

/// Ends the process on a signal, from a thread of its own; the kernel then ends everything else.
fn end_on_signals() -> Result<()> {
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
    // Before any other thread is made, so that all of them leave these to the one below.
    signals.thread_block()?;
    thread::spawn(move || {
        let signal = signals.wait().unwrap_or(Signal::SIGTERM);
        eprintln!("\nTaking everything down.");
        process::exit(128 + signal as i32);
    });
    Ok(())
}

const TUNNEL: u16 = 15008;
