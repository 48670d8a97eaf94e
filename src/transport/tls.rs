//! Mutual TLS 1.3 between two workloads, on behalf of both.

mod engine;
mod stream;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use metrics::{counter, histogram};
use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{self, cipher_suite, kx_group};
use rustls::pki_types::{IpAddr, ServerName};
use rustls::server::NoServerSessionStorage;
use rustls::sign::SingleCertAndKey;
use rustls::{
    AlertDescription, CertificateError as RustlsCertificateError, ClientConfig, CommonState, NamedGroup, OtherError,
    ServerConfig,
};
use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;
use x509_parser::prelude::{FromDer, X509Certificate};

pub(super) use self::engine::{Keys, Rekey};
pub use self::stream::TlsStream;

use self::engine::Engine;
use super::fast::Link;
use super::metrics::{HANDSHAKE_SECONDS, HANDSHAKES};
use super::{Admission, AdmissionSettings, Permit};
use crate::identity::verify::{ClientVerifier, ServerVerifier, identity_of};
use crate::identity::{CertificateError, Identities, Refusal, TrustBundle, WorkloadCertificate};
use crate::mesh::Identity;

/// Makes sessions, both ways. Cheap to clone; the clones share their configurations.
#[derive(Clone)]
pub struct Tls {
    identities: Arc<Identities>,
    provider: Arc<CryptoProvider>,
    admission: Admission,
    handshake: Duration,
    configs: Arc<Mutex<HashMap<Identity, Configs>>>,
}

#[derive(Clone, Copy, Debug)]
pub struct TlsSettings {
    /// From the TCP connection to the end of the handshake.
    pub handshake: Duration,
    pub admission: AdmissionSettings,
}

impl Default for TlsSettings {
    fn default() -> Self {
        Self { handshake: Duration::from_secs(10), admission: AdmissionSettings::default() }
    }
}

/// What the two sides of a handshake agreed to speak.
pub enum Spoken {
    Hbone(Session),
    Fast(Session<Link>),
}

/// Which protocols one side offers, or takes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Offer {
    /// The fast tunnel where the peer speaks it, else HBONE.
    Both,
    Hbone,
}

/// One TLS connection whose peer is proven.
pub struct Session<S = TlsStream> {
    pub stream: S,
    pub peer: PeerInfo,
    /// Held until the first request has come.
    pub(super) permit: Option<Permit>,
}

/// Who is on the other side, and what that rests on.
#[derive(Clone, Debug)]
pub struct PeerInfo {
    pub identity: Identity,
    /// The name of the group that agreed the keys: `X25519MLKEM768`, `X25519` or `secp256r1`.
    pub key_exchange: &'static str,
    /// When the first of both certificates ends.
    pub not_after: SystemTime,
    own: Arc<WorkloadCertificate>,
    trust: Arc<TrustBundle>,
}

impl PeerInfo {
    /// The own certificate's serial number and the trust bundle's generation.
    pub fn generation(&self) -> (&str, u64) {
        (&self.own.serial, self.trust.generation)
    }

    /// Whether the connection may still take new flows: no certificate expired or was replaced, and the bundle stands.
    pub fn is_current(&self, now: SystemTime) -> bool {
        !self.own.is_superseded() && self.is_trusted(now)
    }

    /// As [`PeerInfo::is_current`], though the own certificate may have been renewed.
    pub fn is_trusted(&self, now: SystemTime) -> bool {
        now < self.not_after && !self.trust.is_superseded()
    }

    /// Completes once it is trusted no more, or soon behind that.
    pub async fn outlived(&self) {
        loop {
            let now = SystemTime::now();
            if !self.is_trusted(now) {
                return;
            }
            // The clock by which certificates end may be set.
            let rest = self.not_after.duration_since(now).unwrap_or_default().min(CHECKING);
            tokio::select! {
                () = self.trust.superseded() => {}
                () = tokio::time::sleep(rest) => {}
            }
        }
    }
}

/// Why there is no session.
#[derive(Clone, Debug, thiserror::Error)]
pub enum TlsError {
    #[error("the peer shows no certificate: every peer of the mesh must have one")]
    NoCertificate,
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("the peer does not speak TLS: plaintext came to the tunnel's port")]
    NotTls,
    #[error("the peer does not agree on h2 or the fast tunnel by ALPN")]
    Alpn,
    #[error("the TLS handshake took longer than {0:?}: maybe a NetworkPolicy is blocking HBONE port 15008")]
    Timeout(Duration),
    #[error("too many handshakes are under way with this peer, with this pod or on this node")]
    Busy,
    #[error("the peer refused the handshake: {0:?}")]
    PeerRefused(AlertDescription),
    #[error("the TLS handshake failed: {0}")]
    Protocol(Arc<str>),
    #[error("the connection ended during the TLS handshake: {0}")]
    Io(Arc<io::Error>),
    #[error(transparent)]
    Own(#[from] CertificateError),
}

