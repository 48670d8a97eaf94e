//! The two nodes, their three pods, and the servers that every variant is measured with.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use selvedge_lab::waypoint::{self, Waypoint};
use selvedge_lab::{
    Agent, AgentOptions, BOUND, Families, Lab, LabOptions, Namespace, NodeSpec, Pod, PodSpec, ServiceSpec, eventually,
};
use serde_json::{Value, json};

use crate::bench::other::Other;
use crate::bench::proxies::{Proxy, Proxying};
use crate::bench::usage::{Carriers, processes};
use crate::bench::variants::{self, Carrier, Flag, Place, Variant};
use crate::cluster::{Authority, Reached, Subject};

/// The lab with its pods and servers; what carries the traffic comes and goes.
pub struct Stage {
    pub lab: Lab,
    pub client: Pod,
    /// The server on the other node.
    far: Pod,
    /// The server on the client's node.
    near: Pod,
    binary: PathBuf,
    pub load: PathBuf,
    _servers: Vec<Process>,
}

impl Stage {
    pub fn set(binary: &Path, load: &Path) -> Result<Self> {
        // One family, so that a thousand pods fit soon; wide ranges, so that they fit at all.
        let node = |name: &str, number: u8| {
            let range = (Ipv4Addr::new(10, number, 0, 1).into(), 16);
            NodeSpec::new(name, vec![Ipv4Addr::new(172, 18, 0, 10 + number).into()], vec![range])
        };
        let lab = Lab::new(LabOptions {
            nodes: vec![node(NEAR, 1), node(FAR, 2)],
            families: Families::V4,
            binary: Some(binary.into()),
            ..LabOptions::default()
        })?;
        let server = |name: &str, node: &str| {
            let spec = PodSpec::new(&format!("bench/{name}"), node).service_account(name);
            lab.pod(spec.port("http", HTTP).port("iperf", IPERF))
        };
        let client = lab.pod(PodSpec::new("bench/client", NEAR).service_account("client"))?;
        let (far, near) = (server("far", FAR)?, server("near", NEAR)?);
        let pods = [&client, &far, &near].map(|pod| pod.sysctl(TIME_WAITS, REMEMBERED));
        let nodes = [NEAR, FAR].map(|node| lab.node(node).sysctl(TIME_WAITS, REMEMBERED));
        pods.into_iter().chain(nodes).collect::<Result<()>>()?;
        fs::create_dir_all(FOLDER)?;
        let mut servers = Vec::new();
        for pod in [&far, &near] {
            servers.extend([serve_http(pod)?, serve_bytes(pod)?]);
        }
        let stage = Self { lab, client, far, near, binary: binary.into(), load: load.into(), _servers: servers };
        for pod in [&stage.far, &stage.near] {
            stage.wait_answer(&stage.client, (pod.ip(), HTTP).into())?;
        }
        Ok(stage)
    }

    /// Starts what carries a variant, and proves that it does.
    pub fn start(&self, variant: &Variant) -> Result<Running> {
        let running = match &variant.carrier {
            Carrier::Nothing => Running::over(self.server(variant.place).ip()),
            Carrier::Relay => self.start_relay(variant.place)?,
            Carrier::Agents(flags) => self.start_agents(variant.place, flags)?,
            Carrier::Routes(routes) => {
                self.ask_for_layer_7(*routes, "node")?;
                Running { to: VIP.into(), ..self.start_agents(variant.place, &[])? }
            }
            Carrier::Waypoint => self.start_waypoint(variant.place)?,
            Carrier::Proxy(proxy) => self.start_proxy(*proxy)?,
            Carrier::Other(command) => self.start_other(variant.place, command)?,
        };
        self.wait_answer(&self.client, (running.to, HTTP).into())?;
        if variant.is_ours() {
            let opened =
                |agent: &Agent| agent.metrics().map(|all| all.sum("selvedge_tcp_connections_opened_total", &[]));
            eventually("the agents count what they carry", BOUND, || {
                running.agents.iter().any(|agent| opened(agent).is_ok_and(|count| count > 0.0)).then_some(())
            })
            .context("the traffic went past the mesh")?;
        }
        Ok(running)
    }

