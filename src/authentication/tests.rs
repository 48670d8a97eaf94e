use std::sync::Arc;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{
    self, ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING, ECDSA_P521_SHA512_FIXED_SIGNING,
    EcdsaKeyPair, Ed25519KeyPair, KeyPair, RsaKeyPair,
};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::Request;
use http::request::Parts;
use serde_json::{Value, json};

use super::*;

mod published;
mod random;
mod requests;
mod verifying;

pub const NOW: i64 = 1_800_000_000;
pub const ISSUER: &str = "https://issuer.example";

/// An issuer's key of each type, made anew.
pub enum Signer {
    Rsa(Box<RsaKeyPair>),
    Elliptic(Algorithm, EcdsaKeyPair),
    Edwards(Ed25519KeyPair),
}

impl Signer {
    fn rsa() -> Self {
        Self::Rsa(Box::new(RsaKeyPair::generate(aws_lc_rs::rsa::KeySize::Rsa2048).unwrap()))
    }

    fn elliptic(algorithm: Algorithm) -> Self {
        let signing = match algorithm {
            Algorithm::Es256 => &ECDSA_P256_SHA256_FIXED_SIGNING,
            Algorithm::Es384 => &ECDSA_P384_SHA384_FIXED_SIGNING,
            _ => &ECDSA_P521_SHA512_FIXED_SIGNING,
        };
        Self::Elliptic(algorithm, EcdsaKeyPair::generate(signing).unwrap())
    }

    pub fn edwards() -> Self {
        Self::Edwards(Ed25519KeyPair::generate().unwrap())
    }

    /// The public key, as its issuer publishes it.
    pub fn published(&self, id: Option<&str>) -> Value {
        let mut key = match self {
            Self::Rsa(pair) => {
                let public = pair.public_key();
                let part = |number: &[u8]| URL_SAFE_NO_PAD.encode(number);
                json!({
                    "kty": "RSA",
                    "n": part(public.modulus().big_endian_without_leading_zero()),
                    "e": part(public.exponent().big_endian_without_leading_zero()),
                })
            }
            Self::Elliptic(algorithm, pair) => {
                let point = &pair.public_key().as_ref()[1..];
                let (x, y) = point.split_at(point.len() / 2);
                let curve = match algorithm {
                    Algorithm::Es256 => "P-256",
                    Algorithm::Es384 => "P-384",
                    _ => "P-521",
                };
                json!({"kty": "EC", "crv": curve, "x": URL_SAFE_NO_PAD.encode(x), "y": URL_SAFE_NO_PAD.encode(y)})
            }
            Self::Edwards(pair) => {
                json!({"kty": "OKP", "crv": "Ed25519", "x": URL_SAFE_NO_PAD.encode(pair.public_key().as_ref())})
            }
        };
        if let Some(id) = id {
            key["kid"] = id.into();
        }
        key
    }

    fn sign(&self, algorithm: Algorithm, message: &[u8]) -> Vec<u8> {
        let random = SystemRandom::new();
        match self {
            Self::Rsa(pair) => {
                let encoding = match algorithm {
                    Algorithm::Rs256 => &signature::RSA_PKCS1_SHA256,
                    Algorithm::Rs384 => &signature::RSA_PKCS1_SHA384,
                    Algorithm::Rs512 => &signature::RSA_PKCS1_SHA512,
                    Algorithm::Ps256 => &signature::RSA_PSS_SHA256,
                    Algorithm::Ps384 => &signature::RSA_PSS_SHA384,
                    _ => &signature::RSA_PSS_SHA512,
                };
                let mut signed = vec![0; pair.public_modulus_len()];
                pair.sign(encoding, &random, message, &mut signed).unwrap();
                signed
            }
            Self::Elliptic(_, pair) => pair.sign(&random, message).unwrap().as_ref().to_vec(),
            Self::Edwards(pair) => pair.sign(message).as_ref().to_vec(),
        }
    }

    pub fn token(&self, algorithm: Algorithm, claims: &Value) -> String {
        self.token_with(algorithm, &json!({"alg": algorithm.as_str()}), claims)
    }

    fn token_with(&self, algorithm: Algorithm, header: &Value, claims: &Value) -> String {
        let signed =
            format!("{}.{}", URL_SAFE_NO_PAD.encode(header.to_string()), URL_SAFE_NO_PAD.encode(claims.to_string()));
        let signature = self.sign(algorithm, signed.as_bytes());
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
    }
}

/// Claims of a token that holds.
pub fn claims() -> Value {
    json!({"iss": ISSUER, "sub": "alice", "aud": "shop", "exp": NOW + 300, "iat": NOW})
}

pub fn with(name: &str, value: Value) -> Value {
    let mut claims = claims();
    claims[name] = value;
    claims
}

fn keys(published: &[Value]) -> Keys {
    let set = KeySet::parse(&json!({"keys": published}).to_string()).unwrap();
    Keys { source: KeySource::Inline, found: Some(Found { set: Arc::new(set), until: None }) }
}

fn rule(keys: Keys) -> Rule {
    Rule {
        issuer: ISSUER.into(),
        audiences: Vec::new(),
        keys,
        places: vec![Place::bearer()],
        forward: false,
        claim_headers: Vec::new(),
        payload_header: None,
        opaque: false,
    }
}

fn head(target: &str, headers: &[(&str, &str)]) -> Parts {
    let mut request = Request::builder().uri(target);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(()).unwrap().into_parts().0
}
