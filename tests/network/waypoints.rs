//! Waypoints in processes of their own: two nodes, clients and servers on both, and a waypoint in a pod of its own.

mod authorizers;
mod judging;
mod place;
mod tokens;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::waypoint::{Waypoint, gateway, lead_to};
use selvedge_lab::{
    Agent, AgentOptions, BOUND, Lab, Pod, PodSpec, Request, ServiceSpec, authorization, eventually, trial_with,
};
use serde_json::json;

use crate::http::{Application, Keeping, while_asked};
use crate::lab;
use crate::probes::masquerade;
use crate::raw_peer::{self, Credential, Offer, converse};
pub use place::Place;

pub fn trials() -> Vec<Trial> {
    let own = vec![
        trial_with("waypoints::requests_go_through_one_and_keep_their_client", lab(), requests_go_through_one),
        trial_with("waypoints::it_speaks_both_tunnels", lab(), it_speaks_both_tunnels),
        trial_with("waypoints::what_is_no_request_is_carried_as_it_is", lab(), what_is_no_request),
        trial_with("waypoints::policy_judges_the_client_and_never_the_waypoint", lab(), policy_judges_the_client),
        trial_with(
            "waypoints::a_word_about_a_client_is_believed_from_its_waypoint_alone",
            lab(),
            a_word_about_a_client,
        ),
        trial_with("waypoints::requests_are_judged_there_and_nobody_goes_round_it", lab(), requests_are_judged_there),
        trial_with("waypoints::no_headless_service_and_no_node_port_leads_beside_one", lab(), no_way_beside),
        trial_with("waypoints::without_one_that_is_ready_connections_are_refused", lab(), without_one),
        trial_with("waypoints::a_service_needs_to_be_admitted", lab(), a_service_needs_to_be_admitted),
        trial_with("waypoints::rolling_one_fails_no_request", lab(), rolling_one),
    ];
    [own, authorizers::trials(), judging::trials(), tokens::trials()].into_iter().flatten().collect()
}

fn requests_go_through_one(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    lab.put(&json!({
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"namespace": "shop", "name": "cart"},
        "spec": {
            "parentRefs": [{"group": "", "kind": "Service", "name": "cart"}],
            "rules": [
                {
                    "matches": [{"headers": [{"name": "x-version", "value": "near"}]}],
                    "filters": [{"type": "RequestHeaderModifier",
                                 "requestHeaderModifier": {"set": [{"name": "x-routed", "value": "yes"}]}}],
                    "backendRefs": [{"name": "near", "port": 80}],
                },
                {"backendRefs": [{"name": "far", "port": 80}]},
            ],
        },
    }))?;
    let (agents, waypoint) = shop.run(lab, &AgentOptions::default(), &[])?;
    for (header, pod) in [("near", "near"), ("other", "far")] {
        let request = Request::get("/x?q=1").header("x-version", header);
        let answer = shop.web.http(shop.vip(), &request)?.json()?;
        ensure!(answer["pod"] == pod && answer["path"] == "/x?q=1", "{answer}");
        ensure!(answer["peer"] == shop.web.ip().to_string(), "the application sees another client: {answer}");
        ensure!((answer["headers"]["x-routed"] == "yes") == (pod == "near"), "{answer}");
    }
    let client = "spiffe://cluster.local/ns/shop/sa/default";
    let line =
        waypoint.access_line("a request", |line| line["path"] == "/x" && line["destination_pod"] == "shop/near")?;
    for (field, wanted) in [
        ("source_identity", client),
        ("source_pod", "shop/web"),
        ("direction", "relayed"),
        ("service", "shop/near"),
        ("route", "shop/cart"),
    ] {
        ensure!(line[field] == wanted, "{field}: {line}");
    }
    // The server's agent knows the client as if it had come by itself.
    drop((shop.near, shop.far));
    let line = agents[1].access_line("what the waypoint passed on", |line| line["direction"] == "inbound")?;
    ensure!(line["source_identity"] == client && line["source_pod"] == "shop/web", "{line}");
    let line = agents[0].access_line("the client's connection", |line| line["direction"] == "outbound")?;
    ensure!(line["destination_pod"] == "infra/gw-1" && line["service"] == "shop/cart", "{line}");
    ensure!(line["destination_identity"] == "spiffe://cluster.local/ns/infra/sa/gw-selvedge-waypoint", "{line}");
    eventually("requests are counted where they are served", BOUND, || {
        let labels = [("reporter", "waypoint"), ("response_code", "200"), ("route", "shop/cart")];
        (waypoint.metrics().ok()?.sum("selvedge_http_requests_total", &labels) == 2.0).then_some(())
    })
}

