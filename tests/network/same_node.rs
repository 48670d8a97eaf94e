//! Two pods of one node: joined without a tunnel where that is allowed, and else by the tunnel, with the same outcome.

use std::io::{Read, Write};
use std::net::{IpAddr, TcpStream};

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::{
    Agent, AgentOptions, BOUND, End, Lab, Pod, PodSpec, Server, ServiceSpec, authorization, eventually, trial_with,
};
use serde_json::{Value, json};

use crate::knock::{Ended, knock};
use crate::lab;

pub fn trials() -> Vec<Trial> {
    vec![
        trial_with("same_node::nothing_crosses_the_pods_interfaces", lab(), nothing_crosses_the_pods_interfaces),
        trial_with("same_node::both_ways_end_alike_and_are_told_alike", lab(), both_ways_end_alike_and_are_told_alike),
        trial_with("same_node::a_network_policy_keeps_to_the_tunnel", lab(), a_network_policy_keeps_to_the_tunnel),
        trial_with("same_node::a_gateway_waypoint_keeps_to_the_tunnel", lab(), a_gateway_waypoint_keeps_to_the_tunnel),
        trial_with("same_node::a_change_of_policy_resets_what_it_forbids", lab(), a_change_of_policy_resets),
        trial_with("same_node::a_pod_that_leaves_takes_its_connections", lab(), a_pod_that_leaves),
        trial_with("same_node::a_drain_lets_it_finish", lab(), a_drain_lets_it_finish),
        trial_with("same_node::bytes_of_a_living_connection_are_counted_on_both_sides", lab(), bytes_are_counted),
        trial_with("same_node::readers_who_stall_hold_up_nobody_and_leave_nothing", lab(), readers_who_stall),
    ]
}

fn nothing_crosses_the_pods_interfaces(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, SameNode::Direct)?;
    let crossing = [&shop.web, &shop.cart].map(|pod| shop.node(lab).capture(pod.host_interface()));
    for (own, ip) in shop.web.ips().iter().zip(shop.cart.ips()) {
        let mut call = Call::open(&shop.web, *ip)?;
        call.still_talks()?;
        ensure!(shop.server.peers().last().map(|peer| peer.ip()) == Some(*own), "the application sees another client");
    }
    for capture in crossing {
        let ports = capture?.tcp_ports()?;
        ensure!(ports.is_empty(), "TCP crossed an interface: {ports:?}");
    }
    for direction in ["outbound", "inbound"] {
        let line = shop.agent.access_line(direction, |line| line["direction"] == direction)?;
        for (field, wanted) in [
            ("transport", "same-node"),
            ("verdict", "allow"),
            ("source_pod", "shop/web"),
            ("source_identity", "spiffe://cluster.local/ns/shop/sa/web"),
            ("destination_pod", "shop/cart"),
            ("destination_identity", "spiffe://cluster.local/ns/shop/sa/cart"),
        ] {
            ensure!(line[field] == wanted, "{field} is not {wanted}: {line}");
        }
        ensure!(line["key_exchange"].is_null(), "{line}");
    }
    let metrics = shop.agent.metrics()?;
    ensure!(metrics.sum("selvedge_tls_handshakes_total", &[]) == 0.0, "there was TLS");
    for (direction, reporter) in [("outbound", "source"), ("inbound", "destination")] {
        let labels = [
            ("direction", direction),
            ("reporter", reporter),
            ("transport", "same-node"),
            ("connection_security_policy", "none"),
            ("source_principal", "spiffe://cluster.local/ns/shop/sa/web"),
            ("destination_workload", "cart"),
        ];
        let opened = metrics.sum("selvedge_tcp_connections_opened_total", &labels);
        ensure!(opened == shop.cart.ips().len() as f64, "{opened} connections {direction}");
    }
    Ok(())
}

