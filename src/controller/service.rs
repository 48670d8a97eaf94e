//! The CA's gRPC: `istio.v1.auth.IstioCertificateService/CreateCertificate`.

use std::convert::Infallible;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime};

use futures_util::future::BoxFuture;
use http::{Request, Response};
use metrics::{counter, histogram};
use rustls::pki_types::CertificateSigningRequestDer;
use rustls::pki_types::pem::PemObject;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::server::{Grpc, NamedService, UnaryService};
use tonic::{Code, Status};
use tonic_prost::ProstCodec;
use tracing::{info, warn};

use super::authorization::{AgentRules, Bearer, Refusal, Role};
use super::metrics::{REQUEST_SECONDS, REQUESTS};
use super::pods::Pods;
use super::root::Root;
use super::tokens::Tokens;
use crate::identity::wire::{CREATE_CERTIFICATE, CertificateRequest, CertificateResponse, SERVICE};
use crate::identity::{CaError, certificates_to_pem};
use crate::mesh::Identity;

/// Signs for agents what their node may hold and for waypoints what they are, and refuses all else.
pub struct CaService {
    pub rules: AgentRules,
    pub tokens: Tokens,
    pub pods: Arc<Pods>,
    pub root: Arc<Root>,
    /// No certificate lives longer.
    pub longest: Duration,
}

/// Why a request was not fulfilled.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("the request is unusable: {0}")]
    Invalid(String),
    #[error("the API server cannot be asked: {0}")]
    ApiServer(#[from] kube::Error),
    #[error("nothing can be signed now: {0}")]
    NotReady(String),
}

impl CaService {
    async fn create(&self, request: tonic::Request<CertificateRequest>) -> Result<CertificateResponse, Failure> {
        let bearer = self.bearer(&request).await?;
        let message = request.into_inner();
        let identity = self.entitled(&bearer, &message).await?;
        let csr = CertificateSigningRequestDer::from_pem_slice(message.csr.as_bytes())
            .map_err(|error| Failure::Invalid(format!("its csr is no PKCS #10 request in PEM: {error:?}")))?;
        let Ok(1..) = u64::try_from(message.validity_duration) else {
            return Err(Failure::Invalid("its validity_duration is no number of seconds above zero".to_owned()));
        };
        let validity = Duration::from_secs(message.validity_duration.unsigned_abs()).min(self.longest);
        let (signer, anchor) = self.root.signer().map_err(Failure::NotReady)?;
        let signed = signer.sign(&csr, &identity, validity, SystemTime::now()).map_err(|error| match error {
            CaError::Refused { cause, .. } => Failure::Invalid(format!("its csr: {cause}")),
            other => Failure::NotReady(other.to_string()),
        })?;
        info!(%identity, node = %bearer.node, "Signed a certificate.");
        // As the field's CAs answer: the root at the end, whether or not the client has use for it.
        let chain = signed.chain.iter().chain(&anchor);
        let cert_chain = chain.map(|der| certificates_to_pem(std::slice::from_ref(der))).collect();
        Ok(CertificateResponse { cert_chain })
    }

    /// Who asks: an agent's pod on its node, or a waypoint's.
    async fn bearer(&self, request: &tonic::Request<CertificateRequest>) -> Result<Bearer, Failure> {
        let header = request.metadata().get("authorization").and_then(|value| value.to_str().ok());
        let token = header.and_then(|header| header.strip_prefix("Bearer ")).map(str::trim);
        let token = token.filter(|token| !token.is_empty()).ok_or(Refusal::NoToken)?;
        let bearer = self.rules.bearer(&self.tokens.review(token).await?)?;
        let known = self.pods.get(&bearer.namespace, &bearer.pod);
        match self.rules.check_bearer(&bearer, known.as_ref()) {
            Err(refusal) if refusal.may_be_news() => {
                let asked = self.pods.ask(&bearer.namespace, &bearer.pod).await?;
                self.rules.check_bearer(&bearer, asked.as_ref())?;
            }
            checked => checked?,
        }
        Ok(bearer)
    }

