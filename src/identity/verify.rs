//! Whom a peer's certificate proves: the chain by webpki, then exactly one SPIFFE identity of our trust domain.
//!
//! No DNS name is ever looked at. Every refusal has a kind of its own, because people must be told which it was.

use std::fmt;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, SignatureScheme};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::{CaError, TrustBundle};
use crate::mesh::{Identity, TrustDomain};

/// Why a peer's certificate proves nothing to us.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Refusal {
    #[error("the peer is {got}, of another trust domain than {wanted}")]
    WrongTrustDomain { wanted: TrustDomain, got: Identity },
    #[error("the peer is {got}, but {wanted} was wanted")]
    WrongIdentity { wanted: Identity, got: Identity },
    #[error("the peer's certificate, or one above it, has expired: is the clock right, does its node reach the CA?")]
    Expired,
    #[error("the peer's certificate is not valid yet: compare the clocks of both nodes")]
    NotYetValid,
    #[error("the peer's certificate leads to no trust anchor of ours: both nodes need one CA, or each other's anchor")]
    UnknownIssuer,
    #[error("the peer's certificate is signed by itself")]
    SelfSigned,
    #[error("the peer's certificate holds no SPIFFE identity spiffe://<trust domain>/ns/<namespace>/sa/<account>")]
    NoSpiffeUri,
    #[error("the peer's certificate holds {0} URIs; exactly one identity is wanted")]
    SeveralSpiffeUris(usize),
    #[error("the peer's certificate cannot be used: {0}")]
    Unsuitable(String),
}

/// Checks servers: the chain, the trust domain, and exactly the wanted identity.
pub struct ServerVerifier {
    trust: Arc<TrustBundle>,
    wanted: Identity,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerVerifier {
    pub fn new(trust: Arc<TrustBundle>, wanted: Identity, algorithms: WebPkiSupportedAlgorithms) -> Self {
        Self { trust, wanted, algorithms }
    }
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let chain = ParsedCertificate::try_from(leaf).and_then(|parsed| {
            let (roots, algorithms) = (&self.trust.roots, self.algorithms.all);
            verify_server_cert_signed_by_trust_anchor(&parsed, roots, intermediates, now, algorithms)
        });
        chain.map_err(|error| refused(refusal_of(error, leaf)))?;
        let got = proven(leaf, &self.wanted.trust_domain).map_err(refused)?;
        if got != self.wanted {
            return Err(refused(Refusal::WrongIdentity { wanted: self.wanted.clone(), got }));
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, leaf, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, leaf, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl fmt::Debug for ServerVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ServerVerifier(wanted {})", self.wanted)
    }
}

/// Checks clients: the chain and the trust domain. Whether that client may come in is policy's to say.
pub struct ClientVerifier {
    chain: Arc<dyn ClientCertVerifier>,
    trust_domain: TrustDomain,
}

impl ClientVerifier {
    /// # Errors
    /// A bundle that holds no anchor.
    pub fn new(
        trust: &TrustBundle,
        trust_domain: TrustDomain,
        provider: Arc<rustls::crypto::CryptoProvider>,
    ) -> Result<Self, CaError> {
        let chain = WebPkiClientVerifier::builder_with_provider(trust.roots.clone(), provider)
            .clear_root_hint_subjects()
            .build()
            .map_err(|error| CaError::Unusable(error.to_string().into()))?;
        Ok(Self { chain, trust_domain })
    }
}

impl ClientCertVerifier for ClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let chain = self.chain.verify_client_cert(leaf, intermediates, now);
        chain.map_err(|error| refused(refusal_of(error, leaf)))?;
        proven(leaf, &self.trust_domain).map_err(refused)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls12_signature(message, leaf, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, leaf, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

impl fmt::Debug for ClientVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClientVerifier(trust domain {})", self.trust_domain)
    }
}

/// The one SPIFFE identity among a certificate's URI names.
///
/// [X.509-SVID, section 2](https://github.com/spiffe/spiffe/blob/main/standards/X509-SVID.md#2-spiffe-id): exactly
/// one URI; one that holds more is refused, whatever they are. Other kinds of names may stand beside it.
pub fn identity_of(certificate: &X509Certificate<'_>) -> Result<Identity, Refusal> {
    let unreadable = || Refusal::Unsuitable("its names cannot be read".to_owned());
    let names = certificate.subject_alternative_name().map_err(|_| unreadable())?.ok_or(Refusal::NoSpiffeUri)?;
    let names = &names.value.general_names;
    // One that cannot be read may be a second URI.
    if names.iter().any(|name| matches!(name, GeneralName::Invalid(..))) {
        return Err(unreadable());
    }
    let uris: Vec<&str> =
        names.iter().filter_map(|name| if let GeneralName::URI(uri) = name { Some(*uri) } else { None }).collect();
    match uris[..] {
        [] => Err(Refusal::NoSpiffeUri),
        [uri] => uri.parse().map_err(|_| Refusal::NoSpiffeUri),
        _ => Err(Refusal::SeveralSpiffeUris(uris.len())),
    }
}

fn proven(leaf: &CertificateDer<'_>, trust_domain: &TrustDomain) -> Result<Identity, Refusal> {
    let (_, parsed) = X509Certificate::from_der(leaf).map_err(|error| Refusal::Unsuitable(error.to_string()))?;
    let got = identity_of(&parsed)?;
    if got.trust_domain != *trust_domain {
        return Err(Refusal::WrongTrustDomain { wanted: trust_domain.clone(), got });
    }
    Ok(got)
}

fn refusal_of(error: Error, leaf: &CertificateDer<'_>) -> Refusal {
    let is_self_issued = || {
        X509Certificate::from_der(leaf).is_ok_and(|(_, parsed)| parsed.subject().as_raw() == parsed.issuer().as_raw())
    };
    match error {
        Error::InvalidCertificate(error) => match error {
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => Refusal::Expired,
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => Refusal::NotYetValid,
            // A certificate that is its own CA comes as `Other`: webpki takes no CA for a leaf.
            CertificateError::UnknownIssuer | CertificateError::BadSignature | CertificateError::Other(_)
                if is_self_issued() =>
            {
                Refusal::SelfSigned
            }
            CertificateError::UnknownIssuer | CertificateError::BadSignature => Refusal::UnknownIssuer,
            other => Refusal::Unsuitable(other.to_string()),
        },
        other => Refusal::Unsuitable(other.to_string()),
    }
}

fn refused(refusal: Refusal) -> Error {
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(refusal))))
}

#[cfg(test)]
mod tests;