/// Whatever becomes of a connection, the client sees the same and the log says the same, joined or through the tunnel.
fn both_ways_end_alike_and_are_told_alike(lab: &Lab) -> Result<()> {
    let mut told = Vec::new();
    for way in [SameNode::Direct, SameNode::Tunnel] {
        let shop = Shop::open(lab, way)?;
        let thief = lab.pod(PodSpec::new("shop/thief", NODE).service_account("thief"))?;
        let nobody = lab.pod(PodSpec::new("shop/nobody", NODE).service_account(""))?;
        let stranger = lab.pod(PodSpec::new("shop/stranger", NODE).outside())?;
        let from_thief = json!([{"from": [{"source": {"serviceAccounts": ["shop/thief"]}}]}]);
        lab.put(&authorization("shop/no-thieves", json!({"action": "DENY", "rules": from_thief})))?;
        lab.put(&json!({
            "apiVersion": "selvedge.dev/v1alpha1",
            "kind": "PeerAuthentication",
            "metadata": {"namespace": "shop", "name": "strict"},
            "spec": {"mtls": {"mode": "STRICT"}},
        }))?;
        lab.service(
            &ServiceSpec::new("shop/cart").cluster_ip("10.96.0.7".parse()?).port("http", 80, PORT).endpoint(&shop.cart),
        )?;
        let agents = [&thief, &nobody].map(|pod| shop.agent.wait_pod(pod));
        for known in agents {
            known?;
        }
        lab.settle(std::slice::from_ref(&shop.agent))?;
        let cart = shop.cart.ip();
        let mut outcomes = Vec::new();
        for (name, client, ip, port) in [
            ("allowed", &shop.web, cart, PORT),
            ("by the Service", &shop.web, "10.96.0.7".parse()?, 80),
            ("denied by name", &thief, cart, PORT),
            ("without an identity", &nobody, cart, PORT),
            ("in plaintext", &stranger, cart, PORT),
            ("at a port where nobody listens", &shop.web, cart, 9),
            ("at a port of the mesh", &shop.web, cart, 15006),
        ] {
            let called = knock(client, (ip, port))?;
            let mut lines = Vec::new();
            let directions: &[&str] = match name {
                "without an identity" | "at a port of the mesh" => &["outbound"],
                "in plaintext" => &["inbound"],
                _ => &["outbound", "inbound"],
            };
            for direction in directions {
                let own = |line: &Value| {
                    let source = line["source_addr"].as_str().unwrap_or_default();
                    let mine = line["source_pod"] == client.full_name() || source == called.from.to_string();
                    let there = line["destination_addr"] == format!("{cart}:{}", if port == 80 { PORT } else { port });
                    let dialled = line["requested_addr"].is_null() != (port == 80) || *direction == "inbound";
                    mine && there && dialled && line["direction"] == *direction
                };
                let mut line = shop.agent.access_line(&format!("{name}, {direction}"), own)?;
                let fields = line.as_object_mut().context("a line is an object")?;
                let transport = fields.remove("transport");
                let plain = name == "in plaintext" || name == "without an identity" || name == "at a port of the mesh";
                let wanted = if plain { "plaintext" } else { way.transport() };
                ensure!(transport == Some(wanted.into()), "{name}, {direction}: {transport:?}");
                for varies in ["time", "duration_ms", "detail", "source_addr", "key_exchange"] {
                    fields.remove(varies);
                }
                lines.push(line.to_string().replace(&cart.to_string(), "CART"));
            }
            outcomes.push((name, called.ended, lines));
        }
        told.push(outcomes);
        for pod in [thief, nobody, stranger] {
            lab.delete(pod)?;
        }
        shop.close(lab)?;
    }
    for (direct, tunnel) in told[0].iter().zip(&told[1]) {
        ensure!(direct == tunnel, "directly: {direct:#?}\nthrough the tunnel: {tunnel:#?}");
    }
    Ok(())
}

