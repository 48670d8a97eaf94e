//! The application sees the client's own address, from a port that harms no live connection, and no address is
//! believed that cannot have come from outside.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, SocketAddrV6, TcpStream};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::{Agent, AgentOptions, BOUND, Lab, PodSpec, Request, eventually, trial_with};
use socket2::SockRef;

use crate::knock::is_refusal;
use crate::lab;

pub fn trials() -> Vec<Trial> {
    let bodies: [(&str, Body); 6] = [
        (
            "a_port_of_a_connection_that_was_excluded_is_never_taken",
            a_port_of_a_connection_that_was_excluded_is_never_taken,
        ),
        (
            "a_port_of_a_connection_older_than_the_mesh_is_never_taken",
            a_port_of_a_connection_older_than_the_mesh_is_never_taken,
        ),
        (
            "a_port_of_an_accepted_plaintext_connection_is_never_taken",
            a_port_of_an_accepted_plaintext_connection_is_never_taken,
        ),
        (
            "a_client_that_comes_upon_a_port_of_ours_breaks_nothing_and_gets_through",
            a_client_that_comes_upon_a_port_of_ours_breaks_nothing_and_gets_through,
        ),
        (
            "a_port_is_free_again_as_soon_as_the_application_has_closed",
            a_port_is_free_again_as_soon_as_the_application_has_closed,
        ),
        (
            "loopback_link_local_and_the_pods_own_addresses_are_not_believed",
            loopback_link_local_and_the_pods_own_addresses_are_not_believed,
        ),
    ];
    let in_both_modes = bodies.into_iter().flat_map(|(name, body)| {
        ["tproxy", "redirect"].map(|mode| {
            let options = AgentOptions::default().arg("--capture").arg(mode);
            trial_with(&format!("source_address::{name}_by_{mode}"), lab(), move |lab| body(lab, options))
        })
    });
    in_both_modes.collect()
}

type Body = fn(&Lab, AgentOptions) -> Result<()>;

fn a_port_of_a_connection_older_than_the_mesh_is_never_taken(lab: &Lab, options: AgentOptions) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b"))?;
    let server = cart.serve_echo(8080)?;
    let mut older = Vec::new();
    for (own, ip) in web.ips().iter().zip(cart.ips()) {
        older.push(web.connect_from((*own, 2000).into(), (*ip, 8080))?);
    }
    let agents = lab.start_agents(&options.arg("--source-ports=2000-2001"))?;
    for ((own, ip), older) in web.ips().iter().zip(cart.ips()).zip(&mut older) {
        // Several times: a port drawn at random would be wrong in half of them.
        for _ in 0..4 {
            let mut newer = web.connect((*ip, 8080))?;
            echoes(&mut newer).context("through the tunnel")?;
            let seen = server.peers().last().copied();
            ensure!(seen == Some((*own, 2001).into()), "the application saw {seen:?}");
            echoes(older).context("the older connection")?;
            // With both ports held there is none to take, and nobody pays for it.
            let third = web.connect_within((*ip, 8080), Duration::from_secs(2));
            let third = third.map_err(Into::into).and_then(|mut third| echoes(&mut third));
            ensure!(third.is_err(), "a third connection found a third port");
            echoes(older).context("the older connection")?;
            echoes(&mut newer).context("the newer connection")?;
            // A reset leaves no TIME_WAIT, which would hold the port for a minute.
            SockRef::from(&newer).set_linger(Some(Duration::ZERO))?;
            drop(newer);
            let left = || server.live() == 1 + usize::from(ip.is_ipv4());
            eventually("the newer connection has left the application", BOUND, || left().then_some(()))?;
            ports_are_free(&agents[1])?;
        }
        older.shutdown(std::net::Shutdown::Both)?;
    }
    Ok(())
}

