//! The keys of an issuer, as it publishes them: RFC 7517.

use std::fmt;
use std::sync::Arc;

use aws_lc_rs::signature::{ED25519, ParsedPublicKey, RsaPublicKeyComponents};
use serde::Deserialize;
use serde_json::Value;

use super::algorithm::Algorithm;
use super::token::base64;

/// The keys of an issuer that signatures can be verified with.
#[derive(Clone)]
pub struct KeySet {
    /// As it was written: two sets that were written alike are alike.
    text: Arc<str>,
    keys: Vec<Key>,
    /// Why others are left out.
    passed_over: Vec<String>,
}

/// One key, bound to the algorithms that it may be used with.
#[derive(Clone)]
pub(super) struct Key {
    pub id: Option<String>,
    uses: Vec<(Algorithm, ParsedPublicKey)>,
}

/// Why a text is no set of keys, or one without a key that is any use.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum KeySetError {
    #[error("it is larger than {} KiB; an issuer's keys take a few", MOST_TEXT >> 10)]
    Large,
    #[error("it is no JSON Web Key Set, which looks like {{\"keys\": [...]}}: {0}")]
    Malformed(String),
    #[error("no key in it can verify a token{}", causes(.0))]
    Empty(Vec<String>),
}

impl KeySet {
    /// Reads a JSON Web Key Set. Keys that are of no use here are passed over, as RFC 7517, section 5, has it; a set without
    /// one that is any use is an error.
    pub fn parse(text: &str) -> Result<Self, KeySetError> {
        if text.len() > MOST_TEXT {
            return Err(KeySetError::Large);
        }
        let set: WrittenSet = serde_json::from_str(text).map_err(|error| KeySetError::Malformed(error.to_string()))?;
        if set.keys.len() > MOST_KEYS {
            return Err(KeySetError::Malformed(format!("{} keys, and {MOST_KEYS} is the most", set.keys.len())));
        }
        let (mut keys, mut passed_over) = (Vec::new(), Vec::new());
        for (at, written) in set.keys.into_iter().enumerate() {
            match Key::read(written) {
                Ok(key) => keys.push(key),
                Err(cause) => passed_over.push(format!("keys[{at}] {cause}")),
            }
        }
        if keys.is_empty() {
            return Err(KeySetError::Empty(passed_over));
        }
        Ok(Self { text: text.into(), keys, passed_over })
    }

    pub fn text(&self) -> &str {
        &self.text
    }

    /// Those among its keys that are of no use here, each with why.
    pub fn passed_over(&self) -> &[String] {
        &self.passed_over
    }

    pub fn len(&self) -> usize {
        self.keys.len()
    }

    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Those that a token may have been signed with: by its `kid`, where it has one and they have, and its algorithm.
    pub(super) fn candidates<'a>(
        &'a self,
        id: Option<&'a str>,
        algorithm: Algorithm,
    ) -> impl Iterator<Item = &'a ParsedPublicKey> {
        let named = self.keys.iter().filter(move |key| id.is_none() || key.id.is_none() || key.id.as_deref() == id);
        named.flat_map(move |key| key.uses.iter().filter(move |(of, _)| *of == algorithm).map(|(_, key)| key))
    }
}

impl PartialEq for KeySet {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for KeySet {}

impl fmt::Debug for KeySet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ids = self.keys.iter().map(|key| key.id.as_deref().unwrap_or("(unnamed)"));
        f.debug_list().entries(ids).finish()
    }
}

impl Key {
    fn read(written: Value) -> Result<Self, String> {
        let key: WrittenKey = serde_json::from_value(written).map_err(|error| format!("cannot be read: {error}"))?;
        if key.usage.as_deref().is_some_and(|usage| usage != "sig") {
            return Err("is not for signatures (use)".to_owned());
        }
        if key.operations.as_ref().is_some_and(|operations| !operations.iter().any(|one| one == "verify")) {
            return Err("is not for verifying (key_ops)".to_owned());
        }
        let mut uses = match key.kind.as_str() {
            "RSA" => key.rsa()?,
            "EC" => vec![key.elliptic()?],
            "OKP" => vec![key.edwards()?],
            other => return Err(format!("is of type {other:?}, and RSA, EC and OKP are known")),
        };
        if let Some(name) = &key.algorithm {
            let only = Algorithm::named(name);
            uses.retain(|(algorithm, _)| Some(*algorithm) == only);
            if uses.is_empty() {
                return Err(format!("is for {name:?}, which its type cannot do"));
            }
        }
        Ok(Self { id: key.id, uses })
    }
}

