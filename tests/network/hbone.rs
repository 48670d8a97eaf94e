//! HBONE to the letter, seen from raw peers: a client that dials a joined pod's tunnel, and a server in place of an
//! agent.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use libtest_mimic::Trial;
use selvedge_lab::{Agent, AgentOptions, BOUND, Lab, Pod, PodSpec, authorization, trial_with};
use serde_json::json;
use tokio::io::AsyncReadExt;

use crate::lab;
use crate::raw_peer::{self, Credential, Offer, ask, converse, echoed};

pub fn trials() -> Vec<Trial> {
    vec![
        trial_with("hbone::a_raw_client_is_answered_as_the_field_expects", lab(), a_raw_client_is_answered),
        trial_with("hbone::a_raw_server_is_asked_as_the_field_expects", lab(), a_raw_server_is_asked),
        trial_with("hbone::goaway_sends_new_connections_elsewhere", lab(), goaway_sends_new_connections_elsewhere),
    ]
}

fn a_raw_client_is_answered(lab: &Lab) -> Result<()> {
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b").service_account("cart"))?;
    let other = lab.pod(PodSpec::new("shop/other", "node-b"))?;
    let stranger = lab.pod(PodSpec::new("shop/stranger", "node-a").outside())?;
    let there = json!({"operation": {"ports": ["8081"]}});
    lab.put(&authorization("shop/nobody-at-8081", json!({"action": "DENY", "rules": [{"to": [there]}]})))?;
    let agent = lab.node("node-b").start_agent(&AgentOptions::default())?;
    let server = cart.serve_echo(8080)?;
    let _denied = cart.serve_echo(8081)?;
    for (ip, from) in cart.ips().iter().zip(stranger.ips()) {
        let connect = || Offer::new(Credential::of(&lab.ca(), "shop/web").unwrap_or_else(|error| panic!("{error}")));
        let at = |ip: IpAddr, port: u16| SocketAddr::new(ip, port).to_string();
        converse(async {
            let tls = raw_peer::dial(&stranger, (*ip, 15008).into(), connect()).await?;
            let mut h2 = raw_peer::speak_h2(tls).await?;
            let headers = [
                ("baggage", "k8s.namespace.name=shop,k8s.pod.name=raw"),
                ("forwarded", "for=\"192.0.2.1:4000\""),
                ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
            ];
            let (status, head, mut stream, mut body) = ask(&mut h2, &at(*ip, 8080), &headers).await?;
            ensure!(status == 200, "{status}");
            let baggage = head.get("baggage").context("a 200 without baggage")?.to_str()?;
            for part in ["k8s.namespace.name=shop", "k8s.pod.name=cart", "k8s.cluster.name=Kubernetes"] {
                ensure!(baggage.contains(part), "{part} is not in {baggage}");
            }
            echoed(&mut stream, &mut body, b"through").await?;

            let elsewhere = other.ips().iter().find(|other| other.is_ipv4() == ip.is_ipv4()).context("no address")?;
            for (authority, wanted) in [
                (at(*elsewhere, 8080), 400),
                (at(*ip, 15001), 400),
                (at(*ip, 15006), 400),
                (at(*ip, 15008), 400),
                ("cart.shop.svc:8080".to_owned(), 400),
                (at(*ip, 8081), 401),
                (at(*ip, 9), 503),
            ] {
                let (status, ..) = ask(&mut h2, &authority, &[]).await?;
                ensure!(status == wanted, "{authority}: {status}, not {wanted}");
            }
            // None of these cost the tunnel its life.
            echoed(&mut stream, &mut body, b"still").await
        })?;
        // The TCP peer's address is believed, the header's is not.
        let peer = server.peers().last().copied().context("nobody came")?;
        ensure!(peer.ip() == *from, "the application saw {peer}");
    }
    for (code, detail) in [
        ("protocol", "is not the one connected to"),
        ("protocol", "belongs to the mesh"),
        ("policy:shop/nobody-at-8081", ""),
        ("connect", "application at"),
    ] {
        agent.access_line(detail, |line| {
            line["reason"] == code && line["detail"].as_str().is_some_and(|text| text.contains(detail))
        })?;
    }
    let metrics = agent.metrics()?;
    for (status, least) in [("400", 10.0), ("401", 2.0), ("503", 2.0)] {
        let count = metrics.sum("selvedge_hbone_refused_total", &[("status", status)]);
        ensure!(count >= least, "{status} was counted {count} times");
    }
    Ok(())
}

/// A pod whose tunnel port is served by the test.
struct RawServer {
    listener: tokio::net::TcpListener,
    acceptor: tokio_rustls::TlsAcceptor,
}

impl RawServer {
    fn start(lab: &Lab, pod: &Pod) -> Result<Self> {
        let listener = pod.listen(15008)?;
        listener.set_nonblocking(true)?;
        let _inside = raw_peer::runtime().enter();
        let account = format!("{}/{}", pod.namespace_name(), pod.service_account());
        let acceptor = Offer::new(Credential::of(&lab.ca(), &account)?).acceptor(&lab.ca())?;
        Ok(Self { listener: tokio::net::TcpListener::from_std(listener)?, acceptor })
    }