    /// The identity asked for, if a pod on the bearer's node runs as it, or the waypoint that asks is it.
    async fn entitled(&self, bearer: &Bearer, message: &CertificateRequest) -> Result<Identity, Failure> {
        let identity = self.rules.identity(message.impersonated())?;
        if bearer.role == Role::Waypoint {
            self.rules.check_own(bearer, &identity)?;
            return Ok(identity);
        }
        let known = self.pods.find(|pods| self.rules.check_identity(bearer, &identity, pods));
        if let Err(refusal) = known {
            if !refusal.may_be_news() {
                return Err(refusal.into());
            }
            // A pod may be younger than what the watch has told: it need not wait for it.
            let asked = self.pods.ask_on_node(&identity.namespace, &bearer.node).await?;
            self.rules.check_identity(bearer, &identity, &asked)?;
        }
        Ok(identity)
    }
}

impl Failure {
    fn status(&self) -> Status {
        let code = match self {
            Self::Refused(Refusal::NoToken | Refusal::BadToken(_)) => Code::Unauthenticated,
            Self::Refused(Refusal::NoIdentity | Refusal::BadIdentity(_)) | Self::Invalid(_) => Code::InvalidArgument,
            Self::Refused(_) => Code::PermissionDenied,
            Self::ApiServer(_) | Self::NotReady(_) => Code::Unavailable,
        };
        Status::new(code, self.to_string())
    }

    fn outcome(&self) -> &'static str {
        match self {
            Self::Refused(Refusal::NoToken | Refusal::BadToken(_)) => "unauthenticated",
            Self::Refused(Refusal::NoIdentity | Refusal::BadIdentity(_)) | Self::Invalid(_) => "invalid",
            Self::Refused(_) => "denied",
            Self::ApiServer(_) | Self::NotReady(_) => "unavailable",
        }
    }
}

/// The service as tonic's server takes it.
#[derive(Clone)]
pub struct CaServer(pub Arc<CaService>);

impl NamedService for CaServer {
    const NAME: &'static str = SERVICE;
}

impl Service<Request<Body>> for CaServer {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let service = self.clone();
        Box::pin(async move {
            if request.uri().path() != CREATE_CERTIFICATE {
                return Ok(Status::unimplemented("there is CreateCertificate, and no other method").into_http());
            }
            let codec = ProstCodec::<CertificateResponse, CertificateRequest>::default();
            let mut grpc = Grpc::new(codec).max_decoding_message_size(MOST_REQUEST_BYTES);
            Ok(grpc.unary(service, request).await)
        })
    }
}

impl UnaryService<CertificateRequest> for CaServer {
    type Response = CertificateResponse;
    type Future = BoxFuture<'static, Result<tonic::Response<CertificateResponse>, Status>>;

    fn call(&mut self, request: tonic::Request<CertificateRequest>) -> Self::Future {
        let service = self.0.clone();
        Box::pin(async move {
            let began = Instant::now();
            let asked =
                request.get_ref().impersonated().unwrap_or_default().chars().take(MOST_SHOWN).collect::<String>();
            let answer = service.create(request).await;
            let outcome = answer.as_ref().map_or_else(Failure::outcome, |_| "signed");
            counter!(REQUESTS, "outcome" => outcome).increment(1);
            histogram!(REQUEST_SECONDS).record(began.elapsed());
            answer.map(tonic::Response::new).map_err(|failure| {
                warn!(identity = asked, outcome, "No certificate was signed: {failure}.");
                failure.status()
            })
        })
    }
}

/// A request is a kilobyte.
const MOST_REQUEST_BYTES: usize = 64 * 1024;
/// Of what a stranger writes into our log.
const MOST_SHOWN: usize = 400;
