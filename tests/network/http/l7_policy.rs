//! Policy that speaks of requests: decided for each of them where it arrives, however it came.

use std::io::{Read, Write};
use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::{
    AgentOptions, BOUND, Lab, Pod, PodSpec, Request, Response, ServiceSpec, authorization, eventually, trial_with,
};
use serde_json::{Value, json};

use super::protocols::{call, hear_until};
use super::{Application, Keeping, Shop, curl, service, vip};
use crate::knock::{Ended, knock};
use crate::lab;

pub fn trials() -> Vec<Trial> {
    vec![
        trial_with("l7_policy::each_request_is_judged_however_it_came", lab(), however_it_came),
        trial_with("l7_policy::every_transport_leads_to_the_same_judge", lab(), every_transport),
        trial_with("l7_policy::a_path_is_judged_in_its_one_form_and_passed_on_so", lab(), path_tricks),
        trial_with("l7_policy::a_connection_outlives_a_request_that_is_denied", lab(), a_denied_request),
        trial_with("l7_policy::a_grpc_client_and_a_client_of_http2_are_told_in_their_words", lab(), in_their_words),
        trial_with("l7_policy::what_is_not_http_is_reset", lab(), what_is_not_http),
        trial_with("l7_policy::a_policy_that_comes_resets_what_nobody_has_read", lab(), a_policy_comes_and_goes),
        trial_with("l7_policy::what_nobody_reads_fails_closed", lab(), unread),
        trial_with("l7_policy::a_dry_run_keeps_nobody_from_speaking_something_else", lab(), a_dry_run),
        trial_with("l7_policy::bodies_upgrades_and_crowds_pass_the_judge", lab(), bodies_upgrades_and_crowds),
        trial_with("l7_policy::connect_tells_the_truth_where_requests_are_judged", lab(), the_truth),
    ]
}

/// Clients of `shop` may read, those of the team also write; nobody comes to the admin pages.
pub fn rules() -> [Value; 2] {
    let shop = json!([{"source": {"namespaces": ["shop"]}}]);
    let readers = json!({"from": shop, "to": [{"operation": {"methods": ["GET"], "hosts": ["cart"]}}]});
    let writers = json!({
        "from": shop, "to": [{"operation": {"methods": ["POST"], "paths": ["/items/*"]}}],
        "when": [{"key": "request.headers[x-team]", "values": ["cart*"]}],
    });
    let admin = json!({"to": [{"operation": {"paths": ["/admin", "/admin/*"]}}]});
    [
        authorization("shop/callers", json!({"rules": [readers, writers]})),
        authorization("shop/no-admin", json!({"action": "DENY", "rules": [admin]})),
    ]
}

/// What is asked, and what `rules` make of it.
pub fn table() -> Vec<(Request, u16)> {
    let post = |path: &str| Request::post(path, "x");
    vec![
        (Request::get("/items/1?a=b"), 200),
        (Request::get("/admin"), 403),
        (Request::get("/admin/users"), 403),
        (Request::get("/administer"), 200),
        (Request::get("/x/../admin"), 403),
        (post("/items/1"), 403),
        (post("/items/1").header("x-team", "cart-2"), 200),
        (post("/items/1").header("x-team", "cart").header("X-Team", "other"), 403),
        (post("/other").header("x-team", "cart"), 403),
        (Request { method: "DELETE".into(), ..Request::get("/items/1") }, 403),
    ]
}

fn enforce(lab: &Lab, policies: &[Value]) -> Result<()> {
    policies.iter().try_for_each(|policy| lab.put(policy))
}

fn check(pod: &Pod, to: (IpAddr, u16), what: &str) -> Result<()> {
    let mut connection = Keeping::connect(pod, to).with_context(|| what.to_owned())?;
    for (request, status) in table() {
        let answer = connection.send(&request).with_context(|| format!("{what}: {request:?}"))?;
        ensure!(answer.status == status, "{what}: {request:?}: {answer:?}");
        if status == 200 {
            ensure!(answer.json()?["peer"] == pod.ip().to_string(), "{what}: another client was seen: {answer:?}");
        } else {
            ensure!(answer.header("selvedge-reason") == Some("policy") && answer.body.is_empty(), "{what}: {answer:?}");
        }
    }
    Ok(())
}

