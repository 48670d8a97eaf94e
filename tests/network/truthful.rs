//! connect() tells the truth: it is told what it would hear without a mesh, and "prohibited" where the mesh says no.

mod bounds;
mod crowds;
mod programs;
mod upheaval;

use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::{
    AgentOptions, BOUND, Conversation, Lab, Namespace, Pod, PodSpec, Server, authorization, eventually, trial_with,
};
use serde_json::json;

use self::programs::Firewalled;
use crate::lab;
use crate::raw_peer::{self, Credential, Offer};

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![
        trial_with("truthful::every_outcome_is_that_of_the_bare_network", lab(), |lab| {
            every_outcome_is_that_of_the_bare_network(lab, &[])
        }),
        trial_with("truthful::every_outcome_is_that_of_the_bare_network_in_redirect_mode", lab(), |lab| {
            every_outcome_is_that_of_the_bare_network(lab, &["--capture=redirect"])
        }),
        trial_with("truthful::every_outcome_is_that_of_the_bare_network_by_legacy_tables", lab(), |lab| {
            every_outcome_is_that_of_the_bare_network(lab, &["--iptables=legacy"])
        }),
        trial_with("truthful::every_outcome_is_that_of_the_bare_network_over_hbone", lab(), |lab| {
            every_outcome_is_that_of_the_bare_network(lab, &["--tunnel=hbone"])
        }),
        trial_with(
            "truthful::every_outcome_is_that_of_the_bare_network_where_neighbours_are_tunnelled_to",
            lab(),
            |lab| every_outcome_is_that_of_the_bare_network(lab, &["--same-node=tunnel"]),
        ),
        trial_with("truthful::a_server_that_proves_another_identity_is_prohibited", lab(), |lab| {
            another_identity(lab, &[])
        }),
        trial_with("truthful::a_server_that_proves_another_identity_is_prohibited_over_hbone", lab(), |lab| {
            another_identity(lab, &["--tunnel=hbone"])
        }),
        trial_with("truthful::what_the_mesh_forbids_is_prohibited", lab(), |lab| {
            what_the_mesh_forbids_is_prohibited(lab, &[])
        }),
        trial_with("truthful::what_the_mesh_forbids_is_prohibited_over_hbone", lab(), |lab| {
            what_the_mesh_forbids_is_prohibited(lab, &["--tunnel=hbone", "--same-node=tunnel"])
        }),
    ];
    trials.extend(bounds::trials());
    trials.extend(programs::trials());
    trials.extend(crowds::trials());
    trials.extend(upheaval::trials());
    trials
}

fn every_outcome_is_that_of_the_bare_network(lab: &Lab, arguments: &[&str]) -> Result<()> {
    let scene = Scene::new(lab)?;
    let calls = scene.calls(lab);
    let bare: Vec<Told> = calls.iter().map(|call| call.told()).collect();
    let agents = lab.start_agents(&with(arguments))?;
    for (call, bare) in calls.iter().zip(bare) {
        let told = call.told();
        ensure!(told == bare, "{call:?}: {told:?}, and {bare:?} without the mesh");
    }
    // All of them were held: nothing was told before it was known.
    for agent in &agents {
        ensure!(agent.dump()?["capture"]["connect"] == "truthful");
        ensure!(answers(agent, "outbound", "connected")? + answers(agent, "inbound", "connected")? > 0.0);
        eventually("nobody waits any more", BOUND, || (held(agent).ok()? == 0.0).then_some(()))?;
    }
    for answer in ["connected", "refused", "silent"] {
        ensure!(answers(&agents[0], "outbound", answer)? > 0.0, "nothing outbound was {answer}");
        ensure!(answers(&agents[1], "inbound", answer)? > 0.0, "nothing inbound was {answer}");
    }
    let waited = agents[0].metrics()?.sum("selvedge_connect_held_duration_seconds_count", &[("direction", "outbound")]);
    ensure!(waited > 0.0, "nobody's wait was measured");
    Ok(())
}

