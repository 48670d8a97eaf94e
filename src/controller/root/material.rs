//! The Secret and the ConfigMap, read and written.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::time::SystemTime;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;
use rcgen::KeyPair;
use rustls::pki_types::CertificateDer;

use super::{Alarm, Signing};
use crate::identity::{CaError, NewRoot, Signer, certificates_from_pem, certificates_to_pem, hash_of, is_root};
use crate::mesh::TrustDomain;

/// What the Secret holds: who shall sign, and during a rotation who signed before.
#[derive(Clone, PartialEq, Debug)]
pub struct CaSecret {
    pub current: Pair,
    pub previous: Option<Pair>,
    /// The trust bundle has been made of it once.
    pub is_published: bool,
    /// A controller made the root, and so may make another.
    pub is_ours: bool,
    /// Somebody asked for a new root.
    pub rotate: Option<String>,
    pub object: Secret,
}

/// A certificate with its key, and the anchors that it leads to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pair {
    pub certificates: Vec<CertificateDer<'static>>,
    pub anchors: Vec<CertificateDer<'static>>,
    key: Hidden,
}

/// A private key in PEM, which does not show itself.
#[derive(Clone, PartialEq, Eq)]
struct Hidden(String);

impl std::fmt::Debug for Hidden {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("(hidden)")
    }
}

/// What the ConfigMap holds: whom everybody trusts, and how far a rotation is.
#[derive(Clone, PartialEq, Debug)]
pub struct Bundle {
    pub anchors: Vec<CertificateDer<'static>>,
    /// Hashes of anchors that not every agent may have yet: nothing is signed by them.
    pub introducing: BTreeSet<String>,
    /// Since when all is signed by the new anchor and the old ones only wait for the last certificate under them.
    pub retiring_since: Option<Timestamp>,
    pub object: ConfigMap,
}

impl CaSecret {
    pub fn read(object: Secret) -> Result<Self, Alarm> {
        let unfit = |cause: String| Alarm::Unfit { what: "Secret", name: SECRET, cause };
        let empty = BTreeMap::new();
        let data = object.data.as_ref().unwrap_or(&empty);
        let current = Pair::read(data, "tls.crt", "tls.key", "ca.crt").map_err(unfit)?;
        let previous = match data.contains_key(PREVIOUS_KEY) {
            true => Some(Pair::read(data, PREVIOUS_CERTIFICATE, PREVIOUS_KEY, PREVIOUS_ANCHORS).map_err(unfit)?),
            false => None,
        };
        let annotation = |name: &str| object.metadata.annotations.as_ref().and_then(|all| all.get(name)).cloned();
        Ok(Self {
            current,
            previous,
            is_published: annotation(PUBLISHED).as_deref() == Some("published"),
            is_ours: annotation(MADE_BY).as_deref() == Some("controller"),
            rotate: annotation(ROTATE),
            object,
        })
    }

    /// The Secret of a new mesh.
    pub fn first(namespace: &str, trust_domain: &TrustDomain, now: SystemTime) -> Result<Secret, CaError> {
        let root = NewRoot::make(trust_domain, now)?;
        let metadata = ObjectMeta {
            name: Some(SECRET.to_owned()),
            namespace: Some(namespace.to_owned()),
            labels: Some(labels()),
            annotations: Some(BTreeMap::from([(MADE_BY.to_owned(), "controller".to_owned())])),
            ..ObjectMeta::default()
        };
        let data = [("tls.crt", &root.certificate), ("tls.key", &root.key), ("ca.crt", &root.certificate)];
        let data = data.map(|(name, text)| (name.to_owned(), ByteString(text.clone().into_bytes())));
        Ok(Secret {
            metadata,
            type_: Some("kubernetes.io/tls".to_owned()),
            data: Some(data.into()),
            ..Secret::default()
        })
    }

    /// The Secret with a new root in it, the one of now beside it as the previous.
    pub fn with_new_root(&self, trust_domain: &TrustDomain, now: SystemTime) -> Result<Secret, CaError> {
        let root = NewRoot::make(trust_domain, now)?;
        let mut object = self.object.clone();
        let data = object.data.get_or_insert_default();
        for (from, to) in [("tls.crt", PREVIOUS_CERTIFICATE), ("tls.key", PREVIOUS_KEY), ("ca.crt", PREVIOUS_ANCHORS)] {
            if let Some(old) = data.get(from).cloned() {
                data.insert(to.to_owned(), old);
            }
        }
        for (name, text) in [("tls.crt", &root.certificate), ("tls.key", &root.key), ("ca.crt", &root.certificate)] {
            data.insert(name.to_owned(), ByteString(text.clone().into_bytes()));
        }
        object.metadata.annotations.get_or_insert_default().remove(ROTATE);
        Ok(object)
    }

