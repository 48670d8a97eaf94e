use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{CertificateParams, IsCa, Issuer, KeyPair, SanType, date_time_ymd};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::*;
use crate::identity::{EmbeddedCa, IdentitySettings};

/// A node with a CA of its own folder, for every test of this room.
pub(crate) struct Node {
    pub tls: Tls,
    pub identities: Arc<Identities>,
    pub ca: Arc<EmbeddedCa>,
    pub dir: Arc<tempfile::TempDir>,
}

impl Node {
    pub fn new() -> Self {
        Self::with(Arc::new(tempfile::tempdir().unwrap()), IdentitySettings::default(), TlsSettings::default())
    }

    pub fn with(dir: Arc<tempfile::TempDir>, identity: IdentitySettings, tls: TlsSettings) -> Self {
        let domain: crate::mesh::TrustDomain = "cluster.local".parse().unwrap();
        let ca = EmbeddedCa::open(dir.path(), &domain).unwrap();
        let identities = Identities::new(domain, ca.clone(), ca.trust(), identity);
        Self { tls: Tls::with_settings(identities.clone(), tls), identities, ca, dir }
    }

    /// Both ends of one session between `a` and `b`, of HBONE.
    pub async fn pair(&self) -> (Session, Session) {
        let (client, server) = tcp_pair().await;
        let (a, b) = (id("a"), id("b"));
        let (client, server) = tokio::join!(self.tls.connect_hbone(client, &a, &b), self.tls.accept_hbone(server, &b));
        (client.unwrap(), server.unwrap())
    }

    /// Both ends of one session between `a` and `b`, of the fast tunnel.
    pub async fn fast_pair(&self) -> (Session<Link>, Session<Link>) {
        let (client, server) = tcp_pair().await;
        let (a, b) = (id("a"), id("b"));
        let (client, server) =
            tokio::join!(self.tls.connect(client, &a, &b, Offer::Both), self.tls.accept(server, &b, Offer::Both));
        match (client.unwrap(), server.unwrap()) {
            (Spoken::Fast(client), Spoken::Fast(server)) => (client, server),
            _ => panic!("two of ours did not agree on the fast tunnel"),
        }
    }

    fn issuer(&self) -> Issuer<'static, KeyPair> {
        let key = KeyPair::from_pem(&std::fs::read_to_string(self.dir.path().join("ca.key")).unwrap()).unwrap();
        Issuer::from_ca_cert_pem(&std::fs::read_to_string(self.dir.path().join("ca.crt")).unwrap(), key).unwrap()
    }
}

impl Tls {
    pub(crate) async fn accept_hbone(&self, tcp: TcpStream, own: &Identity) -> Result<Session, TlsError> {
        match self.accept(tcp, own, Offer::Hbone).await? {
            Spoken::Hbone(session) => Ok(session),
            Spoken::Fast(_) => Err(TlsError::Alpn),
        }
    }
}

pub(crate) fn id(account: &str) -> Identity {
    format!("spiffe://cluster.local/ns/shop/sa/{account}").parse().unwrap()
}

pub(crate) async fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
    let address = listener.local_addr().unwrap();
    let (client, server) = tokio::join!(TcpStream::connect(address), listener.accept());
    (client.unwrap(), server.unwrap().0)
}

#[derive(Debug)]
struct BelievesAnybody;

impl ServerCertVerifier for BelievesAnybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

type Chain = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn params(uris: &[&str]) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.subject_alt_names = uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap())).collect();
    params.is_ca = IsCa::ExplicitNoCa;
    params
}

fn signed(params: &CertificateParams, issuer: Option<&Issuer<'_, KeyPair>>) -> Chain {
    let key = KeyPair::generate().unwrap();
    let certificate = match issuer {
        Some(issuer) => params.signed_by(&key, issuer).unwrap(),
        None => params.self_signed(&key).unwrap(),
    };
    (vec![certificate.der().clone()], PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())))
}

fn raw_connector(chain: Option<Chain>, alpn: &[&[u8]]) -> TlsConnector {
    let builder = ClientConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(BelievesAnybody));
    let mut config = match chain {
        Some((chain, key)) => builder.with_client_auth_cert(chain, key).unwrap(),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    TlsConnector::from(Arc::new(config))
}

