//! The cluster's certificates and kubeconfigs, made anew for each cluster.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};
use serde_json::json;

/// A certificate authority that writes what it makes into a folder.
pub struct Authority {
    folder: PathBuf,
    issuer: Issuer<'static, KeyPair>,
    certificate: String,
}

impl Authority {
    pub fn new(folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let mut parameters = CertificateParams::default();
        parameters.distinguished_name.push(DnType::CommonName, "kubernetes");
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let key = KeyPair::generate()?;
        let certificate = parameters.self_signed(&key)?.pem();
        fs::write(folder.join("ca.crt"), &certificate)?;
        Ok(Self { folder: folder.to_owned(), issuer: Issuer::new(parameters, key), certificate })
    }

    /// Where everything lies that it made.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Makes `NAME.crt` and `NAME.key`.
    pub fn issue(&self, name: &str, subject: &Subject, reached_at: &[Reached]) -> Result<Issued> {
        let mut parameters = CertificateParams::default();
        parameters.distinguished_name.push(DnType::CommonName, subject.user);
        if let Some(group) = subject.group {
            parameters.distinguished_name.push(DnType::OrganizationName, group);
        }
        parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        for place in reached_at {
            parameters.subject_alt_names.push(match place {
                Reached::At(ip) => SanType::IpAddress(*ip),
                Reached::By(name) => SanType::DnsName(name.as_str().try_into()?),
            });
        }
        let key = KeyPair::generate()?;
        let issued = Issued { certificate: parameters.signed_by(&key, &self.issuer)?.pem(), key: key.serialize_pem() };
        fs::write(self.folder.join(format!("{name}.crt")), &issued.certificate)?;
        write_secret(&self.folder.join(format!("{name}.key")), &issued.key)?;
        Ok(issued)
    }

    /// A key pair to sign service account tokens with: `NAME.key`, and `NAME.pub` to check them.
    pub fn signing_key(&self, name: &str) -> Result<()> {
        let key = KeyPair::generate()?;
        write_secret(&self.folder.join(format!("{name}.key")), &key.serialize_pem())?;
        Ok(fs::write(self.folder.join(format!("{name}.pub")), key.public_key_pem())?)
    }

    /// A kubeconfig with everything inside, good at any place.
    pub fn kubeconfig(&self, at: &Path, server: &str, who: &Issued) -> Result<()> {
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "selvedge", "cluster": {
                "server": server,
                "certificate-authority-data": base64(self.certificate.as_bytes()),
            }}],
            "users": [{"name": "user", "user": {
                "client-certificate-data": base64(who.certificate.as_bytes()),
                "client-key-data": base64(who.key.as_bytes()),
            }}],
            "contexts": [{"name": "selvedge", "context": {"cluster": "selvedge", "user": "user"}}],
            "current-context": "selvedge",
        });
        write_secret(at, &serde_json::to_string_pretty(&config)?)
    }
}

/// Who a certificate says that its holder is: Kubernetes reads the user from the common name, the group from the
/// organisation.
pub struct Subject<'a> {
    pub user: &'a str,
    pub group: Option<&'a str>,
}

impl<'a> Subject<'a> {
    pub fn user(user: &'a str) -> Self {
        Self { user, group: None }
    }

    pub fn of(group: &'a str, user: &'a str) -> Self {
        Self { user, group: Some(group) }
    }
}

/// Where the holder of a certificate serves.
pub enum Reached {
    At(IpAddr),
    By(String),
}

pub struct Issued {
    certificate: String,
    key: String,
}

fn write_secret(path: &Path, text: &str) -> Result<()> {
    let file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(path);
    file.and_then(|mut file| file.write_all(text.as_bytes()))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// RFC 4648 section 4.
fn base64(bytes: &[u8]) -> String {
    let letter = |index: u32| char::from(ALPHABET[(index & 63) as usize]);
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let padded = [chunk[0], chunk.get(1).copied().unwrap_or(0), chunk.get(2).copied().unwrap_or(0)];
        let word = u32::from_be_bytes([0, padded[0], padded[1], padded[2]]);
        for position in 0..4 {
            text.push(if position <= chunk.len() { letter(word >> (18 - 6 * position)) } else { '=' });
        }
    }
    text
}

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

#[cfg(test)]
mod tests {
    use super::*;

    /// The vectors of RFC 4648 section 10.
    #[test]
    fn base64_is_as_the_standard_says() {
        let vectors =
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg=="), ("fooba", "Zm9vYmE=")];
        for (plain, encoded) in vectors {
            assert_eq!(base64(plain.as_bytes()), encoded);
        }
    }
}
