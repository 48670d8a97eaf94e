//! The CA's own TLS: a server certificate signed by whoever signs, renewed in time, and the connections on it.

use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use futures_util::Stream;
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls::crypto::aws_lc_rs::sign::any_ecdsa_type;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tracing::{debug, warn};

use super::root::Root;
use crate::identity::CaError;

/// The certificate by which agents know the CA.
#[derive(Default)]
pub struct ServerCertificate(RwLock<Option<Arc<CertifiedKey>>>);

impl ServerCertificate {
    /// Makes a new one at a third of its life, and whenever somebody else signs; for as long as it is polled.
    pub async fn keep(&self, root: &Root, names: &[String]) {
        let mut changes = root.subscribe();
        loop {
            changes.borrow_and_update();
            let wait = match self.renew(root, names) {
                Ok(()) => LIFE / 3,
                Err(error) => {
                    debug!(%error, "The CA's server certificate cannot be made yet.");
                    AFTER_FAILURE
                }
            };
            if let Ok(Err(_)) = tokio::time::timeout(wait, changes.changed()).await {
                return;
            }
        }
    }

    fn renew(&self, root: &Root, names: &[String]) -> Result<(), CaError> {
        let unusable = |error: &dyn std::fmt::Display| CaError::Unusable(error.to_string().into());
        let (signer, _) = root.signer().map_err(|error| unusable(&error))?;
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(|error| unusable(&error))?;
        let signed = signer.sign_server(names, &key, LIFE, SystemTime::now())?;
        let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let key = any_ecdsa_type(&der).map_err(|error| unusable(&error))?;
        let held = CertifiedKey::new(signed.chain, key);
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(held));
        Ok(())
    }
}

impl ResolvesServerCert for ServerCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl std::fmt::Debug for ServerCertificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ServerCertificate")
    }
}

/// TLS 1.3 and HTTP/2, and nothing older: agents, ztunnels and istio-agents all speak them.
pub fn acceptor(certificate: Arc<ServerCertificate>) -> Result<TlsAcceptor, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(certificate);
    config.alpn_protocols = vec![b"h2".to_vec()];
    // A session that is resumed would outlive the certificate that it was begun under.
    config.send_tls13_tickets = 0;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Connections whose handshake is done. Who is slow at it keeps nobody else waiting.
pub fn connections(
    listeners: Vec<TcpListener>,
    acceptor: TlsAcceptor,
) -> impl Stream<Item = Result<TlsStream<TcpStream>, std::io::Error>> {
    let (ready, done) = mpsc::channel(64);
    let room = Arc::new(Semaphore::new(MOST_HANDSHAKES));
    for listener in listeners {
        tokio::spawn(accept(listener, acceptor.clone(), ready.clone(), room.clone()));
    }
    futures_util::stream::unfold(done, |mut done| async move { Some((Ok(done.recv().await?), done)) })
}

async fn accept(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    ready: mpsc::Sender<TlsStream<TcpStream>>,
    room: Arc<Semaphore>,
) {
    loop {
        // The semaphore is never closed.
        let Ok(permit) = room.clone().acquire_owned().await else { return };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = ready.closed() => return,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(%error, "A connection to the CA could not be accepted.");
                tokio::time::sleep(AFTER_FAILED_ACCEPT).await;
                continue;
            }
        };
        let (acceptor, ready) = (acceptor.clone(), ready.clone());
        tokio::spawn(async move {
            let _ = stream.set_nodelay(true);
            match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
                Ok(Ok(shaken)) => drop(ready.send(shaken).await),
                Ok(Err(error)) => debug!(%peer, %error, "A TLS handshake with the CA failed."),
                Err(_) => debug!(%peer, "A TLS handshake with the CA took too long."),
            }
            drop(permit);
        });
    }
}

/// Binds the CA's port, on IPv4 and on IPv6 where the machine has it.
pub async fn bind(addresses: &[SocketAddr]) -> Result<Vec<TcpListener>, String> {
    let mut listeners = Vec::new();
    for address in addresses {
        match crate::admin::listen_soon(*address).await {
            Ok(listener) => listeners.push(listener),
            Err(error) if !listeners.is_empty() && crate::admin::lacks_ipv6(*address, &error) => {
                debug!(%address, %error, "The CA goes without IPv6.");
            }
            Err(error) => {
                return Err(format!("the CA cannot listen on {address}: {error}; free the port, or give another"));
            }
        }
    }
    Ok(listeners)
}

const LIFE: Duration = Duration::from_secs(24 * 3600);
const HANDSHAKE: Duration = Duration::from_secs(10);
const MOST_HANDSHAKES: usize = 256;
const AFTER_FAILURE: Duration = Duration::from_secs(1);
const AFTER_FAILED_ACCEPT: Duration = Duration::from_millis(100);
