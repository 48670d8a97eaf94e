//! Who is believed, and why not: raw peers with certificates of every kind against a real agent.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use rcgen::date_time_ymd;
use rustls::crypto::aws_lc_rs::kx_group::{SECP256R1, X25519, X25519MLKEM768};
use selvedge_lab::{Agent, AgentOptions, BOUND, Lab, Pod, PodSpec, eventually, trial_with};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::lab;
use crate::raw_peer::{self, Authority, Credential, Offer, converse, leaf};

pub fn trials() -> Vec<Trial> {
    vec![
        trial_with(
            "identity::a_client_that_proves_nothing_is_refused_with_its_own_reason",
            lab(),
            a_client_that_proves_nothing_is_refused_with_its_own_reason,
        ),
        trial_with(
            "identity::a_server_that_proves_nothing_is_refused_with_its_own_reason",
            lab(),
            a_server_that_proves_nothing_is_refused_with_its_own_reason,
        ),
        trial_with(
            "identity::the_key_exchange_is_post_quantum_unless_the_peer_lacks_it",
            lab(),
            the_key_exchange_is_post_quantum_unless_the_peer_lacks_it,
        ),
    ]
}

/// One certificate that proves nothing.
struct Impostor {
    /// The `result` of `selvedge_tls_handshakes_total`.
    code: &'static str,
    /// What the access log says.
    words: &'static str,
    offer: Offer,
}

fn impostors(lab: &Lab, account: &str) -> Result<Vec<Impostor>> {
    let ca = Authority::of(&lab.ca())?;
    let right = format!("spiffe://cluster.local/ns/shop/sa/{account}");
    let signed = |uris: &[&str]| ca.sign(&leaf(uris)).map(Offer::new);
    let mut expired = leaf(&[&right]);
    (expired.not_before, expired.not_after) = (date_time_ymd(2001, 1, 1), date_time_ymd(2002, 1, 1));
    let mut early = leaf(&[&right]);
    (early.not_before, early.not_after) = (date_time_ymd(2190, 1, 1), date_time_ymd(2200, 1, 1));
    let impostor = |code, words, offer| Impostor { code, words, offer };
    Ok(vec![
        impostor("wrong-trust-domain", "another trust domain", signed(&["spiffe://elsewhere.test/ns/shop/sa/web"])?),
        impostor("expired", "has expired", Offer::new(ca.sign(&expired)?)),
        impostor("not-yet-valid", "not valid yet", Offer::new(ca.sign(&early)?)),
        impostor("self-signed", "signed by itself", Offer::new(Credential::self_signed(&leaf(&[&right]))?)),
        impostor(
            "unknown-issuer",
            "no trust anchor of ours",
            Offer::new(Authority::root("another mesh")?.sign(&leaf(&[&right]))?),
        ),
        impostor("no-spiffe-uri", "holds no SPIFFE identity", signed(&[])?),
        impostor("no-spiffe-uri", "holds no SPIFFE identity", signed(&["https://cart.example/"])?),
        impostor(
            "several-spiffe-uris",
            "holds 2 URIs",
            signed(&[&right, "spiffe://cluster.local/ns/shop/sa/another"])?,
        ),
    ])
}

fn a_client_that_proves_nothing_is_refused_with_its_own_reason(lab: &Lab) -> Result<()> {
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b").service_account("cart"))?;
    let stranger = lab.pod(PodSpec::new("shop/stranger", "node-a").outside())?;
    let agent = lab.node("node-b").start_agent(&AgentOptions::default())?;
    let server = cart.serve_echo(8080)?;
    let tunnel = SocketAddr::new(cart.ip(), 15008);

    let mut cases = impostors(lab, "web")?;
    let nobody = Offer { credential: None, ..Offer::new(Credential::of(&lab.ca(), "shop/web")?) };
    cases.push(Impostor { code: "no-certificate", words: "shows no certificate", offer: nobody });
    const HTTP_1: &[&[u8]] = &[b"http/1.1"];
    for alpn in [&[], HTTP_1] {
        let offer = Offer { alpn, ..Offer::new(Credential::of(&lab.ca(), "shop/web")?) };
        cases.push(Impostor { code: "alpn", words: "does not agree on h2", offer });
    }
    for Impostor { code, words, offer } in cases {
        let before = handshakes(&agent, "server", code)?;
        converse(async {
            // In TLS 1.3 a client learns by its first read that its certificate was refused.
            let Ok(mut session) = raw_peer::dial(&stranger, tunnel, offer).await else { return Ok(()) };
            let read = session.read(&mut [0; 1]).await;
            ensure!(!matches!(read, Ok(1)), "{code}: it was spoken to");
            Ok(())
        })?;
        refused(&agent, "inbound", words)?;
        counted(&agent, "server", code, before)?;
    }

    converse(async {
        let mut plaintext = raw_peer::tcp(&stranger, tunnel)?;
        plaintext.write_all(b"GET / HTTP/1.1\r\nhost: cart\r\n\r\n").await?;
        ensure!(!matches!(plaintext.read(&mut [0; 1]).await, Ok(1)), "plaintext was answered");
        Ok(())
    })?;
    refused(&agent, "inbound", "plaintext came to the tunnel's port")?;
    counted(&agent, "server", "not-tls", 0.0)?;

    ensure!(server.peers().is_empty(), "somebody got through: {:?}", server.peers());
    ensure!(agent.metrics()?.sum("selvedge_connections_failed_total", &[("reason", "tls")]) >= 12.0);
    Ok(())
}