/// What a server says to a client with such a certificate.
async fn server_says(node: &Node, chain: Option<Chain>, alpn: &[&[u8]]) -> Result<Session, TlsError> {
    let (client, server) = tcp_pair().await;
    let connector = raw_connector(chain, alpn);
    let client = tokio::spawn(async move {
        let name = ServerName::try_from("127.0.0.1").unwrap();
        if let Ok(mut stream) = connector.connect(name, client).await {
            let _ = stream.read(&mut [0]).await;
        }
    });
    let result = node.tls.accept_hbone(server, &id("b")).await;
    client.abort();
    result
}

/// What a client that wants `b` says to a server with such a certificate.
async fn client_says(node: &Node, (chain, key): Chain) -> TlsError {
    let (client, server) = tcp_pair().await;
    let mut config = ServerConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let (a, b) = (id("a"), id("b"));
    let (client, _) =
        tokio::join!(node.tls.connect_hbone(client, &a, &b), TlsAcceptor::from(Arc::new(config)).accept(server));
    client.err().unwrap()
}

const A: &str = "spiffe://cluster.local/ns/shop/sa/a";

#[tokio::test]
async fn each_certificate_that_proves_nothing_is_refused_with_its_own_reason_by_both_sides() {
    let node = Node::new();
    let issuer = node.issuer();
    let stranger = Node::new();
    let mut expired = params(&[A]);
    expired.not_after = date_time_ymd(2020, 1, 1);
    let mut early = params(&[A]);
    early.not_before = date_time_ymd(2090, 1, 1);
    let cases = [
        ("wrong-trust-domain", params(&["spiffe://elsewhere/ns/shop/sa/a"]), Some(&issuer)),
        ("expired", expired, Some(&issuer)),
        ("not-yet-valid", early, Some(&issuer)),
        ("self-signed", params(&[A]), None),
        ("no-spiffe-uri", params(&[]), Some(&issuer)),
        ("no-spiffe-uri", params(&["https://cluster.local/ns/shop/sa/a"]), Some(&issuer)),
        ("no-spiffe-uri", params(&["spiffe://cluster.local/ns/shop/sa/"]), Some(&issuer)),
        ("several-spiffe-uris", params(&[A, "spiffe://cluster.local/ns/shop/sa/b"]), Some(&issuer)),
        ("unknown-issuer", params(&[A]), Some(&stranger.issuer())),
    ];
    for (code, params, issuer) in cases {
        let refused = server_says(&node, Some(signed(&params, issuer)), &[b"h2"]).await.err().unwrap();
        assert_eq!(refused.code(), code, "the server said {refused}");
        let refused = client_says(&node, signed(&params, issuer)).await;
        assert_eq!(refused.code(), code, "the client said {refused}");
    }
    let wrong = client_says(&node, signed(&params(&[A]), Some(&issuer))).await;
    assert_eq!(wrong.code(), "wrong-identity", "{wrong}");
    let good = server_says(&node, Some(signed(&params(&[A]), Some(&issuer))), &[b"h2"]).await.unwrap();
    assert_eq!(good.peer.identity, id("a"));
}

#[tokio::test]
async fn a_client_without_certificate_or_alpn_is_refused() {
    let node = Node::new();
    assert_eq!(server_says(&node, None, &[b"h2"]).await.err().unwrap().code(), "no-certificate");
    let issuer = node.issuer();
    for alpn in [&[][..], &[b"http/1.1".as_slice()]] {
        let refused = server_says(&node, Some(signed(&params(&[A]), Some(&issuer))), alpn).await.err().unwrap();
        assert_eq!(refused.code(), "alpn", "{refused}");
    }
}

#[tokio::test]
async fn plaintext_on_the_tunnels_port_is_told_apart() {
    let node = Node::new();
    let (mut client, server) = tcp_pair().await;
    client.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    assert_eq!(node.tls.accept_hbone(server, &id("b")).await.err().unwrap().code(), "not-tls");
}

#[tokio::test]
async fn clients_that_stall_their_handshake_are_bounded_in_time_and_number() {
    let admission = AdmissionSettings { per_peer: 2, per_pod: 10, total: 10 };
    let settings = TlsSettings { handshake: Duration::from_millis(200), admission };
    let node = Node::with(Arc::new(tempfile::tempdir().unwrap()), IdentitySettings::default(), settings);
    let mut stalled = Vec::new();
    let mut clients = Vec::new();
    for _ in 0..2 {
        let (client, server) = tcp_pair().await;
        clients.push(client);
        let tls = node.tls.clone();
        stalled.push(tokio::spawn(async move { tls.accept_hbone(server, &id("b")).await.err().unwrap() }));
    }
    tokio::task::yield_now().await;
    let (_third, server) = tcp_pair().await;
    assert_eq!(node.tls.accept_hbone(server, &id("b")).await.err().unwrap().code(), "limit");
    for handshake in stalled {
        assert_eq!(handshake.await.unwrap().code(), "timeout");
    }
    node.pair().await;
}

