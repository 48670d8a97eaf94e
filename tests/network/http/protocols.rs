//! What clients speak: HTTP of either version, gRPC, upgrades, and what is none of these.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use hyper_util::rt::TokioIo;
use libtest_mimic::Trial;
use selvedge_lab::{AgentOptions, BOUND, Lab, Pod, PodSpec, trial_with};
use serde_json::Value;
use tonic::codegen::Service;
use tonic::transport::{Endpoint, Uri};

use super::{Keeping, Shop, curl, service, vip};
use crate::knock::{Ended, knock};
use crate::lab;

pub fn trials() -> Vec<Trial> {
    vec![
        trial_with("http::either_version_goes_on_as_the_port_says", lab(), either_version),
        trial_with("http::trailers_and_expectations_are_passed_on", lab(), trailers_and_expectations),
        trial_with("http::a_grpc_client_is_answered_in_its_own_words", lab(), a_grpc_client),
        trial_with("http::an_upgrade_is_carried_through", lab(), an_upgrade),
        trial_with("http::a_port_that_declares_nothing_takes_whoever_speaks_first", lab(), a_silent_port),
        trial_with("http::what_is_not_http_is_reset_where_http_is_declared", lab(), what_is_not_http),
    ]
}

fn either_version(lab: &Lab) -> Result<()> {
    let cases = [
        ("http", "--http1.1", "HTTP/1.1"),
        ("http", "--http1.0", "HTTP/1.1"),
        ("http", "--http2-prior-knowledge", "HTTP/2.0"),
        // An upgrade to h2c is nobody's duty.
        ("http", "--http2", "HTTP/1.1"),
        ("http2", "--http1.1", "HTTP/2.0"),
        ("", "--http2-prior-knowledge", "HTTP/2.0"),
        ("", "--http1.1", "HTTP/1.1"),
    ];
    let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
    let far = lab.pod(PodSpec::new("shop/far", "node-b"))?;
    let _application = super::Application::start(&far, 8080)?;
    for (number, port) in ["http", "http2", ""].into_iter().enumerate() {
        let number = number as u8 + 1;
        lab.service(&service(&format!("shop/cart-{number}"), number).port(port, 80, 8080).endpoint(&far))?;
    }
    let _agents = lab.start_agents(&AgentOptions::default())?;
    for (port, flag, wanted) in cases {
        let number = match port {
            "http" => 1,
            "http2" => 2,
            _ => 3,
        };
        let url = format!("http://{}/a?b=c", vip(number));
        let answer: Value =
            serde_json::from_str(&curl(&web, &[flag, "-H", "Connection: x-own", "-H", "X-Own: 1", &url])?)?;
        ensure!(answer["version"] == wanted && answer["path"] == "/a?b=c", "{port:?} {flag}: {answer}");
        ensure!(answer["peer"] == web.ip().to_string(), "{answer}");
        let headers = &answer["headers"];
        // HTTP/2 has no such field, and curl leaves it as it is.
        ensure!(flag == "--http2-prior-knowledge" || headers["x-own"].is_null(), "{port:?} {flag}: {answer}");
        for hop in ["connection", "upgrade", "http2-settings", "via", "x-forwarded-for"] {
            ensure!(headers[hop].is_null(), "{port:?} {flag}: {hop}: {answer}");
        }
        let host = if wanted == "HTTP/2.0" { &answer["authority"] } else { &headers["host"] };
        ensure!(*host == vip(number).to_string(), "{port:?} {flag}: {answer}");
    }
    Ok(())
}

fn trailers_and_expectations(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    let _agents = lab.start_agents(&AgentOptions::default())?;
    let text = curl(&shop.web, &["--http2-prior-knowledge", "-D", "-", &shop.url("/trailers")])?;
    ensure!(text.to_lowercase().contains("x-sum: 42"), "no trailers: {text}");

    let mut stream = shop.web.connect(shop.vip())?;
    stream.set_read_timeout(Some(BOUND))?;
    stream.write_all(b"GET /trailers HTTP/1.1\r\nHost: a\r\nTE: trailers\r\nConnection: TE\r\n\r\n")?;
    hear_until(&mut stream, "x-sum: 42")?;

    let mut stream = shop.web.connect(shop.vip())?;
    stream.set_read_timeout(Some(BOUND))?;
    stream.write_all(b"POST /x HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")?;
    hear_until(&mut stream, "HTTP/1.1 100 Continue\r\n\r\n")?;
    stream.write_all(b"hello")?;
    hear_until(&mut stream, "\"length\":5")?;

    let mut stream = shop.web.connect(shop.vip())?;
    stream.set_read_timeout(Some(BOUND))?;
    stream.write_all(
        b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n",
    )?;
    hear_until(&mut stream, "\"length\":5")?;
    Ok(())
}

