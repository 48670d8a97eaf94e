//! HTTP on the node: requests told apart between real clients and real servers.

pub mod authorizers;
mod connections;
mod early;
mod h2spec;
pub mod l7_policy;
mod protocols;
mod refusals;
mod room;
mod routes;
mod server;
pub mod tokens;
mod traces;
mod traffic;
mod websockets;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::{Agent, AgentOptions, BOUND, Lab, Pod, PodSpec, Request, ServiceSpec, eventually, trial_with};
use serde_json::{Value, json};

use crate::lab;
pub use server::Application;

pub fn trials() -> Vec<Trial> {
    let own = vec![
        trial_with("http::each_request_of_a_connection_goes_its_own_way", lab(), each_request_goes_its_own_way),
        trial_with("http::the_mesh_is_the_same_below_it", lab(), the_mesh_is_the_same_below_it),
        trial_with("http::a_large_body_is_streamed_both_ways", lab(), a_large_body_is_streamed_both_ways),
        trial_with("http::a_policy_that_forbids_stops_connections_that_wait", lab(), a_policy_that_forbids),
        trial_with("http::an_agent_that_leaves_says_so", lab(), an_agent_that_leaves_says_so),
        trial_with("http::an_agent_is_replaced_and_no_request_is_lost", lab(), an_agent_is_replaced),
        trial_with("http::many_requests_at_once_are_all_answered", lab(), many_requests_at_once),
    ];
    [
        own,
        authorizers::trials(),
        connections::trials(),
        early::trials(),
        h2spec::trials(),
        l7_policy::trials(),
        protocols::trials(),
        refusals::trials(),
        room::trials(),
        routes::trials(),
        tokens::trials(),
        traces::trials(),
        traffic::trials(),
        websockets::trials(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// One connection, many requests: to either endpoint, from the client's own address, over few connections.
fn each_request_goes_its_own_way(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let mut connection = Keeping::connect(&shop.web, shop.vip())?;
    let mut seen = std::collections::BTreeSet::new();
    for number in 0..24 {
        let answer = connection.get(&format!("/{number}?q=1"))?;
        ensure!(answer["peer"] == shop.web.ip().to_string(), "another client was seen: {answer}");
        ensure!(answer["path"] == format!("/{number}?q=1"), "{answer}");
        ensure!(answer["headers"]["host"] == "cart", "{answer}");
        seen.insert(answer["pod"].as_str().unwrap_or_default().to_owned());
    }
    ensure!(seen.len() == 2, "one of two endpoints was never chosen: {seen:?}");
    let connections = shop.near.peers().len() + shop.far.peers().len();
    ensure!(connections <= 4, "24 requests took {connections} connections");

    let v6 = (shop.vip_v6(), 80);
    if lab.families().has(v6.0) {
        let answer = shop.web.http_get(v6, "/v6")?.json()?;
        ensure!(answer["peer"] == shop.web.ip_v6().context("no second family")?.to_string(), "{answer}");
    }
    // Nobody asks a client of HTTP/1.0 for a host.
    let mut old = shop.web.connect(shop.vip())?;
    std::io::Write::write_all(&mut old, b"GET /old HTTP/1.0\r\n\r\n")?;
    let answer = protocols::hear_until(&mut old, "\"path\":\"/old\"")?;
    ensure!(answer.contains("\"host\":\"10.96.0.1:80\""), "{answer}");

    let line = agents[0].access_line("a request", |line| line["path"] == "/7" && line["status"] == 200)?;
    for (field, wanted) in [
        ("method", "GET"),
        ("host", "cart"),
        ("protocol", "http/1"),
        ("service", "shop/cart"),
        ("source_pod", "shop/web"),
        ("source_identity", "spiffe://cluster.local/ns/shop/sa/default"),
    ] {
        ensure!(line[field] == wanted, "{field}: {line}");
    }
    ensure!(line["bytes_received"].as_u64() > Some(50) && line["reason"].is_null(), "{line}");
    eventually("every request is counted", BOUND, || {
        let labels = [
            ("response_code", "200"),
            ("destination_service", "cart"),
            ("request_protocol", "http/1"),
            ("route", "none"),
        ];
        let metrics = agents[0].metrics().ok()?;
        (metrics.sum("selvedge_http_requests_total", &labels) >= 25.0).then_some(())
    })?;
    let inbound = |line: &Value| line["direction"] == "inbound";
    drop((connection, shop.near, shop.far));
    let line = agents[1].access_line("the connection that carried them", inbound)?;
    ensure!(line["source_identity"] == "spiffe://cluster.local/ns/shop/sa/default", "{line}");
    Ok(())
}

/// Same-node, fast and HBONE, by what the agents are told.
fn the_mesh_is_the_same_below_it(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    for (options, transports) in [
        (AgentOptions::default().hbone(), ["same-node", "hbone"]),
        (AgentOptions::default().arg("--tunnel").arg("auto").arg("--same-node").arg("tunnel"), ["fast", "fast"]),
    ] {
        let agents = lab.start_agents(&options)?;
        for pod in ["near", "far"] {
            eventually(&format!("an answer of {pod}"), BOUND, || {
                let answer = shop.web.http_get(shop.vip(), "/x").ok()?.json().ok()?;
                (answer["pod"] == pod).then_some(())
            })?;
        }
        for (pod, transport) in ["shop/near", "shop/far"].into_iter().zip(transports) {
            let line = agents[0].access_line(pod, |line| line["path"] == "/x" && line["destination_pod"] == pod)?;
            ensure!(line["transport"] == transport, "{line}");
        }
        agents.into_iter().try_for_each(|agent| agent.stop().map(drop))?;
    }
    Ok(())
}

fn a_large_body_is_streamed_both_ways(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    shop.web.http_get(shop.vip(), "/warm")?;
    let before = resident(&agents[0])?;
    for version in ["--http1.1", "--http2-prior-knowledge"] {
        let down =
            curl(&shop.web, &[version, "-o", "/dev/null", "-w", "%{size_download}", &shop.url("/bytes/100000000")])?;
        ensure!(down == "100000000", "{version}: {down}");
        let script =
            format!("head -c 100000000 /dev/zero | curl -sS {version} -H 'Expect:' -T - {}", shop.url("/upload"));
        let up: Value = serde_json::from_str(&shop.web.sh(&script)?)?;
        ensure!(up["length"] == 100_000_000, "{version}: {up}");
    }
    let grown = resident(&agents[0])? - before;
    ensure!(grown < 24e6, "400 MB made the agent grow by {grown} bytes");
    Ok(())
}

fn a_policy_that_forbids(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let mut connection = Keeping::connect(&shop.web, shop.vip())?;
    for _ in 0..8 {
        connection.get("/before")?;
    }
    lab.deny_all("shop")?;
    lab.settle(&agents)?;
    let denied = eventually("requests are refused", BOUND, || {
        let answer = shop.web.http_get(shop.vip(), "/after").ok()?;
        (answer.status == 403).then_some(answer)
    })?;
    ensure!(denied.header("selvedge-reason") == Some("policy"), "{denied:?}");
    // Each connection that waits is reset as soon as it has been decided again.
    eventually("no connection that waits is used", BOUND, || {
        (0..8).all(|_| connection.ask("/after").is_ok_and(|answer| answer.status == 403)).then_some(())
    })?;
    let heard = [shop.near.heard(), shop.far.heard()].concat();
    ensure!(!heard.is_empty(), "nothing was heard before");
    Ok(())
}

fn an_agent_that_leaves_says_so(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    let agents = lab.start_agents(&AgentOptions::default().arg("--drain").arg("20s"))?;
    let mut connection = Keeping::connect(&shop.web, shop.vip())?;
    connection.get("/before")?;
    agents[0].kill(nix::sys::signal::Signal::SIGTERM)?;
    eventually("the agent drains", BOUND, || agents[0].log().contains("Draining").then_some(()))?;
    connection.wait_closed()?;
    agents[0].wait(BOUND)?;
    ensure!(!agents[0].log().contains("outlived the drain"), "{}", agents[0].log_tail());
    Ok(())
}

/// Clients that keep their connections lose no request as their agent is replaced.
fn an_agent_is_replaced(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    let node = lab.node("node-a");
    let _other = lab.node("node-b").start_agent(&crate::turns::options(lab.node("node-b"), "truthful"))?;
    let mut agent = node.start_agent(&crate::turns::options(node, "truthful"))?;
    while_asked(&shop.web, shop.vip(), 2, |turn| {
        let next = node.start_agent(&crate::turns::options(node, "truthful").beside(turn * 100))?;
        let old = std::mem::replace(&mut agent, next);
        old.kill(nix::sys::signal::Signal::SIGTERM)?;
        let status = old.wait(BOUND)?;
        ensure!(status.code() == Some(0), "it ended with {status}:\n{}", old.log_tail());
        Ok(())
    })
}

fn many_requests_at_once(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    for (count, arguments) in [("2000", ["--h1", "-c20", "-m1"]), ("4000", ["-ph2c", "-c10", "-m20"])] {
        let load = shop.web.output(Command::new("h2load").args(["-n", count]).args(arguments).arg(shop.url("/x")));
        let output = load.context("h2load cannot be run; it is in the package nghttp2-client")?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let wanted = format!("{count} succeeded, 0 failed, 0 errored, 0 timeout");
        ensure!(said.contains(&wanted), "{arguments:?}: {said}");
    }
    let connections = shop.near.peers().len() + shop.far.peers().len();
    ensure!(connections < 200, "6,000 requests took {connections} connections");
    eventually("none is left under way", BOUND, || {
        let kept = agents[0].metrics().ok()?.sum("selvedge_http_pooled_connections", &[]);
        (kept <= connections as f64).then_some(())
    })
}

/// A client, and a Service with an endpoint on either node.
struct Shop {
    web: Pod,
    near: Application,
    far: Application,
    _pods: [Pod; 2],
}

impl Shop {
    /// `port` names the Service's port, and so says what it speaks.
    fn open(lab: &Lab, port: &str) -> Result<Self> {
        let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
        let near = lab.pod(PodSpec::new("shop/near", "node-a"))?;
        let far = lab.pod(PodSpec::new("shop/far", "node-b"))?;
        lab.service(&service("shop/cart", 1).port(port, 80, 8080).endpoint(&near).endpoint(&far))?;
        Ok(Self {
            near: Application::start(&near, 8080)?,
            far: Application::start(&far, 8080)?,
            web,
            _pods: [near, far],
        })
    }

    fn vip(&self) -> (IpAddr, u16) {
        (vip(1), 80)
    }

    fn vip_v6(&self) -> IpAddr {
        vip_v6(1)
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", vip(1))
    }
}

/// A connection of a client that sends one request after the other.
pub struct Keeping(std::net::TcpStream);

impl Keeping {
    pub fn connect(pod: &Pod, to: (IpAddr, u16)) -> Result<Self> {
        let stream = pod.connect(to)?;
        stream.set_read_timeout(Some(BOUND))?;
        Ok(Self(stream))
    }

    pub fn ask(&mut self, path: &str) -> Result<selvedge_lab::Response> {
        selvedge_lab::exchange(&mut self.0, "cart", &Request::get(path))
    }

    pub fn get(&mut self, path: &str) -> Result<Value> {
        let answer = self.ask(path)?;
        ensure!(answer.status == 200, "{answer:?}");
        answer.json()
    }

    /// Waits for the end, which must be in order.
    fn wait_closed(&mut self) -> Result<()> {
        let read = std::io::Read::read(&mut self.0, &mut [0; 16]).context("it was not closed in order")?;
        ensure!(read == 0, "something was said behind the answer");
        Ok(())
    }
}

/// Takes so many turns, counted from 1, while four clients ask without a pause; every request must be answered.
pub fn while_asked(web: &Pod, to: (IpAddr, u16), turns: u16, mut turn: impl FnMut(u16) -> Result<()>) -> Result<()> {
    let (stop, answered) = (AtomicBool::new(false), AtomicUsize::new(0));
    let keep_asking = || -> Result<()> {
        while !stop.load(Ordering::Relaxed) {
            let mut connection = Keeping::connect(web, to)?;
            while !stop.load(Ordering::Relaxed) {
                let answer = connection.ask("/x")?;
                ensure!(answer.status == 200, "{answer:?}");
                answered.fetch_add(1, Ordering::Relaxed);
                if answer.header("connection") == Some("close") {
                    break;
                }
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..4).map(|_| scope.spawn(keep_asking)).collect();
        let turned = (1..=turns).try_for_each(|number| {
            let more = answered.load(Ordering::Relaxed) + 50;
            eventually("requests are answered", BOUND, || (answered.load(Ordering::Relaxed) > more).then_some(()))?;
            turn(number)
        });
        stop.store(true, Ordering::Relaxed);
        for client in clients {
            client.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
        }
        turned
    })
}

/// A Service under L7 on the node, at the `number`th addresses.
fn service(full_name: &str, number: u8) -> ServiceSpec {
    let spec = ServiceSpec::new(full_name).cluster_ip(vip(number)).cluster_ip(vip_v6(number));
    spec.field("/metadata/annotations", json!({"selvedge.dev/waypoint": "node"}))
}

fn vip(number: u8) -> IpAddr {
    Ipv4Addr::new(10, 96, 0, number).into()
}

fn vip_v6(number: u8) -> IpAddr {
    Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, number.into()).into()
}

/// What curl prints, run in a pod.
fn curl(pod: &Pod, arguments: &[&str]) -> Result<String> {
    let output = pod.output(Command::new("curl").args(["-sS", "--max-time", "60"]).args(arguments))?;
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "curl {arguments:?}: {error}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn resident(agent: &Agent) -> Result<f64> {
    Ok(agent.metrics()?.sum("selvedge_process_resident_memory_bytes", &[]))
}