fn however_it_came(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    let teller = lab.pod(PodSpec::new("bank/teller", "node-a"))?;
    let stranger = lab.pod(PodSpec::new("shop/stranger", "node-a").outside())?;
    // As the page about it has it.
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/l7-policy.md"))?;
    let example = page.split("```yaml\n").nth(1).and_then(|rest| rest.split("```").next()).context("no example")?;
    let (_, policies) = example.split_once("---\n").context("no policy behind the Service")?;
    lab.write("example.yaml", policies)?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let [near, far] = &shop._pods;
    for (to, what) in [(shop.vip(), "by the Service"), ((near.ip(), 8080), "near"), ((far.ip(), 8080), "far")] {
        check(&shop.web, to, what)?;
    }
    // Whom no request could be allowed is not let in at all.
    for pod in [near, far] {
        ensure!(knock(&teller, (pod.ip(), 8080))?.ended == Ended::Refused, "the teller was let in");
        ensure!(teller.http_get((pod.ip(), 8080), "/items/1").is_err(), "the teller was heard");
        ensure!(stranger.http_get((pod.ip(), 8080), "/items/1").is_err(), "plaintext was heard");
    }
    let refused = teller.http_get(shop.vip(), "/items/1")?;
    ensure!(refused.status == 403 && refused.header("selvedge-reason") == Some("policy"), "{refused:?}");
    ensure!(
        !format!("{:?}{:?}", shop.near.heard(), shop.far.heard()).contains("admin\""),
        "an admin page was asked for"
    );

    let denied = |line: &Value| line["path"] == "/admin/users" && line["direction"] == "inbound";
    let line = agents[1].access_line("a denied request", denied)?;
    for (field, wanted) in [
        ("verdict", "deny"),
        ("policy", "shop/no-admin"),
        ("reason", "policy:shop/no-admin"),
        ("method", "GET"),
        ("source_identity", "spiffe://cluster.local/ns/shop/sa/default"),
        ("destination_pod", "shop/far"),
        ("service", "shop/cart"),
        ("transport", crate::tunnel()),
    ] {
        ensure!(line[field] == wanted, "{field}: {line}");
    }
    ensure!(line["status"] == 403, "{line}");
    let allowed = |line: &Value| line["path"] == "/items/1" && line["direction"] == "inbound" && line["status"] == 200;
    let line = agents[1].access_line("an allowed request", allowed)?;
    ensure!(line["verdict"] == "allow" && line["policy"] == "shop/callers", "{line}");
    eventually("both ends count", BOUND, || {
        let metrics = agents[1].metrics().ok()?;
        let counted = |code: &str| {
            let labels = [("response_code", code), ("reporter", "destination"), ("destination_service", "cart")];
            metrics.sum("selvedge_http_requests_total", &labels)
        };
        let decided = [("policy", "shop/no-admin"), ("verdict", "deny")];
        let decided = metrics.sum("selvedge_policy_decisions_total", &decided);
        (counted("403") >= 7.0 && counted("200") >= 3.0 && decided >= 3.0).then_some(())
    })
}