fn a_network_policy_keeps_to_the_tunnel(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, SameNode::Direct)?;
    let of_kubernetes = |selector: Value| {
        json!({
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": "np", "namespace": "shop"},
            "spec": {"podSelector": selector, "policyTypes": ["Ingress"], "ingress": [{}]},
        })
    };
    let of_cni = |api_version: &str, kind: &str, namespace: Option<&str>| {
        let mut policy = json!({"apiVersion": api_version, "kind": kind, "metadata": {"name": "np"}, "spec": {}});
        if let Some(namespace) = namespace {
            policy["metadata"]["namespace"] = namespace.into();
        }
        policy
    };
    let expression = |key: &str, operator: &str, values: &[&str]| {
        let expression = match values {
            [] => json!({"key": key, "operator": operator}),
            values => json!({"key": key, "operator": operator, "values": values}),
        };
        json!({"matchExpressions": [expression]})
    };
    let mut elsewhere = of_kubernetes(json!({}));
    elsewhere["metadata"]["namespace"] = "bank".into();
    let cases = [
        (of_kubernetes(json!({"matchLabels": {"app": "cart"}})), "tunnel"),
        (of_kubernetes(json!({"matchLabels": {"app": "web"}})), "tunnel"),
        (of_kubernetes(json!({})), "tunnel"),
        (of_kubernetes(json!({"matchLabels": {"app": "other"}})), "direct"),
        (of_kubernetes(expression("app", "In", &["cart", "other"])), "tunnel"),
        (of_kubernetes(expression("app", "NotIn", &["cart", "web"])), "direct"),
        (of_kubernetes(expression("tier", "DoesNotExist", &[])), "tunnel"),
        (of_kubernetes(expression("tier", "Exists", &[])), "direct"),
        (of_kubernetes(expression("tier", "Sometimes", &[])), "tunnel"),
        (elsewhere, "direct"),
        (of_cni("cilium.io/v2", "CiliumNetworkPolicy", Some("shop")), "tunnel"),
        (of_cni("cilium.io/v2", "CiliumNetworkPolicy", Some("bank")), "direct"),
        (of_cni("cilium.io/v2", "CiliumClusterwideNetworkPolicy", None), "tunnel"),
        (of_cni("projectcalico.org/v3", "NetworkPolicy", Some("shop")), "tunnel"),
        (of_cni("projectcalico.org/v3", "GlobalNetworkPolicy", None), "tunnel"),
        (of_cni("policy.networking.k8s.io/v1alpha2", "ClusterNetworkPolicy", None), "tunnel"),
    ];
    for (index, (mut policy, wanted)) in cases.into_iter().enumerate() {
        // Of a name of its own: a malformed one would keep its last good version.
        policy["metadata"]["name"] = format!("np-{index}").into();
        let file = format!("np-{index}.yaml");
        shop.goes("direct").with_context(|| format!("before {policy}"))?;
        let mut held = Call::open(&shop.web, shop.cart.ip())?;
        lab.write(&file, &format!("{policy}\n"))?;
        lab.settle(std::slice::from_ref(&shop.agent))?;
        shop.goes(wanted).with_context(|| policy.to_string())?;
        match wanted {
            "tunnel" => held.is_reset().with_context(|| format!("joined before {policy}"))?,
            _ => held.still_talks().with_context(|| format!("joined before {policy}"))?,
        }
        lab.remove(&file)?;
        eventually("the policy is gone", BOUND, || shop.goes("direct").ok())?;
    }
    // A label that a policy selects by comes to a pod.
    lab.write("np.yaml", &format!("{}\n", of_kubernetes(json!({"matchLabels": {"tier": "locked"}}))))?;
    lab.settle(std::slice::from_ref(&shop.agent))?;
    shop.goes("direct")?;
    let mut labelled = shop.web.manifest().clone();
    labelled["metadata"]["labels"]["tier"] = "locked".into();
    lab.put(&labelled)?;
    lab.settle(std::slice::from_ref(&shop.agent))?;
    shop.goes("tunnel").context("once the source has the label")
}

fn a_gateway_waypoint_keeps_to_the_tunnel(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, SameNode::Direct)?;
    shop.goes("direct")?;
    for (waypoint, wanted) in [("a-gateway", "tunnel"), ("none", "direct")] {
        let mut manifest = shop.cart.manifest().clone();
        manifest["metadata"]["annotations"]["selvedge.dev/waypoint"] = waypoint.into();
        lab.put(&manifest)?;
        lab.settle(std::slice::from_ref(&shop.agent))?;
        shop.goes(wanted).with_context(|| format!("waypoint: {waypoint}"))?;
    }
    let of_service = ServiceSpec::new("shop/cart").port("http", 80, PORT).endpoint(&shop.cart);
    lab.service(&of_service.field("/metadata/annotations", json!({"selvedge.dev/waypoint": "a-gateway"})))?;
    lab.settle(std::slice::from_ref(&shop.agent))?;
    shop.goes("tunnel").context("a Service's waypoint")
}

