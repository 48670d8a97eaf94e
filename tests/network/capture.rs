//! What is captured and what is left alone: exclusions, the pod itself, nested containers, the world outside.

use std::io::{Read, Write};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::{Agent, AgentOptions, BOUND, Lab, Namespace, PodSpec, ServiceSpec, eventually, trial_with};
use serde_json::json;

use crate::capture_modes::{of_host, show};
use crate::lab;

pub fn trials() -> Vec<Trial> {
    let bodies: [(&str, Body); 8] = [
        (
            "excluded_inbound_ports_reach_the_application_past_policy",
            excluded_inbound_ports_reach_the_application_past_policy,
        ),
        (
            "excluded_outbound_ports_and_ranges_leave_as_they_were",
            excluded_outbound_ports_and_ranges_leave_as_they_were,
        ),
        (
            "a_pod_reaches_itself_by_loopback_by_its_address_and_by_its_service",
            a_pod_reaches_itself_by_loopback_by_its_address_and_by_its_service,
        ),
        ("an_application_bound_to_its_pod_address_is_captured", an_application_bound_to_its_pod_address_is_captured),
        ("traffic_of_a_nested_container_is_left_alone", traffic_of_a_nested_container_is_left_alone),
        (
            "the_world_outside_is_reached_from_the_pods_own_address",
            the_world_outside_is_reached_from_the_pods_own_address,
        ),
        (
            "pods_outside_the_mesh_and_joined_ones_talk_in_plaintext",
            pods_outside_the_mesh_and_joined_ones_talk_in_plaintext,
        ),
        (
            "a_server_may_speak_first_through_the_tunnel_and_past_it",
            a_server_may_speak_first_through_the_tunnel_and_past_it,
        ),
    ];
    let in_both_modes = bodies.into_iter().flat_map(|(name, body)| {
        ["tproxy", "redirect"].map(|mode| {
            let options = AgentOptions::default().arg("--capture").arg(mode);
            trial_with(&format!("capture::{name}_by_{mode}"), lab(), move |lab| body(lab, &options))
        })
    });
    let impostors = trial_with(
        "capture::a_namespace_with_a_neighbours_address_gets_nothing_and_is_reported",
        lab(),
        a_namespace_with_a_neighbours_address_gets_nothing_and_is_reported,
    );
    in_both_modes.chain([impostors]).collect()
}

type Body = fn(&Lab, &AgentOptions) -> Result<()>;

fn a_namespace_with_a_neighbours_address_gets_nothing_and_is_reported(lab: &Lab) -> Result<()> {
    // Processes of one world see each other's: an address that no other trial uses.
    let address = "10.244.2.77".parse()?;
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b").ip(address))?;
    let agent = lab.node("node-b").start_agent(&AgentOptions::default())?;
    let script = format!("ip link set lo up && ip addr add {address}/32 dev lo && echo ready && exec sleep 1000");
    let mut unprivileged = Command::new("unshare");
    unprivileged.args(["-Urn", "sh", "-c", &script]).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut impostor = lab.node("node-b").spawn(&mut unprivileged)?;
    let outcome = (|| {
        let mut ready = [0; 6];
        impostor.stdout.take().context("no standard output")?.read_exact(&mut ready)?;
        eventually("the impostor is counted", BOUND, || {
            agent.metrics().ok().filter(|metrics| metrics.sum("selvedge_capture_impostors", &[]) == 1.0)
        })?;
        let place = format!("/proc/{}/", impostor.id());
        ensure!(agent.log().contains("is not proven to be the pod's; it gets nothing"), "not in the log");
        let shown = show(lab, "node-b", &["shop/cart"])?;
        ensure!(shown.contains("impostor") && shown.contains(&place), "not shown:\n{shown}");
        let netns = format!("{place}ns/net");
        let inside = show(lab, "node-b", &["--netns", &netns])?;
        ensure!(inside.contains("rules         none"), "the impostor got rules:\n{inside}");
        let own = show(lab, "node-b", &["--netns", &cart.path().display().to_string()])?;
        ensure!(own.contains("SELVEDGE_IN"), "the pod itself is not captured:\n{own}");

        // Nor does it get anything where the pod itself has no namespace at all.
        lab.delete(cart)?;
        let mut manifest = lab.pod(PodSpec::new("shop/ghost", "node-a").outside())?.manifest().clone();
        manifest["metadata"]["annotations"] = json!({});
        manifest["spec"]["nodeName"] = "node-b".into();
        manifest["status"]["podIP"] = address.to_string().into();
        manifest["status"]["podIPs"] = json!([{"ip": address.to_string()}]);
        lab.put(&manifest)?;
        eventually("the pod without a namespace waits", BOUND, || {
            let shown = show(lab, "node-b", &["shop/ghost"]).ok()?;
            (shown.contains("ghost: pending") && shown.contains("is not proven to be the pod's")).then_some(())
        })
        .with_context(|| show(lab, "node-b", &[]).unwrap_or_default())
    })();
    impostor.kill()?;
    impostor.wait()?;
    outcome
}

