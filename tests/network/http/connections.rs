//! How connections begin and end: those of clients, and those that are kept to applications.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::Signal;
use selvedge_lab::{Agent, AgentOptions, BOUND, Lab, PodSpec, authorization, eventually, trial_with};
use serde_json::json;

use super::protocols::hear_until;
use super::{Application, Keeping, Shop, service, vip};
use crate::lab;

pub fn trials() -> Vec<Trial> {
    vec![
        trial_with("http::connections::a_client_that_says_no_more_gets_its_answer", lab(), says_no_more),
        trial_with("http::connections::a_client_that_has_gone_is_waited_for_no_longer", lab(), has_gone),
        trial_with("http::connections::a_head_that_takes_too_long_is_answered", lab(), a_slow_head),
        trial_with("http::connections::one_that_nobody_uses_is_closed_in_time", lab(), nobody_uses),
        trial_with("http::connections::no_certificate_outlives_itself_in_a_pool", lab(), certificates_of_seconds),
        trial_with("http::connections::a_client_by_an_old_certificate_is_told_to_come_anew", lab(), told_to_come_anew),
        trial_with("http::connections::an_upgrade_is_given_what_the_drain_gives", lab(), drained),
    ]
}

/// `printf 'GET / HTTP/1.1...' | nc -N`.
fn says_no_more(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    let read_there = authorization("shop/callers", json!({"rules": [{"to": [{"operation": {"paths": ["/*"]}}]}]}));
    lab.put(&read_there)?;
    let _agents = lab.start_agents(&AgentOptions::default())?;
    let far = &shop._pods[1];
    for (to, what) in [(shop.vip(), "at the client's agent"), ((far.ip(), 8080), "at the server's agent")] {
        let mut stream = shop.web.connect(to)?;
        stream.set_read_timeout(Some(BOUND))?;
        let request = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: cart\r\n\r\n");
        stream.write_all(format!("{}{}", request("/sleep/300"), request("/sleep/301")).as_bytes())?;
        stream.shutdown(Shutdown::Write)?;
        let mut heard = String::new();
        stream.read_to_string(&mut heard).context(what)?;
        ensure!(heard.matches("HTTP/1.1 200 OK").count() == 2 && heard.ends_with("slept"), "{what}: {heard}");

        // In the midst of a body that is no end of a request.
        let mut broken = shop.web.connect(to)?;
        broken.set_read_timeout(Some(BOUND))?;
        broken.write_all(b"POST /half HTTP/1.1\r\nHost: cart\r\nContent-Length: 9\r\n\r\nhalf")?;
        broken.shutdown(Shutdown::Write)?;
        let mut heard = String::new();
        // It may be reset.
        let _ = broken.read_to_string(&mut heard);
        ensure!(!heard.contains("200 OK"), "{what}: {heard}");
    }
    let said =
        shop.web.sh(&format!("printf 'GET /sleep/200 HTTP/1.1\\r\\nHost: a\\r\\n\\r\\n' | nc -N {} 80", vip(1)))?;
    ensure!(said.starts_with("HTTP/1.1 200 OK") && said.ends_with("slept"), "{said}");
    Ok(())
}

/// Its kernel says the same as of one that waits: the agent asks whether anybody is there.
fn has_gone(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let mut stream = shop.web.connect(shop.vip())?;
    stream.write_all(b"GET /sleep/600000 HTTP/1.1\r\nHost: cart\r\n\r\n")?;
    eventually("the request arrives", BOUND, || (shop.near.heard().len() + shop.far.heard().len() == 1).then_some(()))?;
    drop(stream);
    let line = agents[0].access_line("that it was given up", |line| line["path"] == "/sleep/600000")?;
    ensure!(line["status"] == 0 && line["reason"] == "reset", "{line}");
    Ok(())
}

fn a_slow_head(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let mut slow = shop.web.connect(shop.vip())?;
    slow.set_read_timeout(Some(4 * BOUND))?;
    slow.write_all(b"GET /x HTTP/1.1\r\nHost: cart\r\nX-More: ")?;
    let mut heard = String::new();
    slow.read_to_string(&mut heard)?;
    ensure!(heard.starts_with("HTTP/1.1 408 ") && heard.contains("selvedge-reason: protocol"), "{heard}");
    let line = agents[0].access_line("the slow head", |line| line["status"] == 408)?;
    ensure!(line["detail"].as_str().is_some_and(|detail| detail.contains("in time")), "{line}");
    ensure!(shop.near.peers().is_empty() && shop.far.peers().is_empty(), "somebody was reached");
    Ok(())
}

fn nobody_uses(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
    let far = lab.pod(PodSpec::new("shop/far", "node-b"))?;
    lab.service(&service("shop/cart", 1).port("http", 80, 8080).endpoint(&far))?;
    // It says that it closes soon, and does not.
    let listener = far.listen(8080)?;
    let (told, hear) = std::sync::mpsc::channel();
    std::thread::spawn(move || -> std::io::Result<()> {
        for stream in listener.incoming() {
            let (mut stream, told) = (stream?, told.clone());
            std::thread::spawn(move || -> Result<()> {
                hear_until(&mut stream, "\r\n\r\n")?;
                stream.write_all(b"HTTP/1.1 200 OK\r\nkeep-alive: timeout=2\r\ncontent-length: 2\r\n\r\nok")?;
                told.send(stream.read(&mut [0])?)?;
                Ok(())
            });
        }
        Ok(())
    });
    let agents = lab.start_agents(&AgentOptions::default())?;
    let kept = |agent: &Agent| agent.metrics().map(|metrics| metrics.sum("selvedge_http_pooled_connections", &[]));
    ensure!(web.http_get((vip(1), 80), "/x")?.text() == "ok");
    ensure!(kept(&agents[0])? == 1.0, "it was not kept");
    let read = hear.recv_timeout(BOUND).context("it was not closed")?;
    ensure!(read == 0, "something was said on it");
    eventually("it is counted no more", BOUND, || (kept(&agents[0]).ok()? == 0.0).then_some(()))
}