impl TlsError {
    /// One word for metrics and logs; bounded in number.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NoCertificate => "no-certificate",
            Self::Refused(refusal) => match refusal {
                Refusal::WrongTrustDomain { .. } => "wrong-trust-domain",
                Refusal::WrongIdentity { .. } => "wrong-identity",
                Refusal::Expired => "expired",
                Refusal::NotYetValid => "not-yet-valid",
                Refusal::UnknownIssuer => "unknown-issuer",
                Refusal::SelfSigned => "self-signed",
                Refusal::NoSpiffeUri => "no-spiffe-uri",
                Refusal::SeveralSpiffeUris(_) => "several-spiffe-uris",
                Refusal::Unsuitable(_) => "unsuitable-certificate",
            },
            Self::NotTls => "not-tls",
            Self::Alpn => "alpn",
            Self::Timeout(_) => "timeout",
            Self::Busy => "limit",
            Self::PeerRefused(_) => "peer-refused",
            Self::Protocol(_) => "protocol",
            Self::Io(_) => "io",
            Self::Own(_) => "own-certificate",
        }
    }

    /// What an I/O error of a TLS stream says underneath.
    pub(super) fn from_io(error: io::Error) -> Self {
        let Some(tls) = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) else {
            return Self::Io(Arc::new(error));
        };
        match tls {
            rustls::Error::NoCertificatesPresented => Self::NoCertificate,
            rustls::Error::InvalidCertificate(RustlsCertificateError::Other(OtherError(other))) => {
                match other.downcast_ref::<Refusal>() {
                    Some(refusal) => Self::Refused(refusal.clone()),
                    None => Self::Protocol(tls.to_string().into()),
                }
            }
            rustls::Error::NoApplicationProtocol => Self::Alpn,
            rustls::Error::AlertReceived(AlertDescription::NoApplicationProtocol) => Self::Alpn,
            rustls::Error::AlertReceived(alert) => Self::PeerRefused(*alert),
            rustls::Error::InvalidMessage(rustls::InvalidMessage::InvalidContentType) => Self::NotTls,
            other => Self::Protocol(other.to_string().into()),
        }
    }
}

impl Tls {
    pub fn new(identities: Arc<Identities>) -> Self {
        Self::with_settings(identities, TlsSettings::default())
    }

    pub fn with_settings(identities: Arc<Identities>, settings: TlsSettings) -> Self {
        Self {
            identities,
            provider: Arc::new(provider()),
            admission: Admission::new(settings.admission),
            handshake: settings.handshake,
            configs: Arc::default(),
        }
    }

    /// The server's side of a connection that came to the pod which runs as `own`.
    ///
    /// # Errors
    /// See [`TlsError`]; the connection is closed then.
    pub async fn accept(&self, tcp: TcpStream, own: &Identity, offer: Offer) -> Result<Spoken, TlsError> {
        self.measured("server", self.accepted(tcp, own, offer)).await
    }

    /// The client's side of a connection made for the pod which runs as `own`, to the workload that must be `wanted`.
    ///
    /// TLS 1.3 ends on the client before the server has judged the client: a refusal comes with the first read.
    ///
    /// # Errors
    /// See [`TlsError`]; the connection is closed then.
    pub async fn connect(
        &self,
        tcp: TcpStream,
        own: &Identity,
        wanted: &Identity,
        offer: Offer,
    ) -> Result<Spoken, TlsError> {
        self.measured("client", self.connected(tcp, own, wanted, offer)).await
    }

    /// As [`Tls::connect`], for HBONE and nothing else.
    ///
    /// # Errors
    /// See [`TlsError`].
    pub async fn connect_hbone(&self, tcp: TcpStream, own: &Identity, wanted: &Identity) -> Result<Session, TlsError> {
        match self.connect(tcp, own, wanted, Offer::Hbone).await? {
            Spoken::Hbone(session) => Ok(session),
            Spoken::Fast(_) => Err(TlsError::Alpn),
        }
    }