impl WrittenKey {
    /// RFC 7518, section 6.3.1.
    fn rsa(&self) -> Result<Vec<(Algorithm, ParsedPublicKey)>, String> {
        let (n, e) = (number(self.n.as_deref(), "n")?, number(self.e.as_deref(), "e")?);
        let bits = n.len() * 8 - n.first().map_or(0, |first| first.leading_zeros() as usize);
        if !(2048..=8192).contains(&bits) {
            return Err(format!("has {bits} bits, and 2048 to 8192 are taken"));
        }
        let components = RsaPublicKeyComponents { n, e };
        let parse = |algorithm: Algorithm| {
            let parsed = components.to_parsed_public_key(algorithm.rsa()?);
            Some(parsed.map(|key| (algorithm, key)).map_err(|cause| format!("is no RSA key: {cause}")))
        };
        Algorithm::ALL.into_iter().filter_map(parse).collect()
    }

    /// RFC 7518, section 6.2.1.
    fn elliptic(&self) -> Result<(Algorithm, ParsedPublicKey), String> {
        let curve = self.curve.as_deref().unwrap_or_default();
        let Some((algorithm, verification, length)) = Algorithm::of_curve(curve) else {
            return Err(format!("is of curve {curve:?}, and P-256, P-384 and P-521 are known"));
        };
        let mut point = vec![UNCOMPRESSED];
        for (name, written) in [("x", &self.x), ("y", &self.y)] {
            let coordinate = bytes(written.as_deref(), name)?;
            if coordinate.len() != length {
                return Err(format!("has {} bytes in {name}, and {curve} has {length}", coordinate.len()));
            }
            point.extend(coordinate);
        }
        let key = ParsedPublicKey::new(verification, point).map_err(|cause| format!("is no point of {curve}: {cause}"));
        Ok((algorithm, key?))
    }

    /// RFC 8037, section 2.
    fn edwards(&self) -> Result<(Algorithm, ParsedPublicKey), String> {
        let curve = self.curve.as_deref().unwrap_or_default();
        if curve != "Ed25519" {
            return Err(format!("is of curve {curve:?}, and Ed25519 is known"));
        }
        let key = ParsedPublicKey::new(&ED25519, bytes(self.x.as_deref(), "x")?);
        Ok((Algorithm::EdDsa, key.map_err(|cause| format!("is no Ed25519 key: {cause}"))?))
    }
}

#[derive(Deserialize)]
struct WrittenSet {
    keys: Vec<Value>,
}

#[derive(Deserialize)]
struct WrittenKey {
    #[serde(rename = "kty")]
    kind: String,
    #[serde(rename = "kid")]
    id: Option<String>,
    #[serde(rename = "use")]
    usage: Option<String>,
    #[serde(rename = "key_ops")]
    operations: Option<Vec<String>>,
    #[serde(rename = "alg")]
    algorithm: Option<String>,
    #[serde(rename = "crv")]
    curve: Option<String>,
    n: Option<String>,
    e: Option<String>,
    x: Option<String>,
    y: Option<String>,
}

fn bytes(written: Option<&str>, name: &str) -> Result<Vec<u8>, String> {
    let written = written.ok_or_else(|| format!("has no {name}"))?;
    base64(written).ok_or_else(|| format!("has a {name} that is no base64url"))
}

/// A positive number without the leading zeros that some issuers write.
fn number(written: Option<&str>, name: &str) -> Result<Vec<u8>, String> {
    let bytes = bytes(written, name)?;
    let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
    if zeros == bytes.len() {
        return Err(format!("has an {name} of nothing"));
    }
    Ok(bytes[zeros..].to_vec())
}

fn causes(passed_over: &[String]) -> String {
    if passed_over.is_empty() { String::new() } else { format!(": {}", passed_over.join("; ")) }
}

/// SEC 1, section 2.3.3.
const UNCOMPRESSED: u8 = 4;
const MOST_TEXT: usize = 256 << 10;
const MOST_KEYS: usize = 100;