fn what_the_mesh_forbids_is_prohibited(lab: &Lab, arguments: &[&str]) -> Result<()> {
    let scene = Scene::new(lab)?;
    // Each with the node whose agent decides first.
    let calls = [
        (&scene.web, &scene.cart, 0),
        (&scene.web, &scene.near, 0),
        (&scene.stranger, &scene.cart, 1),
        (&scene.stranger, &scene.near, 0),
    ];
    let mut firewalled = Vec::new();
    for (client, server, _) in calls {
        firewalled.push((client, Firewalled::ask(client, server, LIVE)?));
    }
    let agents = lab.start_agents(&with(arguments))?;
    let there = json!({"operation": {"ports": [LIVE.to_string()]}});
    lab.put(&authorization("shop/not-this-port", json!({"action": "DENY", "rules": [{"to": [there]}]})))?;
    for (client, server, agent) in calls {
        for ip in server.ips() {
            let prohibited = prohibited(*ip);
            eventually("the policy is in force", BOUND, || {
                (told(client, (*ip, LIVE).into(), BOUND) == prohibited).then_some(())
            })?;
            // Again and again. To a client outside the pod the kernel sends ICMP sparingly; the SYN comes again.
            for _ in 0..4 {
                let told = told(client, (*ip, LIVE).into(), BOUND);
                ensure!(told == prohibited, "{} to {ip}: {told:?}", client.full_name());
            }
            let told = told(client, (*ip, DEAD).into(), BOUND);
            ensure!(told == Told::Error(ErrorKind::ConnectionRefused), "what is not forbidden: {told:?}");
        }
        agents[agent].access_line("the denial", |line| line["reason"] == "policy:shop/not-this-port")?;
    }
    firewalled.iter().try_for_each(|(client, firewalled)| firewalled.is_the_same(client))?;
    ensure!(scene.servers.iter().all(|server| server.peers().iter().all(|peer| peer.ip() != scene.stranger.ip())));
    Ok(())
}

fn another_identity(lab: &Lab, arguments: &[&str]) -> Result<()> {
    let scene = Scene::new(lab)?;
    let live = |ip: &IpAddr| SocketAddr::new(*ip, LIVE);
    ensure!(scene.cart.ips().iter().all(|ip| told(&scene.web, live(ip), BOUND) == Told::Connected), "the bare network");
    let firewalled = Firewalled::ask(&scene.web, &scene.cart, LIVE)?;
    // On its node no agent runs; at its tunnel port answers somebody whom the CA knows by another name.
    let agent = lab.node("node-a").start_agent(&with(arguments))?;
    let mut serving = Vec::new();
    for ip in scene.cart.ips() {
        let offer = Offer::new(Credential::of(&lab.ca(), "shop/impostor")?).acceptor(&lab.ca())?;
        let listener = scene.cart.listen(SocketAddr::new(*ip, TUNNEL))?;
        listener.set_nonblocking(true)?;
        serving.push(raw_peer::runtime().spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener)?;
            loop {
                let (stream, _) = listener.accept().await?;
                // What comes of it is the client's to say.
                let _ = offer.accept(stream).await;
            }
            #[expect(unreachable_code, reason = "it says what the block returns")]
            io::Result::Ok(())
        }));
        for _ in 0..4 {
            let told = told(&scene.web, live(ip), BOUND);
            ensure!(told == prohibited(*ip), "{ip}: {told:?}");
        }
    }
    firewalled.is_the_same(&scene.web)?;
    serving.iter().for_each(|serving| serving.abort());
    agent.access_line("the impostor", |line| line["reason"] == "tls")?;
    ensure!(answers(&agent, "outbound", "prohibited")? >= 4.0);
    Ok(())
}

/// A client in the mesh and one outside, and servers on the same node, on another, and outside.
struct Scene {
    web: Pod,
    stranger: Pod,
    near: Pod,
    cart: Pod,
    servers: Vec<Server>,
}

/// One connection to try.
struct Call<'a> {
    what: &'static str,
    client: &'a Pod,
    to: SocketAddr,
}

/// What connect() said.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Told {
    /// And the two then talked.
    Connected,
    Error(ErrorKind),
    /// Nothing, for as long as was waited.
    Silence,
}

