use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::LazyLock;

use proptest::prelude::*;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::*;
use crate::identity::certificate::PendingKey;
use crate::mutation::mutated;

fn domain() -> TrustDomain {
    "cluster.local".parse().unwrap()
}

fn cart() -> Identity {
    "spiffe://cluster.local/ns/shop/sa/cart".parse().unwrap()
}

#[test]
fn agents_that_start_at_once_with_an_empty_folder_end_with_one_ca() {
    let dir = tempfile::tempdir().unwrap();
    let barrier = std::sync::Barrier::new(8);
    let anchors: Vec<_> = std::thread::scope(|scope| {
        let starts: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(|| {
                    barrier.wait();
                    EmbeddedCa::open(dir.path(), &domain()).unwrap().trust().borrow().certificates().to_vec()
                })
            })
            .collect();
        starts.into_iter().map(|start| start.join().unwrap()).collect()
    });
    assert!(anchors.windows(2).all(|pair| pair[0] == pair[1]), "two agents made a CA each");
    let mode = fs::metadata(dir.path().join("ca.key")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn half_a_pair_is_an_error_and_never_a_new_root() {
    for lost in ["ca.key", "ca.crt"] {
        let dir = tempfile::tempdir().unwrap();
        EmbeddedCa::open(dir.path(), &domain()).unwrap();
        fs::remove_file(dir.path().join(lost)).unwrap();
        let error = EmbeddedCa::open(dir.path(), &domain()).err().unwrap().to_string();
        assert!(error.contains(lost) && error.contains("Restore"), "{error}");
        assert!(!dir.path().join(lost).exists(), "{lost} was made up");
    }
}

#[test]
fn a_key_that_others_may_read_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    EmbeddedCa::open(dir.path(), &domain()).unwrap();
    fs::set_permissions(dir.path().join("ca.key"), fs::Permissions::from_mode(0o644)).unwrap();
    let error = EmbeddedCa::open(dir.path(), &domain()).err().unwrap().to_string();
    assert!(error.contains("chmod 600"), "{error}");
}

#[tokio::test]
async fn a_leaf_holds_one_identity_both_usages_and_never_outlives_its_ca() {
    let dir = tempfile::tempdir().unwrap();
    let ca = EmbeddedCa::open(dir.path(), &domain()).unwrap();
    let pending = PendingKey::new(&cart()).unwrap();
    let century = Duration::from_secs(100 * 365 * 24 * 3600);
    let signed = ca.sign(&pending.csr, &cart(), century).await.unwrap();
    assert_eq!(signed.chain.len(), 1);
    let (_, leaf) = X509Certificate::from_der(&signed.chain[0]).unwrap();
    let anchors = ca.trust().borrow().certificates().to_vec();
    let (_, root) = X509Certificate::from_der(&anchors[0]).unwrap();
    assert_eq!(leaf.validity().not_after, root.validity().not_after);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    assert!(leaf.validity().not_before.timestamp() <= now as i64 - 59);
    assert!(!leaf.is_ca());
    let usage = leaf.key_usage().unwrap().unwrap().value;
    assert!(usage.digital_signature() && !usage.key_cert_sign());
    let extended = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(extended.server_auth && extended.client_auth && !extended.any);
    assert_eq!(super::super::verify::identity_of(&leaf), Ok(cart()));
    assert_eq!(pending.complete(&cart(), signed).unwrap().identity, cart());
}

#[tokio::test]
async fn a_certificate_over_another_key_or_for_another_identity_is_not_used() {
    let dir = tempfile::tempdir().unwrap();
    let ca = EmbeddedCa::open(dir.path(), &domain()).unwrap();
    let day = Duration::from_secs(86400);
    let (a, b) = (PendingKey::new(&cart()).unwrap(), PendingKey::new(&cart()).unwrap());
    let for_a = ca.sign(&a.csr, &cart(), day).await.unwrap();
    assert!(b.complete(&cart(), for_a).unwrap_err().to_string().contains("another key"));
    let other: Identity = "spiffe://cluster.local/ns/shop/sa/other".parse().unwrap();
    let for_other = ca.sign(&a.csr, &other, day).await.unwrap();
    assert!(a.complete(&cart(), for_other).unwrap_err().to_string().contains("other"));
}

fn authority(name: &str, above: Option<&Issuer<'_, KeyPair>>) -> (String, KeyPair, CertificateParams) {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let pem = match above {
        Some(issuer) => params.signed_by(&key, issuer).unwrap().pem(),
        None => params.self_signed(&key).unwrap().pem(),
    };
    (pem, key, params)
}

fn place(dir: &std::path::Path, certificates: &[&str], key: &KeyPair) {
    fs::write(dir.join("ca.crt"), certificates.concat()).unwrap();
    fs::write(dir.join("ca.key"), key.serialize_pem()).unwrap();
    fs::set_permissions(dir.join("ca.key"), fs::Permissions::from_mode(0o600)).unwrap();
}

