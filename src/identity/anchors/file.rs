use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::identity::{CaError, TrustKeeper, TrustSource, certificates_from_pem};

/// A trust bundle that lies in a file, as one mounted from a ConfigMap does.
pub struct FileAnchors {
    path: PathBuf,
    keeper: TrustKeeper,
}

impl FileAnchors {
    /// # Errors
    /// A file that cannot be read, or holds no certificates.
    pub fn open(path: &Path) -> Result<Self, CaError> {
        let anchors = Self { path: path.to_owned(), keeper: TrustKeeper::new() };
        anchors.read()?;
        Ok(anchors)
    }

    pub fn trust(&self) -> TrustSource {
        self.keeper.source()
    }

    /// Follows the file for as long as it is polled. A change that cannot be used leaves what stood in force.
    pub async fn follow(self) {
        let mut seen = self.stamp();
        let mut ticks = tokio::time::interval(POLL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        loop {
            ticks.tick().await;
            let stamp = self.stamp();
            if stamp == seen {
                continue;
            }
            match self.read() {
                Ok(()) => tracing::info!(file = %self.path.display(), "The trust bundle changed and is in force."),
                Err(error) => {
                    tracing::warn!(%error, "The trust bundle changed, but cannot be used; the one before stays.")
                }
            }
            seen = stamp;
        }
    }

    fn read(&self) -> Result<(), CaError> {
        let wrong = |cause: String| CaError::File {
            file: self.path.display().to_string(),
            cause,
            cure: "Name a file with the CA's root certificates in PEM by --ca-root",
        };
        let pem = std::fs::read(&self.path).map_err(|error| wrong(error.to_string()))?;
        self.keeper.replace(certificates_from_pem(&pem).map_err(wrong)?, false).map(drop)
    }

    /// What changes when the file does, also by a link that leads elsewhere.
    fn stamp(&self) -> Option<(u64, u64, i64, i64)> {
        let metadata = std::fs::metadata(&self.path).ok()?;
        Some((metadata.ino(), metadata.len(), metadata.ctime(), metadata.ctime_nsec()))
    }
}

const POLL: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::identity::{NewRoot, certificates_to_pem, hash_of};

    fn root() -> String {
        NewRoot::make(&"cluster.local".parse().unwrap(), SystemTime::now()).unwrap().certificate
    }

    #[tokio::test]
    async fn a_file_that_changes_takes_effect_and_a_broken_one_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca.crt");
        let (old, new) = (root(), root());
        assert!(FileAnchors::open(&path).is_err());
        std::fs::write(&path, &old).unwrap();
        let anchors = FileAnchors::open(&path).unwrap();
        let mut trust = anchors.trust();
        let before = trust.borrow().clone();
        std::fs::write(&path, "no certificate").unwrap();
        assert!(anchors.read().is_err());
        assert_eq!(trust.borrow().hash(), before.hash());
        let following = tokio::spawn(anchors.follow());
        tokio::task::yield_now().await;
        std::fs::write(&path, format!("{old}{new}")).unwrap();
        let moved = trust.wait_for(|bundle| bundle.certificates().len() == 2);
        tokio::time::timeout(Duration::from_secs(10), moved).await.unwrap().unwrap();
        assert!(before.is_superseded());
        following.abort();
    }

    #[test]
    fn the_hash_of_a_bundle_does_not_depend_on_the_order_of_its_roots() {
        let (one, other) = (root(), root());
        let read = |pem: String| certificates_from_pem(pem.as_bytes()).unwrap();
        let (forth, back) = (read(format!("{one}{other}")), read(format!("{other}{one}\n")));
        assert_eq!(hash_of(&forth), hash_of(&back));
        assert_ne!(hash_of(&forth), hash_of(&read(one)));
        assert_eq!(read(certificates_to_pem(&forth)), forth);
    }
}
