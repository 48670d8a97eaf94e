use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer};

use crate::mesh::Identity;

/// Whoever signs: the embedded CA of a folder, or a service that speaks the field's protocol.
pub trait CertificateAuthority: Send + Sync {
    /// A certificate over the request's key for exactly one identity. The CA may shorten the validity.
    fn sign<'a>(
        &'a self,
        csr: &'a Csr,
        identity: &'a Identity,
        validity: Duration,
    ) -> BoxFuture<'a, Result<SignedCertificate, CaError>>;
}

/// A certificate request (PKCS #10): the public key, signed by its private key.
pub struct Csr {
    pub der: CertificateSigningRequestDer<'static>,
    pub pem: String,
}

/// What a CA hands back: leaf first, then what leads from it towards an anchor (the anchor itself may be left out).
pub struct SignedCertificate {
    pub chain: Vec<CertificateDer<'static>>,
}

/// Why no certificate was signed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CaError {
    #[error("{file}: {cause}. {cure}")]
    File { file: String, cause: String, cure: &'static str },
    #[error("the CA cannot be reached: {0}")]
    Unavailable(Arc<str>),
    #[error("the CA refused to sign for {identity}: {cause}")]
    Refused { identity: Identity, cause: Arc<str> },
    #[error(
        "the CA's own certificate has expired: replace ca.crt and ca.key, keeping the old anchor until all peers trust the new one"
    )]
    Expired,
    #[error("what the CA signed is unusable: {0}")]
    Unusable(Arc<str>),
}

impl CaError {
    /// Whether the same request may succeed a moment later.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::File { .. } | Self::Unavailable(_) | Self::Expired => true,
            Self::Refused { .. } | Self::Unusable(_) => false,
        }
    }
}
