//! The embedded CA: `ca.crt` and `ca.key` in a folder, for meshes without a cluster and for every test.

mod folder;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use futures_util::future::BoxFuture;
use rustls::pki_types::CertificateDer;

use self::folder::{Folder, Pair};
use super::{CaError, CertificateAuthority, Csr, SignedCertificate, Signer, TrustKeeper, TrustSource};
use crate::mesh::{Identity, TrustDomain};

/// A CA whose key lies in a folder.
///
/// `ca.crt` may hold several certificates: all are trust anchors, the one over `ca.key` signs. Where that one is an
/// intermediate, it goes with each leaf. A changed file takes effect within a second or so ([`EmbeddedCa::watch`]).
pub struct EmbeddedCa {
    folder: Folder,
    signer: ArcSwap<Signer>,
    trust: TrustKeeper,
}

impl EmbeddedCa {
    /// The CA of a folder; an empty folder is given a new one, once, however many agents start at a time.
    ///
    /// # Errors
    /// A folder that cannot be read or written, half a pair, a key that others may read, or files that do not fit.
    pub fn open(dir: &Path, trust_domain: &TrustDomain) -> Result<Arc<Self>, CaError> {
        let folder = Folder::new(dir);
        let (signer, anchors) = read(&folder, folder.read_or_create(trust_domain)?)?;
        let trust = TrustKeeper::new();
        trust.replace(anchors, false)?;
        Ok(Arc::new(Self { folder, signer: ArcSwap::from_pointee(signer), trust }))
    }

    pub fn trust(&self) -> TrustSource {
        self.trust.source()
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
        let (signer, anchors) = read(&self.folder, self.folder.read()?)?;
        self.trust.replace(anchors, false)?;
        self.signer.store(Arc::new(signer));
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
        let signed = self.signer.load().sign(&csr.der, identity, validity, SystemTime::now());
        Box::pin(std::future::ready(signed))
    }
}

/// Who signs, and all that is trusted: in a folder every certificate is an anchor.
fn read(folder: &Folder, pair: Pair) -> Result<(Signer, Vec<CertificateDer<'static>>), CaError> {
    let signer = Signer::new(&pair.certificates, pair.key).map_err(|unfit| CaError::File {
        file: folder.certificate_path().display().to_string(),
        cause: unfit.cause,
        cure: unfit.cure,
    })?;
    Ok((signer, pair.certificates))
}

/// How often the folder is looked at.
const POLL: Duration = Duration::from_secs(1);
