use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::BoxFuture;
use http::Uri;
use http::uri::PathAndQuery;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::client::Grpc;
use tonic::codegen::Service;
use tonic::metadata::AsciiMetadataValue;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};
use tonic_prost::ProstCodec;

use super::trust::certificates_from_pem;
use super::wire::{CREATE_CERTIFICATE, CertificateRequest, CertificateResponse};
use super::{CaError, CertificateAuthority, Csr, SignedCertificate, TrustBundle, TrustSource, is_root};
use crate::mesh::Identity;

/// A CA that speaks the field's protocol: `selvedge controller`, istiod, istio-csr.
///
/// The token is read anew for each request, for the kubelet replaces it. One connection serves all requests; it is made
/// anew after a failure, so that another replica answers, and when the trust bundle changes.
pub struct RemoteCa {
    address: CaAddress,
    token: PathBuf,
    /// What the CA's own server certificate must lead to.
    trust: TrustSource,
    channel: Mutex<Option<Held>>,
}

/// `https://selvedge-controller.selvedge-system.svc:15012`
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CaAddress {
    host: String,
    port: u16,
    name: ServerName<'static>,
}

struct Held {
    /// Of the trust bundle under which it was made.
    generation: u64,
    channel: Channel,
}

impl RemoteCa {
    pub fn new(address: CaAddress, token: PathBuf, trust: TrustSource) -> Arc<Self> {
        Arc::new(Self { address, token, trust, channel: Mutex::default() })
    }

    async fn ask(&self, csr: &Csr, identity: &Identity, validity: Duration) -> Result<SignedCertificate, CaError> {
        let token = self.token().await?;
        let channel = self.channel()?;
        let seconds = i64::try_from(validity.as_secs()).unwrap_or(i64::MAX);
        let message = CertificateRequest::impersonating(csr.pem.clone(), seconds, &identity.to_string());
        let mut request = Request::new(message);
        request.metadata_mut().insert("authorization", token);
        request.set_timeout(ANSWER);
        let call = async {
            let mut client = Grpc::new(channel).max_decoding_message_size(MOST_ANSWER_BYTES);
            client.ready().await.map_err(|error| Status::unavailable(story(&error)))?;
            let codec = ProstCodec::<CertificateRequest, CertificateResponse>::default();
            client.unary(request, PathAndQuery::from_static(CREATE_CERTIFICATE), codec).await
        };
        let answer = tokio::time::timeout(ANSWER, call).await;
        let answer = answer.unwrap_or_else(|_| Err(Status::deadline_exceeded("it did not answer in time")));
        let response = answer.map_err(|status| {
            let error = self.error_of(&status, identity);
            if error.may_pass() {
                // The next request finds another replica, where there is one.
                self.held().take();
            }
            error
        })?;
        chain_of(&response.into_inner())
    }

    async fn token(&self) -> Result<AsciiMetadataValue, CaError> {
        let wrong = |cause: String, cure| CaError::File { file: self.token.display().to_string(), cause, cure };
        let token = tokio::fs::read_to_string(&self.token).await.map_err(|error| {
            wrong(error.to_string(), "Mount a projected service account token there, or name another by --ca-token")
        })?;
        format!("Bearer {}", token.trim())
            .parse()
            .map_err(|_| wrong("it holds no token".to_owned(), "It must be the text of one service account token"))
    }

    fn channel(&self) -> Result<Channel, CaError> {
        let trust = self.trust.borrow().clone();
        if trust.certificates().is_empty() {
            return Err(CaError::Unavailable("there is no trust bundle yet, so no CA can be trusted".into()));
        }
        let mut held = self.held();
        if let Some(held) = &*held
            && held.generation == trust.generation
        {
            return Ok(held.channel.clone());
        }
        let channel = self.address.channel(&trust)?;
        *held = Some(Held { generation: trust.generation, channel: channel.clone() });
        Ok(channel)
    }

    /// What may pass is told apart from what a repetition would not change.
    fn error_of(&self, status: &Status, identity: &Identity) -> CaError {
        let told = match status.message() {
            "" => status.code().description().to_owned(),
            message => message.to_owned(),
        };
        let told = match std::error::Error::source(status) {
            Some(source) if status.code() != Code::PermissionDenied => format!("{told}: {}", story(source)),
            _ => told,
        };
        match status.code() {
            Code::PermissionDenied | Code::InvalidArgument | Code::FailedPrecondition | Code::OutOfRange => {
                CaError::Refused { identity: identity.clone(), cause: told.into() }
            }
            Code::Unauthenticated => {
                CaError::Unavailable(format!("{}: it does not accept this agent's token: {told}", self.address).into())
            }
            _ => CaError::Unavailable(format!("{}: {told}", self.address).into()),
        }
    }