    /// The server of a place.
    pub fn server(&self, place: Place) -> &Pod {
        match place {
            Place::OneNode => &self.near,
            Place::TwoNodes | Place::Outside | Place::Requests => &self.far,
        }
    }

    pub fn pods(&self) -> [&Pod; 3] {
        [&self.client, &self.far, &self.near]
    }

    fn start_relay(&self, place: Place) -> Result<Running> {
        let (server, near, far) = (self.server(place).ip(), self.lab.node(NEAR), self.lab.node(FAR));
        let mut running = Running::over(near.ip());
        if place == Place::TwoNodes {
            running.start(|| self.relay(far, server))?;
            running.start(|| self.relay(near, far.ip()))?;
        } else {
            running.start(|| self.relay(near, server))?;
        }
        Ok(running)
    }

    fn relay(&self, on: &Namespace, to: IpAddr) -> Result<Process> {
        let mut command = Command::new(&self.load);
        command.arg("relay").args([HTTP, IPERF].map(|port| format!("{port}={to}:{port}")));
        Process::spawn(on, &mut command)
    }

    /// On the client's node, towards the port of the server that speaks TLS.
    fn start_proxy(&self, proxy: Proxy) -> Result<Running> {
        let near = self.lab.node(NEAR);
        let mut running = Running::over(near.ip());
        let before = processes();
        running.proxies.push(proxy.start(near, self.far.ip(), &root_of(&self.far))?);
        self.wait_answer(&self.client, (running.to, HTTP).into())?;
        running.carriers.push(Carriers::since(&before));
        Ok(running)
    }

    fn start_agents(&self, place: Place, flags: &[Flag]) -> Result<Running> {
        self.lab.join(&self.far, place != Place::Outside)?;
        let options = AgentOptions { args: variants::arguments(flags, &self.binary)?, ..AgentOptions::default() };
        // Told in full, and kept nowhere: what counts is what it costs the agent.
        let options = options.arg("--access-log").arg("text").arg("--drain").arg("1s").without_access_log();
        let mut running = Running::over(self.server(place).ip());
        running.agents = self.lab.start_agents(&options)?;
        for agent in &running.agents {
            let joined = self.pods().into_iter().filter(|pod| pod.node_name() == agent.node());
            let joined = joined.filter(|pod| place != Place::Outside || pod.uid() != self.far.uid());
            agent.wait_pods("captured", joined.count())?;
            running.carriers.push(Carriers::of([agent.pid()].into_iter().chain(agent.worker())));
        }
        Ok(running)
    }

    /// On the client's node, in a pod of its own. It alone is the hop that tells requests apart; the agents on its both
    /// sides are what any connection costs.
    fn start_waypoint(&self, place: Place) -> Result<Running> {
        waypoint::gateway(&self.lab, "All")?;
        self.ask_for_layer_7(1, "infra/gw")?;
        let mut running = Running { to: VIP.into(), ..self.start_agents(place, &[])? };
        let mut waypoint = Waypoint::start_unlogged(&self.lab, NEAR, 1, &[])?;
        waypoint::lead_to(&self.lab, &[(&waypoint, true)])?;
        waypoint.wait_ready()?;
        running.carriers.insert(0, Carriers::of([waypoint.pid()]));
        running.waypoint = Some(waypoint);
        Ok(running)
    }

