//! The roots that the mesh trusts, and whether every agent has them.

use std::time::{Duration, SystemTime};

use rustls::pki_types::CertificateDer;
use x509_parser::pem::Pem;

use super::super::cluster::{NAMESPACE, TRUST_BUNDLE};
use super::facts::Facts;
use super::{Area, Findings};
use crate::identity::hash_of;

pub fn judge(facts: &Facts, findings: &mut Findings) {
    let bundle = match &facts.trust_bundle {
        Err(cause) => return findings.unknown(Area::Certificates, format!("the trust bundle: {cause}")),
        Ok(None) => {
            return findings.error(
                Area::Certificates,
                format!("there is no ConfigMap {NAMESPACE}/{TRUST_BUNDLE}"),
                "the controller makes it once it runs; if it was there before, put it back from the Secret selvedge-ca",
            );
        }
        Ok(Some(map)) => map.data.as_ref().and_then(|data| data.get("ca.crt")).cloned().unwrap_or_default(),
    };
    let mut certificates = Vec::new();
    for pem in Pem::iter_from_buffer(bundle.as_bytes()) {
        match pem {
            Ok(pem) => certificates.push(CertificateDer::from(pem.contents)),
            Err(cause) => {
                let text = format!("ca.crt of ConfigMap {NAMESPACE}/{TRUST_BUNDLE} cannot be read: {cause}");
                return findings.error(Area::Certificates, text, "write PEM certificates, one after the other");
            }
        }
    }
    certificates.iter().for_each(|der| root(der, findings));
    if certificates.is_empty() {
        let text = format!("ConfigMap {NAMESPACE}/{TRUST_BUNDLE} holds no certificate under ca.crt");
        return findings.error(
            Area::Certificates,
            text,
            "put the mesh's root there: no peer can be believed without it",
        );
    }
    spread(facts, &hash_of(&certificates), findings);
}

fn root(der: &[u8], findings: &mut Findings) {
    let Ok((_, certificate)) = x509_parser::parse_x509_certificate(der) else {
        return findings.error(Area::Certificates, "a root cannot be read", "replace it in the trust bundle");
    };
    let end = certificate.validity().not_after;
    let until = u64::try_from(end.timestamp()).map(|seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
    let left = until.ok().and_then(|until| until.duration_since(SystemTime::now()).ok());
    let name = certificate.subject().to_string();
    match left {
        None => findings.error(
            Area::Certificates,
            format!("the root {name:?} has expired, {end}"),
            "rotate it: selvedge rotate-root",
        ),
        Some(left) if left < SOON => findings.warn(
            Area::Certificates,
            format!("the root {name:?} expires within 30 days, {end}"),
            "rotate it now, while both are good: selvedge rotate-root",
        ),
        Some(_) => findings.ok(Area::Certificates, format!("the root {name:?} is good until {end}")),
    }
}

/// Whether every agent trusts what the ConfigMap says.
fn spread(facts: &Facts, hash: &str, findings: &mut Findings) {
    let Ok(nodes) = &facts.mesh_nodes else { return };
    let behind: Vec<&str> = nodes
        .iter()
        .filter(|node| node.status.trust_bundle_hash != hash)
        .filter_map(|node| node.metadata.name.as_deref())
        .collect();
    match behind[..] {
        [] => findings.ok(Area::Certificates, format!("{} agents trust this bundle", nodes.len())),
        _ => findings.warn(
            Area::Certificates,
            format!("not yet trusted as it is by the agents of {}", behind.join(", ")),
            "it takes a moment; if it stays so, the agent there cannot read the ConfigMap: see its log",
        ),
    }
}

const SOON: Duration = Duration::from_secs(30 * 24 * 3600);