impl Scene {
    fn new(lab: &Lab) -> Result<Self> {
        let web = lab.pod(PodSpec::new("shop/web", "node-a").service_account("web"))?;
        let stranger = lab.pod(PodSpec::new("shop/stranger", "node-a").outside())?;
        let near = lab.pod(PodSpec::new("shop/near", "node-a").service_account("near"))?;
        let cart = lab.pod(PodSpec::new("shop/cart", "node-b").service_account("cart"))?;
        let mut servers = Vec::new();
        for (network, ips) in [
            (near.network(), near.ips().to_vec()),
            (cart.network(), cart.ips().to_vec()),
            (lab.outside(), outside(lab)),
        ] {
            for ip in ips {
                servers.push(network.serve_echo(SocketAddr::new(ip, LIVE))?);
                let tool = if ip.is_ipv4() { "iptables" } else { "ip6tables" };
                network.sh(&format!("{tool} -w -A INPUT -p tcp --dport {HOLE} -j DROP"))?;
            }
        }
        for node in lab.nodes() {
            node.ip_batch([
                format!("route add unreachable {NOWHERE}/32"),
                format!("route add unreachable {NOWHERE_V6}/128"),
            ])?;
        }
        Ok(Self { web, stranger, near, cart, servers })
    }

    fn calls(&self, lab: &Lab) -> Vec<Call<'_>> {
        let mut calls = Vec::new();
        let mut of = |what, client, ips: Vec<IpAddr>, ports: &[u16]| {
            for ip in ips {
                calls.extend(ports.iter().map(|port| Call { what, client, to: (ip, *port).into() }));
            }
        };
        of("to another node", &self.web, self.cart.ips().to_vec(), &[LIVE, DEAD, HOLE]);
        of("on the same node", &self.web, self.near.ips().to_vec(), &[LIVE, DEAD]);
        of("from outside the mesh", &self.stranger, self.cart.ips().to_vec(), &[LIVE, DEAD, HOLE]);
        of("to outside the mesh", &self.web, outside(lab), &[LIVE, DEAD, HOLE]);
        of("to nowhere", &self.web, vec![NOWHERE.parse().unwrap(), NOWHERE_V6.parse().unwrap()], &[LIVE]);
        calls
    }
}

impl Call<'_> {
    fn told(&self) -> Told {
        let patience = if self.to.port() == HOLE { PATIENCE } else { BOUND };
        told(self.client, self.to, patience)
    }
}

impl std::fmt::Debug for Call<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}, {} to {}", self.what, self.client.full_name(), self.to)
    }
}

fn with(arguments: &[&str]) -> AgentOptions {
    arguments.iter().fold(AgentOptions::default(), |options, argument| options.arg(argument))
}

fn outside(lab: &Lab) -> Vec<IpAddr> {
    lab.families().outside()
}

/// Connects, and where that succeeds talks to the echo server there.
fn told(client: &Namespace, to: SocketAddr, patience: Duration) -> Told {
    match client.connect_within(to, patience) {
        Ok(stream) => match Conversation::over(stream).and_then(|mut talk| talk.exchange("hello")) {
            Ok(()) => Told::Connected,
            Err(_) => Told::Error(ErrorKind::ConnectionReset),
        },
        Err(error) if is_own_bound(&error) => Told::Silence,
        Err(error) => Told::Error(error.kind()),
    }
}

/// Whether the time ran out that was given, rather than the kernel's.
fn is_own_bound(error: &io::Error) -> bool {
    error.kind() == ErrorKind::TimedOut && error.raw_os_error().is_none()
}

/// ICMP says it in both families, and the kernel translates it by family.
fn prohibited(ip: IpAddr) -> Told {
    Told::Error(if ip.is_ipv4() { ErrorKind::HostUnreachable } else { ErrorKind::PermissionDenied })
}

fn answers(agent: &selvedge_lab::Agent, direction: &str, answer: &str) -> Result<f64> {
    Ok(agent.metrics()?.sum("selvedge_connect_answers_total", &[("direction", direction), ("answer", answer)]))
}

fn held(agent: &selvedge_lab::Agent) -> Result<f64> {
    Ok(agent.metrics()?.sum("selvedge_connect_held", &[]))
}

const LIVE: u16 = 8080;
const DEAD: u16 = 7070;
/// Packets to it vanish.
const HOLE: u16 = 6060;
const TUNNEL: u16 = 15008;
const NOWHERE: &str = "203.0.113.7";
const NOWHERE_V6: &str = "2001:db8:dead::7";
/// How long a silent server is waited for.
const PATIENCE: Duration = Duration::from_secs(3);
