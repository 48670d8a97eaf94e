use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use aws_lc_rs::digest;
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use tokio::sync::watch;

use super::CaError;

/// The trust bundle that stands now, and word of every change.
pub type TrustSource = watch::Receiver<Arc<TrustBundle>>;

/// The anchors that peers' certificates must lead to; several while a root is being replaced.
pub struct TrustBundle {
    pub roots: Arc<RootCertStore>,
    /// Grows with each change, so that what was decided under an older bundle is known as such.
    pub generation: u64,
    superseded: AtomicBool,
    certificates: Vec<CertificateDer<'static>>,
}

impl TrustBundle {
    /// # Errors
    /// An empty bundle, or a certificate that cannot be an anchor.
    pub fn new(certificates: Vec<CertificateDer<'static>>, generation: u64) -> Result<Self, CaError> {
        let mut roots = RootCertStore::empty();
        for certificate in &certificates {
            roots
                .add(certificate.clone())
                .map_err(|error| CaError::Unusable(format!("a trust anchor cannot be read: {error}").into()))?;
        }
        if roots.is_empty() {
            return Err(CaError::Unusable("the trust bundle holds no certificate".into()));
        }
        Ok(Self { roots: Arc::new(roots), generation, superseded: AtomicBool::new(false), certificates })
    }

    /// Whether a newer bundle has taken this one's place.
    pub fn is_superseded(&self) -> bool {
        self.superseded.load(Ordering::Acquire)
    }

    pub fn certificates(&self) -> &[CertificateDer<'static>] {
        &self.certificates
    }

    /// By which agents tell the controller which bundle they hold: [`hash_of`] its certificates.
    pub fn hash(&self) -> String {
        hash_of(&self.certificates)
    }

    pub(super) fn supersede(&self) {
        self.superseded.store(true, Ordering::Release);
    }
}

/// SHA-256 in hexadecimal over the certificates' DER, sorted and put end to end: the same for the same set, in whatever
/// order it is written.
pub fn hash_of(certificates: &[CertificateDer<'_>]) -> String {
    let mut sorted: Vec<&[u8]> = certificates.iter().map(AsRef::as_ref).collect();
    sorted.sort_unstable();
    sorted.dedup();
    let hash = digest::digest(&digest::SHA256, &sorted.concat());
    hash.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

impl fmt::Debug for TrustBundle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TrustBundle(generation {}, {} anchors)", self.generation, self.certificates.len())
    }
}
