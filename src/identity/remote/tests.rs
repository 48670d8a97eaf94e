use std::convert::Infallible;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::SystemTime;

use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::ServerConfig;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tonic::body::Body;
use tonic::server::{NamedService, UnaryService};

use super::*;
use crate::identity::certificate::PendingKey;
use crate::identity::wire::SERVICE;
use crate::identity::{NewRoot, Signer, TrustKeeper, certificates_to_pem};
use crate::mesh::TrustDomain;

/// What the CA at the other end does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Manner {
    Signs,
    Refuses,
    KnowsNoToken,
    IsSilent,
}

/// A CA of the field's protocol, with a root of its own.
#[derive(Clone)]
struct FieldCa {
    signer: Arc<Signer>,
    root: String,
    manner: Arc<Mutex<Manner>>,
    asked: Arc<AtomicUsize>,
}

impl FieldCa {
    fn new() -> Self {
        let domain: TrustDomain = "cluster.local".parse().unwrap();
        let root = NewRoot::make(&domain, SystemTime::now()).unwrap();
        let key = KeyPair::from_pem(&root.key).unwrap();
        let anchors = certificates_from_pem(root.certificate.as_bytes()).unwrap();
        let signer = Arc::new(Signer::new(&anchors, key).unwrap());
        Self { signer, root: root.certificate, manner: Arc::new(Mutex::new(Manner::Signs)), asked: Arc::default() }
    }

    fn behave(&self, manner: Manner) {
        *self.manner.lock().unwrap() = manner;
    }

    /// Serves on a port of its own, under a certificate for `localhost`.
    async fn serve(&self) -> u16 {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let names = ["localhost".to_owned()];
        let signed = self.signer.sign_server(&names, &key, Duration::from_secs(60), SystemTime::now()).unwrap();
        let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(signed.chain, PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())))
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let incoming = futures_util::stream::unfold((listener, acceptor), |(listener, acceptor)| async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                if let Ok(shaken) = acceptor.accept(stream).await {
                    return Some((Ok::<_, std::io::Error>(shaken), (listener, acceptor)));
                }
            }
        });
        let server = tonic::transport::Server::builder().add_service(self.clone());
        tokio::spawn(async move { server.serve_with_incoming(incoming).await.unwrap() });
        port
    }

    fn answer(&self, request: &Request<CertificateRequest>) -> Result<CertificateResponse, Status> {
        assert_eq!(request.metadata().get("authorization").unwrap(), "Bearer a-token");
        let identity = request.get_ref().impersonated().unwrap().parse().unwrap();
        let csr = rustls::pki_types::pem::PemObject::from_pem_slice(request.get_ref().csr.as_bytes()).unwrap();
        let validity = Duration::from_secs(request.get_ref().validity_duration.try_into().unwrap());
        let signed = self.signer.sign(&csr, &identity, validity, SystemTime::now()).unwrap();
        // As istiod answers: the root last.
        Ok(CertificateResponse { cert_chain: vec![certificates_to_pem(&signed.chain), self.root.clone()] })
    }
}

impl NamedService for FieldCa {
    const NAME: &'static str = SERVICE;
}

impl Service<http::Request<Body>> for FieldCa {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        assert_eq!(request.uri().path(), CREATE_CERTIFICATE);
        let this = self.clone();
        Box::pin(async move {
            let codec = ProstCodec::<CertificateResponse, CertificateRequest>::default();
            Ok(tonic::server::Grpc::new(codec).unary(this, request).await)
        })
    }
}

impl UnaryService<CertificateRequest> for FieldCa {
    type Response = CertificateResponse;
    type Future = BoxFuture<'static, Result<tonic::Response<CertificateResponse>, Status>>;

    fn call(&mut self, request: Request<CertificateRequest>) -> Self::Future {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let this = self.clone();
        Box::pin(async move {
            let manner = *this.manner.lock().unwrap();
            match manner {
                Manner::Signs => this.answer(&request).map(tonic::Response::new),
                Manner::Refuses => Err(Status::permission_denied("no live pod runs as that")),
                Manner::KnowsNoToken => Err(Status::unauthenticated("it has expired")),
                Manner::IsSilent => std::future::pending().await,
            }
        })
    }
}

fn cart() -> Identity {
    "spiffe://cluster.local/ns/shop/sa/cart".parse().unwrap()
}

