//! Peers of the tunnel written by hand: they offer what they like, and see every frame's meaning.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use h2::client::SendRequest;
use http::Request;
use http::header::HeaderMap;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair, SanType, SerialNumber,
};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, SupportedKxGroup, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName as Names, Error, RootCertStore, ServerConfig,
    SignatureScheme,
};
use selvedge_lab::Namespace;
use tokio::net::TcpStream;
use tokio::runtime::{Builder, Handle};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

/// Drives the sockets of every raw peer, on a thread of its own.
pub fn runtime() -> &'static Handle {
    static RUNTIME: OnceLock<Handle> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        let runtime = Builder::new_current_thread().enable_all().build();
        let runtime = runtime.unwrap_or_else(|error| panic!("no runtime: {error}"));
        let handle = runtime.handle().clone();
        std::thread::spawn(move || runtime.block_on(std::future::pending::<()>()));
        handle
    })
}

/// Runs a peer's conversation, which must end within bounds.
pub fn converse<T>(conversation: impl Future<Output = Result<T>>) -> Result<T> {
    runtime().block_on(async {
        let ended = tokio::time::timeout(Duration::from_secs(30), conversation).await;
        ended.context("the conversation did not end within 30 s")?
    })
}

/// A CA that signs whatever it is asked to.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pub certificate_pem: String,
    pub key_pem: String,
}

impl Authority {
    /// The one in a folder that agents use.
    pub fn of(folder: &Path) -> Result<Self> {
        let read = |name: &str| std::fs::read_to_string(folder.join(name)).with_context(|| name.to_owned());
        let (certificate_pem, key_pem) = (read("ca.crt")?, read("ca.key")?);
        let issuer = Issuer::from_ca_cert_pem(&certificate_pem, KeyPair::from_pem(&key_pem)?)?;
        Ok(Self { issuer, certificate_pem, key_pem })
    }

    /// A new root.
    pub fn root(name: &str) -> Result<Self> {
        let (key, params) = (KeyPair::generate()?, authority_params(name));
        let (certificate_pem, key_pem) = (params.self_signed(&key)?.pem(), key.serialize_pem());
        Ok(Self { issuer: Issuer::new(params, key), certificate_pem, key_pem })
    }

    /// A new CA below this one.
    pub fn intermediate(&self, name: &str, change: impl FnOnce(&mut CertificateParams)) -> Result<Self> {
        let (key, mut params) = (KeyPair::generate()?, authority_params(name));
        change(&mut params);
        let (certificate_pem, key_pem) = (params.signed_by(&key, &self.issuer)?.pem(), key.serialize_pem());
        Ok(Self { issuer: Issuer::new(params, key), certificate_pem, key_pem })
    }

    /// Puts the CA into a folder for agents, with more anchors if there are any.
    pub fn place(&self, folder: &Path, more_anchors: &[&str]) -> Result<()> {
        use std::os::unix::fs::PermissionsExt;
        std::fs::create_dir_all(folder)?;
        let put = |name: &str, text: &str, mode| -> Result<()> {
            let draft = folder.join(format!("{name}.draft"));
            std::fs::write(&draft, text)?;
            std::fs::set_permissions(&draft, std::fs::Permissions::from_mode(mode))?;
            Ok(std::fs::rename(draft, folder.join(name))?)
        };
        put("ca.key", &self.key_pem, 0o600)?;
        put("ca.crt", &[&[self.certificate_pem.as_str()], more_anchors].concat().concat(), 0o644)
    }

    pub fn sign(&self, params: &CertificateParams) -> Result<Credential> {
        let key = KeyPair::generate()?;
        Ok(Credential::new(params.signed_by(&key, &self.issuer)?.der(), &key))
    }
}

fn authority_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params
}

/// What a leaf for these URIs says, unless it is changed: everything right.
pub fn leaf(uris: &[&str]) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    let uri = |uri: &&str| SanType::URI((*uri).try_into().unwrap_or_else(|error| panic!("{uri}: {error}")));
    params.subject_alt_names = uris.iter().map(uri).collect();
    params.is_ca = IsCa::ExplicitNoCa;
    params.serial_number = Some(SerialNumber::from(1));
    params
}

/// A certificate and its key.
#[derive(Debug)]
pub struct Credential {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl Credential {
    pub fn self_signed(params: &CertificateParams) -> Result<Self> {
        let key = KeyPair::generate()?;
        Ok(Self::new(params.self_signed(&key)?.der(), &key))
    }

    fn new(leaf: &CertificateDer<'static>, key: &KeyPair) -> Self {
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        Self { chain: vec![leaf.clone()], key }
    }