fn it_speaks_both_tunnels(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    let fast = AgentOptions::default().arg("--tunnel").arg("auto");
    let (agents, waypoint) = shop.run(lab, &fast, &["--tunnel", "auto"])?;
    let mut connection = Keeping::connect(&shop.web, shop.vip())?;
    for number in 0..20 {
        ensure!(connection.get(&format!("/fast/{number}"))?["peer"] == shop.web.ip().to_string());
    }
    let line = waypoint.access_line("a request over the fast tunnel", |line| line["path"] == "/fast/3")?;
    ensure!(line["transport"] == "fast", "{line}");
    // The waypoint keeps a connection with them for its next request, and they would wait for it.
    drop(agents);
    let _agents = lab.start_agents(&AgentOptions::default().hbone())?;
    ensure!(shop.web.http_get(shop.vip(), "/hbone")?.json()?["peer"] == shop.web.ip().to_string());
    let line = waypoint.access_line("a request over HBONE", |line| line["path"] == "/hbone")?;
    ensure!(line["transport"] == "hbone", "{line}");
    Ok(())
}

fn what_is_no_request(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "undeclared")?;
    lab.service(&asking("shop/greet", 2).port("any", 80, 9000).endpoint(&shop.pods[1]))?;
    let (_agents, _waypoint) = shop.run(lab, &AgentOptions::default(), &[])?;
    let _greeting = shop.pods[1].serve_greeting(9000, "welcome\n")?;
    let mut stream = shop.web.connect((vip(2), 80))?;
    let mut heard = [0; 8];
    std::io::Read::read_exact(&mut stream, &mut heard)?;
    ensure!(&heard == b"welcome\n");
    // And requests on such a port are requests.
    ensure!(shop.web.http_get(shop.vip(), "/x")?.status == 200);
    Ok(())
}

fn policy_judges_the_client(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    let stranger = lab.pod(PodSpec::new("shop/stranger", "node-a").service_account("stranger"))?;
    web_only(lab)?;
    // Its endpoint is the same pod; the waypoint is none of this Service's.
    lab.service(&ServiceSpec::new("shop/apart").cluster_ip(vip(3)).port("http", 80, 8081).endpoint(&shop.pods[1]))?;
    let _apart = Application::start(&shop.pods[1], 8081)?;
    lab.put(&json!({
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"namespace": "shop", "name": "cart"},
        "spec": {
            "parentRefs": [{"group": "", "kind": "Service", "name": "cart"}],
            "rules": [
                {"matches": [{"path": {"type": "PathPrefix", "value": "/apart"}}],
                 "backendRefs": [{"name": "apart", "port": 80}]},
                {"backendRefs": [{"name": "cart", "port": 80}]},
            ],
        },
    }))?;
    let (agents, _waypoint) = shop.run(lab, &AgentOptions::default(), &[])?;
    let answer = shop.web.http_get(shop.vip(), "/x")?;
    ensure!(answer.status == 200, "{answer:?}");
    let answer = stranger.http_get(shop.vip(), "/x")?;
    ensure!(answer.status == 403 && answer.header("selvedge-reason") == Some("policy"), "{answer:?}");
    // Nobody takes the waypoint's word there, and it has no rights of its own.
    let answer = shop.web.http_get(shop.vip(), "/apart")?;
    ensure!(answer.status == 403, "{answer:?}");
    let line = agents[1].access_line("the waypoint's own try", |line| line["reason"] == "policy:shop/web-only")?;
    ensure!(line["source_identity"] == "spiffe://cluster.local/ns/infra/sa/gw-selvedge-waypoint", "{line}");
    Ok(())
}