    async fn accepted(&self, mut tcp: TcpStream, own: &Identity, offer: Offer) -> Result<Spoken, TlsError> {
        let address = |address: io::Result<SocketAddr>| match address {
            Ok(address) => Ok(address.ip().to_canonical()),
            Err(error) => Err(TlsError::Io(Arc::new(error))),
        };
        let (peer, pod) = (address(tcp.peer_addr())?, address(tcp.local_addr())?);
        let permit = self.admission.enter(peer, pod).ok_or(TlsError::Busy)?;
        let mut first = [0];
        if tcp.peek(&mut first).await.map_err(TlsError::from_io)? == 1 && first[0] != TLS_HANDSHAKE {
            return Err(TlsError::NotTls);
        }
        tune(&tcp);
        let configs = self.configs(own).await?;
        let mut config = configs.server.clone();
        if offer == Offer::Hbone {
            Arc::make_mut(&mut config).alpn_protocols = vec![H2.to_vec()];
        }
        let mut engine = Engine::server(config).map_err(|error| TlsError::from_io(engine::tls_error(error)))?;
        engine.shake_hands(&mut tcp).await.map_err(TlsError::from_io)?;
        spoken(tcp, engine, configs, Some(permit))
    }

    async fn connected(
        &self,
        mut tcp: TcpStream,
        own: &Identity,
        wanted: &Identity,
        offer: Offer,
    ) -> Result<Spoken, TlsError> {
        tune(&tcp);
        let address = tcp.peer_addr().map_err(|error| TlsError::Io(Arc::new(error)))?.ip();
        let configs = self.configs(own).await?;
        let name = ServerName::IpAddress(IpAddr::from(address));
        let engine = Engine::client(self.client_config(&configs, wanted, offer), name);
        let mut engine = engine.map_err(|error| TlsError::from_io(engine::tls_error(error)))?;
        engine.shake_hands(&mut tcp).await.map_err(TlsError::from_io)?;
        spoken(tcp, engine, configs, None)
    }

    async fn measured(
        &self,
        role: &'static str,
        handshake: impl Future<Output = Result<Spoken, TlsError>>,
    ) -> Result<Spoken, TlsError> {
        let start = tokio::time::Instant::now();
        let result = match tokio::time::timeout(self.handshake, handshake).await {
            Ok(result) => result,
            Err(_) => Err(TlsError::Timeout(self.handshake)),
        };
        let (code, key_exchange) = match &result {
            Ok(spoken) => ("ok", spoken.peer().key_exchange),
            Err(error) => (error.code(), "none"),
        };
        counter!(HANDSHAKES, "role" => role, "result" => code, "key_exchange" => key_exchange).increment(1);
        if result.is_ok() {
            histogram!(HANDSHAKE_SECONDS, "role" => role).record(start.elapsed().as_secs_f64());
        }
        result
    }

    /// The configurations under the certificate and bundle of now: made again only when one of them changed.
    async fn configs(&self, own: &Identity) -> Result<Configs, TlsError> {
        let certificate = self.identities.certificate(own).await?;
        let trust = self.identities.trust();
        let mut cached = self.configs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(configs) = cached.get(own)
            && Arc::ptr_eq(&configs.certificate, &certificate)
            && Arc::ptr_eq(&configs.trust, &trust)
        {
            return Ok(configs.clone());
        }
        cached.retain(|_, configs| !configs.certificate.is_superseded());
        let configs = self.build(certificate, trust)?;
        cached.insert(own.clone(), configs.clone());
        Ok(configs)
    }

    /// One configuration for all connections to whom is wanted, as long as there are any: each holds on to its own to its
    /// end.
    fn client_config(&self, configs: &Configs, wanted: &Identity, offer: Offer) -> Arc<ClientConfig> {
        let mut wanting = configs.wanting.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(config) = wanting.get(&(wanted.clone(), offer)).and_then(Weak::upgrade) {
            return config;
        }
        // Everything in it is shared with the others but the verifier, which knows who is wanted.
        let mut config = ClientConfig::clone(&configs.client);
        let algorithms = self.provider.signature_verification_algorithms;
        let verifier = ServerVerifier::new(configs.trust.clone(), wanted.clone(), algorithms);
        config.dangerous().set_certificate_verifier(Arc::new(verifier));
        if offer == Offer::Hbone {
            config.alpn_protocols = vec![H2.to_vec()];
        }
        let config = Arc::new(config);
        wanting.retain(|_, config| config.strong_count() > 0);
        wanting.insert((wanted.clone(), offer), Arc::downgrade(&config));
        config
    }