fn a_grpc_client(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "grpc")?;
    lab.service(&service("shop/empty", 2).port("grpc", 80, 8080))?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    call(&shop.web, vip(1)).context("a call that is answered")?;
    let status = call(&shop.web, vip(2)).err().context("nobody could answer")?;
    ensure!(status.code() == tonic::Code::Unavailable && status.message() == "no-endpoint", "{status:?}");
    let line =
        agents[0].access_line("the call", |line| line["protocol"] == "grpc" && line["service"] == "shop/cart")?;
    ensure!(line["status"] == 200 && line["grpc_status"] == "0" && line["path"] == "/shop.Cart/Get", "{line}");
    let line = agents[0].access_line("the refused", |line| line["service"] == "shop/empty")?;
    ensure!(line["grpc_status"] == "14" && line["reason"] == "no-endpoint", "{line}");
    Ok(())
}

pub fn call(pod: &Pod, to: IpAddr) -> std::result::Result<(), tonic::Status> {
    call_method(pod, to, "/shop.Cart/Get")
}

pub fn call_method(pod: &Pod, to: IpAddr, method: &'static str) -> std::result::Result<(), tonic::Status> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(internal)?;
    runtime.block_on(async {
        let pod = pod.network().clone();
        let connect = dialling(pod, SocketAddr::new(to, 80));
        let channel = Endpoint::from_static("http://cart").connect_with_connector(connect).await.map_err(internal)?;
        let mut client = tonic::client::Grpc::new(channel);
        client.ready().await.map_err(internal)?;
        let path = http::uri::PathAndQuery::from_static(method);
        let codec = tonic_prost::ProstCodec::<(), ()>::default();
        client.unary(tonic::Request::new(()), path, codec).await.map(drop)
    })
}

fn dialling(
    pod: selvedge_lab::Namespace,
    to: SocketAddr,
) -> impl Service<Uri, Response = TokioIo<tokio::net::TcpStream>, Error = std::io::Error, Future: Send> + Send + Clone {
    Dialling { pod, to }
}

#[derive(Clone)]
struct Dialling {
    pod: selvedge_lab::Namespace,
    to: SocketAddr,
}

impl Service<Uri> for Dialling {
    type Response = TokioIo<tokio::net::TcpStream>;
    type Error = std::io::Error;
    type Future = std::future::Ready<std::io::Result<Self::Response>>;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<std::io::Result<()>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let dial = || {
            let stream = self.pod.connect(self.to)?;
            stream.set_nonblocking(true)?;
            tokio::net::TcpStream::from_std(stream).map(TokioIo::new)
        };
        std::future::ready(dial())
    }
}

fn internal(error: impl std::error::Error) -> tonic::Status {
    tonic::Status::internal(error.to_string())
}

fn an_upgrade(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let mut stream = shop.web.connect(shop.vip())?;
    stream.set_read_timeout(Some(BOUND))?;
    stream
        .write_all(b"GET /ws HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n\r\n")?;
    let head = hear_until(&mut stream, "\r\n\r\n")?.to_lowercase();
    ensure!(head.starts_with("http/1.1 101") && head.contains("upgrade: websocket"), "{head}");
    for text in ["\u{1}\u{2}frame", "another"] {
        stream.write_all(text.as_bytes())?;
        hear_until(&mut stream, text)?;
    }
    drop(stream);
    let line = agents[0].access_line("the upgrade", |line| line["path"] == "/ws")?;
    ensure!(line["status"] == 101, "{line}");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(extended_connect(&shop))?;
    // And a connection of which the server does not change the protocol goes on.
    let mut connection = Keeping::connect(&shop.web, shop.vip())?;
    connection.get("/still")?;
    Ok(())
}

