//! A tunnel that fails is tried again before the application's first byte, and never after.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use libtest_mimic::Trial;
use selvedge_lab::{AgentOptions, Lab, PodSpec, trial_with};
use socket2::SockRef;
use tokio_rustls::TlsAcceptor;

use crate::lab;
use crate::raw_peer::{self, Credential, Offer};

pub fn trials() -> Vec<Trial> {
    vec![
        trial_with(
            "retry::a_broken_tunnel_is_tried_again_before_the_first_byte",
            lab(),
            a_broken_tunnel_is_tried_again,
        ),
        trial_with("retry::what_was_delivered_once_is_never_sent_again", lab(), what_was_delivered_is_never_sent_again),
        trial_with(
            "retry::who_waits_for_a_tunnel_port_where_nobody_listens_hears_nothing_and_who_is_connected_a_reset",
            lab(),
            nobody_listens,
        ),
        trial_with("retry::a_restarted_agent_costs_its_peers_no_new_connection", lab(), a_restarted_agent),
    ]
}

/// How a raw tunnel server misbehaves, connection by connection; behind the last it behaves.
#[derive(Clone, Copy, Debug)]
enum Breaks {
    AtAccept,
    AfterTheHandshake,
    AfterTheRequest,
    ByRefusedStream,
    AfterTheFirstByte,
    Never,
}

/// Serves a pod's tunnel port, misbehaving in order. What applications sent is counted as it is delivered.
fn serve(
    listener: std::net::TcpListener,
    acceptor: TlsAcceptor,
    order: Vec<Breaks>,
    delivered: Arc<AtomicUsize>,
) -> Result<()> {
    listener.set_nonblocking(true)?;
    let inside = raw_peer::runtime().enter();
    let listener = tokio::net::TcpListener::from_std(listener)?;
    drop(inside);
    raw_peer::runtime().spawn(async move {
        let mut order = order.into_iter();
        while let Ok((tcp, _)) = listener.accept().await {
            let breaks = order.next().unwrap_or(Breaks::Never);
            let (acceptor, delivered) = (acceptor.clone(), delivered.clone());
            raw_peer::runtime().spawn(async move { conversation(tcp, acceptor, breaks, &delivered).await });
        }
    });
    Ok(())
}

async fn conversation(
    tcp: tokio::net::TcpStream,
    acceptor: TlsAcceptor,
    breaks: Breaks,
    delivered: &AtomicUsize,
) -> Result<()> {
    SockRef::from(&tcp).set_linger(Some(Duration::ZERO))?;
    if let Breaks::AtAccept = breaks {
        return Ok(());
    }
    let session = acceptor.accept(tcp).await?;
    if let Breaks::AfterTheHandshake = breaks {
        return Ok(());
    }
    let mut connection = h2::server::handshake(session).await?;
    while let Some(request) = connection.accept().await {
        let (request, mut responder) = request?;
        match breaks {
            Breaks::AfterTheRequest => return Ok(()),
            Breaks::ByRefusedStream => {
                responder.send_reset(h2::Reason::REFUSED_STREAM);
                continue;
            }
            _ => {}
        }
        let mut send = responder.send_response(http::Response::new(()), false)?;
        let mut body = request.into_body();
        if let Breaks::AfterTheFirstByte = breaks {
            let mut reading = Box::pin(async move { body.data().await.map(drop) });
            tokio::select! {
                _ = &mut reading => {}
                _ = connection.accept() => {}
            }
            delivered.fetch_add(1, Ordering::SeqCst);
            return Ok(());
        }
        raw_peer::runtime().spawn(async move {
            while let Some(Ok(data)) = body.data().await {
                body.flow_control().release_capacity(data.len())?;
                send.send_data(Bytes::copy_from_slice(&data), false)?;
            }
            anyhow::Ok(())
        });
    }
    Ok(())
}