fn every_transport(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    let stranger = lab.pod(PodSpec::new("shop/stranger", "node-a").outside())?;
    let readers = json!({"to": [{"operation": {"methods": ["GET"]}}]});
    let [near, far] = &shop._pods;
    for options in [
        AgentOptions::default().hbone(),
        AgentOptions::default().arg("--tunnel").arg("auto"),
        AgentOptions::default().arg("--same-node").arg("tunnel"),
        AgentOptions::default().arg("--connect").arg("eager"),
    ] {
        enforce(lab, &rules())?;
        let agents = lab.start_agents(&options)?;
        for (to, what) in [(shop.vip(), "by the Service"), ((near.ip(), 8080), "near"), ((far.ip(), 8080), "far")] {
            check(&shop.web, to, &format!("{what}, {options:?}"))?;
        }
        lab.put(&authorization("shop/callers", json!({"rules": [readers]})))?;
        lab.settle(&agents)?;
        // In plaintext, and without an agent.
        for pod in [near, far] {
            let mut connection = Keeping::connect(&stranger, (pod.ip(), 8080))?;
            for (request, status) in [
                (Request::get("/x"), 200),
                (Request::get("/admin"), 403),
                (Request::post("/x", "y"), 403),
                (Request::get("/z"), 200),
            ] {
                let answer = connection.send(&request)?;
                ensure!(answer.status == status, "{request:?}: {answer:?}");
            }
        }
        agents.into_iter().try_for_each(|agent| agent.stop().map(drop))?;
    }
    Ok(())
}

fn path_tricks(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    enforce(lab, &rules()[1..])?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let far = &shop._pods[1];
    for (path, status, seen) in TRICKS {
        for (to, what) in [(shop.vip(), "by the Service"), ((far.ip(), 8080), "by the pod")] {
            let answer = Keeping::connect(&shop.web, to)?.send(&Request::get(path))?;
            ensure!(answer.status == status, "{what}: {path}: {answer:?}");
            if status == 200 {
                ensure!(answer.json()?["path"] == seen, "{what}: {path}: {answer:?}");
            }
            let url = format!("http://{}:{}{path}", to.0, to.1);
            let arguments = ["--http2-prior-knowledge", "--path-as-is", "-o", "/dev/null", "-w", "%{http_code}", &url];
            let code = curl(&shop.web, &arguments)?;
            ensure!(code == status.to_string(), "{what}: {path} of HTTP/2: {code}");
        }
    }
    // No client library sends it.
    let mut raw = shop.web.connect((far.ip(), 8080))?;
    raw.set_read_timeout(Some(BOUND))?;
    raw.write_all(b"GET /public\\..\\admin HTTP/1.1\r\nHost: cart\r\n\r\n")?;
    hear_until(&mut raw, "HTTP/1.1 403 ")?;
    let line = agents[1].access_line("a path that is refused", |line| line["status"] == 400)?;
    ensure!(line["reason"] == "protocol" && line["detail"].is_string(), "{line}");
    ensure!(shop.far.heard().iter().all(|asked| !asked.contains("admin")), "{:?}", shop.far.heard());
    Ok(())
}

/// Paths, what becomes of them under `rules`, and what the application sees of those that pass.
pub const TRICKS: [(&str, u16, &str); 16] = [
    ("/public/../admin", 403, ""),
    ("/%61dmin", 403, ""),
    ("/%2e/admin", 403, ""),
    ("/public/%2E%2e/admin", 403, ""),
    ("//admin", 403, ""),
    ("/admin//users", 403, ""),
    ("/./admin/", 403, ""),
    ("/admin%2fusers", 400, ""),
    ("/admin%5Cusers", 400, ""),
    ("/admin%00", 400, ""),
    ("/admin%", 400, ""),
    ("/public/..;/admin", 400, ""),
    ("/admin?x=/../public", 403, ""),
    ("/public?x=/../admin", 200, "/public?x=/../admin"),
    ("/admin/../public", 200, "/public"),
    ("/a//b/./c%7e%20?d=//e", 200, "/a/b/c~%20?d=//e"),
];