#[test]
fn a_leaf_among_the_anchors_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (root, root_key, root_params) = authority("root", None);
    let issuer = Issuer::new(root_params, KeyPair::from_pem(&root_key.serialize_pem()).unwrap());
    let leaf = CertificateParams::default().signed_by(&root_key, &issuer).unwrap().pem();
    place(dir.path(), &[&root, &leaf], &root_key);
    let error = EmbeddedCa::open(dir.path(), &domain()).err().unwrap().to_string();
    assert!(error.contains("certificate 2 in it is not a CA's"), "{error}");
}

#[tokio::test]
async fn a_validity_beyond_all_clocks_is_the_cas_own() {
    let dir = tempfile::tempdir().unwrap();
    let ca = EmbeddedCa::open(dir.path(), &domain()).unwrap();
    let pending = PendingKey::new(&cart()).unwrap();
    ca.sign(&pending.csr, &cart(), Duration::MAX).await.unwrap();
}

#[tokio::test]
async fn an_intermediate_signs_and_goes_with_each_leaf() {
    let dir = tempfile::tempdir().unwrap();
    let (root, root_key, root_params) = authority("root", None);
    let issuer = Issuer::new(root_params, root_key);
    let (middle, middle_key, _) = authority("middle", Some(&issuer));
    place(dir.path(), &[&root, &middle], &middle_key);
    let ca = EmbeddedCa::open(dir.path(), &domain()).unwrap();
    let pending = PendingKey::new(&cart()).unwrap();
    let signed = ca.sign(&pending.csr, &cart(), Duration::from_secs(60)).await.unwrap();
    assert_eq!(signed.chain.len(), 2, "leaf and intermediate, without the root");
    assert_eq!(ca.trust().borrow().certificates().len(), 2);
}

#[test]
fn a_changed_file_moves_the_bundle_and_a_bad_one_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (old, old_key, _) = authority("old", None);
    let (new, new_key, _) = authority("new", None);
    place(dir.path(), &[&old], &old_key);
    let ca = EmbeddedCa::open(dir.path(), &domain()).unwrap();
    let before = ca.trust().borrow().clone();
    place(dir.path(), &[&old, &new], &new_key);
    ca.reload().unwrap();
    let during = ca.trust().borrow().clone();
    assert_eq!((during.generation, during.certificates().len()), (before.generation + 1, 2));
    assert!(before.is_superseded() && !during.is_superseded());
    fs::write(dir.path().join("ca.crt"), "").unwrap();
    assert!(ca.reload().is_err());
    assert_eq!(ca.trust().borrow().generation, during.generation);
    place(dir.path(), &[&old], &new_key);
    assert!(ca.reload().unwrap_err().to_string().contains("no certificate in it is over the key"));
}

#[tokio::test]
async fn a_folder_that_is_watched_takes_effect_without_a_word() {
    let dir = tempfile::tempdir().unwrap();
    let (old, old_key, _) = authority("old", None);
    let (new, _, _) = authority("new", None);
    place(dir.path(), &[&old], &old_key);
    let ca = EmbeddedCa::open(dir.path(), &domain()).unwrap();
    let mut trust = ca.trust();
    let watching = tokio::spawn(async move { ca.watch().await });
    tokio::task::yield_now().await;
    place(dir.path(), &[&old, &new], &old_key);
    let moved = trust.wait_for(|bundle| bundle.certificates().len() == 2);
    tokio::time::timeout(Duration::from_secs(5), moved).await.unwrap().unwrap();
    watching.abort();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn files_with_changed_bytes_are_refused_by_name_or_make_a_ca_that_signs(
        certificates in mutated(vec![WRITTEN.0.clone().into_bytes()]),
        key in prop_oneof![Just(WRITTEN.1.clone().into_bytes()), mutated(vec![WRITTEN.1.clone().into_bytes()])],
    ) {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("ca.crt"), certificates).unwrap();
        fs::write(dir.path().join("ca.key"), key).unwrap();
        fs::set_permissions(dir.path().join("ca.key"), fs::Permissions::from_mode(0o600)).unwrap();
        match EmbeddedCa::open(dir.path(), &domain()) {
            Ok(ca) => {
                let pending = PendingKey::new(&cart()).unwrap();
                let signed = ca.signer.load().sign(&pending.csr.der, &cart(), Duration::from_secs(60), SystemTime::now());
                if let Ok(signed) = signed {
                    prop_assert!(pending.complete(&cart(), signed).is_ok());
                }
            }
            Err(error) => prop_assert!(error.to_string().len() < 1_024, "{error}"),
        }
    }
}

/// `ca.crt` of two anchors, and `ca.key`.
static WRITTEN: LazyLock<(String, String)> = LazyLock::new(|| {
    let (old, _, _) = authority("old", None);
    let (new, key, _) = authority("new", None);
    (format!("{new}{old}"), key.serialize_pem())
});
