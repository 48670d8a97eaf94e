//! Services on real traffic: who is chosen, who is passed over, and what a client sees where nobody is left.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::trial_with;
use selvedge_lab::{AgentOptions, BOUND, Lab, LabOptions, NodeSpec, Pod, PodSpec, Server, ServiceSpec, eventually};
use serde_json::{Value, json};

use crate::knock::{Ended, knock};
use crate::lab;

pub fn trials() -> Vec<Trial> {
    vec![
        trial_with(
            "services::every_address_and_port_of_a_service_leads_to_its_endpoints",
            lab(),
            every_address_and_port_of_a_service_leads_to_its_endpoints,
        ),
        trial_with("services::a_target_port_s_name_means_each_pod_s_own_number", lab(), a_named_target_port),
        trial_with("services::what_nobody_serves_is_reset_with_no_endpoint", lab(), what_nobody_serves),
        trial_with("services::a_service_outside_the_mesh_is_reached_in_plaintext", lab(), a_service_outside_the_mesh),
        trial_with("services::endpoints_come_and_go_with_their_conditions", lab(), conditions),
        trial_with("services::a_client_with_affinity_stays_at_its_endpoint", lab(), affinity),
        trial_with("services::near_endpoints_are_chosen_as_the_service_asks", zoned(), near_endpoints),
        trial_with("services::a_busy_endpoint_gets_less", lab(), a_busy_endpoint_gets_less),
        trial_with("services::a_dead_endpoint_is_passed_over_left_out_and_tried_again", lab(), a_dead_endpoint),
        trial_with("services::an_endpoint_that_is_somebody_else_is_passed_over", lab(), somebody_else),
        trial_with("services::a_silent_endpoint_is_passed_over", lab(), a_silent_endpoint),
    ]
}

fn every_address_and_port_of_a_service_leads_to_its_endpoints(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
    let near = Backend::start(lab, "shop/near", "node-a")?;
    let far = Backend::start(lab, "shop/far", "node-b")?;
    let _admin = far.pod.serve_greeting(9090, "admin")?;
    let external: IpAddr = Ipv4Addr::new(198, 51, 100, 7).into();
    lab.service(
        &near
            .and(&far, service("shop/cart", 1).port("http", 80, 8080).port("admin", 81, 9090))
            .field("/spec/externalIPs", json!([external.to_string()])),
    )?;
    lab.service(&near.and(&far, ServiceSpec::new("shop/headless").port("http", 8080, 8080)))?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let addresses: Vec<IpAddr> = vips(1).into_iter().filter(|ip| lab.families().has(*ip)).chain([external]).collect();
    for vip in addresses {
        let seen = tally(&web, vip, 24)?;
        ensure!(seen.len() == 2, "{vip}: one of two endpoints was never chosen: {seen:?}");
        let line = agents[0].access_line("through the Service", |line| line["requested_addr"] == addr(vip, 80))?;
        ensure!(line["service"] == "shop/cart", "{line}");
    }
    let mut admin = Vec::new();
    for _ in 0..8 {
        admin.push(knock(&web, (vips(1)[0], 81))?.ended);
    }
    // One endpoint does not listen there: the other one answers every time.
    ensure!(admin.iter().all(|ended| *ended == Ended::Greeted("admin".into())), "{admin:?}");
    // A headless Service is its pods: clients learn their addresses from DNS, and dial them.
    for backend in [&near, &far] {
        for ip in backend.pod.ips() {
            let answer = web.http_get((*ip, 8080), "/")?.json()?;
            ensure!(answer["pod"] == backend.pod.name(), "{answer}");
        }
    }
    let line = agents[1].access_line("an inbound connection", |line| line["direction"] == "inbound")?;
    ensure!(line["source_identity"] == "spiffe://cluster.local/ns/shop/sa/default", "{line}");
    Ok(())
}

fn a_named_target_port(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
    let mut servers = Vec::new();
    let mut pods = Vec::new();
    for (name, node, port) in [("shop/one", "node-a", 8001), ("shop/two", "node-b", 8002)] {
        let pod = lab.pod(PodSpec::new(name, node).label("tier", "back").port("web", port))?;
        servers.push(pod.serve_http(port, pod.name())?);
        pods.push(pod);
    }
    // No EndpointSlice: the selector says who serves it.
    lab.put(&json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"namespace": "shop", "name": "back"},
        "spec": {
            "clusterIP": vips(1)[0].to_string(),
            "selector": {"tier": "back"},
            "ports": [{"port": 80, "targetPort": "web"}],
        },
    }))?;
    let _agents = lab.start_agents(&AgentOptions::default())?;
    let seen = tally(&web, vips(1)[0], 24)?;
    ensure!(seen.contains_key("one") && seen.contains_key("two"), "{seen:?}");
    Ok(())
}