/// And comes to the application over one connection.
fn a_denied_request(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    enforce(lab, &rules())?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let far = &shop._pods[1];
    let mut connection = Keeping::connect(&shop.web, (far.ip(), 8080))?;
    for _ in 0..3 {
        connection.get("/items/1")?;
        let answer = connection.send(&Request::post("/items/1", "a body that nobody reads"))?;
        ensure!(answer.status == 403, "{answer:?}");
    }
    ensure!(shop.far.peers().len() == 1, "{:?}", shop.far.peers());
    // A policy that comes decides the next request of the same connection.
    let nobody = json!({"action": "DENY", "rules": [{"to": [{"operation": {"paths": ["/items/*"]}}]}]});
    lab.put(&authorization("shop/closed", nobody))?;
    lab.settle(&agents)?;
    let answer = connection.send(&Request::get("/items/1"))?;
    ensure!(answer.status == 403, "{answer:?}");
    connection.get("/other")?;
    // One that denies the client altogether ends it.
    lab.put(&authorization("shop/nobody", json!({"action": "DENY", "rules": [{}]})))?;
    let mut room = [0; 16];
    let read = connection.0.read(&mut room).err().context("it was not reset")?;
    ensure!(read.kind() == std::io::ErrorKind::ConnectionReset, "{read}");
    let line = agents[1].access_line("the connection", |line| {
        line["direction"] == "inbound" && line["method"].is_null() && line["reason"] == "policy:shop/nobody"
    })?;
    ensure!(line["source_pod"] == "shop/web", "{line}");
    Ok(())
}

fn in_their_words(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "grpc")?;
    let denied = json!({"action": "DENY", "rules": [{"to": [{"operation": {"paths": ["/shop.Cart/*"]}}]}]});
    let agents = lab.start_agents(&AgentOptions::default())?;
    call(&shop.web, vip(1)).context("a call that nothing forbids")?;
    lab.put(&authorization("shop/no-calls", denied))?;
    lab.settle(&agents)?;
    let status = eventually("the call is denied", BOUND, || call(&shop.web, vip(1)).err())?;
    ensure!(status.code() == tonic::Code::PermissionDenied && status.message() == "policy", "{status:?}");
    let line = agents[0].access_line("the call", |line| line["grpc_status"] == "7")?;
    ensure!(line["path"] == "/shop.Cart/Get", "{line}");
    let far = &shop._pods[1];
    let url = |path: &str| format!("http://{}:8080{path}", far.ip());
    let arguments = ["--http2-prior-knowledge", "-w", " %{http_code}", "-o", "/dev/null"];
    for (path, wanted) in [("/x", " 200"), ("/shop.Cart/Get", " 403")] {
        let told = curl(&shop.web, &[&arguments[..], &[&url(path)]].concat())?;
        ensure!(told == wanted, "{path}: {told}");
    }
    Ok(())
}

fn what_is_not_http(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
    let stranger = lab.pod(PodSpec::new("shop/stranger", "node-a").outside())?;
    let far = lab.pod(PodSpec::new("shop/far", "node-b"))?;
    lab.service(&service("shop/cart", 1).port("", 80, 8080).endpoint(&far))?;
    let application = Application::start(&far, 8080)?;
    lab.put(&rules()[1])?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    for (client, to) in [(&web, (vip(1), 80)), (&web, (far.ip(), 8080)), (&stranger, (far.ip(), 8080))] {
        let mut stream = client.connect(to)?;
        stream.set_read_timeout(Some(BOUND))?;
        stream.write_all(b"\x16\x03\x01 hello there, this is no request\r\n")?;
        let error = stream.read(&mut [0; 16]).err().context("it was not reset")?;
        ensure!(error.kind() == std::io::ErrorKind::ConnectionReset, "{error}");
    }
    let protocol = |line: &Value| line["reason"] == "protocol" && line["direction"] == "inbound";
    let line = agents[1].access_line("what was no request", protocol)?;
    ensure!(line["detail"].as_str().is_some_and(|detail| detail.contains("no HTTP")), "{line}");
    ensure!(application.heard().is_empty(), "{:?}", application.heard());
    ensure!(web.http_get((far.ip(), 8080), "/x")?.status == 200, "and what is HTTP is not");
    Ok(())
}