    /// Puts the server behind a Service whose requests are told apart as the other proxies do it: by the rules of the last
    /// of so many routes.
    fn ask_for_layer_7(&self, routes: usize, waypoint: &str) -> Result<()> {
        let service = ServiceSpec::new("bench/far").cluster_ip(VIP.into()).port("http", HTTP, HTTP).endpoint(&self.far);
        self.lab.service(&service.field("/metadata/annotations", json!({"selvedge.dev/waypoint": waypoint})))?;
        let backends = || json!([{"name": "far", "port": HTTP}]);
        let set = json!({"set": [{"name": "x-route", "value": "bench"}]});
        let filter = json!({"type": "RequestHeaderModifier", "requestHeaderModifier": set});
        let canary = json!({"name": "x-canary", "type": "RegularExpression", "value": "."});
        let all = json!([
            {"matches": [{"path": {"value": "/admin"}}]},
            {"matches": [{"headers": [canary]}], "backendRefs": backends()},
            {"filters": [filter], "backendRefs": backends()},
        ]);
        let route = |name: String, rules: Value| {
            json!({
                "apiVersion": "gateway.networking.k8s.io/v1",
                "kind": "HTTPRoute",
                "metadata": {"name": name, "namespace": "bench"},
                "spec": {"parentRefs": [{"group": "", "kind": "Service", "name": "far"}], "rules": rules},
            })
        };
        let others = (1..routes).map(|number| {
            let matches = json!([{"path": {"value": format!("/other/{number}")}}]);
            route(format!("other-{number}"), json!([{"matches": matches, "backendRefs": backends()}]))
        });
        let documents: Vec<_> = others.chain([route("bench".to_owned(), all)]).map(|route| route.to_string()).collect();
        self.lab.write("routes.yaml", &documents.join("\n---\n"))
    }

    fn start_other(&self, place: Place, command: &str) -> Result<Running> {
        self.lab.join(&self.far, place != Place::Outside)?;
        let mut running = Running::over(self.server(place).ip());
        for node in self.lab.nodes() {
            let before = processes();
            running.others.push(Other::start(command, node, self, place)?);
            running.carriers.push(Carriers::since(&before));
        }
        Ok(running)
    }

    fn wait_answer(&self, from: &Namespace, to: SocketAddr) -> Result<()> {
        let mut last = String::new();
        let answered = eventually(&format!("{to} answers"), BOUND, || match from.http_get(to, "/") {
            Ok(answer) if answer.status == 200 => Some(()),
            Ok(answer) => {
                last = format!("it answered {}", answer.status);
                None
            }
            Err(error) => {
                last = format!("{error:#}");
                None
            }
        });
        answered.with_context(|| format!("{last}\n{}", self.lab.log_tails()))
    }
}

/// A variant that is up. Dropping it ends what carried it.
pub struct Running {
    /// Where the client has to connect to.
    pub to: IpAddr,
    agents: Vec<Agent>,
    others: Vec<Other>,
    relays: Vec<Process>,
    proxies: Vec<Proxying>,
    waypoint: Option<Waypoint>,
    /// One entry a node, behind that of the waypoint.
    carriers: Vec<Carriers>,
}

impl Running {
    fn over(to: IpAddr) -> Self {
        Self {
            to,
            agents: Vec::new(),
            others: Vec::new(),
            relays: Vec::new(),
            proxies: Vec::new(),
            waypoint: None,
            carriers: Vec::new(),
        }
    }

    fn start(&mut self, relay: impl FnOnce() -> Result<Process>) -> Result<()> {
        let relay = relay()?;
        self.carriers.push(Carriers::of([relay.0.id() as i32]));
        self.relays.push(relay);
        Ok(())
    }

    pub fn is_carried(&self) -> bool {
        !self.carriers.is_empty()
    }

    /// Seconds of processor time that all carriers used so far.
    pub fn cpu(&self) -> f64 {
        self.carriers.iter().map(Carriers::cpu).sum()
    }

    /// Those of them that the hop used which tells requests apart: the carrier on the client's node, or the waypoint.
    pub fn cpu_of_hop(&self) -> f64 {
        self.carriers.first().map_or(0.0, Carriers::cpu)
    }