fn what_nobody_serves(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
    let cart = Backend::start(lab, "shop/cart", "node-b")?;
    lab.service(&service("shop/cart", 1).port("http", 80, 8080).endpoint(&cart.pod))?;
    lab.service(&service("shop/empty", 2).port("http", 80, 8080))?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    for (vip, port) in [(vips(1)[0], 82), (vips(2)[0], 80)] {
        let knock = knock(&web, (vip, port))?;
        ensure!(knock.ended == Ended::Refused, "{vip}:{port}: {knock:?}");
        let line = agents[0].access_line("a refusal", |line| line["source_addr"] == knock.from.to_string())?;
        ensure!(line["reason"] == "no-endpoint", "{line}");
    }
    eventually("both refusals are counted", BOUND, || {
        let metrics = agents[0].metrics().ok()?;
        (metrics.sum("selvedge_connections_failed_total", &[("reason", "no-endpoint")]) == 2.0).then_some(())
    })?;
    ensure!(cart.server.peers().is_empty(), "a port that the Service does not have led somewhere");
    Ok(())
}

fn a_service_outside_the_mesh(lab: &Lab) -> Result<()> {
    lab.namespace("old", false)?;
    let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
    let old = Backend::start(lab, "old/ledger", "node-b")?;
    lab.service(&service("old/ledger", 1).port("http", 80, 8080).endpoint(&old.pod))?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let answer = web.http_get((vips(1)[0], 80), "/")?.json()?;
    ensure!(answer["pod"] == "ledger" && answer["peer"] == web.ip().to_string(), "{answer}");
    let line = agents[0].access_line("the Service outside", |line| line["service"] == "old/ledger")?;
    ensure!(line["direction"] == "passthrough" && line["transport"] == "plaintext", "{line}");
    Ok(())
}

fn conditions(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
    let one = Backend::start(lab, "shop/one", "node-a")?;
    let two = Backend::start(lab, "shop/two", "node-b")?;
    let write = |first: Value, second: Value, publish: bool| {
        let spec = service("shop/cart", 1).port("http", 80, 8080);
        let spec = spec.endpoint_with(&one.pod, first).endpoint_with(&two.pod, second);
        lab.service(&spec.field("/spec/publishNotReadyAddresses", publish.into()))
    };
    let ready = json!({"ready": true, "serving": true, "terminating": false});
    let unready = json!({"ready": false, "serving": false, "terminating": false});
    let leaving = json!({"ready": false, "serving": true, "terminating": true});
    let cases = [
        ("two are ready", ready.clone(), json!({}), false, vec!["one", "two"]),
        ("one is not ready", unready.clone(), ready.clone(), false, vec!["two"]),
        ("one is leaving", leaving.clone(), ready, false, vec!["two"]),
        ("none is ready, and one still serves", leaving, unready.clone(), false, vec!["one"]),
        ("none serves", unready.clone(), unready.clone(), false, vec![]),
        ("none is ready, and all are published", unready.clone(), unready.clone(), true, vec!["one", "two"]),
    ];
    write(unready.clone(), unready, false)?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    for (what, first, second, publish, wanted) in cases {
        write(first, second, publish)?;
        lab.settle(&agents)?;
        if wanted.is_empty() {
            let knock = knock(&web, (vips(1)[0], 80))?;
            ensure!(knock.ended == Ended::Refused, "{what}: {knock:?}");
            continue;
        }
        let seen = tally(&web, vips(1)[0], 20).context(what)?;
        ensure!(seen.keys().eq(&wanted), "{what}: {seen:?}");
    }
    Ok(())
}

fn affinity(lab: &Lab) -> Result<()> {
    let clients = [lab.pod(PodSpec::new("shop/web", "node-a"))?, lab.pod(PodSpec::new("shop/app", "node-b"))?];
    let one = Backend::start(lab, "shop/one", "node-a")?;
    let two = Backend::start(lab, "shop/two", "node-b")?;
    let spec = one.and(&two, service("shop/cart", 1).port("http", 80, 8080));
    lab.service(&spec.field("/spec/sessionAffinity", "ClientIP".into()))?;
    let _agents = lab.start_agents(&AgentOptions::default())?;
    for client in &clients {
        let seen = tally(client, vips(1)[0], 20)?;
        ensure!(seen.len() == 1, "{} went to {seen:?}", client.name());
    }
    Ok(())
}

/// Two nodes in two zones.
fn zoned() -> LabOptions {
    let zone = |name, number, zone| NodeSpec::numbered(name, number).label("topology.kubernetes.io/zone", zone);
    LabOptions { nodes: vec![zone("node-a", 1, "east"), zone("node-b", 2, "west")], ..lab() }
}