fn a_policy_comes_and_goes(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
    let [near, far] = ["node-a", "node-b"].map(|node| lab.pod(PodSpec::new(&format!("shop/{node}"), node)));
    let pods = [near?, far?];
    let _servers = [pods[0].serve_echo(8080)?, pods[1].serve_echo(8080)?];
    lab.service(&service("shop/cart", 1).port("", 80, 8080).endpoint(&pods[0]).endpoint(&pods[1]))?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let open = || -> Result<Vec<std::net::TcpStream>> {
        let opened = pods.iter().map(|pod| {
            let mut stream = web.connect((pod.ip(), 8080))?;
            stream.set_read_timeout(Some(BOUND))?;
            says_back(&mut stream)?;
            Ok(stream)
        });
        opened.collect()
    };
    let mut streams = open()?;
    lab.put(&rules()[1])?;
    for stream in &mut streams {
        let error = stream.read(&mut [0; 16]).err().context("it was not reset")?;
        ensure!(error.kind() == std::io::ErrorKind::ConnectionReset, "{error}");
    }
    agents[1].access_line("the connection", |line| line["reason"] == "drain" && line["direction"] == "inbound")?;
    remove(lab, "no-admin")?;
    let mut streams = eventually("new connections carry what they like", BOUND, || open().ok())?;
    streams.iter_mut().try_for_each(says_back)
}

fn says_back(stream: &mut std::net::TcpStream) -> Result<()> {
    let mut room = [0; 5];
    stream.write_all(b"\x00ping")?;
    stream.read_exact(&mut room)?;
    ensure!(&room == b"\x00ping", "{room:?}");
    Ok(())
}

/// Removes the file of a policy, whatever the lab has called it.
fn remove(lab: &Lab, name: &str) -> Result<()> {
    for entry in std::fs::read_dir(lab.manifests())? {
        let path = entry?.path();
        if path.file_name().is_some_and(|file| file.to_string_lossy().contains(name)) {
            std::fs::remove_file(path)?;
        }
    }
    Ok(())
}

/// Without a waypoint, on a port that says it speaks something else, and on one that no Service leads to.
fn unread(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
    let far = lab.pod(PodSpec::new("shop/far", "node-b").label("app", "far"))?;
    let _applications = [8080, 8081, 8082].map(|port| Application::start(&far, port));
    let plain = ServiceSpec::new("shop/plain").cluster_ip(vip(1));
    lab.service(&plain.port("http", 80, 8080).endpoint(&far))?;
    lab.service(&service("shop/tls", 2).port("tls", 80, 8081).endpoint(&far))?;
    let reading = json!({"rules": [{"to": [{"operation": {"methods": ["GET"]}}]}]});
    lab.put(&authorization("shop/readers", reading))?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    for port in [8080, 8081, 8082] {
        ensure!(web.http_get((far.ip(), port), "/x").is_err(), "port {port} was open");
    }
    agents[1].access_line("a refusal", |line| line["reason"] == "policy:shop/readers")?;
    // A DENY rule stands as if it said nothing of requests.
    let no_writing =
        json!({"action": "DENY", "rules": [{"to": [{"operation": {"methods": ["POST"], "ports": ["8082"]}}]}]});
    lab.put(&authorization("shop/readers", no_writing))?;
    lab.settle(&agents)?;
    ensure!(web.http_get((far.ip(), 8080), "/x")?.status == 200, "port 8080");
    ensure!(web.http_get((far.ip(), 8082), "/x").is_err(), "port 8082");
    Ok(())
}