fn requests_are_judged_there(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    let outside = lab.pod(PodSpec::new("shop/outside", "node-a").outside())?;
    let reading = json!({
        "from": [{"source": {"principals": ["cluster.local/ns/shop/sa/default"]}}],
        "to": [{"operation": {"methods": ["GET"], "paths": ["/open/*"]}}],
    });
    lab.put(&authorization("shop/reading", json!({"action": "ALLOW", "rules": [reading]})))?;
    let (agents, _waypoint) = shop.run(lab, &AgentOptions::default(), &[])?;
    for (path, status) in [("/open/x", 200), ("/closed", 403), ("/closed/../open/x", 200), ("/open/%2e%2e/closed", 403)]
    {
        let answer = shop.web.http_get(shop.vip(), path)?;
        ensure!(answer.status == status, "{path}: {answer:?}");
    }
    ensure!(shop.far.heard().iter().chain(&shop.near.heard()).all(|heard| heard == "GET /open/x"));
    // Round it: the pod's own address, from inside the mesh and from outside.
    for (number, client) in [&shop.web, &outside].into_iter().enumerate() {
        let there = (shop.pods[1].ip(), 8080);
        let reached = client.http_get(there, "/open/x").is_ok_and(|answer| answer.status == 200);
        ensure!(!reached, "client {number} went round the waypoint");
    }
    let line = agents[1].access_line("the refusal", |line| line["reason"] == "waypoint")?;
    ensure!(line["detail"].as_str().is_some_and(|detail| detail.contains("dial the Service")), "{line}");
    Ok(())
}

/// A headless Service leads to the pod's own address, and what comes by a port of the nodes comes from the node's.
fn no_way_beside(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    let outside = lab.pod(PodSpec::new("away/outside", "node-b").outside())?;
    let far = &shop.pods[1];
    masquerade(lab.node("node-b"), &outside, far)?;
    lab.service(&ServiceSpec::new("shop/far-headless").port("http", 80, 8080).endpoint(far))?;
    let (agents, _waypoint) = shop.run(lab, &AgentOptions::default(), &[])?;
    let at = (far.ip(), 8080);
    for (client, what) in [(&shop.web, "a client of the mesh"), (&outside, "one by a port of the nodes")] {
        ensure!(client.http_get(at, "/before")?.status == 200, "{what}, while no policy speaks of requests");
    }
    let admin = json!({"operation": {"paths": ["/admin"]}});
    lab.put(&authorization("shop/no-admin", json!({"action": "DENY", "rules": [{"to": [admin]}]})))?;
    lab.settle(&agents)?;
    let gateway = lab.node("node-b").gateways().into_iter().find(|ip| ip.is_ipv4()).map(|ip| ip.to_string());
    for (client, from) in [(&shop.web, Some(shop.web.ip().to_string())), (&outside, gateway)] {
        eventually("nobody comes beside it", BOUND, || client.http_get(at, "/after").is_err().then_some(()))?;
        let address = |line: &serde_json::Value| Some(line["source_addr"].as_str()?.rsplit_once(':')?.0.to_owned());
        let refused = |line: &serde_json::Value| line["reason"] == "waypoint" && address(line) == from;
        let line = agents[1].access_line("the refusal", refused)?;
        ensure!(line["direction"] == "inbound" && line["destination_pod"] == "shop/far", "{line}");
    }
    ensure!(!shop.far.heard().iter().any(|heard| heard == "GET /after"), "{:?}", shop.far.heard());
    ensure!(shop.web.http_get(shop.vip(), "/through")?.status == 200);
    Ok(())
}

fn a_word_about_a_client(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    let thief = lab.pod(PodSpec::new("shop/thief", "node-a").outside())?;
    web_only(lab)?;
    let (_agents, _waypoint) = shop.run(lab, &AgentOptions::default(), &[])?;
    let far = &shop.pods[1];
    let (authority, tunnel) = (SocketAddr::new(far.ip(), 8080).to_string(), SocketAddr::new(far.ip(), 15008));
    let forwarded = format!("for=\"{}:4321\"", shop.web.ip());
    let claim = [("forwarded", &*forwarded), ("selvedge-client-identity", "spiffe://cluster.local/ns/shop/sa/default")];
    for (account, wanted) in [
        ("shop/thief", 401),
        // A waypoint, and not this Service's.
        ("infra/other-selvedge-waypoint", 401),
        ("infra/gw-selvedge-waypoint", 200),
    ] {
        let offer = Offer::new(Credential::of(&lab.ca(), account)?);
        converse(async {
            let mut h2 = raw_peer::speak_h2(raw_peer::dial(&thief, tunnel, offer).await?).await?;
            let (status, ..) = raw_peer::ask(&mut h2, &authority, &claim).await?;
            ensure!(status == wanted, "{account}: {status}");
            Ok(())
        })?;
    }
    let seen = |peers: Vec<SocketAddr>| peers.iter().any(|peer| peer.ip() == shop.web.ip());
    eventually("the application sees whom the waypoint speaks for", BOUND, || seen(shop.far.peers()).then_some(()))
}