fn near_endpoints(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
    let near = Backend::start(lab, "shop/near", "node-a")?;
    let far = Backend::start(lab, "shop/far", "node-b")?;
    let ports = |number| service(&format!("shop/cart-{number}"), number).port("http", 80, 8080);
    lab.service(&near.and(&far, ports(1)).field("/spec/internalTrafficPolicy", "Local".into()))?;
    lab.service(&ports(2).endpoint(&far.pod).field("/spec/internalTrafficPolicy", "Local".into()))?;
    lab.service(&near.and(&far, ports(3)).field("/spec/trafficDistribution", "PreferSameNode".into()))?;
    lab.service(&ports(4).endpoint(&far.pod).field("/spec/trafficDistribution", "PreferSameNode".into()))?;
    // Zones and hints stand in the slices, as the control plane writes them.
    for (number, hints) in [(5, false), (6, true)] {
        let field = if hints { None } else { Some("PreferClose") };
        lab.put(&json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"namespace": "shop", "name": format!("cart-{number}")},
            "spec": {
                "clusterIP": vips(number)[0].to_string(), "trafficDistribution": field,
                "ports": [{"port": 80, "targetPort": 8080}],
            },
        }))?;
        let endpoint = |pod: &Pod, zone: &str, hint: &str| {
            let mut endpoint = json!({"addresses": [pod.ip().to_string()], "nodeName": pod.node_name(), "zone": zone});
            if hints {
                endpoint["hints"] = json!({"forZones": [{"name": hint}]});
            }
            endpoint
        };
        // A hint may send a zone's clients elsewhere than into their own.
        lab.put(&json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {
                "namespace": "shop", "name": format!("cart-{number}-v4"),
                "labels": {"kubernetes.io/service-name": format!("cart-{number}")},
            },
            "ports": [{"port": 8080}],
            "endpoints": [endpoint(&near.pod, "east", "west"), endpoint(&far.pod, "west", "east")],
        }))?;
    }
    let agents = lab.start_agents(&AgentOptions::default())?;
    let cases = [(1, "near"), (3, "near"), (4, "far"), (5, "near"), (6, "far")];
    for (number, wanted) in cases {
        let seen = tally(&web, vips(number)[0], 12).with_context(|| format!("cart-{number}"))?;
        ensure!(seen.keys().eq([wanted]), "cart-{number}: {seen:?}");
    }
    let knock = knock(&web, (vips(2)[0], 80))?;
    ensure!(knock.ended == Ended::Refused, "Local led to another node: {knock:?}");
    let line = agents[0].access_line("a refusal", |line| line["source_addr"] == knock.from.to_string())?;
    ensure!(line["reason"] == "no-endpoint", "{line}");
    Ok(())
}

fn a_busy_endpoint_gets_less(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
    let busy = Backend::start(lab, "shop/busy", "node-b")?;
    let idle = Backend::start(lab, "shop/idle", "node-b")?;
    lab.service(&service("shop/one", 1).port("http", 80, 8080).endpoint(&busy.pod))?;
    lab.service(&busy.and(&idle, service("shop/both", 2).port("http", 80, 8080)))?;
    let _agents = lab.start_agents(&AgentOptions::default())?;
    let held = (0..8).map(|_| web.connect((vips(1)[0], 80))).collect::<std::io::Result<Vec<_>>>()?;
    eventually("the busy endpoint has its load", BOUND, || (busy.server.live() == held.len()).then_some(()))?;
    let seen = tally(&web, vips(2)[0], 24)?;
    ensure!(seen.keys().eq(["idle"]), "eight connections weighed nothing: {seen:?}");
    drop(held);
    eventually("both serve once the load is gone", BOUND, || {
        tally(&web, vips(2)[0], 12).is_ok_and(|seen| seen.len() == 2).then_some(())
    })
}

fn a_dead_endpoint(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
    let good = Backend::start(lab, "shop/good", "node-b")?;
    let dead = lab.pod(PodSpec::new("shop/dead", "node-b"))?;
    lab.service(&service("shop/cart", 1).port("http", 80, 8080).endpoint(&good.pod).endpoint(&dead))?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let seen = tally(&web, vips(1)[0], 40)?;
    ensure!(seen.keys().eq(["good"]), "{seen:?}");
    ensure!(good.server.peers().len() == 40, "a request was made twice: {} connections", good.server.peers().len());
    let tries = agents[1].access_log()?.iter().filter(|line| line["destination_pod"] == "shop/dead").count();
    ensure!(tries == 3, "an endpoint that keeps failing was tried {tries} times");
    let _revived = dead.serve_http(8080, "dead")?;
    eventually("it is tried again, and has its share", BOUND, || {
        tally(&web, vips(1)[0], 12).is_ok_and(|seen| seen.len() == 2).then_some(())
    })
}