fn a_change_of_policy_resets(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, SameNode::Direct)?;
    let teller = lab.pod(PodSpec::new("bank/teller", NODE).service_account("teller"))?;
    shop.agent.wait_pod(&teller)?;
    let mut calls = [Call::open(&shop.web, shop.cart.ip())?, Call::open(&teller, shop.cart.ip())?];
    let bank = json!([{"from": [{"source": {"namespaces": ["bank"]}}]}]);
    lab.put(&authorization("shop/no-bank", json!({"action": "DENY", "rules": bank})))?;
    let [web, teller] = &mut calls;
    teller.is_reset()?;
    web.still_talks()?;
    for direction in ["outbound", "inbound"] {
        shop.agent.access_line(direction, |line| {
            line["direction"] == direction
                && line["transport"] == "same-node"
                && line["source_pod"] == "bank/teller"
                && line["reason"] == "policy:shop/no-bank"
        })?;
    }
    lab.put(&authorization("shop/nobody", json!({})))?;
    web.is_reset()
}

fn a_pod_that_leaves(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, SameNode::Direct)?;
    let spare = lab.pod(PodSpec::new("shop/spare", NODE))?;
    shop.agent.wait_pod(&spare)?;
    let mut held = Call::open(&shop.web, shop.cart.ip())?;
    let mut of_spare = Call::open(&spare, shop.cart.ip())?;
    let to_spare_server = spare.serve_greeting(PORT, GREETING)?;
    let mut to_spare = Call::open(&shop.web, spare.ip())?;
    let mut manifest = spare.manifest().clone();
    manifest["status"]["phase"] = "Succeeded".into();
    lab.put(&manifest)?;
    of_spare.is_reset().context("its own connection")?;
    to_spare.is_reset().context("a connection to it")?;
    held.still_talks().context("a connection of others")?;
    drop(to_spare_server);
    for (source, destination) in [("shop/spare", "shop/cart"), ("shop/web", "shop/spare")] {
        for direction in ["outbound", "inbound"] {
            shop.agent.access_line(&format!("{source} to {destination}, {direction}"), |line| {
                line["source_pod"] == source
                    && line["destination_pod"] == destination
                    && line["direction"] == direction
                    && line["reason"] == "drain"
            })?;
        }
    }
    Ok(())
}

fn a_drain_lets_it_finish(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, SameNode::Direct)?;
    let echo = shop.cart.serve_echo(7000)?;
    let mut open = shop.web.converse((shop.cart.ip(), 7000))?;
    open.exchange("before")?;
    shop.agent.kill(nix::sys::signal::Signal::SIGTERM)?;
    eventually("it says that it is not ready", BOUND, || (!shop.agent.is_ready()).then_some(()))?;
    open.exchange("while it drains")?;
    open.finish_speaking()?;
    ensure!(open.end()? == End::Closed(Vec::new()), "it did not end in order");
    let status = shop.agent.wait(BOUND)?;
    ensure!(status.code() == Some(0), "it ended with {status}");
    drop(echo);
    Ok(())
}

fn bytes_are_counted(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, SameNode::Direct)?;
    let _echo = shop.cart.serve_echo(7000)?;
    let mut stream = shop.web.connect((shop.cart.ip(), 7000))?;
    stream.set_read_timeout(Some(BOUND))?;
    let mut reading = stream.try_clone()?;
    std::thread::scope(|scope| {
        let reader = scope.spawn(move || std::io::copy(&mut (&mut reading).take(MEGABYTES), &mut std::io::sink()));
        stream.write_all(&vec![7; MEGABYTES as usize])?;
        let read = reader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        ensure!(read == MEGABYTES, "{read} bytes came back");
        Ok(())
    })?;
    for reporter in ["source", "destination"] {
        eventually(&format!("bytes as the {reporter} reports them"), BOUND, || {
            let metrics = shop.agent.metrics().ok()?;
            let labels = [("reporter", reporter), ("transport", "same-node")];
            let moved = ["selvedge_tcp_sent_bytes_total", "selvedge_tcp_received_bytes_total"]
                .map(|name| metrics.sum(name, &labels));
            (moved == [MEGABYTES as f64; 2]).then_some(())
        })?;
    }
    Ok(())
}

