use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use futures_util::future::BoxFuture;

use super::*;
use crate::identity::{Csr, EmbeddedCa, SignedCertificate};

/// A CA that can be switched off, and counts.
struct SwitchedCa {
    ca: Arc<EmbeddedCa>,
    down: AtomicBool,
    silent: AtomicBool,
    asked: AtomicUsize,
}

impl CertificateAuthority for SwitchedCa {
    fn sign<'a>(
        &'a self,
        csr: &'a Csr,
        identity: &'a Identity,
        validity: Duration,
    ) -> BoxFuture<'a, Result<SignedCertificate, CaError>> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        if self.silent.load(Ordering::SeqCst) {
            return Box::pin(std::future::pending());
        }
        if self.down.load(Ordering::SeqCst) {
            return Box::pin(async { Err(CaError::Unavailable("switched off".into())) });
        }
        self.ca.sign(csr, identity, validity)
    }
}

fn node(settings: IdentitySettings) -> (Arc<SwitchedCa>, Arc<Identities>, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let domain: TrustDomain = "cluster.local".parse().unwrap();
    let ca = EmbeddedCa::open(dir.path(), &domain).unwrap();
    let trust = ca.trust();
    let switched = Arc::new(SwitchedCa {
        ca,
        down: AtomicBool::new(false),
        silent: AtomicBool::new(false),
        asked: AtomicUsize::new(0),
    });
    let identities = Identities::new(domain, switched.clone(), trust, settings);
    (switched, identities, dir)
}

fn cart() -> Identity {
    "spiffe://cluster.local/ns/shop/sa/cart".parse().unwrap()
}

#[tokio::test]
async fn all_who_ask_at_once_share_one_request() {
    let (ca, identities, _dir) = node(IdentitySettings::default());
    let cart = cart();
    let answers = futures_util::future::join_all((0..20).map(|_| identities.certificate(&cart))).await;
    let first = answers[0].as_ref().unwrap();
    assert!(answers.iter().all(|answer| Arc::ptr_eq(answer.as_ref().unwrap(), first)));
    assert_eq!(ca.asked.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn demand_beats_the_back_off() {
    let settings = IdentitySettings { first_backoff: Duration::from_secs(3600), ..IdentitySettings::default() };
    let (ca, identities, _dir) = node(settings);
    ca.down.store(true, Ordering::SeqCst);
    let error = identities.certificate(&cart()).await.unwrap_err();
    assert!(error.to_string().contains("switched off"), "{error}");
    ca.down.store(false, Ordering::SeqCst);
    identities.certificate(&cart()).await.unwrap();
}

#[tokio::test]
async fn a_silent_ca_is_waited_for_within_bounds() {
    let settings = IdentitySettings { wait: Duration::from_millis(50), ..IdentitySettings::default() };
    let (ca, identities, _dir) = node(settings);
    ca.silent.store(true, Ordering::SeqCst);
    let error = identities.certificate(&cart()).await.unwrap_err();
    assert!(matches!(error, CertificateError::Timeout { .. }), "{error}");
}

#[tokio::test]
async fn a_ca_that_refused_and_then_falls_silent_has_refused() {
    let settings = IdentitySettings { wait: ASK_AGAIN * 3, ..IdentitySettings::default() };
    let (ca, identities, _dir) = node(settings);
    ca.down.store(true, Ordering::SeqCst);
    let cart = cart();
    let (answer, ()) = tokio::join!(identities.certificate(&cart), async {
        while ca.asked.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        ca.silent.store(true, Ordering::SeqCst);
    });
    assert!(answer.unwrap_err().to_string().contains("switched off"));
}

#[tokio::test]
async fn what_is_retained_is_fetched_ahead_renewed_and_dropped() {
    let settings = IdentitySettings { validity: Duration::from_secs(2), ..IdentitySettings::default() };
    let (ca, identities, _dir) = node(settings);
    let mut rotations = identities.subscribe();
    tokio::spawn(identities.clone().run());
    identities.retain(HashSet::from([cart()]));
    rotations.wait_for(|count| *count >= 1).await.unwrap();
    let first = identities.certificate(&cart()).await.unwrap();
    tokio::time::timeout(Duration::from_secs(5), rotations.wait_for(|count| *count >= 2)).await.unwrap().unwrap();
    assert!(first.is_superseded(), "a renewed certificate was still taken for the newest");
    let second = identities.certificate(&cart()).await.unwrap();
    assert_ne!(first.serial, second.serial);
    assert!(ca.asked.load(Ordering::SeqCst) >= 2);
    identities.retain(HashSet::new());
    assert!(second.is_superseded());
    assert!(identities.status().is_empty());
}

#[tokio::test]
async fn what_is_valid_stays_in_use_while_the_ca_is_down() {
    let settings = IdentitySettings {
        validity: Duration::from_secs(2),
        first_backoff: Duration::from_millis(10),
        ..IdentitySettings::default()
    };
    let (ca, identities, _dir) = node(settings);
    let mut rotations = identities.subscribe();
    tokio::spawn(identities.clone().run());
    let held = identities.certificate(&cart()).await.unwrap();
    ca.down.store(true, Ordering::SeqCst);
    rotations.wait_for(|count| *count >= 3).await.unwrap();
    assert!(identities.status()[0].problem.is_some());
    assert!(!held.is_superseded());
    ca.down.store(false, Ordering::SeqCst);
    let seen = *rotations.borrow();
    rotations.wait_for(|count| *count > seen).await.unwrap();
    identities.certificate(&cart()).await.unwrap();
}
