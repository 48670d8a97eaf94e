use std::sync::LazyLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use proptest::prelude::*;
use rustls::crypto::aws_lc_rs::default_provider;

use super::*;
use crate::identity::certificate::PendingKey;
use crate::identity::{CertificateAuthority, EmbeddedCa};
use crate::mutation::mutated;

/// A CA, and a leaf that it signed.
struct Signed {
    trust: Arc<TrustBundle>,
    leaf: Vec<u8>,
}

static SIGNED: LazyLock<Signed> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    let ca = EmbeddedCa::open(dir.path(), &cart().trust_domain).unwrap();
    let key = PendingKey::new(&cart()).unwrap();
    let signed = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let signed = signed.block_on(ca.sign(&key.csr, &cart(), Duration::from_secs(3600))).unwrap();
    let trust = ca.trust().borrow().clone();
    Signed { trust, leaf: signed.chain[0].to_vec() }
});

fn cart() -> Identity {
    "spiffe://cluster.local/ns/shop/sa/cart".parse().unwrap()
}

fn now() -> UnixTime {
    UnixTime::since_unix_epoch(SystemTime::now().duration_since(UNIX_EPOCH).unwrap())
}

/// Whether both sides' verifiers take a chain.
fn taken(leaf: &[u8], above: &[CertificateDer<'_>]) -> [bool; 2] {
    let leaf = CertificateDer::from(leaf);
    let provider = Arc::new(default_provider());
    let algorithms = provider.signature_verification_algorithms;
    let server = ServerVerifier::new(SIGNED.trust.clone(), cart(), algorithms);
    let client = ClientVerifier::new(&SIGNED.trust, cart().trust_domain, provider).unwrap();
    let name = ServerName::IpAddress(std::net::IpAddr::from([10, 0, 0, 1]).into());
    [
        server.verify_server_cert(&leaf, above, &name, &[], now()).is_ok(),
        client.verify_client_cert(&leaf, above, now()).is_ok(),
    ]
}

#[test]
fn the_certificate_that_was_signed_is_taken() {
    assert_eq!(taken(&SIGNED.leaf, &[]), [true, true]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn a_certificate_with_changed_bytes_is_refused_without_a_panic(leaf in mutated(vec![SIGNED.leaf.clone()])) {
        if let Ok((_, parsed)) = X509Certificate::from_der(&leaf) {
            let _ = identity_of(&parsed);
        }
        prop_assert_eq!(taken(&leaf, &[]), [leaf == SIGNED.leaf; 2]);
    }

    #[test]
    fn what_comes_with_a_good_certificate_makes_it_neither_better_nor_worse(
        above in prop::collection::vec(mutated(vec![SIGNED.leaf.clone()]), 0..4),
    ) {
        let above: Vec<_> = above.into_iter().map(CertificateDer::from).collect();
        prop_assert_eq!(taken(&SIGNED.leaf, &above), [true, true]);
    }
}