fn without_one(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    let (agents, waypoint) = shop.run(lab, &AgentOptions::default(), &[])?;
    ensure!(shop.web.http_get(shop.vip(), "/x")?.status == 200);
    lead_to(lab, &[(&waypoint, false)])?;
    lab.settle(&agents)?;
    eventually("nobody is reached without it", BOUND, || shop.web.connect(shop.vip()).is_err().then_some(()))?;
    let line = agents[0].access_line("the refusal", |line| line["reason"] == "waypoint")?;
    ensure!(
        line["detail"].as_str().is_some_and(|detail| detail.contains("no pod of the waypoint infra/gw is ready")),
        "{line}"
    );
    lead_to(lab, &[(&waypoint, true)])?;
    lab.settle(&agents)?;
    eventually("it is reached again", BOUND, || (shop.web.http_get(shop.vip(), "/x").ok()?.status == 200).then_some(()))
}

fn a_service_needs_to_be_admitted(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    let (agents, _waypoint) = shop.run(lab, &AgentOptions::default(), &[])?;
    gateway(lab, "Same")?;
    lab.settle(&agents)?;
    eventually("it is not reached", BOUND, || shop.web.connect(shop.vip()).is_err().then_some(()))?;
    let line = agents[0].access_line("the refusal", |line| line["reason"] == "waypoint")?;
    ensure!(line["detail"].as_str().is_some_and(|detail| detail.contains("allowedRoutes")), "{line}");
    Ok(())
}

fn rolling_one(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    let (agents, mut current) = shop.run(lab, &AgentOptions::default(), &["--linger", "2s"])?;
    while_asked(&shop.web, shop.vip(), 2, |turn| {
        // As a Deployment does it: the next one is there before the old one goes.
        let mut next = Waypoint::start(lab, "node-a", usize::from(turn) + 1, &["--linger", "2s"])?;
        next.wait_ready()?;
        lead_to(lab, &[(&current, true), (&next, true)])?;
        lab.settle(&agents)?;
        current.terminate()?;
        lead_to(lab, &[(&current, false), (&next, true)])?;
        let status = current.wait()?;
        ensure!(status.code() == Some(0) && !current.log().contains("outlived"), "{}", current.log());
        current = next;
        Ok(())
    })
}

/// A client, a Service that has a waypoint with an endpoint on either node, and each endpoint's own Service.
struct Shop {
    web: Pod,
    near: Application,
    far: Application,
    pods: [Pod; 2],
}

impl Shop {
    /// `port` names the Services' ports.
    fn open(lab: &Lab, port: &str) -> Result<Self> {
        let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
        let near = lab.pod(PodSpec::new("shop/near", "node-a"))?;
        let far = lab.pod(PodSpec::new("shop/far", "node-b"))?;
        lab.service(&asking("shop/cart", 1).port(port, 80, 8080).endpoint(&near).endpoint(&far))?;
        lab.service(&asking("shop/near", 11).port(port, 80, 8080).endpoint(&near))?;
        lab.service(&asking("shop/far", 12).port(port, 80, 8080).endpoint(&far))?;
        Ok(Self {
            near: Application::start(&near, 8080)?,
            far: Application::start(&far, 8080)?,
            web,
            pods: [near, far],
        })
    }

    /// The agents, and a waypoint on the other node than the client's.
    fn run(&self, lab: &Lab, options: &AgentOptions, args: &[&str]) -> Result<(Vec<Agent>, Waypoint)> {
        gateway(lab, "All")?;
        let mut waypoint = Waypoint::start(lab, "node-b", 1, args)?;
        lead_to(lab, &[(&waypoint, true)])?;
        let agents = lab.start_agents(options)?;
        waypoint.wait_ready()?;
        Ok((agents, waypoint))
    }

    fn vip(&self) -> (IpAddr, u16) {
        (vip(1), 80)
    }
}

/// Lets one service account in, and nobody else.
fn web_only(lab: &Lab) -> Result<()> {
    let web = json!({"source": {"principals": ["cluster.local/ns/shop/sa/default"]}});
    lab.put(&authorization("shop/web-only", json!({"action": "ALLOW", "rules": [{"from": [web]}]})))
}

/// A Service before which the waypoint stands.
fn asking(full_name: &str, number: u8) -> ServiceSpec {
    let spec = ServiceSpec::new(full_name).cluster_ip(vip(number));
    spec.field("/metadata/annotations", json!({"selvedge.dev/waypoint": "infra/gw"}))
}

fn vip(number: u8) -> IpAddr {
    Ipv4Addr::new(10, 96, 0, number).into()
}