/// An agent's side: the CA's root in a trust bundle, and a token.
struct Agent {
    ca: Arc<RemoteCa>,
    keeper: TrustKeeper,
    dir: tempfile::TempDir,
}

fn agent(port: u16) -> Agent {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("token"), "a-token\n").unwrap();
    let keeper = TrustKeeper::new();
    let address = format!("https://localhost:{port}").parse().unwrap();
    Agent { ca: RemoteCa::new(address, dir.path().join("token"), keeper.source()), keeper, dir }
}

impl Agent {
    fn trust(&self, ca: &FieldCa) {
        self.keeper.replace(certificates_from_pem(ca.root.as_bytes()).unwrap(), false).unwrap();
    }

    async fn ask(&self) -> Result<SignedCertificate, CaError> {
        let pending = PendingKey::new(&cart()).unwrap();
        let signed = self.ca.sign(&pending.csr, &cart(), Duration::from_secs(60)).await?;
        let chain = signed.chain.clone();
        pending.complete(&cart(), signed)?;
        Ok(SignedCertificate { chain })
    }
}

#[tokio::test]
async fn a_ca_of_the_fields_protocol_signs_and_its_root_is_left_out() {
    let field = FieldCa::new();
    let agent = agent(field.serve().await);
    agent.trust(&field);
    assert_eq!(agent.ask().await.unwrap().chain.len(), 1);
    assert_eq!(agent.ask().await.unwrap().chain.len(), 1);
}

#[tokio::test]
async fn a_ca_that_no_anchor_vouches_for_is_told_nothing() {
    let field = FieldCa::new();
    let agent = agent(field.serve().await);
    let error = agent.ask().await.err().unwrap();
    assert!(error.may_pass() && error.to_string().contains("no trust bundle yet"), "{error}");
    agent.trust(&FieldCa::new());
    let error = agent.ask().await.err().unwrap();
    assert!(error.may_pass() && error.to_string().contains("TLS"), "{error}");
    assert_eq!(field.asked.load(Ordering::SeqCst), 0);
    agent.trust(&field);
    agent.ask().await.unwrap();
}

#[tokio::test]
async fn a_refusal_is_told_apart_from_what_may_pass() {
    let field = FieldCa::new();
    let agent = agent(field.serve().await);
    agent.trust(&field);
    field.behave(Manner::Refuses);
    let error = agent.ask().await.err().unwrap();
    assert!(!error.may_pass() && error.to_string().contains("no live pod runs as that"), "{error}");
    field.behave(Manner::KnowsNoToken);
    let error = agent.ask().await.err().unwrap();
    assert!(error.may_pass() && error.to_string().contains("it has expired"), "{error}");
    field.behave(Manner::Signs);
    agent.ask().await.unwrap();
}

#[tokio::test]
async fn a_token_that_is_not_there_is_named_and_read_again() {
    let field = FieldCa::new();
    let agent = agent(field.serve().await);
    agent.trust(&field);
    let token = agent.dir.path().join("token");
    std::fs::remove_file(&token).unwrap();
    let error = agent.ask().await.err().unwrap();
    assert!(error.may_pass() && error.to_string().contains("--ca-token"), "{error}");
    std::fs::write(&token, "a-token").unwrap();
    agent.ask().await.unwrap();
}

#[tokio::test]
async fn a_ca_that_is_away_or_silent_is_asked_again_on_a_new_connection() {
    let field = FieldCa::new();
    let agent = agent(field.serve().await);
    agent.trust(&field);
    field.behave(Manner::IsSilent);
    let asked = tokio::time::timeout(Duration::from_secs(60), agent.ask()).await.unwrap();
    let error = asked.err().unwrap();
    assert!(error.may_pass(), "{error}");
    field.behave(Manner::Signs);
    agent.ask().await.unwrap();
}

#[test]
fn an_address_says_https_a_host_and_a_port() {
    let address: CaAddress = "https://istiod.istio-system.svc:15012".parse().unwrap();
    assert_eq!(address.to_string(), "https://istiod.istio-system.svc:15012");
    assert_eq!("https://[::1]:1".parse::<CaAddress>().unwrap().to_string(), "https://[::1]:1");
    assert_eq!("https://a/".parse::<CaAddress>().unwrap().to_string(), "https://a:443");
    for text in ["", "a:1", "http://a:1", "https://", "https://a/b", "https://a?b", "ftp://a", "https://a b"] {
        assert!(text.parse::<CaAddress>().is_err(), "{text}");
    }
}
