use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType,
    SerialNumber, date_time_ymd,
};
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::certificate::time;
use super::{CaError, SignedCertificate};
use crate::mesh::{Identity, TrustDomain};

/// A CA's key with its certificate: whoever holds it signs.
pub struct Signer {
    issuer: Issuer<'static, KeyPair>,
    /// What goes with each leaf: nothing under a root, the intermediates otherwise.
    chain: Vec<CertificateDer<'static>>,
    /// The subject of the anchor above the chain.
    above: Vec<u8>,
    not_after: SystemTime,
}

/// Certificates and key that make no CA: what is wrong with them, and what would be right.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{cause}. {cure}")]
pub struct Unfit {
    pub cause: String,
    pub cure: &'static str,
}

impl Signer {
    /// The CA of a key and the certificate over it, which stands among `certificates` with what leads to an anchor.
    ///
    /// # Errors
    /// Files that do not fit together.
    pub fn new(certificates: &[CertificateDer<'static>], key: KeyPair) -> Result<Self, Unfit> {
        let unfit = |cause: String, cure| Unfit { cause, cure };
        let links =
            links(certificates).map_err(|error| unfit(error, "Every certificate in it must be PEM and readable"))?;
        let own = key.subject_public_key_info();
        let signing = links.iter().position(|link| link.public_key == own).ok_or_else(|| {
            unfit("no certificate in it is over the key of the CA".to_owned(), "Put the pair's two files together")
        })?;
        // Each is a trust anchor or leads to one: a leaf among them could sign for anybody.
        if let Some(at) = links.iter().position(|link| !link.is_ca) {
            let cure = "Use certificates with basicConstraints CA:TRUE, and no others";
            return Err(unfit(format!("certificate {} in it is not a CA's", at + 1), cure));
        }
        let issuer = Issuer::from_ca_cert_der(&certificates[signing], key)
            .map_err(|error| unfit(error.to_string(), "The CA's key must be ECDSA P-256 or alike"))?;
        let mut chain = Vec::new();
        let mut at = signing;
        while links[at].subject != links[at].issuer && chain.len() < links.len() {
            chain.push(certificates[at].clone());
            let Some(above) = links.iter().position(|link| link.subject == links[at].issuer) else { break };
            at = above;
        }
        Ok(Self { issuer, chain, above: links[at].issuer.clone(), not_after: links[signing].not_after })
    }

    /// Whether what is signed leads to this anchor, by the names in the chain.
    pub fn leads_to(&self, anchor: &CertificateDer<'_>) -> bool {
        let Ok((_, anchor)) = X509Certificate::from_der(anchor) else { return false };
        *anchor.subject().as_raw() == *self.above
    }

    /// When the CA's own certificate ends.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// A certificate for one identity, over the key of the request, of which nothing else is believed.
    ///
    /// # Errors
    /// A request that is none or not signed by its own key, or a CA that has expired.
    pub fn sign(
        &self,
        csr: &CertificateSigningRequestDer<'_>,
        identity: &Identity,
        validity: Duration,
        now: SystemTime,
    ) -> Result<SignedCertificate, CaError> {
        let refused =
            |error: rcgen::Error| CaError::Refused { identity: identity.clone(), cause: error.to_string().into() };
        // Verifies that the requester holds the key.
        let request = CertificateSigningRequestParams::from_der(csr).map_err(refused)?;
        let name = SanType::URI(identity.to_string().try_into().map_err(refused)?);
        self.issue(&request.public_key, vec![name], validity, now)?.map_err(refused)
    }

    /// A certificate for a server of these DNS names.
    ///
    /// # Errors
    /// A name that is none, or a CA that has expired.
    pub fn sign_server(
        &self,
        names: &[String],
        key: &KeyPair,
        validity: Duration,
        now: SystemTime,
    ) -> Result<SignedCertificate, CaError> {
        let unusable = |error: rcgen::Error| CaError::Unusable(error.to_string().into());
        let names = names.iter().map(|name| Ok(SanType::DnsName(name.as_str().try_into()?)));
        let names = names.collect::<Result<_, rcgen::Error>>().map_err(unusable)?;
        self.issue(key, names, validity, now)?.map_err(unusable)
    }

    fn issue(
        &self,
        key: &impl PublicKeyData,
        names: Vec<SanType>,
        validity: Duration,
        now: SystemTime,
    ) -> Result<Result<SignedCertificate, rcgen::Error>, CaError> {
        let not_after = now.checked_add(validity).map_or(self.not_after, |end| end.min(self.not_after));
        if not_after <= now {
            return Err(CaError::Expired);
        }
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.subject_alt_names = names;
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(random_serial());
        params.not_before = date_time_ymd(1970, 1, 1) + since_1970(now - BACKDATE);
        params.not_after = date_time_ymd(1970, 1, 1) + since_1970(not_after);
        Ok(params.signed_by(key, &self.issuer).map(|leaf| {
            let chain = std::iter::once(leaf.der().clone()).chain(self.chain.iter().cloned()).collect();
            SignedCertificate { chain }
        }))
    }
}

/// A new root: its certificate and its key, both in PEM.
pub struct NewRoot {
    pub certificate: String,
    pub key: String,
}

impl NewRoot {
    /// # Errors
    /// The machine has no randomness to give, or the like.
    pub fn make(trust_domain: &TrustDomain, now: SystemTime) -> Result<Self, CaError> {
        let failed = |error: rcgen::Error| CaError::Unusable(format!("no CA could be made: {error}").into());
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed)?;
        let serial = random_serial();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, trust_domain.as_str());
        // Roots are told apart by name, too: during a rotation there are two.
        let end: String = serial.to_bytes()[12..].iter().map(|byte| format!("{byte:02x}")).collect();
        params.distinguished_name.push(DnType::CommonName, format!("Selvedge root {end}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.serial_number = Some(serial);
        params.not_before = date_time_ymd(1970, 1, 1) + since_1970(now - BACKDATE);
        params.not_after = date_time_ymd(1970, 1, 1) + since_1970(now + ROOT_LIFE);
        let certificate = params.self_signed(&key).map_err(failed)?;
        Ok(Self { certificate: certificate.pem(), key: key.serialize_pem() })
    }
}

/// Whether a certificate is signed by itself, as roots are.
pub fn is_root(certificate: &CertificateDer<'_>) -> bool {
    X509Certificate::from_der(certificate).is_ok_and(|(_, parsed)| parsed.subject() == parsed.issuer())
}

/// One certificate of a CA, as far as putting them in order takes.
struct Link {
    subject: Vec<u8>,
    issuer: Vec<u8>,
    public_key: Vec<u8>,
    is_ca: bool,
    not_after: SystemTime,
}

fn links(certificates: &[CertificateDer<'_>]) -> Result<Vec<Link>, String> {
    let read = |der: &CertificateDer<'_>| {
        let (_, parsed) = X509Certificate::from_der(der).map_err(|error| error.to_string())?;
        Ok(Link {
            subject: parsed.subject().as_raw().to_vec(),
            issuer: parsed.issuer().as_raw().to_vec(),
            public_key: parsed.public_key().raw.to_vec(),
            is_ca: parsed.is_ca(),
            not_after: time(parsed.validity().not_after.timestamp()),
        })
    };
    certificates.iter().map(read).collect()
}

// RFC 5280, section 4.1.2.2: positive, at most 20 octets; 16 random ones never meet twice.
fn random_serial() -> SerialNumber {
    let mut bytes: [u8; 16] = rand::random();
    bytes[0] = bytes[0] & 0x7f | 0x40;
    SerialNumber::from_slice(&bytes)
}

fn since_1970(time: SystemTime) -> Duration {
    Duration::from_secs(time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs())
}

/// How far a leaf's validity reaches back, for peers whose clocks are slow.
const BACKDATE: Duration = Duration::from_secs(60);
/// Ten years: a root is replaced by a person.
const ROOT_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
