use std::fmt;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use aws_lc_rs::digest;
use pem::{EncodeConfig, LineEnding, Pem};
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tokio::sync::{Notify, watch};

use super::CaError;

/// The trust bundle that stands now, and word of every change.
pub type TrustSource = watch::Receiver<Arc<TrustBundle>>;

/// The anchors that peers' certificates must lead to; several while a root is being replaced.
pub struct TrustBundle {
    pub roots: Arc<RootCertStore>,
    /// Grows with each change, so that what was decided under an older bundle is known as such.
    pub generation: u64,
    superseded: AtomicBool,
    /// Told of that.
    waiting: Notify,
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
        Ok(Self { certificates, roots: Arc::new(roots), generation, ..Self::empty() })
    }

    /// No anchor at all: nobody is trusted yet.
    pub fn empty() -> Self {
        Self {
            roots: Arc::new(RootCertStore::empty()),
            generation: 0,
            superseded: AtomicBool::new(false),
            waiting: Notify::new(),
            certificates: Vec::new(),
        }
    }

    /// Whether a newer bundle has taken this one's place.
    pub fn is_superseded(&self) -> bool {
        self.superseded.load(Ordering::Acquire)
    }

    /// Completes once a newer bundle has taken this one's place.
    pub async fn superseded(&self) {
        let mut told = pin!(self.waiting.notified());
        // From here on no word is missed.
        told.as_mut().enable();
        if !self.is_superseded() {
            told.await;
        }
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
        self.waiting.notify_waiters();
    }
}

/// Where a trust bundle is kept for all who read it.
pub struct TrustKeeper(watch::Sender<Arc<TrustBundle>>);

impl TrustKeeper {
    /// Nobody is trusted until the first [`TrustKeeper::replace`].
    pub fn new() -> Self {
        Self(watch::Sender::new(Arc::new(TrustBundle::empty())))
    }

    pub fn source(&self) -> TrustSource {
        self.0.subscribe()
    }

    /// The bundle is this from now on. The same anchors make no change, unless others are said to sign now.
    ///
    /// # Errors
    /// As [`TrustBundle::new`]; what stood stays in force.
    pub fn replace(&self, certificates: Vec<CertificateDer<'static>>, others_sign: bool) -> Result<bool, CaError> {
        let current = self.0.borrow().clone();
        let is_news = others_sign || hash_of(current.certificates()) != hash_of(&certificates);
        if is_news || current.certificates().is_empty() {
            let bundle = TrustBundle::new(certificates, current.generation + 1)?;
            self.0.send_replace(Arc::new(bundle)).supersede();
        }
        Ok(is_news)
    }
}

impl Default for TrustKeeper {
    fn default() -> Self {
        Self::new()
    }
}

/// Reads certificates in PEM, one or more.
///
/// # Errors
/// What is wrong with the text.
pub fn certificates_from_pem(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let certificates: Vec<_> =
        CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().map_err(|error| format!("{error:?}"))?;
    if certificates.is_empty() {
        return Err("it holds no certificate in PEM".to_owned());
    }
    Ok(certificates)
}

/// Writes certificates in PEM, its lines ended as OpenSSL and cert-manager end them: with a line feed alone.
pub fn certificates_to_pem(certificates: &[CertificateDer<'_>]) -> String {
    let form = EncodeConfig::new().set_line_ending(LineEnding::LF);
    certificates.iter().map(|der| pem::encode_config(&Pem::new("CERTIFICATE", der.as_ref()), form)).collect()
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

/// On the trust bundle's ConfigMap: moves when certificates under another anchor are to be used from now on.
pub const SIGNED_BY: &str = "selvedge.dev/signed-by";

#[cfg(test)]
mod tests {
    use futures_util::{FutureExt, poll};
    use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};

    use super::*;

    fn anchor() -> Vec<CertificateDer<'static>> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        vec![params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().clone()]
    }

    #[tokio::test]
    async fn who_waits_for_the_end_of_a_bundle_is_told_of_it_and_who_comes_later_too() {
        let keeper = TrustKeeper::new();
        keeper.replace(anchor(), false).unwrap();
        let bundle = keeper.source().borrow().clone();
        let mut told = pin!(bundle.superseded());
        assert!(poll!(told.as_mut()).is_pending());
        keeper.replace(anchor(), false).unwrap();
        assert!(told.now_or_never().is_some(), "nobody told it");
        assert!(bundle.superseded().now_or_never().is_some());
    }
}