    fn build(&self, certificate: Arc<WorkloadCertificate>, trust: Arc<TrustBundle>) -> Result<Configs, TlsError> {
        let unusable = |error: String| TlsError::Protocol(error.into());
        let clock = self.identities.clock();
        let resolver = Arc::new(SingleCertAndKey::from(certificate.key.clone()));

        let domain = self.identities.trust_domain().clone();
        let clients =
            ClientVerifier::new(&trust, domain, self.provider.clone()).map_err(|error| unusable(error.to_string()))?;
        let mut server = ServerConfig::builder_with_details(self.provider.clone(), clock.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| unusable(error.to_string()))?
            .with_client_cert_verifier(Arc::new(clients))
            .with_cert_resolver(resolver.clone());
        server.alpn_protocols = vec![FAST.to_vec(), H2.to_vec()];
        // The fast tunnel encrypts in place, by the same library, with keys that rustls hands over.
        server.enable_secret_extraction = true;
        // A resumed session would skip the identity check.
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        server.max_early_data_size = 0;

        // Stands in until the connection names whom it wants; it never verifies anybody.
        let algorithms = self.provider.signature_verification_algorithms;
        let placeholder = ServerVerifier::new(trust.clone(), certificate.identity.clone(), algorithms);
        let mut client = ClientConfig::builder_with_details(self.provider.clone(), clock.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| unusable(error.to_string()))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(placeholder))
            .with_client_cert_resolver(resolver);
        client.alpn_protocols = vec![FAST.to_vec(), H2.to_vec()];
        client.enable_secret_extraction = true;
        client.resumption = Resumption::disabled();
        client.enable_sni = false;
        client.enable_early_data = false;

        let (server, client) = (Arc::new(server), Arc::new(client));
        Ok(Configs { server, client, wanting: Arc::default(), certificate, trust })
    }
}

#[derive(Clone)]
struct Configs {
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
    /// That of the client, for each of those who are wanted.
    wanting: Arc<Mutex<Wanting>>,
    certificate: Arc<WorkloadCertificate>,
    trust: Arc<TrustBundle>,
}

type Wanting = HashMap<(Identity, Offer), Weak<ClientConfig>>;

impl Spoken {
    pub fn peer(&self) -> &PeerInfo {
        match self {
            Self::Hbone(session) => &session.peer,
            Self::Fast(session) => &session.peer,
        }
    }
}

fn spoken(tcp: TcpStream, engine: Engine, configs: Configs, permit: Option<Permit>) -> Result<Spoken, TlsError> {
    let peer = proven(engine.state(), configs)?;
    match engine.state().alpn_protocol() {
        Some(H2) => Ok(Spoken::Hbone(Session { stream: TlsStream::new(tcp, engine), peer, permit })),
        Some(FAST) => {
            let keys = engine.into_keys().map_err(|error| TlsError::from_io(engine::tls_error(error)))?;
            let stream = Link::new(tcp, keys).map_err(|error| TlsError::Protocol(error.to_string().into()))?;
            Ok(Spoken::Fast(Session { stream, peer, permit }))
        }
        _ => Err(TlsError::Alpn),
    }
}

fn proven(state: &CommonState, configs: Configs) -> Result<PeerInfo, TlsError> {
    let leaf = state.peer_certificates().and_then(<[_]>::first).ok_or(TlsError::NoCertificate)?;
    let (_, parsed) = X509Certificate::from_der(leaf).map_err(|error| Refusal::Unsuitable(error.to_string()))?;
    let identity = identity_of(&parsed)?;
    let seconds = u64::try_from(parsed.validity().not_after.timestamp()).unwrap_or(0);
    Ok(PeerInfo {
        identity,
        key_exchange: match state.negotiated_key_exchange_group().map(|group| group.name()) {
            Some(NamedGroup::X25519MLKEM768) => "X25519MLKEM768",
            Some(NamedGroup::X25519) => "X25519",
            Some(NamedGroup::secp256r1) => "secp256r1",
            _ => "other",
        },
        not_after: configs.certificate.not_after.min(UNIX_EPOCH + Duration::from_secs(seconds)),
        own: configs.certificate,
        trust: configs.trust,
    })
}

fn provider() -> CryptoProvider {
    CryptoProvider {
        cipher_suites: vec![cipher_suite::TLS13_AES_128_GCM_SHA256, cipher_suite::TLS13_AES_256_GCM_SHA384],
        kx_groups: vec![kx_group::X25519MLKEM768, kx_group::X25519, kx_group::SECP256R1],
        ..aws_lc_rs::default_provider()
    }
}

/// Small writes go at once, and a peer that vanished is found out. A socket that takes no option works without it.
fn tune(tcp: &TcpStream) {
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE).with_retries(9);
    let socket = SockRef::from(tcp);
    for outcome in [tcp.set_nodelay(true), socket.set_tcp_keepalive(&keepalive)] {
        if let Err(error) = outcome {
            tracing::debug!(%error, "A tunnel's socket refused an option.");
        }
    }
}

const H2: &[u8] = b"h2";
/// See docs/fast-tunnel.md.
const FAST: &[u8] = b"selvedge-fast/1";
/// RFC 8446, section 5.1: the content type of a handshake record.
const TLS_HANDSHAKE: u8 = 22;
const KEEPALIVE: Duration = Duration::from_secs(180);
/// How long it may go unnoticed, by who waits for a certificate's end, that the clock was set beyond it.
const CHECKING: Duration = Duration::from_secs(10);
