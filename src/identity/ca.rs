//! The embedded CA: `ca.crt` and `ca.key` in a folder, for meshes without a cluster and for every test.

mod folder;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use futures_util::future::BoxFuture;
use rcgen::{
    CertificateParams, CertificateSigningRequestParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType, SerialNumber, date_time_ymd,
};
use rustls::pki_types::CertificateDer;
use tokio::sync::watch;

use self::folder::{Folder, Pair};
use super::{CaError, CertificateAuthority, Csr, SignedCertificate, TrustBundle, TrustSource};
use crate::mesh::{Identity, TrustDomain};

/// A CA whose key lies in a folder.
///
/// `ca.crt` may hold several certificates: all are trust anchors, the one over `ca.key` signs. Where that one is an
/// intermediate, it goes with each leaf. A changed file takes effect within a second or so ([`EmbeddedCa::watch`]).
pub struct EmbeddedCa {
    folder: Folder,
    signer: ArcSwap<Signer>,
    trust: watch::Sender<Arc<TrustBundle>>,
}

impl EmbeddedCa {
    /// The CA of a folder; an empty folder is given a new one, once, however many agents start at a time.
    ///
    /// # Errors
    /// A folder that cannot be read or written, half a pair, a key that others may read, or files that do not fit.
    pub fn open(dir: &Path, trust_domain: &TrustDomain) -> Result<Arc<Self>, CaError> {
        let folder = Folder::new(dir);
        let signer = Signer::new(folder.read_or_create(trust_domain)?, folder.certificate_path())?;
        let bundle = TrustBundle::new(signer.anchors.clone(), 1)?;
        Ok(Arc::new(Self {
            folder,
            signer: ArcSwap::from_pointee(signer),
            trust: watch::Sender::new(Arc::new(bundle)),
        }))
    }

    pub fn trust(&self) -> TrustSource {
        self.trust.subscribe()
    }

    /// Follows the folder for as long as it is polled. A change that cannot be used leaves what stood in force.
    pub async fn watch(&self) {
        let mut seen = self.folder.stamp();
        let mut ticks = tokio::time::interval(POLL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        loop {
            ticks.tick().await;
            let stamp = self.folder.stamp();
            if stamp == seen {
                continue;
            }
            match self.reload() {
                Ok(()) => tracing::info!("The CA folder changed and is in force."),
                Err(error) => {
                    tracing::warn!(%error, "The CA folder changed, but cannot be used; the CA before stays in force.")
                }
            }
            seen = stamp;
        }
    }

    /// Reads the folder again.
    ///
    /// # Errors
    /// As [`EmbeddedCa::open`]; what stood stays in force.
    pub fn reload(&self) -> Result<(), CaError> {
        let signer = Signer::new(self.folder.read()?, self.folder.certificate_path())?;
        let anchors = signer.anchors.clone();
        let current = self.trust.borrow().clone();
        let changed = current.certificates() != anchors;
        let bundle = TrustBundle::new(anchors, current.generation + 1)?;
        self.signer.store(Arc::new(signer));
        if changed {
            self.trust.send_replace(Arc::new(bundle)).supersede();
        }
        Ok(())
    }
}

impl CertificateAuthority for EmbeddedCa {
    fn sign<'a>(
        &'a self,
        csr: &'a Csr,
        identity: &'a Identity,
        validity: Duration,
    ) -> BoxFuture<'a, Result<SignedCertificate, CaError>> {
        let signed = self.signer.load().sign(csr, identity, validity, SystemTime::now());
        Box::pin(std::future::ready(signed))
    }
}

struct Signer {
    issuer: Issuer<'static, KeyPair>,
    /// What goes with each leaf: nothing under a root, the intermediates otherwise.
    chain: Vec<CertificateDer<'static>>,
    anchors: Vec<CertificateDer<'static>>,
    not_after: SystemTime,
}

impl Signer {
    fn new(pair: Pair, path: PathBuf) -> Result<Self, CaError> {
        let wrong = |cause: String, cure| CaError::File { file: path.display().to_string(), cause, cure };
        let links = folder::links(&pair.certificates)
            .map_err(|error| wrong(error, "Every certificate in it must be PEM and readable"))?;
        let own = rcgen::PublicKeyData::subject_public_key_info(&pair.key);
        let signing = links.iter().position(|link| link.public_key == own).ok_or_else(|| {
            wrong("no certificate in it is over the key in ca.key".to_owned(), "Put the pair's two files together")
        })?;
        // Each is a trust anchor: a leaf among them could sign for anybody.
        if let Some(at) = links.iter().position(|link| !link.is_ca) {
            let cure = "Use certificates with basicConstraints CA:TRUE, and no others";
            return Err(wrong(format!("certificate {} in it is not a CA's", at + 1), cure));
        }
        let issuer = Issuer::from_ca_cert_der(&pair.certificates[signing], pair.key)
            .map_err(|error| wrong(error.to_string(), "The CA's key must be ECDSA P-256 or alike"))?;
        let mut chain = Vec::new();
        let mut at = signing;
        while links[at].subject != links[at].issuer && chain.len() < links.len() {
            chain.push(pair.certificates[at].clone());
            let Some(above) = links.iter().position(|link| link.subject == links[at].issuer) else { break };
            at = above;
        }
        let not_after = links[signing].not_after;
        Ok(Self { issuer, chain, anchors: pair.certificates, not_after })
    }

    fn sign(
        &self,
        csr: &Csr,
        identity: &Identity,
        validity: Duration,
        now: SystemTime,
    ) -> Result<SignedCertificate, CaError> {
        let refused =
            |error: rcgen::Error| CaError::Refused { identity: identity.clone(), cause: error.to_string().into() };
        // Verifies that the requester holds the key. Nothing else in the request is believed.
        let request = CertificateSigningRequestParams::from_der(&csr.der).map_err(refused)?;
        let not_after = now.checked_add(validity).map_or(self.not_after, |end| end.min(self.not_after));
        if not_after <= now {
            return Err(CaError::Expired);
        }
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into().map_err(refused)?)];
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(random_serial());
        params.not_before = date_time_ymd(1970, 1, 1) + since_1970(now - BACKDATE);
        params.not_after = date_time_ymd(1970, 1, 1) + since_1970(not_after);
        let leaf = params.signed_by(&request.public_key, &self.issuer).map_err(refused)?;
        let chain = std::iter::once(leaf.der().clone()).chain(self.chain.iter().cloned()).collect();
        Ok(SignedCertificate { chain })
    }
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
/// How often the folder is looked at.
const POLL: Duration = Duration::from_secs(1);