    /// Resident memory in MB of each node's carrier.
    pub fn resident(&self) -> Vec<f64> {
        self.carriers.iter().map(Carriers::resident).collect()
    }

    /// Resident memory in MB of all carriers, without pages of files.
    pub fn own_memory(&self) -> f64 {
        self.carriers.iter().map(Carriers::own).sum()
    }

    /// Ends it in order: agents take their rules out of the pods.
    pub fn stop(self) -> Result<()> {
        for agent in self.agents {
            let node = agent.node().to_owned();
            let status = agent.stop()?;
            ensure!(status.success(), "the agent of {node} ended with {status}");
        }
        self.others.into_iter().try_for_each(Other::stop)
    }
}

/// A process that ends with its handle.
pub struct Process(pub Child);

impl Process {
    pub fn spawn(within: &Namespace, command: &mut Command) -> Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let child = within.spawn(command).with_context(|| format!("cannot run {}", command.get_program().display()))?;
        Ok(Self(child))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // One that has ended already is only to be reaped.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn serve_bytes(pod: &Pod) -> Result<Process> {
    Process::spawn(pod, Command::new("iperf3").args(["--server", "--port", &IPERF.to_string()]))
}

/// The root that the certificate of a server's port of TLS leads to.
fn root_of(pod: &Pod) -> PathBuf {
    Path::new(FOLDER).join(pod.name()).join("ca.crt")
}

/// One nginx worker, which says a few bytes and writes nothing down.
fn serve_http(pod: &Pod) -> Result<Process> {
    let folder = Path::new(FOLDER).join(pod.name());
    fs::create_dir_all(&folder)?;
    let configuration = folder.join("nginx.conf");
    let reached = [Reached::By(SERVER_NAME.to_owned())];
    Authority::new(&folder)?.issue("server", &Subject::user(SERVER_NAME), &reached)?;
    let text = NGINX.replace("FOLDER", &folder.display().to_string());
    let text = text.replace("TLS_PORT", &HTTPS.to_string()).replace("PORT", &HTTP.to_string());
    fs::write(&configuration, text)?;
    let mut command = Command::new("nginx");
    command.arg("-p").arg(&folder).arg("-c").arg(&configuration).args(["-e", "stderr"]);
    Process::spawn(pod, &mut command)
}

pub const HTTP: u16 = 8080;
/// The same over TLS, for proxies that are no mesh.
pub const HTTPS: u16 = 8443;
pub const SERVER_NAME: &str = "far.bench";
pub const IPERF: u16 = 5201;
const VIP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
pub const NEAR: &str = "node-a";
const FAR: &str = "node-b";
/// In the world's private /run, so that it goes with the world.
pub const FOLDER: &str = "/run/selvedge-bench";
const NGINX: &str = "
user root root;
daemon off;
master_process off;
pid FOLDER/pid;
error_log stderr warn;
events { worker_connections 16384; }
http {
    access_log off;
    keepalive_requests 1000000000;
    keepalive_timeout 1h;
    client_body_temp_path FOLDER/body;
    proxy_temp_path FOLDER/proxy;
    fastcgi_temp_path FOLDER/fastcgi;
    uwsgi_temp_path FOLDER/uwsgi;
    scgi_temp_path FOLDER/scgi;
    server {
        listen PORT backlog=4096 reuseport;
        listen TLS_PORT ssl backlog=4096 reuseport;
        ssl_protocols TLSv1.3;
        ssl_certificate FOLDER/server.crt;
        ssl_certificate_key FOLDER/server.key;
        location / { return 200 \"hello from behind the mesh\\n\"; }
    }
}
";
/// How many connections that have ended a namespace remembers. Without a bound, those of one variant use up the client's
/// ports towards the server that the next one dials too, and each connect() of it then searches among them all.
const REMEMBERED: &str = "1000";
const TIME_WAITS: &str = "ipv4.tcp_max_tw_buckets";