fn excluded_inbound_ports_reach_the_application_past_policy(lab: &Lab, options: &AgentOptions) -> Result<()> {
    const KEY: &str = "selvedge.dev/exclude-inbound-ports";
    namespace(lab, "open", "enabled", json!({KEY: "9002"}))?;
    namespace(lab, "bound", "required", json!({}))?;
    for name in ["open", "bound"] {
        lab.deny_all(name)?;
    }
    let stranger = lab.pod(PodSpec::new("away/stranger", "node-a").outside())?;
    let web = lab.pod(PodSpec::new("away/web", "node-a"))?;
    let open = lab.pod(PodSpec::new("open/cart", "node-b").annotation(KEY, "9001"))?;
    let bound = lab.pod(PodSpec::new("bound/cart", "node-b").annotation(KEY, "9001"))?;
    let _agents = lab.start_agents(options)?;
    let mut servers = Vec::new();
    for pod in [&open, &bound] {
        for port in [8080, 9001, 9002] {
            servers.push(pod.serve_http(port, "cart")?);
        }
    }
    for client in [&stranger, &web] {
        for ip in open.ips() {
            for port in [9001, 9002] {
                client.http_get((*ip, port), "/").with_context(|| format!("{} is excluded", port))?;
            }
            ensure!(client.http_get((*ip, 8080), "/").is_err(), "8080 is under policy");
        }
        ensure!(client.http_get((bound.ip(), 9001), "/").is_err(), "`required` voids the pod's exclusion");
    }
    Ok(())
}

fn excluded_outbound_ports_and_ranges_leave_as_they_were(lab: &Lab, options: &AgentOptions) -> Result<()> {
    let outside = lab.families().outside();
    let ranges: Vec<_> = outside.iter().map(|ip| format!("{ip}/{}", if ip.is_ipv4() { 32 } else { 128 })).collect();
    namespace(lab, "shop", "enabled", json!({"selvedge.dev/exclude-outbound-cidrs": ranges.join(",")}))?;
    namespace(lab, "bound", "required", json!({}))?;
    const PORTS: &str = "selvedge.dev/exclude-outbound-ports";
    let web = lab.pod(PodSpec::new("shop/web", "node-a").annotation(PORTS, "9000"))?;
    let bound = lab.pod(PodSpec::new("bound/web", "node-a").annotation(PORTS, "9000"))?;
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b"))?;
    let agents = lab.start_agents(options)?;
    let _excluded = cart.serve_http(9000, "cart")?;
    let _captured = cart.serve_http(8080, "cart")?;
    let _away = lab.outside().serve_http(8080, "outside")?;
    let link = lab.link()?;
    for ip in cart.ips() {
        web.http_get((*ip, 9000), "/left-out")?;
    }
    ensure!(link.find(b"left-out")?.is_found(), "the excluded port went through the tunnel");
    for ip in &outside {
        let answer = web.http_get((*ip, 8080), "/")?;
        ensure!(web.ips().iter().any(|ip| answer.json().is_ok_and(|seen| seen["peer"] == ip.to_string())));
    }
    bound.http_get((cart.ip(), 9000), "/voided")?;
    ensure!(!link.find(b"voided")?.is_found(), "`required` voids the pod's exclusion");
    web.http_get((cart.ip(), 8080), "/")?;
    captured(&agents[0], "shop/web", ":8080")?;
    for line in agents[0].access_log()? {
        let (pod, to) = (&line["source_pod"], line["destination_addr"].as_str().unwrap_or_default());
        let left_out = to.ends_with(":9000") || outside.iter().any(|ip| to.contains(&ip.to_string()));
        ensure!(*pod != "shop/web" || !left_out, "captured all the same: {line}");
    }
    Ok(())
}