    fn held(&self) -> std::sync::MutexGuard<'_, Option<Held>> {
        self.channel.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl CertificateAuthority for RemoteCa {
    fn sign<'a>(
        &'a self,
        csr: &'a Csr,
        identity: &'a Identity,
        validity: Duration,
    ) -> BoxFuture<'a, Result<SignedCertificate, CaError>> {
        Box::pin(self.ask(csr, identity, validity))
    }
}

impl CaAddress {
    /// The Service of the controller.
    ///
    /// # Errors
    /// A namespace that is no name.
    pub fn of_controller(namespace: &str) -> Result<Self, String> {
        format!("https://selvedge-controller.{namespace}.svc:15012").parse()
    }

    /// The connection, made when it is first used.
    fn channel(&self, trust: &TrustBundle) -> Result<Channel, CaError> {
        let unusable = |error: &dyn std::error::Error| CaError::Unusable(format!("{self}: {error}").into());
        let mut config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| unusable(&error))?
            .with_root_certificates(trust.roots.clone())
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let connector = Connector { address: self.clone(), tls: TlsConnector::from(Arc::new(config)) };
        // TLS is the connector's affair, so that its certificates are ours to choose.
        let authority = format!("http://{}:{}", bracketed(&self.host), self.port);
        let endpoint = Endpoint::from_shared(authority).map_err(|error| unusable(&error))?;
        Ok(endpoint
            .connect_timeout(CONNECT)
            .http2_keep_alive_interval(PING)
            .keep_alive_timeout(PING)
            .connect_with_connector_lazy(connector))
    }

    async fn connect(&self, tls: &TlsConnector) -> Result<TlsStream<TcpStream>, String> {
        let found = tokio::net::lookup_host((self.host.as_str(), self.port)).await;
        let found = found.map_err(|error| format!("the name {} does not resolve: {error}", self.host))?;
        let mut last = format!("the name {} has no address", self.host);
        for address in found {
            match tokio::time::timeout(CONNECT, TcpStream::connect(address)).await {
                Ok(Ok(stream)) => {
                    let _ = stream.set_nodelay(true);
                    let shaken = tls.connect(self.name.clone(), stream).await;
                    return shaken.map_err(|error| format!("TLS with {address}: {error}"));
                }
                Ok(Err(error)) => last = format!("{address}: {error}"),
                Err(_) => last = format!("{address}: no answer in {CONNECT:?}"),
            }
        }
        Err(last)
    }
}

impl std::str::FromStr for CaAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refused = || format!("{text:?} is no address of a CA; write one such as https://ca.example:15012");
        let uri: Uri = text.parse().map_err(|_| refused())?;
        let bare = uri.path_and_query().is_none_or(|path| path.as_str() == "/");
        let (Some("https"), Some(host), true) = (uri.scheme_str(), uri.host(), bare) else { return Err(refused()) };
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let name = ServerName::try_from(host.clone()).map_err(|_| refused())?;
        Ok(Self { host, port: uri.port_u16().unwrap_or(443), name })
    }
}

impl std::fmt::Display for CaAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "https://{}:{}", bracketed(&self.host), self.port)
    }
}

/// Opens the connection of a channel.
#[derive(Clone)]
struct Connector {
    address: CaAddress,
    tls: TlsConnector,
}

impl Service<Uri> for Connector {
    type Response = TokioIo<TlsStream<TcpStream>>;
    type Error = std::io::Error;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let this = self.clone();
        Box::pin(async move { this.address.connect(&this.tls).await.map(TokioIo::new).map_err(std::io::Error::other) })
    }
}

/// What the CA signed, without the root: a peer has it, or would not believe it.
fn chain_of(response: &CertificateResponse) -> Result<SignedCertificate, CaError> {
    let pem = response.cert_chain.join("\n");
    let mut chain = certificates_from_pem(pem.as_bytes()).map_err(|error| CaError::Unusable(error.into()))?;
    while chain.len() > 1 && chain.last().is_some_and(is_root) {
        chain.pop();
    }
    Ok(SignedCertificate { chain })
}

/// An error with what it came from.
fn story(error: &dyn std::error::Error) -> String {
    let mut told = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_told = cause.to_string();
        if !told.ends_with(&cause_told) {
            told = format!("{told}: {cause_told}");
        }
        next = cause.source();
    }
    told
}

fn bracketed(host: &str) -> String {
    if host.contains(':') { format!("[{host}]") } else { host.to_owned() }
}

const CONNECT: Duration = Duration::from_secs(3);
/// Shorter than the store waits for one request.
const ANSWER: Duration = Duration::from_secs(10);
/// While a request waits: a replica that vanished is noticed.
const PING: Duration = Duration::from_secs(2);
/// Any chain is far smaller.
const MOST_ANSWER_BYTES: usize = 256 * 1024;

#[cfg(test)]
mod tests;