/// More readers stall than there are pipes: the others get through, and once all are gone nothing is left of them.
fn readers_who_stall(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, SameNode::Direct)?;
    let listener = shop.cart.listen(7000)?;
    let before = shop.agent.metrics()?.sum("selvedge_process_open_fds", &[]);
    let mut stalled = Vec::new();
    for _ in 0..STALLED {
        let client = shop.web.connect((shop.cart.ip(), 7000))?;
        let (server, _) = listener.accept()?;
        client.set_nonblocking(true)?;
        stalled.push((client, server));
    }
    // Fills everything on the way: what the relay takes meanwhile, a later round fills again.
    for _ in 0..5 {
        for (client, _) in &mut stalled {
            while client.write(&[1; 262_144]).is_ok() {}
        }
    }
    let mut call = Call::open(&shop.web, shop.cart.ip())?;
    for _ in 0..10 {
        call.still_talks()?;
    }
    for (_, mut server) in stalled {
        server.set_read_timeout(Some(BOUND))?;
        server.read_exact(&mut [0; 65_536]).context("a stalled one goes on")?;
    }
    drop(call);
    eventually("nothing is open", BOUND, || {
        let metrics = shop.agent.metrics().ok()?;
        let open = metrics.sum("selvedge_connections_open", &[]);
        let descriptors = metrics.sum("selvedge_process_open_fds", &[]);
        // Some pipes are kept for the next bytes.
        (open == 0.0 && descriptors < before + 80.0).then_some(())
    })
}

/// What carries a connection between two pods of one node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum SameNode {
    Direct,
    Tunnel,
}

impl SameNode {
    fn transport(self) -> &'static str {
        match self {
            Self::Direct => "same-node",
            Self::Tunnel => crate::tunnel(),
        }
    }
}

/// A client and a server on one node, and its agent.
struct Shop {
    web: Pod,
    cart: Pod,
    agent: Agent,
    server: Server,
}

impl Shop {
    fn open(lab: &Lab, way: SameNode) -> Result<Self> {
        let pod = |name: &str| PodSpec::new(&format!("shop/{name}"), NODE).service_account(name).label("app", name);
        let (web, cart) = (lab.pod(pod("web"))?, lab.pod(pod("cart"))?);
        let server = cart.serve_greeting(PORT, GREETING)?;
        let how = if way == SameNode::Direct { "direct" } else { "tunnel" };
        let agent = lab.node(NODE).start_agent(&AgentOptions::default().arg("--same-node").arg(how))?;
        Ok(Self { web, cart, agent, server })
    }

    fn close(self, lab: &Lab) -> Result<()> {
        let status = self.agent.stop()?;
        ensure!(status.code() == Some(0), "the agent ended with {status}");
        lab.delete(self.web)?;
        lab.delete(self.cart)
    }

    fn node<'a>(&self, lab: &'a Lab) -> &'a selvedge_lab::Node {
        lab.node(NODE)
    }

    /// Checks by a new connection which way it goes.
    fn goes(&self, wanted: &str) -> Result<()> {
        let called = knock(&self.web, (self.cart.ip(), PORT))?;
        ensure!(called.ended == Ended::Greeted(GREETING.into()), "{:?}", called.ended);
        let line = self.agent.access_line("the connection", |line| {
            line["direction"] == "outbound" && line["source_addr"] == called.from.to_string()
        })?;
        ensure!((line["transport"] == "same-node") == (wanted == "direct"), "not {wanted}: {line}");
        Ok(())
    }
}

/// A connection that goes on, to a server that greets and then echoes.
struct Call(TcpStream);

impl Call {
    fn open(client: &Pod, ip: IpAddr) -> Result<Self> {
        let mut stream = client.connect((ip, PORT))?;
        stream.set_read_timeout(Some(BOUND))?;
        let mut greeting = [0; GREETING.len()];
        stream.read_exact(&mut greeting).with_context(|| format!("{} hears nothing", client.name()))?;
        Ok(Self(stream))
    }

    fn still_talks(&mut self) -> Result<()> {
        let mut echo = [0; 4];
        self.0.write_all(b"ping").and_then(|()| self.0.read_exact(&mut echo))?;
        ensure!(&echo == b"ping", "something else came back");
        Ok(())
    }

    fn is_reset(&mut self) -> Result<()> {
        match self.0.read(&mut [0]) {
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => Ok(()),
            other => anyhow::bail!("not reset but {other:?}"),
        }
    }
}

const NODE: &str = "node-a";
const PORT: u16 = 8080;
const GREETING: &str = "hello";
const MEGABYTES: u64 = 8 << 20;
/// More than the agent has pipes for.
const STALLED: usize = 150;