fn a_pod_reaches_itself_by_loopback_by_its_address_and_by_its_service(lab: &Lab, options: &AgentOptions) -> Result<()> {
    lab.deny_all("shop")?;
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b"))?;
    let vip = "10.96.0.10".parse()?;
    let vip_v6 = "fd00:10:96::10".parse()?;
    lab.service(
        &ServiceSpec::new("shop/cart").cluster_ip(vip).cluster_ip(vip_v6).port("http", 80, 8080).endpoint(&cart),
    )?;
    let agents = lab.start_agents(options)?;
    let _server = cart.serve_http(8080, "cart")?;
    for loopback in ["127.0.0.1", "::1"] {
        let ip: std::net::IpAddr = loopback.parse()?;
        ensure!(cart.http_get((ip, 8080), "/")?.json()?["peer"] == loopback);
    }
    for ip in cart.ips() {
        ensure!(cart.http_get((*ip, 8080), "/")?.json()?["peer"] == ip.to_string(), "by its own address");
    }
    ensure!(agents[1].access_log()?.is_empty(), "what stays in the pod was captured: {:?}", agents[1].access_log());
    for (vip, own) in [vip, vip_v6].into_iter().zip(cart.ips()) {
        let answer = cart.http_get((vip, 80), "/").context("by its Service")?;
        ensure!(answer.json()?["peer"] == own.to_string(), "by its Service: {}", answer.text());
    }
    Ok(())
}

fn an_application_bound_to_its_pod_address_is_captured(lab: &Lab, options: &AgentOptions) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
    let stranger = lab.pod(PodSpec::new("shop/stranger", "node-a").outside())?;
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b"))?;
    let agents = lab.start_agents(options)?;
    for ip in cart.ips() {
        let _server = cart.serve_http((*ip, 8080), "cart")?;
        for client in [&web, &stranger] {
            let peer = client.ips().iter().find(|own| own.is_ipv4() == ip.is_ipv4()).context("no such family")?;
            let answer = client.http_get((*ip, 8080), "/")?;
            ensure!(answer.json()?["peer"] == peer.to_string(), "{}", answer.text());
            agents[1].access_line("it was captured", |line| {
                line["direction"] == "inbound" && line["source_addr"].as_str().is_some_and(|from| of_host(from, *peer))
            })?;
        }
    }
    Ok(())
}

fn traffic_of_a_nested_container_is_left_alone(lab: &Lab, options: &AgentOptions) -> Result<()> {
    lab.deny_all("shop")?;
    let host = lab.pod(PodSpec::new("shop/docker", "node-a"))?;
    let nested = Namespace::create(&lab.ca().with_file_name("nested.netns"))?;
    host.sysctl("ipv4.ip_forward", "1")?;
    host.ip_batch([
        format!("link add n0 type veth peer name eth0 netns {}", nested.path().display()),
        "link add docker0 type bridge".into(),
        "link set n0 master docker0 up".into(),
        "addr add 10.200.0.1/24 dev docker0".into(),
        "link set docker0 up".into(),
    ])?;
    nested.ip_batch(["addr add 10.200.0.2/24 dev eth0", "link set eth0 up", "route add default via 10.200.0.1"])?;
    let node = lab.node("node-a");
    node.ip_batch([format!("route add 10.200.0.0/24 via {} dev {}", host.ip(), host.host_interface())])?;
    lab.outside().ip_batch([format!("route add 10.200.0.0/24 via {}", node.ip())])?;
    let agents = lab.start_agents(options)?;
    let away = lab.families().outside()[0];
    let _away = lab.outside().serve_http(8080, "outside")?;
    let _inside = nested.serve_http(8080, "nested")?;
    let answer = nested.http_get((away, 8080), "/").context("from the nested container")?;
    ensure!(answer.json()?["peer"] == "10.200.0.2", "{}", answer.text());
    let inside: std::net::IpAddr = "10.200.0.2".parse()?;
    let answer = lab.outside().http_get((inside, 8080), "/").context("to the nested container")?;
    ensure!(answer.json()?["pod"] == "nested", "{}", answer.text());
    // The pod's own traffic is captured beside it.
    host.http_get((away, 8080), "/")?;
    captured(&agents[0], "shop/docker", "203.0.113.1:8080")?;
    ensure!(agents[0].access_log()?.len() == 1, "{:?}", agents[0].access_log()?);
    Ok(())
}