fn a_port_of_a_connection_that_was_excluded_is_never_taken(lab: &Lab, options: AgentOptions) -> Result<()> {
    let stranger = lab.pod(PodSpec::new("shop/stranger", "node-a").outside())?;
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b").annotation("selvedge.dev/exclude-inbound-ports", "8080"))?;
    let agents = lab.start_agents(&options.arg("--source-ports=2000-2001"))?;
    let server = cart.serve_echo(8080)?;
    let mut direct = stranger.connect_from((stranger.ip(), 2000).into(), (cart.ip(), 8080))?;
    echoes(&mut direct)?;
    ensure!(server.peers() == [(stranger.ip(), 2000).into()], "not direct: {:?}", server.peers());
    let mut manifest = cart.manifest().clone();
    manifest["metadata"]["annotations"] = serde_json::json!({});
    lab.put(&manifest)?;
    eventually("the port is captured", BOUND, || {
        let mut stream = stranger.connect((cart.ip(), 8080)).ok()?;
        echoes(&mut stream).ok()?;
        // A reset leaves no TIME_WAIT, which would hold the port for a minute.
        SockRef::from(&stream).set_linger(Some(Duration::ZERO)).ok()?;
        let captured = agents[1].metrics().ok()?.sum("selvedge_tcp_connections_opened_total", &[]) > 0.0;
        captured.then_some(())
    })?;
    eventually("earlier ones have left the application", BOUND, || (server.live() == 1).then_some(()))?;
    ports_are_free(&agents[1])?;
    for _ in 0..4 {
        let mut newer = stranger.connect((cart.ip(), 8080))?;
        echoes(&mut newer)?;
        let seen = server.peers().last().copied();
        ensure!(seen == Some((stranger.ip(), 2001).into()), "the application saw {seen:?}");
        echoes(&mut direct).context("the connection that was excluded")?;
        SockRef::from(&newer).set_linger(Some(Duration::ZERO))?;
        drop(newer);
        eventually("it has left the application", BOUND, || (server.live() == 1).then_some(()))?;
        ports_are_free(&agents[1])?;
    }
    Ok(())
}

fn a_port_of_an_accepted_plaintext_connection_is_never_taken(lab: &Lab, options: AgentOptions) -> Result<()> {
    let stranger = lab.pod(PodSpec::new("shop/stranger", "node-a").outside())?;
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b"))?;
    let agents = lab.start_agents(&options.arg("--source-ports=2000-2001"))?;
    let server = cart.serve_echo(8080)?;
    for (own, ip) in stranger.ips().iter().zip(cart.ips()) {
        for chosen in [2000, 2001] {
            let mut stream = stranger.connect_from((*own, chosen).into(), (*ip, 8080))?;
            echoes(&mut stream).with_context(|| format!("a client at {own} port {chosen}"))?;
            let seen = server.peers().last().copied();
            ensure!(seen == Some((*own, 4001 - chosen).into()), "the application saw {seen:?}");
            drop(stream);
            ports_are_free(&agents[1])?;
        }
    }
    Ok(())
}

fn a_client_that_comes_upon_a_port_of_ours_breaks_nothing_and_gets_through(
    lab: &Lab,
    options: AgentOptions,
) -> Result<()> {
    let stranger = lab.pod(PodSpec::new("shop/stranger", "node-a").outside())?;
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b"))?;
    let _agents = lab.start_agents(&options.arg("--source-ports=2000-2001"))?;
    let server = cart.serve_echo(8080)?;
    for (own, ip) in stranger.ips().iter().zip(cart.ips()) {
        let to = SocketAddr::from((*ip, 8080));
        let mut first = stranger.connect_from((*own, 40_000).into(), to)?;
        echoes(&mut first)?;
        let ours = server.peers().last().copied().context("nobody came")?;
        ensure!([2000, 2001].contains(&ours.port()), "{ours}");
        let sent = lab.node("node-b").capture(cart.host_interface())?;
        thread::scope(|scope| {
            let newcomer = scope.spawn(|| stranger.connect_from(ours, to));
            eventually("the newcomer's SYN is at the pod", BOUND, || {
                sent.tcp_ports().ok().filter(|ports| ports.contains_key(&ours.port()))
            })?;
            for _ in 0..3 {
                echoes(&mut first).context("the connection that has the port")?;
            }
            drop(first);
            let mut newcomer = newcomer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            echoes(&mut newcomer).context("the newcomer, once the port is free")
        })?;
    }
    Ok(())
}

