//! The root: what the Secret and the ConfigMap say, and who signs by it.

mod keeper;
mod material;
pub mod progress;
mod rotation;

use std::sync::{Arc, PoisonError, RwLock};
use std::time::SystemTime;

use rustls::pki_types::CertificateDer;
use tokio::sync::watch;

pub use keeper::Keeper;
pub use material::{ROTATE, SECRET, TRUST_BUNDLE};
pub use rotation::Phase;

use crate::identity::Signer;

/// Who signs now, and what speaks against signing. Shared by the service, the server's own certificate and readiness.
pub struct Root {
    state: RwLock<State>,
    changes: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    signing: Option<Signing>,
    /// Why nothing can be signed, or why what is signed rests on something that is gone.
    alarm: Option<Alarm>,
}

/// Who signs now.
#[derive(Clone)]
struct Signing {
    signer: Arc<Signer>,
    /// The anchor that its certificates lead to.
    anchor: Option<CertificateDer<'static>>,
    /// Of what it was made: the same makes no change.
    hash: String,
}

/// A root that needs a person.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Alarm {
    #[error(
        "ConfigMap {bundle} is there and Secret {secret} is not: restore the Secret from a backup; or remove the \
         ConfigMap to have a new root made, which no certificate of now leads to",
        bundle = TRUST_BUNDLE, secret = SECRET
    )]
    SecretMissing,
    #[error(
        "Secret {secret} is there, and ConfigMap {bundle}, which had been made of it, is not: restore it from a backup; or \
         `kubectl annotate secret {secret} {published}-` to have it made anew of the Secret's ca.crt alone",
        bundle = TRUST_BUNDLE, secret = SECRET, published = material::PUBLISHED
    )]
    BundleMissing,
    #[error("{what} {name}: {cause}")]
    Unfit { what: &'static str, name: &'static str, cause: String },
}

impl Alarm {
    /// One word for a metric.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::SecretMissing => "secret-missing",
            Self::BundleMissing => "bundle-missing",
            Self::Unfit { .. } => "unfit",
        }
    }

    pub const REASONS: [&'static str; 3] = ["secret-missing", "bundle-missing", "unfit"];
}

impl Root {
    pub fn new() -> Arc<Self> {
        Arc::new(Self { state: RwLock::default(), changes: watch::Sender::new(0) })
    }

    /// Who signs, and the anchor that goes with what it signs; or why nobody does.
    pub fn signer(&self) -> Result<(Arc<Signer>, Option<CertificateDer<'static>>), String> {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        match (&state.signing, &state.alarm) {
            (Some(signing), _) => Ok((signing.signer.clone(), signing.anchor.clone())),
            (None, Some(alarm)) => Err(alarm.to_string()),
            (None, None) => Err("the root has not been read yet, or is not yet trusted by every agent".to_owned()),
        }
    }

    pub fn alarm(&self) -> Option<Alarm> {
        self.state.read().unwrap_or_else(PoisonError::into_inner).alarm.clone()
    }

    /// When the certificate of whoever signs ends.
    pub fn not_after(&self) -> Option<SystemTime> {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        state.signing.as_ref().map(|signing| signing.signer.not_after())
    }

    /// Counts up whenever somebody else signs.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Whether the alarm is another than before.
    fn set_alarm(&self, alarm: Option<Alarm>) -> bool {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let is_news = state.alarm != alarm;
        state.alarm = alarm;
        is_news
    }

    /// Whether it is another signer than before.
    fn set_signing(&self, signing: Signing) -> bool {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        if state.signing.as_ref().is_some_and(|held| held.hash == signing.hash) {
            return false;
        }
        state.signing = Some(signing);
        drop(state);
        self.changes.send_modify(|count| *count += 1);
        true
    }
}
