//! One token, in compact form: RFC 7515, section 3.1.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Deserialize;
use serde::de::{Deserializer, Error, MapAccess, Visitor};
use serde_json::{Map, Value};

use super::algorithm::Algorithm;
use super::fault::Fault;

/// A token that has been read. Nothing in it is to be believed before its signature was verified.
#[derive(Clone, PartialEq, Debug)]
pub struct Token<'a> {
    /// What the signature is over.
    pub(super) signed: &'a [u8],
    /// The claims as they were sent.
    pub(super) payload: &'a str,
    pub(super) algorithm: Algorithm,
    pub(super) key_id: Option<String>,
    pub(super) claims: Map<String, Value>,
    pub(super) signature: Vec<u8>,
}

impl<'a> Token<'a> {
    pub fn parse(text: &'a str) -> Result<Self, Fault> {
        if text.len() > MOST {
            return Err(Fault::Malformed("it is longer than 16 KiB"));
        }
        let mut parts = text.split('.');
        let (Some(header), Some(payload), Some(signature), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(Fault::Malformed("it is not three parts with dots between them"));
        };
        let decoded = base64(header).ok_or(Fault::Malformed("its header is no base64url"))?;
        let written: Header = serde_json::from_slice(&decoded)
            .map_err(|_| Fault::Malformed("its header is no JSON object with an alg"))?;
        // RFC 7515, section 4.1.11: what is critical and not understood makes it invalid, and nothing is understood.
        if written.critical.is_some() {
            return Err(Fault::Malformed("its header has a crit, and no extension is known"));
        }
        let algorithm =
            Algorithm::named(&written.algorithm).ok_or_else(|| Fault::Algorithm(shown(&written.algorithm)))?;
        let claims = base64(payload).ok_or(Fault::Malformed("its claims are no base64url"))?;
        let Claims(claims) = serde_json::from_slice(&claims)
            .map_err(|_| Fault::Malformed("its claims are no JSON object with each claim once"))?;
        let signature = base64(signature).ok_or(Fault::Malformed("its signature is no base64url"))?;
        let signed = &text.as_bytes()[..header.len() + 1 + payload.len()];
        Ok(Self { signed, payload, algorithm, key_id: written.key_id, claims, signature })
    }

    /// Who says to have issued it.
    pub fn issuer(&self) -> Option<&str> {
        self.claims.get("iss")?.as_str()
    }
}

/// Without padding, and with nothing that could be written in two ways.
pub(super) fn base64(text: &str) -> Option<Vec<u8>> {
    URL_SAFE_NO_PAD.decode(text).ok()
}

/// What a client wrote, fit for a log.
pub(super) fn shown(text: &str) -> String {
    text.chars().take(MOST_SHOWN).collect()
}

#[derive(Deserialize)]
struct Header {
    #[serde(rename = "alg")]
    algorithm: String,
    #[serde(rename = "kid")]
    key_id: Option<String>,
    #[serde(rename = "crit")]
    critical: Option<Value>,
}

/// RFC 7519, section 4: a claim that is there twice may be refused, and two readers need not agree which one holds.
struct Claims(Map<String, Value>);

impl<'de> Deserialize<'de> for Claims {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Once;
        impl<'de> Visitor<'de> for Once {
            type Value = Claims;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Claims, A::Error> {
                let mut claims = Map::new();
                while let Some((name, value)) = fields.next_entry::<String, Value>()? {
                    if claims.insert(name, value).is_some() {
                        return Err(A::Error::custom("a claim that is there twice"));
                    }
                }
                Ok(Claims(claims))
            }
        }
        deserializer.deserialize_map(Once)
    }
}

const MOST: usize = 16 << 10;
const MOST_SHOWN: usize = 100;
