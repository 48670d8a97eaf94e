//! `cargo xtask demo`: two nodes, five pods, one folder of manifests; real traffic, and what was seen of it.

mod calls;
mod report;
mod stay;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{self, Command, ExitCode};
use std::thread;

use anyhow::{Context, Result};
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
            let names: Vec<_> = self.joined_on(agent.node()).map(Pod::full_name).collect();
            let wanted = names.len() as f64;
            let captured = || agent.metrics().ok().map(|now| now.sum("selvedge_pods", &[("state", "captured")]));
            let result = eventually("all joined pods are captured", BOUND, || captured().filter(|now| *now == wanted));
            report.attempt(&format!("{} has captured its joined pods, and no other", agent.node()), result, |now| {
                (true, format!("selvedge_pods{{state=\"captured\"}} {now}: {}", names.join(", ")))
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
            match call.expected {
                Expected::Allowed => {
                    let held = outcome.answered && explained.allowed;
                    let detail = format!("{}; explain: {}", outcome.detail, explained.words);
                    report.expect(&format!("{}: allowed", call.title()), held, detail);
                    let client = self.pod(call.from)?.ip();
                    let saw = outcome.saw.map_or_else(|| "nobody".to_owned(), |ip| ip.to_string());
                    let detail = format!("{} is {client}; {} saw {saw}", call.from, call.to);
                    report.expect("  the server saw the client's own address", outcome.saw == Some(client), detail);
                }
                Expected::Denied(reason) => {
                    let unheard = self.heard(call.to) == heard_before;
                    let held = !outcome.answered && unheard && !explained.allowed;
                    let detail = format!("{}; explain: {}", outcome.detail, explained.words);
                    report.expect(&format!("{}: denied, and the server never heard of it", call.title()), held, detail);
                    let logged =
                        self.find_line(call, |line| line.contains(reason) && line.contains(&self.source_of(call)));
                    report.attempt("  the access log says why", logged, |line| (true, line.clone()));
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
        let ports = link.tcp_ports()?;
        let tunnel = ports.get(&TUNNEL).copied().unwrap_or_default();
        let words: Vec<_> = ports.iter().map(|(port, packets)| format!("port {port}: {packets} packets")).collect();
        report.expect("the mesh's traffic goes through the tunnel", tunnel > 0, words.join(", "));
        Ok(())
    }

    fn tell_identities(&self, report: &mut Report) {
        report.section("Which identity each side saw");
        for call in CALLS.iter().filter(|call| call.is_allowed() && !call.plaintext) {
            let (source, destination) = (identity(call.from), identity(call.to));
            for (side, pod) in [("client", call.from), ("server", call.to)] {
                let node = self.pods.get(pod).map_or("", Pod::node_name);
                let agent = self.agents.iter().find(|agent| agent.node() == node);
                let line = agent.with_context(|| format!("no agent on {node}")).and_then(|agent| {
                    agent.access_line(&call.title(), |line| {
                        let text = line.to_string();
                        text.contains(&source) && text.contains(&destination)
                    })
                });
                report.attempt(&format!("{}: the {side}'s node saw both", call.title()), line, |line| {
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
        let explain = |format: &[&str]| {
            let mut command = Command::new(&self.binary);
            command.arg("explain").arg("--manifests").arg(self.lab.manifests());
            command.args([call.from, call.to, "--port", &call.protocol.port().to_string()]).args(format);
            let output = command.output().context("cannot run selvedge explain")?;
            anyhow::ensure!(
                output.status.success(),
                "selvedge explain failed: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            );
            Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
        };
        let verdict: Value = serde_json::from_str(&explain(&["-o", "json"])?).context("explain -o json")?;
        let words = explain(&[])?.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ");
        Ok(Explained { allowed: verdict["verdict"] == "allow", words })
    }

    /// Who an access log names as the source: its identity, or its address where it can prove none.
    fn source_of(&self, call: &Call) -> String {
        match (call.plaintext, self.pods.get(call.from)) {
            (true, Some(pod)) => pod.ip().to_string(),
            _ => identity(call.from),
        }
    }

    /// An access log line of any agent, as text.
    fn find_line(&self, call: &Call, wanted: impl Fn(&str) -> bool) -> Result<String> {
        eventually(&format!("an access log line for {}", call.title()), BOUND, || {
            let lines = self.agents.iter().filter_map(|agent| agent.access_log().ok()).flatten();
            lines.map(|line| line.to_string()).find(|line| wanted(line))
        })
    }
}

struct Explained {
    allowed: bool,
    words: String,
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