    async fn accept(&self) -> Result<h2::server::Connection<raw_peer::ServerTls, Bytes>> {
        let (tcp, _) = self.listener.accept().await?;
        Ok(h2::server::handshake(self.acceptor.accept(tcp).await?).await?)
    }
}

/// `web` under an agent, `cart` on a node without one.
fn half_a_mesh(lab: &Lab) -> Result<(Pod, Pod, Agent)> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a").service_account("web"))?;
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b").service_account("cart"))?;
    // Eager, so that a client is there before its server has been asked.
    let agent = lab.node("node-a").start_agent(&AgentOptions::default().arg("--connect=eager"))?;
    Ok((web, cart, agent))
}

fn a_raw_server_is_asked(lab: &Lab) -> Result<()> {
    let (web, cart, _agent) = half_a_mesh(lab)?;
    let server = RawServer::start(lab, &cart)?;
    for (ip, own) in cart.ips().iter().zip(web.ips()) {
        let mut client = raw_peer::tcp(&web, (*ip, 8080).into())?;
        converse(async {
            let mut connection = server.accept().await?;
            let (request, mut responder) = connection.accept().await.context("no request")??;
            ensure!(request.method() == "CONNECT", "{request:?}");
            ensure!(request.uri().to_string() == SocketAddr::new(*ip, 8080).to_string(), "{request:?}");
            ensure!(request.uri().scheme().is_none() && request.uri().path_and_query().is_none(), "{request:?}");
            let header = |name: &str| -> Result<String> {
                Ok(request.headers().get(name).with_context(|| format!("no {name}"))?.to_str()?.to_owned())
            };
            ensure!(header("forwarded")? == format!("for=\"{}\"", client.local_addr()?), "{request:?}");
            let baggage = header("baggage")?;
            for part in ["k8s.cluster.name=Kubernetes", "k8s.namespace.name=shop", "k8s.pod.name=web"] {
                ensure!(baggage.contains(part), "{part} is not in {baggage}");
            }
            ensure!(own.is_ipv4() == ip.is_ipv4());
            // A PING is answered while the request waits, and RST_STREAM is what the application's reset becomes.
            let mut ping = connection.ping_pong().context("a second handle")?;
            let driving = async {
                while let Some(next) = connection.accept().await {
                    next?;
                }
                anyhow::Ok(())
            };
            let talking = async {
                tokio::time::timeout(Duration::from_secs(10), ping.ping(h2::Ping::opaque())).await??;
                let mut stream = responder.send_response(http::Response::new(()), false)?;
                stream.send_data(Bytes::from_static(b"first words"), false)?;
                let mut got = [0; 11];
                client.read_exact(&mut got).await?;
                ensure!(&got == b"first words");
                socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO))?;
                drop(client);
                anyhow::Ok(stream)
            };
            let mut stream = tokio::select! {
                stream = talking => stream?,
                ended = driving => anyhow::bail!("the tunnel ended: {ended:?}"),
            };
            let mut reset = std::pin::pin!(std::future::poll_fn(|cx| stream.poll_reset(cx)));
            let reason = tokio::select! {
                reason = &mut reset => reason?,
                ended = async { connection.accept().await.is_none() } => anyhow::bail!("the tunnel ended: {ended}"),
            };
            ensure!(reason == h2::Reason::CANCEL, "{reason}");
            Ok(())
        })?;
    }
    Ok(())
}

fn goaway_sends_new_connections_elsewhere(lab: &Lab) -> Result<()> {
    let (web, cart, _agent) = half_a_mesh(lab)?;
    let server = RawServer::start(lab, &cart)?;
    let old = web.connect((cart.ip(), 8080))?;
    let serving = |mut connection: h2::server::Connection<raw_peer::ServerTls, Bytes>, name: &'static str| async move {
        let mut streams = Vec::new();
        loop {
            match connection.accept().await {
                Some(Ok((request, mut responder))) => {
                    let mut stream = responder.send_response(http::Response::new(()), false)?;
                    stream.send_data(Bytes::from_static(name.as_bytes()), false)?;
                    streams.push((request, stream));
                    if name == "old" {
                        // It goes on with what it has, and takes nothing new.
                        connection.graceful_shutdown();
                    }
                }
                Some(Err(error)) => return Err(error.into()),
                None => return anyhow::Ok(()),
            }
        }
    };
    let first = converse(server.accept())?;
    raw_peer::runtime().spawn(serving(first, "old"));
    let read = |stream: &std::net::TcpStream| -> Result<String> {
        let mut got = [0; 3];
        stream.set_read_timeout(Some(BOUND))?;
        std::io::Read::read_exact(&mut &*stream, &mut got)?;
        Ok(String::from_utf8_lossy(&got).into_owned())
    };
    ensure!(read(&old)? == "old");
    raw_peer::runtime().spawn(async move {
        while let Ok(connection) = server.accept().await {
            raw_peer::runtime().spawn(serving(connection, "new"));
        }
    });
    for _ in 0..20 {
        let next = web.connect((cart.ip(), 8080))?;
        ensure!(read(&next)? == "new", "a new connection went into a tunnel that was going away");
    }
    // What the old tunnel carries goes on.
    old.set_nonblocking(true)?;
    let read = std::io::Read::read(&mut &old, &mut [0; 1]);
    let waits = read.as_ref().is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock);
    ensure!(waits, "the old connection did not live on: {read:?}");
    Ok(())
}