fn a_broken_tunnel_is_tried_again(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a").service_account("web"))?;
    let ways = [Breaks::AtAccept, Breaks::AfterTheHandshake, Breaks::AfterTheRequest, Breaks::ByRefusedStream];
    let cart = |number| lab.pod(PodSpec::new(&format!("shop/cart-{number}"), "node-b").service_account("cart"));
    let carts: Vec<_> = (0..ways.len()).map(cart).collect::<Result<_>>()?;
    let _agent = lab.node("node-a").start_agent(&AgentOptions::default())?;
    let acceptor = Offer::new(Credential::of(&lab.ca(), "shop/cart")?).acceptor(&lab.ca())?;
    for (cart, breaks) in carts.iter().zip(ways) {
        // The third try succeeds.
        serve(cart.listen(15008)?, acceptor.clone(), vec![breaks, breaks], Arc::default())?;
        echoed(&mut web.connect((cart.ip(), 8080))?).with_context(|| format!("{breaks:?}"))?;
    }
    Ok(())
}

fn what_was_delivered_is_never_sent_again(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a").service_account("web"))?;
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b").service_account("cart"))?;
    let agent = lab.node("node-a").start_agent(&AgentOptions::default())?;
    let acceptor = Offer::new(Credential::of(&lab.ca(), "shop/cart")?).acceptor(&lab.ca())?;
    let delivered = Arc::new(AtomicUsize::new(0));
    serve(cart.listen(15008)?, acceptor, vec![Breaks::AfterTheFirstByte; 20], delivered.clone())?;
    for sent in 1..=10 {
        let mut stream = web.connect((cart.ip(), 8080))?;
        ensure!(echoed(&mut stream).is_err(), "it was answered");
        let count = delivered.load(Ordering::SeqCst);
        ensure!(count == sent, "{sent} messages were sent, {count} arrived");
    }
    agent.access_line("a reset", |line| line["reason"] == "reset" && line["bytes_sent"] == 5)?;
    Ok(())
}

fn nobody_listens(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a").service_account("web"))?;
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b").service_account("cart"))?;
    let eager = lab.pod(PodSpec::new("shop/eager", "node-a").annotation("selvedge.dev/connect", "eager"))?;
    let agent = lab.node("node-a").start_agent(&AgentOptions::default())?;
    // An agent that is away says nothing of the application: who can wait does, and the log says for whom.
    let to = (cart.ip(), 8080).into();
    let silence = web.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(2)));
    ensure!(silence.as_ref().is_err_and(|error| error.kind() == ErrorKind::TimedOut), "{silence:?}");
    let gave_up =
        |line: &serde_json::Value| line["detail"].as_str().is_some_and(|detail| detail.contains("gave it up"));
    let line = agent.access_line("given up", gave_up)?;
    let explained = |line: &serde_json::Value| {
        line["reason"] == "connect"
            && line["detail"].as_str().is_some_and(|detail| detail.contains("blocking HBONE port 15008"))
    };
    ensure!(explained(&line), "{line}");
    // Who is connected already is reset, within bounds.
    let started = std::time::Instant::now();
    let reset = echoed(&mut eager.connect(to)?);
    ensure!(reset.is_err() && started.elapsed() < Duration::from_secs(10), "{reset:?} in {:?}", started.elapsed());
    agent.access_line("reset", |line| explained(line) && !gave_up(line))?;
    Ok(())
}

fn a_restarted_agent(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a").service_account("web"))?;
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b").service_account("cart"))?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let _server = cart.serve_echo(8080)?;
    for _ in 0..3 {
        // A tunnel is in the pool; its far end dies without a word, and its parent starts another.
        echoed(&mut web.connect((cart.ip(), 8080))?)?;
        agents[1].kill_worker()?;
        echoed(&mut web.connect((cart.ip(), 8080))?)?;
    }
    Ok(())
}

fn echoed(stream: &mut TcpStream) -> Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    stream.write_all(b"hello")?;
    let mut got = [0; 5];
    stream.read_exact(&mut got)?;
    ensure!(&got == b"hello");
    Ok(())
}