    pub fn without_request(&self) -> Secret {
        let mut object = self.object.clone();
        object.metadata.annotations.get_or_insert_default().remove(ROTATE);
        object
    }

    pub fn without_previous(&self) -> Secret {
        let mut object = self.object.clone();
        let data = object.data.get_or_insert_default();
        for name in [PREVIOUS_CERTIFICATE, PREVIOUS_KEY, PREVIOUS_ANCHORS] {
            data.remove(name);
        }
        object
    }

    pub fn published(&self) -> Secret {
        let mut object = self.object.clone();
        let annotations = object.metadata.annotations.get_or_insert_default();
        annotations.insert(PUBLISHED.to_owned(), "published".to_owned());
        object
    }
}

impl Pair {
    fn read(data: &BTreeMap<String, ByteString>, crt: &str, key: &str, ca: &str) -> Result<Self, String> {
        let part = |name: &str| data.get(name).map(|bytes| bytes.0.as_slice()).filter(|bytes| !bytes.is_empty());
        let chain = part(crt).ok_or_else(|| format!("{crt} is missing: it must hold the CA's certificate in PEM"))?;
        let mut certificates = certificates_from_pem(chain).map_err(|cause| format!("{crt}: {cause}"))?;
        // Without ca.crt, as some tools write it, the root stands at the end of the chain.
        let anchors = match part(ca) {
            Some(pem) => certificates_from_pem(pem).map_err(|cause| format!("{ca}: {cause}"))?,
            None => certificates.iter().filter(|der| is_root(der)).cloned().collect(),
        };
        if anchors.is_empty() {
            return Err(format!("{ca} is missing: it must hold the root that {crt} leads to"));
        }
        for anchor in &anchors {
            if !certificates.contains(anchor) {
                certificates.push(anchor.clone());
            }
        }
        let hidden = part(key).and_then(|bytes| std::str::from_utf8(bytes).ok());
        let hidden = hidden.ok_or_else(|| format!("{key} is missing: it must hold the CA's private key in PEM"))?;
        Ok(Self { certificates, anchors, key: Hidden(hidden.to_owned()) })
    }

    /// Whoever signs by this pair.
    pub(super) fn signing(&self) -> Result<Signing, Alarm> {
        let unfit = |cause: String| Alarm::Unfit { what: "Secret", name: SECRET, cause };
        let key = KeyPair::from_pem(&self.key.0).map_err(|error| {
            unfit(format!("tls.key: {error}. It must be one private key in PEM, ECDSA or RSA, unencrypted"))
        })?;
        let signer = Signer::new(&self.certificates, key).map_err(|error| unfit(format!("tls.crt: {error}")))?;
        let anchor =
            self.anchors.iter().find(|anchor| signer.leads_to(anchor)).ok_or_else(|| {
                unfit("tls.crt does not lead to a certificate of ca.crt. Put its root there".to_owned())
            })?;
        let hash = hash_of(&[&self.certificates[..], std::slice::from_ref(anchor)].concat());
        Ok(Signing { signer: signer.into(), anchor: Some(anchor.clone()), hash })
    }
}

impl Bundle {
    pub fn read(object: ConfigMap) -> Result<Self, Alarm> {
        let unfit = |cause: String| Alarm::Unfit { what: "ConfigMap", name: TRUST_BUNDLE, cause };
        let pem = object.data.as_ref().and_then(|data| data.get(ANCHORS)).map_or("", String::as_str);
        let anchors = certificates_from_pem(pem.as_bytes()).map_err(|cause| unfit(format!("{ANCHORS}: {cause}")))?;
        let annotation = |name: &str| object.metadata.annotations.as_ref().and_then(|all| all.get(name));
        let introducing = annotation(INTRODUCING).into_iter().flat_map(|list| list.split(','));
        let introducing = introducing.filter(|hash| !hash.is_empty()).map(str::to_owned).collect();
        // A time that cannot be read is one that has just begun: nothing is taken away too early.
        let retiring_since = annotation(RETIRING_SINCE).map(|text| text.parse().unwrap_or_else(|_| Timestamp::now()));
        Ok(Self { anchors, introducing, retiring_since, object })
    }