/// Connections to applications go through tunnels that certificates stand for.
fn certificates_of_seconds(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a").service_account("web"))?;
    let far = lab.pod(PodSpec::new("shop/far", "node-b").service_account("far"))?;
    lab.service(&service("shop/cart", 1).port("http", 80, 8080).endpoint(&far))?;
    let application = Application::start(&far, 8080)?;
    for tunnel in ["fast", "hbone"] {
        let before = application.peers().len();
        let options = AgentOptions::default().arg("--certificate-lifetime").arg("4s");
        let agents = lab.start_agents(&if tunnel == "fast" { options } else { options.hbone() })?;
        let mut connection = Keeping::connect(&web, (vip(1), 80))?;
        let mut asked = 0;
        let renewed = eventually("the certificates have been renewed thrice", BOUND, || {
            // No request is lost as connections give way to others.
            if let Err(error) = connection.get("/x") {
                return Some(Err(error));
            }
            asked += 1;
            let renewals = agents[0].metrics().ok()?.sum("selvedge_certificate_renewals_total", &[]);
            (renewals >= 4.0).then_some(Ok(()))
        });
        renewed??;
        let connections = application.peers().len() - before;
        ensure!((3..asked).contains(&connections), "{tunnel}: {connections} connections for {asked} requests");
        agents.into_iter().try_for_each(|agent| agent.stop().map(drop))?;
    }
    Ok(())
}

/// Who reads requests where they arrive sees the certificate of the tunnel that they come through, which outlives it where
/// nobody reads them before.
fn told_to_come_anew(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
    let far = lab.pod(PodSpec::new("shop/far", "node-b"))?;
    lab.service(&service("shop/cart", 1).port("http", 80, 8080).endpoint(&far))?;
    let _application = Application::start(&far, 8080)?;
    lab.put(&authorization("shop/callers", json!({"rules": [{"to": [{"operation": {"paths": ["/*"]}}]}]})))?;
    let _agents = lab.start_agents(&AgentOptions::default().arg("--certificate-lifetime").arg("4s"))?;
    let to = (far.ip(), 8080);
    let mut connection = Keeping::connect(&web, to)?;
    let told = eventually("a client is told", BOUND, || match connection.ask("/x") {
        Ok(answer) if answer.status != 200 => Some(Err(anyhow::anyhow!("{answer:?}"))),
        Ok(answer) => (answer.header("connection") == Some("close")).then_some(Ok(())),
        Err(error) => Some(Err(error)),
    });
    told??;
    connection.wait_closed()?;
    Keeping::connect(&web, to)?.get("/x")?;

    // And one of HTTP/2, by GOAWAY.
    let stream = web.connect(to)?;
    stream.set_nonblocking(true)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (mut client, connection) = h2::client::handshake(tokio::net::TcpStream::from_std(stream)?).await?;
        let ended = tokio::spawn(connection);
        let (answer, _) = client.send_request(http::Request::get("http://cart/x").body(())?, true)?;
        ensure!(answer.await?.status() == 200);
        let ended = tokio::time::timeout(BOUND, ended).await.context("it goes on under an old certificate")??;
        ended.context("it was not closed in order")?;
        Ok(())
    })
}

fn drained(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    let node = lab.node("node-a");
    let _other = lab.node("node-b").start_agent(&AgentOptions::default())?;
    for (drain, is_reset) in [("60s", false), ("1s", true)] {
        let agent = node.start_agent(&AgentOptions::default().arg("--drain").arg(drain))?;
        let mut open = upgraded(&shop)?;
        agent.kill(Signal::SIGTERM)?;
        eventually("the agent drains", BOUND, || agent.log().contains("Draining").then_some(()))?;
        if is_reset {
            let status = agent.wait(BOUND)?;
            ensure!(status.code() == Some(0), "it ended with {status}");
            let error = open.read(&mut [0; 16]).err().context("it was not reset")?;
            ensure!(error.kind() == std::io::ErrorKind::ConnectionReset, "{error}");
        } else {
            for text in ["one", "another"] {
                open.write_all(text.as_bytes())?;
                hear_until(&mut open, text)?;
            }
            ensure!(agent.worker().is_some(), "it has ended with an upgraded connection open");
            open.shutdown(Shutdown::Write)?;
            ensure!(open.read(&mut [0; 16])? == 0, "it did not end in order");
            let status = agent.wait(BOUND)?;
            ensure!(status.code() == Some(0), "it ended with {status}");
        }
    }
    Ok(())
}

/// A connection that speaks another protocol by now.
fn upgraded(shop: &Shop) -> Result<TcpStream> {
    let mut stream = shop.web.connect(shop.vip())?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    stream.write_all(b"GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")?;
    hear_until(&mut stream, "\r\n\r\n")?;
    stream.write_all(b"before")?;
    hear_until(&mut stream, "before")?;
    Ok(stream)
}
