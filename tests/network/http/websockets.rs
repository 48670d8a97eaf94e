//! WebSockets by a library on either side: RFC 6455 over an upgrade of HTTP/1.1, and RFC 8441 over HTTP/2.

use std::net::SocketAddr;
use std::thread;

use anyhow::{Context, Result, ensure};
use futures_util::{SinkExt, StreamExt};
use http::{Method, Request, Response, StatusCode};
use http_body_util::Empty;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use libtest_mimic::Trial;
use selvedge_lab::{AgentOptions, BOUND, Lab, Pod, PodSpec, trial_with};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role};

use super::{service, vip};
use crate::lab;

pub fn trials() -> Vec<Trial> {
    vec![trial_with("http::websockets_of_both_versions_are_carried_through", lab(), both_versions)]
}

fn both_versions(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
    let far = lab.pod(PodSpec::new("shop/far", "node-b"))?;
    lab.service(&service("shop/chat", 1).port("http", 80, 8080).port("http-2", 81, 8081).endpoint(&far))?;
    serve(&far)?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    std::thread::scope(|scope| {
        let (end, ended) = oneshot::channel::<()>();
        let client = scope.spawn(|| talk(&web, ended));
        let lines = [("http/1", 101), ("http/2", 200)].into_iter().try_for_each(|(protocol, status)| {
            let line = agents[0].access_line(protocol, |line| line["protocol"] == protocol)?;
            ensure!(line["status"] == status && line["path"] == "/room" && line["reason"].is_null(), "{line}");
            ensure!(line["bytes_sent"].as_u64() > Some(LARGE as u64), "{line}");
            Ok(())
        });
        drop(end);
        client.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        lines
    })
}

/// Lives on behind its conversations, as long as the test looks at what was told of them.
fn talk(web: &Pod, ended: oneshot::Receiver<()>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let stream = connect(web, SocketAddr::new(vip(1), 80))?;
        let (socket, answer) = tokio_tungstenite::client_async("ws://chat/room?x=1", stream).await?;
        ensure!(answer.status() == StatusCode::SWITCHING_PROTOCOLS, "{answer:?}");
        converse(socket).await.context("over HTTP/1.1")?;
        let socket = extended_connect(web, SocketAddr::new(vip(1), 81)).await?;
        converse(socket).await.context("over HTTP/2")?;
        let _ = ended.await;
        Ok(())
    })
}

/// Text, binary, a message of many frames' length, a ping, and the end in the order that RFC 6455, section 7, has it.
async fn converse(mut socket: WebSocketStream<impl AsyncRead + AsyncWrite + Unpin>) -> Result<()> {
    for message in [Message::text("good morning"), Message::binary(vec![0; LARGE]), Message::text("\u{1f9f5}")] {
        socket.send(message.clone()).await?;
        let echo = tokio::time::timeout(BOUND, socket.next()).await?.context("closed")??;
        ensure!(echo == message, "another message came back");
    }
    socket.send(Message::Ping(Bytes::from_static(b"are you there"))).await?;
    let pong = tokio::time::timeout(BOUND, socket.next()).await?.context("closed")??;
    ensure!(pong == Message::Pong(Bytes::from_static(b"are you there")), "{pong:?}");
    let close = CloseFrame { code: CloseCode::Normal, reason: "good night".into() };
    socket.close(Some(close.clone())).await?;
    let answer = tokio::time::timeout(BOUND, socket.next()).await?.context("no close frame came back")??;
    ensure!(answer == Message::Close(Some(close)), "{answer:?}");
    ensure!(tokio::time::timeout(BOUND, socket.next()).await?.is_none(), "something came behind the end");
    Ok(())
}

fn connect(from: &Pod, to: SocketAddr) -> Result<TcpStream> {
    let stream = from.connect(to)?;
    stream.set_nonblocking(true)?;
    Ok(TcpStream::from_std(stream)?)
}

async fn extended_connect(
    from: &Pod,
    to: SocketAddr,
) -> Result<WebSocketStream<impl AsyncRead + AsyncWrite + Unpin + use<>>> {
    let io = TokioIo::new(connect(from, to)?);
    let builder = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
    let (mut sender, connection) = builder.handshake::<_, Empty<Bytes>>(io).await?;
    tokio::spawn(connection);
    // The server's settings must have come: they say that it knows the extended CONNECT.
    sender.ready().await?;
    let mut request = Request::builder().method(Method::CONNECT).uri("http://chat/room").body(Empty::new())?;
    request.extensions_mut().insert(hyper::ext::Protocol::from_static("websocket"));
    let mut answer = sender.send_request(request).await?;
    ensure!(answer.status() == StatusCode::OK, "{answer:?}");
    let stream = hyper::upgrade::on(&mut answer).await?;
    Ok(WebSocketStream::from_raw_socket(TokioIo::new(stream), Role::Client, None).await)
}

/// Says back what it hears, until the test ends.
fn serve(pod: &Pod) -> Result<()> {
    let listeners = [pod.listen(8080)?, pod.listen(8081)?];
    thread::spawn(move || -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let [one, two] = listeners;
            one.set_nonblocking(true)?;
            two.set_nonblocking(true)?;
            let (one, two) = (TcpListener::from_std(one)?, TcpListener::from_std(two)?);
            loop {
                tokio::select! {
                    accepted = one.accept() => drop(tokio::spawn(over_http1(accepted?.0))),
                    accepted = two.accept() => drop(tokio::spawn(over_http2(accepted?.0))),
                }
            }
        })
    });
    Ok(())
}

async fn over_http1(stream: TcpStream) {
    if let Ok(socket) = tokio_tungstenite::accept_async(stream).await {
        echo(socket).await;
    }
}

async fn over_http2(stream: TcpStream) {
    let service = service_fn(|mut request: Request<Incoming>| async move {
        let upgrade = hyper::upgrade::on(&mut request);
        tokio::spawn(async move {
            if let Ok(stream) = upgrade.await {
                echo(WebSocketStream::from_raw_socket(TokioIo::new(stream), Role::Server, None).await).await;
            }
        });
        Ok::<_, std::convert::Infallible>(Response::new(Empty::<Bytes>::new()))
    });
    let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    // A client that goes away ends it, which is all there is to say.
    drop(builder.enable_connect_protocol().serve_connection(TokioIo::new(stream), service).await);
}

async fn echo(mut socket: WebSocketStream<impl AsyncRead + AsyncWrite + Unpin>) {
    while let Some(Ok(message)) = socket.next().await {
        // Pings and closes are answered by the library.
        if (message.is_text() || message.is_binary()) && socket.send(message).await.is_err() {
            return;
        }
    }
}

const LARGE: usize = 300_000;