fn somebody_else(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
    let good = Backend::start(lab, "shop/good", "node-a")?;
    let wrong = Backend::start(lab, "shop/wrong", "node-b")?;
    lab.service(&good.and(&wrong, service("shop/cart", 1).port("http", 80, 8080)))?;
    lab.service(&service("shop/wrong", 2).port("http", 80, 8080).endpoint(&wrong.pod))?;
    let here = lab.node("node-a").start_agent(&AgentOptions::default())?;
    // An agent of another mesh, with another CA, answers there.
    let foreign = AgentOptions { ca: Some(lab.ca().join("foreign")), ..AgentOptions::default() };
    let _there = lab.node("node-b").start_agent(&foreign.arg("--trust-domain").arg("foreign.example"))?;
    let seen = tally(&web, vips(1)[0], 20)?;
    ensure!(seen.keys().eq(["good"]), "{seen:?}");
    let knock = knock(&web, (vips(2)[0], 80))?;
    ensure!(knock.ended == Ended::Refused, "{knock:?}");
    let line = here.access_line("a refusal", |line| line["source_addr"] == knock.from.to_string())?;
    ensure!(line["reason"] == "tls", "{line}");
    ensure!(wrong.server.peers().is_empty(), "somebody else was talked to");
    Ok(())
}

fn a_silent_endpoint(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
    let good = Backend::start(lab, "shop/good", "node-a")?;
    let silent = Backend::start(lab, "shop/silent", "node-b")?;
    let near_first = service("shop/cart", 1).port("http", 80, 8080);
    lab.service(&good.and(&silent, near_first))?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    for ip in silent.pod.ips() {
        let bits = if ip.is_ipv4() { 32 } else { 128 };
        lab.node("node-b").ip_batch([format!("route replace blackhole {ip}/{bits}")])?;
    }
    // Side by side, for each that meets the silent one waits for ten seconds; one of many surely does.
    let answers: Vec<Result<String>> = std::thread::scope(|scope| {
        let calls: Vec<_> = (0..12).map(|_| scope.spawn(|| ask(&web, vips(1)[0]))).collect();
        calls.into_iter().map(|call| call.join().unwrap_or_else(|_| Err(anyhow::anyhow!("it panicked")))).collect()
    });
    for answer in answers {
        ensure!(answer? == "good", "the silent one spoke");
    }
    let waited = |line: &Value| line["duration_ms"].as_u64() >= Some(9_000);
    let line = agents[0].access_line("a call that met the silent endpoint", waited)?;
    ensure!(line["destination_pod"] == "shop/good", "{line}");
    Ok(())
}

/// A pod that answers HTTP on 8080 with its name.
struct Backend {
    pod: Pod,
    server: Server,
}

impl Backend {
    fn start(lab: &Lab, full_name: &str, node: &str) -> Result<Self> {
        let pod = lab.pod(PodSpec::new(full_name, node).port("http", 8080))?;
        let server = pod.serve_http(8080, pod.name())?;
        Ok(Self { pod, server })
    }

    fn and(&self, other: &Self, spec: ServiceSpec) -> ServiceSpec {
        spec.endpoint(&self.pod).endpoint(&other.pod)
    }
}

fn service(full_name: &str, number: u8) -> ServiceSpec {
    vips(number).into_iter().fold(ServiceSpec::new(full_name), ServiceSpec::cluster_ip)
}

fn vips(number: u8) -> [IpAddr; 2] {
    let v6 = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, number.into());
    [Ipv4Addr::new(10, 96, 0, number).into(), v6.into()]
}

fn addr(ip: IpAddr, port: u16) -> String {
    std::net::SocketAddr::new(ip, port).to_string()
}

/// Who answers at port 80.
fn ask(client: &Pod, ip: IpAddr) -> Result<String> {
    let answer = client.http_get((ip, 80), "/")?.json()?;
    ensure!(answer["peer"] == client_ip(client, ip).to_string(), "another client was seen: {answer}");
    Ok(answer["pod"].as_str().unwrap_or_default().to_owned())
}

fn client_ip(client: &Pod, towards: IpAddr) -> IpAddr {
    client.ips().iter().copied().find(|ip| ip.is_ipv4() == towards.is_ipv4()).unwrap_or(client.ip())
}

/// Who answers how often, one connection after the other.
fn tally(client: &Pod, ip: IpAddr, count: usize) -> Result<BTreeMap<String, usize>> {
    let mut seen = BTreeMap::new();
    for _ in 0..count {
        *seen.entry(ask(client, ip)?).or_default() += 1;
    }
    Ok(seen)
}
