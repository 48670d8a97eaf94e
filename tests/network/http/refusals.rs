//! What the agent answers itself, and what it keeps from applications.

use std::io::{Read, Write};

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::{AgentOptions, BOUND, Lab, PodSpec, eventually, trial_with};
use serde_json::json;

use super::{Keeping, Shop, service, vip};
use crate::lab;

pub fn trials() -> Vec<Trial> {
    vec![
        trial_with("http::what_two_parsers_could_read_in_two_ways_reaches_nobody", lab(), smuggling),
        trial_with("http::what_is_too_large_is_told_what_of_it_is", lab(), too_large),
        trial_with("http::a_service_without_an_endpoint_is_unavailable", lab(), without_an_endpoint),
        trial_with("http::a_request_that_reached_nobody_is_tried_elsewhere", lab(), tried_elsewhere),
        trial_with("http::a_service_that_asks_no_more_is_left_alone", lab(), asks_no_more),
    ]
}

fn smuggling(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let corpus: [(&str, u16); 14] = [
        ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello", 400),
        ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nhello", 400),
        ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        ("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 501),
        ("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n", 400),
        ("POST / HTTP/1.1\r\nHost: a\r\nX: y\r\n Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        ("GET / HTTP/1.1\nHost: a\n\n", 400),
        ("GET / HTTP/1.1\r\nHost: a\rX: y\r\n\r\n", 400),
        ("GET /a b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\n\r\n", 400),
        ("CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n", 405),
        ("GET / HTTP/3.0\r\nHost: a\r\n\r\n", 505),
        ("POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    ];
    for (request, status) in corpus {
        let answer = said_back(&shop, request.as_bytes()).with_context(|| request.to_owned())?;
        ensure!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{request:?}: {answer:?}");
        ensure!(answer.matches("HTTP/1.1 ").count() == 1, "{request:?}: {answer:?}");
    }
    ensure!(shop.near.heard().is_empty() && shop.far.heard().is_empty(), "something was heard");
    ensure!(shop.near.peers().is_empty() && shop.far.peers().is_empty(), "somebody was reached");

    // What came whole before it is answered, and nothing behind it is heard.
    let pipelined = "GET /first HTTP/1.1\r\nHost: a\r\n\r\nGET /second HTTP/1.1\r\nHost : a\r\n\r\nGET /third HTTP/1.1\r\nHost: a\r\n\r\n";
    let answer = said_back(&shop, pipelined.as_bytes())?;
    ensure!(answer.starts_with("HTTP/1.1 200 ") && answer.contains("HTTP/1.1 400 "), "{answer:?}");
    // A body whose framing breaks is not taken for whole.
    let broken =
        "POST /broken HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0x5\r\nhello\r\n0\r\n\r\n";
    let answer = said_back(&shop, broken.as_bytes())?;
    ensure!(!answer.contains("200 OK"), "{answer:?}");
    let heard = [shop.near.heard(), shop.far.heard()].concat();
    ensure!(heard.iter().all(|asked| asked == "GET /first" || asked == "POST /broken"), "{heard:?}");
    let line = agents[0].access_line("a refused head", |line| line["status"] == 400 && line["reason"] == "protocol")?;
    ensure!(line["detail"].is_string() && line["service"] == "shop/cart", "{line}");
    eventually("the refusals are counted", BOUND, || {
        let counted = agents[0].metrics().ok()?.sum("selvedge_http_requests_total", &[("response_code", "400")]);
        (counted >= 11.0).then_some(())
    })
}

type Fields = Vec<(String, String)>;

/// In either version the same; what fits goes through.
fn too_large(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let path = |length: usize| format!("/{}", "p".repeat(length - 1));
    let fields = |count: usize| (0..count).map(|number| (format!("x-{number}"), "y".to_owned())).collect();
    let large = |size: usize| vec![("x-large".to_owned(), "y".repeat(size))];
    let corpus: [(&str, String, Fields, u16); 7] = [
        ("a target of 32 KiB", path(32 * 1024), vec![], 200),
        ("a longer target", path(32 * 1024 + 70), vec![], 414),
        ("100 fields", path(1), fields(98), 200),
        ("101 fields", path(1), fields(101), 431),
        ("a head of 60 KB", path(1), large(60_000), 200),
        ("a head of 70 KB", path(1), large(70_000), 431),
        ("a target and a field", path(30_000), large(40_000), 431),
    ];
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    for (what, path, fields, wanted) in corpus {
        let lines: String = fields.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        let request = format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{lines}\r\n");
        let answer = said_back(&shop, request.as_bytes())?;
        ensure!(answer.starts_with(&format!("HTTP/1.1 {wanted} ")), "{what}: {answer:.200}");
        let status = runtime.block_on(over_http2(&shop, &path, &fields)).context(what)?;
        ensure!(status == wanted, "{what} over HTTP/2: {status}");
    }
    let heard = shop.near.heard().len() + shop.far.heard().len();
    ensure!(heard == 6, "{heard} were heard");
    for status in [414, 431] {
        let line = agents[0].access_line("one that is too large", |line| line["status"] == status)?;
        ensure!(line["reason"] == "protocol", "{line}");
    }
    // Bodies have no bound of the agent's own.
    let script =
        format!("head -c 20000000 /dev/zero | curl -sS -w '%{{http_code}}' -o /dev/null -T - {}", shop.url("/x"));
    ensure!(shop.web.sh(&script)? == "200", "a large body");
    // RFC 9113, section 8.2.3: cookies that HTTP/2 sends one by one are one field to everybody else.
    let cookies = ["-H", "cookie: a=b", "-H", "cookie: c=d"];
    let answer = super::curl(&shop.web, &[&["--http2-prior-knowledge"][..], &cookies, &[&shop.url("/x")]].concat())?;
    let answer: serde_json::Value = serde_json::from_str(&answer)?;
    ensure!(answer["headers"]["cookie"] == "a=b; c=d", "{answer}");
    Ok(())
}

async fn over_http2(shop: &Shop, path: &str, fields: &[(String, String)]) -> Result<u16> {
    let stream = shop.web.connect(shop.vip())?;
    stream.set_nonblocking(true)?;
    let (mut client, connection) = h2::client::handshake(tokio::net::TcpStream::from_std(stream)?).await?;
    let driving = tokio::spawn(connection);
    let mut request = http::Request::get(format!("http://a{path}"));
    for (name, value) in fields {
        request = request.header(name, value);
    }
    let (answer, _) = client.send_request(request.body(())?, true)?;
    let answer = tokio::time::timeout(BOUND, answer).await??;
    driving.abort();
    Ok(answer.status().as_u16())
}

/// All that a client hears that sends these bytes and then only listens.
fn said_back(shop: &Shop, request: &[u8]) -> Result<String> {
    let mut stream = shop.web.connect(shop.vip())?;
    stream.set_read_timeout(Some(BOUND))?;
    stream.write_all(request)?;
    let mut heard = Vec::new();
    let mut room = [0; 4096];
    loop {
        match stream.read(&mut room) {
            Ok(0) => return Ok(String::from_utf8_lossy(&heard).into_owned()),
            Ok(count) => heard.extend_from_slice(&room[..count]),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset && !heard.is_empty() => {
                return Ok(String::from_utf8_lossy(&heard).into_owned());
            }
            Err(error) => return Err(error).with_context(|| format!("after {:?}", String::from_utf8_lossy(&heard))),
        }
    }
}

fn without_an_endpoint(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
    let far = lab.pod(PodSpec::new("shop/far", "node-b"))?;
    let unready = json!({"ready": false, "serving": false, "terminating": false});
    lab.service(&service("shop/unready", 1).port("http", 80, 8080).endpoint_with(&far, unready))?;
    lab.service(&service("shop/dead", 2).port("http", 80, 9).endpoint(&far))?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    for (number, reason) in [(1, "no-endpoint"), (2, "connect")] {
        let answer = web.http_get((vip(number), 80), "/x")?;
        ensure!(answer.status == 503 && answer.header("selvedge-reason") == Some(reason), "{answer:?}");
    }
    let line = agents[0].access_line("the refusal", |line| line["service"] == "shop/unready")?;
    ensure!(line["status"] == 503 && line["transport"] == "none" && line["reason"] == "no-endpoint", "{line}");
    Ok(())
}

fn tried_elsewhere(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    let dead = lab.pod(PodSpec::new("shop/dead", "node-b"))?;
    let spec = service("shop/cart", 1).port("http", 80, 8080);
    let [near, far] = &shop._pods;
    lab.service(&spec.endpoint(near).endpoint(far).endpoint(&dead))?;
    let _agents = lab.start_agents(&AgentOptions::default())?;
    let mut connection = Keeping::connect(&shop.web, shop.vip())?;
    for _ in 0..20 {
        connection.get("/x")?;
    }
    Ok(())
}

fn asks_no_more(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let mut connection = Keeping::connect(&shop.web, shop.vip())?;
    connection.get("/before")?;
    let [near, far] = &shop._pods;
    let spec = service("shop/cart", 1).port("http", 80, 8080).endpoint(near).endpoint(far);
    lab.service(&spec.field("/metadata/annotations", json!({"selvedge.dev/waypoint": "none"})))?;
    lab.settle(&agents)?;
    let last = connection.ask("/last")?;
    ensure!(last.status == 200 && last.header("connection") == Some("close"), "{last:?}");
    connection.wait_closed()?;
    let lines = agents[0].access_log()?.len();
    shop.web.http_get(shop.vip(), "/as-bytes")?;
    let line = agents[0].access_line("a connection", |line| line["service"] == "shop/cart" && line["path"].is_null());
    ensure!(line?["direction"] == "outbound", "{lines} lines before");
    Ok(())
}