/// RFC 8441: a WebSocket is one stream of an HTTP/2 connection.
async fn extended_connect(shop: &Shop) -> Result<()> {
    let stream = shop.web.connect(shop.vip())?;
    stream.set_nonblocking(true)?;
    let (mut client, connection) = h2::client::handshake(tokio::net::TcpStream::from_std(stream)?).await?;
    let driving = tokio::spawn(connection);
    let mut request = http::Request::builder().method("CONNECT").uri("http://a/ws2").body(())?;
    request.extensions_mut().insert(h2::ext::Protocol::from_static("websocket"));
    let (answer, mut said) = client.send_request(request, false)?;
    let answer = answer.await?;
    ensure!(answer.status() == 200, "{answer:?}");
    said.send_data("frame".into(), false)?;
    let mut heard = answer.into_body();
    let data = heard.data().await.context("nothing came back")??;
    ensure!(data == "frame", "{data:?}");
    driving.abort();
    Ok(())
}

fn a_silent_port(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
    for (number, node) in [(1, "node-a"), (2, "node-b")] {
        let pod = lab.pod(PodSpec::new(&format!("shop/app-{number}"), node))?;
        lab.service(
            &service(&format!("shop/app-{number}"), number)
                .port("greeting", 25, 2500)
                .port("echo", 7, 7000)
                .port("web", 80, 8080)
                .endpoint(&pod),
        )?;
        std::mem::forget((
            pod.serve_greeting(2500, "220 ready\r\n")?,
            pod.serve_echo(7000)?,
            super::Application::start(&pod, 8080)?,
            pod,
        ));
    }
    for options in [AgentOptions::default(), AgentOptions::default().hbone()] {
        let agents = lab.start_agents(&options)?;
        for number in [1, 2] {
            let greeted = knock(&web, (vip(number), 25))?;
            ensure!(greeted.ended == Ended::Greeted("220 ready\r\n".into()), "{greeted:?}");
            let mut echo = web.converse((vip(number), 7))?;
            echo.exchange("\u{0}binary")?;
            echo.exchange("and more of it")?;
            let mut slow = web.converse((vip(number), 7))?;
            slow.say("GET it")?;
            std::thread::sleep(Duration::from_millis(150));
            slow.say(" but not of HTTP\r\n")?;
            slow.hear("GET it but not of HTTP\r\n")?;
            slow.finish_speaking()?;
            ensure!(slow.end()? == selvedge_lab::End::Closed(Vec::new()), "the half-close was lost");
            let answer = web.http_get((vip(number), 80), "/x")?.json()?;
            ensure!(answer["pod"] == format!("app-{number}"), "{answer}");
            let late = web.connect((vip(number), 80))?;
            std::thread::sleep(Duration::from_millis(250));
            Keeping(late).get("/late")?;
        }
        agents.into_iter().try_for_each(|agent| agent.stop().map(drop))?;
    }
    Ok(())
}

fn what_is_not_http(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    for words in ["\u{16}\u{3}\u{1}\u{2}", "EHLO example.com\r\n"] {
        let mut conversation = shop.web.converse(shop.vip())?;
        let end = conversation.end_after(words)?;
        ensure!(end == selvedge_lab::End::Reset(0), "{words:?}: {end:?}");
    }
    let line = agents[0].access_line("what is no HTTP", |line| line["reason"] == "protocol")?;
    ensure!(line["service"] == "shop/cart", "{line}");
    ensure!(shop.near.peers().is_empty() && shop.far.peers().is_empty(), "it reached somebody");
    Ok(())
}

/// What comes until this was said.
pub fn hear_until(stream: &mut std::net::TcpStream, wanted: &str) -> Result<String> {
    let mut heard = Vec::new();
    let mut room = [0; 4096];
    loop {
        let text = String::from_utf8_lossy(&heard).into_owned();
        if text.contains(wanted) {
            return Ok(text);
        }
        match stream.read(&mut room).with_context(|| format!("{wanted:?} was not heard, but {text:?}"))? {
            0 => bail!("closed without {wanted:?}: {text:?}"),
            count => heard.extend_from_slice(&room[..count]),
        }
    }
}