    /// The ConfigMap of a new mesh.
    pub fn first(namespace: &str, pair: &Pair) -> ConfigMap {
        let metadata = ObjectMeta {
            name: Some(TRUST_BUNDLE.to_owned()),
            namespace: Some(namespace.to_owned()),
            labels: Some(labels()),
            ..ObjectMeta::default()
        };
        let data = BTreeMap::from([(ANCHORS.to_owned(), certificates_to_pem(&pair.anchors))]);
        ConfigMap { metadata, data: Some(data), ..ConfigMap::default() }
    }

    pub fn hash(&self) -> String {
        hash_of(&self.anchors)
    }

    pub fn has(&self, anchor: &CertificateDer<'_>) -> bool {
        self.anchors.contains(anchor)
    }

    /// Whether everybody trusts all of these.
    pub fn is_known_to_all(&self, anchors: &[CertificateDer<'static>]) -> bool {
        anchors
            .iter()
            .all(|anchor| self.has(anchor) && !self.introducing.contains(&hash_of(std::slice::from_ref(anchor))))
    }

    pub fn with(&self, added: &[CertificateDer<'static>]) -> ConfigMap {
        let mut introducing = self.introducing.clone();
        introducing.extend(added.iter().map(|anchor| hash_of(std::slice::from_ref(anchor))));
        let mut object = self.holding(&[&self.anchors[..], added].concat());
        let annotations = object.metadata.annotations.get_or_insert_default();
        annotations.insert(INTRODUCING.to_owned(), introducing.into_iter().collect::<Vec<_>>().join(","));
        annotations.remove(RETIRING_SINCE);
        object
    }

    /// The new anchors are everybody's: from now on they sign.
    pub fn switched(&self, anchors: &[CertificateDer<'static>], now: Timestamp) -> ConfigMap {
        let mut object = self.object.clone();
        let annotations = object.metadata.annotations.get_or_insert_default();
        annotations.remove(INTRODUCING);
        annotations.insert(SIGNED_BY.to_owned(), hash_of(anchors));
        annotations.insert(RETIRING_SINCE.to_owned(), now.to_string());
        object
    }

    /// With these anchors, and the rotation over.
    pub fn retired(&self, anchors: &[CertificateDer<'static>]) -> ConfigMap {
        let mut object = self.holding(anchors);
        let annotations = object.metadata.annotations.get_or_insert_default();
        annotations.remove(INTRODUCING);
        annotations.remove(RETIRING_SINCE);
        object
    }

    fn holding(&self, anchors: &[CertificateDer<'static>]) -> ConfigMap {
        let mut object = self.object.clone();
        object.data.get_or_insert_default().insert(ANCHORS.to_owned(), certificates_to_pem(anchors));
        object
    }
}

fn labels() -> BTreeMap<String, String> {
    let labels = [("app.kubernetes.io/name", "selvedge"), ("app.kubernetes.io/managed-by", "selvedge-controller")];
    labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into()
}

/// The Secret that holds the root, or an intermediate: type `kubernetes.io/tls`, as cert-manager writes it.
pub const SECRET: &str = "selvedge-ca";
/// The ConfigMap that every agent reads.
pub const TRUST_BUNDLE: &str = "selvedge-trust-bundle";
/// On the Secret: somebody asks for a new root.
pub const ROTATE: &str = "selvedge.dev/rotate-root";
/// On the Secret: the ConfigMap has been made of it once.
pub(super) const PUBLISHED: &str = "selvedge.dev/trust-bundle";
const MADE_BY: &str = "selvedge.dev/made-by";
/// On the ConfigMap.
const INTRODUCING: &str = "selvedge.dev/introducing";
const RETIRING_SINCE: &str = "selvedge.dev/retiring-since";
/// On the ConfigMap: moves when another anchor's certificates are to be used, so that agents ask for new ones at once.
pub(super) const SIGNED_BY: &str = crate::identity::SIGNED_BY;
const ANCHORS: &str = "ca.crt";
const PREVIOUS_CERTIFICATE: &str = "previous.crt";
const PREVIOUS_KEY: &str = "previous.key";
const PREVIOUS_ANCHORS: &str = "previous-ca.crt";