    /// For `spiffe://cluster.local/ns/NAMESPACE/sa/ACCOUNT`, by the CA of a folder.
    pub fn of(folder: &Path, account: &str) -> Result<Self> {
        let (namespace, account) = account.split_once('/').context("namespace/account")?;
        Authority::of(folder)?.sign(&leaf(&[&format!("spiffe://cluster.local/ns/{namespace}/sa/{account}")]))
    }
}

/// How a raw peer presents itself.
pub struct Offer {
    pub credential: Option<Credential>,
    pub alpn: &'static [&'static [u8]],
    pub groups: Vec<&'static dyn SupportedKxGroup>,
}

impl Offer {
    pub fn new(credential: Credential) -> Self {
        Self { credential: Some(credential), alpn: &[b"h2"], groups: aws_lc_rs::default_provider().kx_groups }
    }

    fn provider(&self) -> Arc<CryptoProvider> {
        Arc::new(CryptoProvider { kx_groups: self.groups.clone(), ..aws_lc_rs::default_provider() })
    }

    fn connector(self) -> Result<TlsConnector> {
        let builder = ClientConfig::builder_with_provider(self.provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(BelievesAnybody));
        let mut config = match self.credential {
            Some(Credential { chain, key }) => builder.with_client_auth_cert(chain, key)?,
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = self.alpn.iter().map(|name| name.to_vec()).collect();
        Ok(TlsConnector::from(Arc::new(config)))
    }

    /// A server's side, which asks clients for a certificate by the CA of a folder.
    pub fn acceptor(self, ca: &Path) -> Result<TlsAcceptor> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(&std::fs::read(ca.join("ca.crt"))?)?)?;
        let provider = self.provider();
        let clients = rustls::server::WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone());
        let Credential { chain, key } = self.credential.context("a server needs a certificate")?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(clients.build()?)
            .with_single_cert(chain, key)?;
        config.alpn_protocols = self.alpn.iter().map(|name| name.to_vec()).collect();
        Ok(TlsAcceptor::from(Arc::new(config)))
    }
}

pub type ClientTls = client::TlsStream<TcpStream>;
pub type ServerTls = server::TlsStream<TcpStream>;

/// Connects to a tunnel's port from a namespace and goes through the handshake.
pub async fn dial(from: &Namespace, to: SocketAddr, offer: Offer) -> Result<ClientTls> {
    let tcp = tcp(from, to)?;
    Ok(offer.connector()?.connect(ServerName::IpAddress(to.ip().into()), tcp).await?)
}

pub fn tcp(from: &Namespace, to: SocketAddr) -> Result<TcpStream> {
    let tcp = from.connect(to).with_context(|| format!("connect to {to}"))?;
    tcp.set_nonblocking(true)?;
    let _inside = runtime().enter();
    Ok(TcpStream::from_std(tcp)?)
}

/// Speaks HTTP/2 on a session; the connection is driven until it ends.
pub async fn speak_h2(tls: ClientTls) -> Result<SendRequest<Bytes>> {
    let (send, connection) = h2::client::handshake(tls).await?;
    runtime().spawn(async move {
        // How it ended is seen by its streams.
        let _ = connection.await;
    });
    Ok(send)
}

/// A CONNECT with headers of choice: the answer's status and headers, and the stream.
pub async fn ask(
    send: &mut SendRequest<Bytes>,
    authority: &str,
    headers: &[(&'static str, &str)],
) -> Result<(u16, HeaderMap, h2::SendStream<Bytes>, h2::RecvStream)> {
    let mut request = Request::builder().method("CONNECT").uri(authority);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    std::future::poll_fn(|cx| send.poll_ready(cx)).await?;
    let (answer, stream) = send.send_request(request.body(())?, false)?;
    let (head, body) = answer.await?.into_parts();
    Ok((head.status.as_u16(), head.headers, stream, body))
}

/// Sends bytes and reads as many back: an echo is at the other end.
pub async fn echoed(stream: &mut h2::SendStream<Bytes>, body: &mut h2::RecvStream, text: &[u8]) -> Result<()> {
    stream.send_data(Bytes::copy_from_slice(text), false)?;
    let mut got = Vec::new();
    while got.len() < text.len() {
        let data = body.data().await.context("the stream ended")??;
        body.flow_control().release_capacity(data.len())?;
        got.extend_from_slice(&data);
    }
    ensure!(got == text, "sent {text:?}, got {got:?}");
    Ok(())
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
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        aws_lc_rs::default_provider().signature_verification_algorithms.supported_schemes()
    }

    fn root_hint_subjects(&self) -> Option<&[Names]> {
        None
    }
}