#[tokio::test]
async fn two_of_ours_agree_on_a_post_quantum_key_exchange_and_know_each_other() {
    let node = Node::new();
    let (client, server) = node.pair().await;
    assert_eq!((&client.peer.identity, &server.peer.identity), (&id("b"), &id("a")));
    assert_eq!((client.peer.key_exchange, server.peer.key_exchange), ("X25519MLKEM768", "X25519MLKEM768"));
    assert!(client.peer.is_current(SystemTime::now()));
    assert!(!client.peer.is_current(client.peer.not_after), "an expired certificate counts as current");
}

#[tokio::test]
async fn configurations_are_kept_until_a_certificate_or_the_bundle_changes() {
    let node = Node::new();
    let first = node.tls.configs(&id("a")).await.unwrap();
    let second = node.tls.configs(&id("a")).await.unwrap();
    assert!(Arc::ptr_eq(&first.server, &second.server) && Arc::ptr_eq(&first.client, &second.client));
    let (client, _server) = node.pair().await;
    let another = Node::new();
    let both = [&node, &another].map(|node| std::fs::read_to_string(node.dir.path().join("ca.crt")).unwrap()).concat();
    std::fs::write(node.dir.path().join("ca.crt"), both).unwrap();
    node.ca.reload().unwrap();
    assert!(!client.peer.is_current(SystemTime::now()), "a session under the old bundle takes new flows");
    let third = node.tls.configs(&id("a")).await.unwrap();
    assert!(!Arc::ptr_eq(&first.server, &third.server));
    // Signed by the second anchor, and believed.
    let issuer = another.issuer();
    server_says(&node, Some(signed(&params(&[A]), Some(&issuer))), &[b"h2"]).await.unwrap();
}

#[tokio::test]
async fn the_fast_tunnel_is_chosen_where_both_speak_it_and_hbone_with_anybody_else() {
    let node = Node::new();
    let (a, b) = (id("a"), id("b"));
    for (client_offers, server_offers, fast) in [
        (Offer::Both, Offer::Both, true),
        (Offer::Both, Offer::Hbone, false),
        (Offer::Hbone, Offer::Both, false),
        (Offer::Hbone, Offer::Hbone, false),
    ] {
        let (client, server) = tcp_pair().await;
        let (client, server) =
            tokio::join!(node.tls.connect(client, &a, &b, client_offers), node.tls.accept(server, &b, server_offers));
        for side in [client.unwrap(), server.unwrap()] {
            assert_eq!(matches!(side, Spoken::Fast(_)), fast, "{client_offers:?} towards {server_offers:?}");
        }
    }
}

#[tokio::test]
async fn an_hbone_stream_carries_megabytes_both_ways_and_its_end_is_told_from_a_cut() {
    let node = Node::new();
    let (client, server) = node.pair().await;
    let data: Vec<u8> = (0..3_000_000_u32).map(|at| (at % 251) as u8).collect();
    let echo = tokio::spawn(async move {
        let (mut reader, mut writer) = tokio::io::split(server.stream);
        tokio::io::copy(&mut reader, &mut writer).await.unwrap();
        writer.shutdown().await.unwrap();
    });
    let (mut reader, mut writer) = tokio::io::split(client.stream);
    let sent = data.clone();
    let sending = tokio::spawn(async move {
        writer.write_all(&sent).await.unwrap();
        writer.shutdown().await.unwrap();
        writer
    });
    let mut got = Vec::new();
    reader.read_to_end(&mut got).await.unwrap();
    assert!(got == data, "{} bytes came back", got.len());
    echo.await.unwrap();
    drop(sending.await.unwrap());

    let (mut client, server) = node.pair().await;
    drop(server);
    let cut = client.stream.read(&mut [0]).await.unwrap_err();
    assert_eq!(cut.kind(), std::io::ErrorKind::UnexpectedEof);
}