fn a_dry_run(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
    let far = lab.pod(PodSpec::new("shop/far", "node-b"))?;
    let _echo = far.serve_echo(8080)?;
    let _application = Application::start(&far, 8081)?;
    lab.service(&service("shop/cart", 1).port("", 80, 8080).port("http", 81, 8081).endpoint(&far))?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let mut before = web.connect((far.ip(), 8080))?;
    before.set_read_timeout(Some(BOUND))?;
    says_back(&mut before)?;
    let mut dry = rules()[1].clone();
    dry["metadata"]["annotations"] = json!({"selvedge.dev/dry-run": "true"});
    lab.put(&dry)?;
    lab.settle(&agents)?;
    says_back(&mut before).context("a connection from before")?;
    let mut after = web.connect((far.ip(), 8080))?;
    after.set_read_timeout(Some(BOUND))?;
    says_back(&mut after).context("a new one")?;
    let mut connection = Keeping::connect(&web, (far.ip(), 8081))?;
    for path in ["/admin", "/x", "/admin"] {
        connection.get(path)?;
    }
    eventually("what it would have denied is counted", BOUND, || {
        let labels = [("policy", "shop/no-admin"), ("verdict", "deny")];
        (agents[1].metrics().ok()?.sum("selvedge_policy_observed_total", &labels) == 2.0).then_some(())
    })
}

fn bodies_upgrades_and_crowds(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    lab.put(&rules()[1])?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let far = &shop._pods[1];
    let url = |path: &str| format!("http://{}:8080{path}", far.ip());
    for version in ["--http1.1", "--http2-prior-knowledge"] {
        let down = curl(&shop.web, &[version, "-o", "/dev/null", "-w", "%{size_download}", &url("/bytes/50000000")])?;
        ensure!(down == "50000000", "{version}: {down}");
        let script = format!("head -c 50000000 /dev/zero | curl -sS {version} -H 'Expect:' -T - {}", url("/upload"));
        let up: Value = serde_json::from_str(&shop.web.sh(&script)?)?;
        ensure!(up["length"] == 50_000_000, "{version}: {up}");
    }
    let mut socket = shop.web.connect((far.ip(), 8080))?;
    socket.set_read_timeout(Some(BOUND))?;
    socket.write_all(b"GET /chat HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")?;
    hear_until(&mut socket, "HTTP/1.1 101 ")?;
    socket.write_all(b"\x00\x01 there and back\n")?;
    hear_until(&mut socket, "there and back")?;
    for (count, arguments) in [("2000", ["--h1", "-c20", "-m1"]), ("4000", ["-ph2c", "-c10", "-m20"])] {
        let mut load = std::process::Command::new("h2load");
        let output = shop.web.output(load.args(["-n", count]).args(arguments).arg(url("/x")))?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let wanted = format!("{count} succeeded, 0 failed, 0 errored, 0 timeout");
        ensure!(said.contains(&wanted), "{arguments:?}: {said}");
    }
    ensure!(shop.far.peers().len() <= 40, "{} connections", shop.far.peers().len());
    // A connection that is given up leaves nothing behind.
    drop(socket);
    eventually("no connection is left", BOUND, || {
        let connections = agents[1].dump().ok()?["connections"].as_array()?.len();
        (connections == 0).then_some(())
    })
}

fn the_truth(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
    let teller = lab.pod(PodSpec::new("bank/teller", "node-a"))?;
    let far = lab.pod(PodSpec::new("shop/far", "node-b"))?;
    let live = Application::start(&far, 8080)?;
    lab.service(&service("shop/cart", 1).port("http", 80, 8080).port("http-dead", 81, 9).endpoint(&far))?;
    enforce(lab, &rules())?;
    let _agents = lab.start_agents(&AgentOptions::default())?;
    let dead = web.connect((far.ip(), 9)).err().context("a dead server was connected")?;
    ensure!(format!("{dead:#}").contains("refused"), "{dead:#}");
    let denied = teller.connect((far.ip(), 8080)).err().context("whom all is denied was connected")?;
    ensure!(!format!("{denied:#}").contains("refused"), "{denied:#}");
    drop(web.connect((far.ip(), 8080)).context("some requests are allowed")?);
    drop(live);
    Ok(())
}

impl Keeping {
    pub fn send(&mut self, request: &Request) -> Result<Response> {
        selvedge_lab::exchange(&mut self.0, "cart", request)
    }
}
