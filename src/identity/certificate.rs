use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls::crypto::aws_lc_rs::sign::any_ecdsa_type;
use rustls::pki_types::{CertificateSigningRequestDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::sign::CertifiedKey;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::verify::identity_of;
use super::{CaError, Csr, SignedCertificate};
use crate::mesh::Identity;

/// One certificate with its chain, and the key it speaks for. The key has no way out: neither `Debug` nor serde.
pub struct WorkloadCertificate {
    pub identity: Identity,
    /// The serial number in hexadecimal.
    pub serial: String,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
    pub(crate) key: Arc<CertifiedKey>,
    superseded: AtomicBool,
}

impl WorkloadCertificate {
    /// Whether a newer certificate has taken this one's place, or nobody on this node is this identity any more.
    pub fn is_superseded(&self) -> bool {
        self.superseded.load(Ordering::Acquire)
    }

    /// The name of whoever signed it.
    pub fn issuer(&self) -> String {
        let leaf = self.key.cert.first().and_then(|der| X509Certificate::from_der(der).ok());
        leaf.map(|(_, parsed)| parsed.issuer().to_string()).unwrap_or_default()
    }

    pub fn is_valid_at(&self, now: SystemTime) -> bool {
        self.not_before <= now && now < self.not_after
    }

    pub(super) fn supersede(&self) {
        self.superseded.store(true, Ordering::Release);
    }
}

impl fmt::Debug for WorkloadCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WorkloadCertificate({}, serial {})", self.identity, self.serial)
    }
}

/// A fresh key, waiting for the certificate that it asked for.
pub(super) struct PendingKey {
    key: KeyPair,
    pub csr: Csr,
}

impl PendingKey {
    /// A new ECDSA P-256 key and the request for `identity`.
    pub fn new(identity: &Identity) -> Result<Self, CaError> {
        let unusable = |error: rcgen::Error| CaError::Unusable(format!("no key could be made: {error}").into());
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(unusable)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into().map_err(unusable)?)];
        let request = params.serialize_request(&key).map_err(unusable)?;
        let pem = request.pem().map_err(unusable)?;
        let der = CertificateSigningRequestDer::from(request.der().to_vec());
        Ok(Self { key, csr: Csr { der, pem } })
    }

    /// The certificate that the CA signed, if it is over this key and for this identity.
    pub fn complete(self, identity: &Identity, signed: SignedCertificate) -> Result<WorkloadCertificate, CaError> {
        let unusable = |cause: String| CaError::Unusable(cause.into());
        let leaf = signed.chain.first().ok_or_else(|| unusable("the chain is empty".to_owned()))?;
        let (_, parsed) =
            X509Certificate::from_der(leaf).map_err(|error| unusable(format!("it cannot be read: {error}")))?;
        let proven = identity_of(&parsed).map_err(|refusal| unusable(refusal.to_string()))?;
        if proven != *identity {
            return Err(unusable(format!("it names {proven}, not {identity}")));
        }
        let serial = parsed.tbs_certificate.raw_serial().iter().map(|byte| format!("{byte:02x}")).collect();
        let validity = parsed.validity();
        let (not_before, not_after) = (time(validity.not_before.timestamp()), time(validity.not_after.timestamp()));
        let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.serialize_der()));
        let signer = any_ecdsa_type(&der).map_err(|error| unusable(format!("the key is unusable: {error}")))?;
        let key = CertifiedKey::new(signed.chain, signer);
        key.keys_match().map_err(|_| unusable("it is over another key than the one requested".to_owned()))?;
        Ok(WorkloadCertificate {
            identity: identity.clone(),
            serial,
            not_before,
            not_after,
            key: Arc::new(key),
            superseded: AtomicBool::new(false),
        })
    }
}

/// Seconds since 1970 as a time; what lies before is 1970.
pub(super) fn time(timestamp: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(u64::try_from(timestamp).unwrap_or(0))
}