fn a_port_is_free_again_as_soon_as_the_application_has_closed(lab: &Lab, options: AgentOptions) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b"))?;
    let _agents = lab.start_agents(&options.arg("--source-ports=2000-2001"))?;
    let _server = cart.serve_http(8080, "cart")?;
    let request = Request::get("/").header("connection", "close");
    for ip in cart.ips() {
        for _ in 0..6 {
            eventually("a port is free", BOUND, || web.http((*ip, 8080), &request).ok())?;
        }
    }
    Ok(())
}

fn loopback_link_local_and_the_pods_own_addresses_are_not_believed(lab: &Lab, options: AgentOptions) -> Result<()> {
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b"))?;
    let node = lab.node("node-b");
    let agent = node.start_agent(&options)?;
    let server = cart.serve_http(8080, "cart")?;
    node.ip_batch(["addr add 169.254.7.7/32 dev lo"])?;
    let link_local = node.connect_from("169.254.7.7:0".parse()?, (cart.ip(), 8080));
    ended(link_local).context("a link-local IPv4 source")?;
    if let Some(ip) = cart.ip_v6() {
        let index = node.run(|| nix_index(cart.host_interface()))?;
        node.ip_batch([format!("addr add fe80::7/64 dev {} nodad", cart.host_interface())])?;
        let from = SocketAddrV6::new("fe80::7".parse()?, 0, 0, index);
        let link_local = node.connect_from(from.into(), (ip, 8080));
        ended(link_local).context("a link-local IPv6 source")?;
    }
    agent.access_line("the reason is the source", |line| line["reason"] == "source")?;

    // The kernel itself drops what comes from outside with an address of the host; nothing of ours may bring it back.
    for from in ["127.0.0.1".parse::<IpAddr>()?, cart.ip()] {
        let spoofed = node.run(|| connect_as(from, (cart.ip(), 8080).into()));
        ensure!(spoofed.is_err(), "a connection came about from {from}");
    }
    ensure!(server.peers().is_empty(), "the application saw {:?}", server.peers());
    Ok(())
}

/// Waits until the agent has let go of what it carried. A port that the kernel has freed is the agent's a moment longer,
/// until it has seen the end of its connection; with two ports in all, the next client would find none.
fn ports_are_free(agent: &Agent) -> Result<()> {
    eventually(&format!("{} carries nothing", agent.node()), BOUND, || {
        agent.dump().ok()?["connections"].as_array()?.is_empty().then_some(())
    })
}

/// Connects from an address that need not be this host's.
fn connect_as(from: IpAddr, to: SocketAddr) -> std::io::Result<()> {
    let socket = socket2::Socket::new(socket2::Domain::for_address(to), socket2::Type::STREAM, None)?;
    socket.set_ip_transparent_v4(true)?;
    socket.bind(&SocketAddr::new(from, 0).into())?;
    socket.connect_timeout(&to.into(), Duration::from_millis(300))
}

fn nix_index(interface: &str) -> Result<u32> {
    Ok(nix::net::if_::if_nametoindex(interface)?)
}

/// Says something and waits to hear it back.
fn echoes(stream: &mut TcpStream) -> Result<()> {
    stream.set_read_timeout(Some(BOUND))?;
    stream.write_all(b"still here?")?;
    let mut heard = [0; 11];
    stream.read_exact(&mut heard)?;
    ensure!(&heard == b"still here?");
    Ok(())
}

/// The other side ends it without a word.
fn ended(stream: std::io::Result<TcpStream>) -> Result<()> {
    let mut stream = match stream {
        Err(error) if is_refusal(error.kind()) => return Ok(()),
        other => other?,
    };
    stream.set_read_timeout(Some(BOUND))?;
    // The reset may be here already.
    let _ = stream.write_all(b"GET / HTTP/1.1\r\n\r\n");
    let mut byte = [0];
    match stream.read(&mut byte) {
        Ok(1..) => anyhow::bail!("it was answered"),
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
            anyhow::bail!("it was neither ended nor answered")
        }
        _ => Ok(()),
    }
}