fn the_world_outside_is_reached_from_the_pods_own_address(lab: &Lab, options: &AgentOptions) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
    let agents = lab.start_agents(options)?;
    let _away = lab.outside().serve_http(8080, "outside")?;
    for (ip, own) in lab.families().outside().into_iter().zip(web.ips()) {
        let answer = web.http_get((ip, 8080), "/")?;
        ensure!(answer.json()?["peer"] == own.to_string(), "{}", answer.text());
        agents[0].access_line("it passed through", |line| {
            line["direction"] == "passthrough"
                && line["source_pod"] == "shop/web"
                && line["destination_addr"].as_str().is_some_and(|to| of_host(to, ip))
        })?;
    }
    Ok(())
}

fn pods_outside_the_mesh_and_joined_ones_talk_in_plaintext(lab: &Lab, options: &AgentOptions) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
    let stranger = lab.pod(PodSpec::new("away/stranger", "node-b").outside())?;
    let agents = lab.start_agents(options)?;
    let _servers = [web.serve_http(8080, "web")?, stranger.serve_http(8080, "stranger")?];
    for (own, other) in web.ips().iter().zip(stranger.ips()) {
        let answer = web.http_get((*other, 8080), "/")?;
        ensure!(answer.json()?["peer"] == own.to_string(), "outwards: {}", answer.text());
        let answer = stranger.http_get((*own, 8080), "/")?;
        ensure!(answer.json()?["peer"] == other.to_string(), "inwards: {}", answer.text());
    }
    let line = agents[0].access_line("inwards", |line| line["direction"] == "inbound")?;
    ensure!(line["transport"] == "plaintext" && line.get("source_identity").is_none(), "{line}");
    captured(&agents[0], "shop/web", ":8080")
}

fn a_server_may_speak_first_through_the_tunnel_and_past_it(lab: &Lab, options: &AgentOptions) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b"))?;
    let _agents = lab.start_agents(options)?;
    let _servers = [cart.serve_greeting(25, "220 cart")?, lab.outside().serve_greeting(25, "220 away")?];
    let away = lab.families().outside();
    let cart = cart.ips().iter().map(|ip| (*ip, "220 cart"));
    for (ip, greeting) in cart.chain(away.into_iter().map(|ip| (ip, "220 away"))) {
        let mut stream = web.connect((ip, 25))?;
        stream.set_read_timeout(Some(BOUND))?;
        let mut said = vec![0; greeting.len()];
        stream.read_exact(&mut said).with_context(|| format!("{ip} says nothing"))?;
        ensure!(said == greeting.as_bytes());
        stream.write_all(b"EHLO")?;
        let mut echoed = [0; 4];
        stream.read_exact(&mut echoed)?;
        ensure!(&echoed == b"EHLO");
    }
    Ok(())
}

fn namespace(lab: &Lab, name: &str, mesh: &str, mut annotations: serde_json::Value) -> Result<()> {
    annotations["selvedge.dev/mesh"] = mesh.into();
    lab.put(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "annotations": annotations}}))
}

/// Waits for the access log to tell of a connection that a pod dialled.
fn captured(agent: &Agent, pod: &str, to: &str) -> Result<()> {
    let wanted = |line: &serde_json::Value| {
        line["source_pod"] == pod && line["destination_addr"].as_str().is_some_and(|addr| addr.ends_with(to))
    };
    agent.access_line("the connection was captured", wanted).map(drop)
}