fn a_server_that_proves_nothing_is_refused_with_its_own_reason(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a").service_account("web"))?;
    // No agent on its node: what answers on its tunnel port is written here.
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b").service_account("cart"))?;
    let agent = lab.node("node-a").start_agent(&AgentOptions::default())?;

    let mut cases = impostors(lab, "cart")?;
    let other = Offer::new(Credential::of(&lab.ca(), "shop/thief")?);
    cases.push(Impostor { code: "wrong-identity", words: "sa/cart was wanted", offer: other });
    let no_alpn = Offer { alpn: &[], ..Offer::new(Credential::of(&lab.ca(), "shop/cart")?) };
    cases.push(Impostor { code: "alpn", words: "does not agree on h2", offer: no_alpn });
    for Impostor { code, words, offer } in cases {
        let before = handshakes(&agent, "client", code)?;
        let listener = cart.listen(15008)?;
        let acceptor = offer.acceptor(&lab.ca())?;
        listener.set_nonblocking(true)?;
        let serving = raw_peer::runtime().spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener)?;
            loop {
                let (tcp, _) = listener.accept().await?;
                if let Ok(mut session) = acceptor.accept(tcp).await {
                    // Whoever is believed would be asked something.
                    let _ = session.read(&mut [0; 64]).await;
                }
            }
            #[expect(unreachable_code, reason = "it tells the type")]
            anyhow::Ok(())
        });
        ensure_broken(&web, (cart.ip(), 8080).into(), code)?;
        serving.abort();
        refused(&agent, "outbound", words)?;
        counted(&agent, "client", code, before)?;
        // The listener is closed once the task is gone; only then can the next one have its port.
        eventually("the raw server is gone", BOUND, || serving.is_finished().then_some(()))?;
    }
    Ok(())
}

fn the_key_exchange_is_post_quantum_unless_the_peer_lacks_it(lab: &Lab) -> Result<()> {
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b").service_account("cart"))?;
    let stranger = lab.pod(PodSpec::new("shop/stranger", "node-a").outside())?;
    let agent = lab.node("node-b").start_agent(&AgentOptions::default())?;
    let _server = cart.serve_echo(8080)?;
    let authority = SocketAddr::new(cart.ip(), 8080).to_string();
    for (groups, agreed) in [
        (vec![X25519MLKEM768, X25519, SECP256R1], "X25519MLKEM768"),
        (vec![X25519, SECP256R1], "X25519"),
        (vec![SECP256R1], "secp256r1"),
    ] {
        let offer = Offer { groups, ..Offer::new(Credential::of(&lab.ca(), "shop/web")?) };
        converse(async {
            let mut h2 = raw_peer::speak_h2(raw_peer::dial(&stranger, (cart.ip(), 15008).into(), offer).await?).await?;
            let (status, _, mut stream, mut body) = raw_peer::ask(&mut h2, &authority, &[]).await?;
            ensure!(status == 200, "{agreed}: {status}");
            raw_peer::echoed(&mut stream, &mut body, b"hello").await
        })?;
        agent.access_line(agreed, |line| line["key_exchange"] == agreed && line["direction"] == "inbound")?;
        let metrics = agent.metrics()?;
        let labels = [("key_exchange", agreed), ("result", "ok"), ("role", "server")];
        ensure!(metrics.sum("selvedge_tls_handshakes_total", &labels) == 1.0, "{agreed} is not counted");
        ensure!(metrics.sum("selvedge_tls_key_exchanges_total", &labels[..1]) == 1.0, "{agreed} is not counted");
    }
    Ok(())
}

/// The application sees its connection break without a byte.
fn ensure_broken(client: &Pod, to: SocketAddr, what: &str) -> Result<()> {
    use std::io::Read;
    let Ok(mut stream) = client.connect(to) else { return Ok(()) };
    let read = stream.read(&mut [0; 1]);
    ensure!(read.is_err(), "{what}: the application read {read:?}");
    Ok(())
}

fn refused(agent: &Agent, direction: &str, words: &str) -> Result<()> {
    let line = agent.access_line(words, |line| {
        line["direction"] == direction && line["detail"].as_str().is_some_and(|detail| detail.contains(words))
    })?;
    ensure!(line["reason"] == "tls", "{line}");
    Ok(())
}

fn counted(agent: &Agent, role: &str, result: &str, before: f64) -> Result<()> {
    let more = || handshakes(agent, role, result).is_ok_and(|count| count > before).then_some(());
    eventually(&format!("{result} is counted"), BOUND, more)
}

fn handshakes(agent: &Agent, role: &str, result: &str) -> Result<f64> {
    Ok(agent.metrics()?.sum("selvedge_tls_handshakes_total", &[("role", role), ("result", result)]))
}
