//! The field's CA protocol, as istiod and istio-csr serve it: gRPC service `istio.v1.auth.IstioCertificateService`
//! ([`ca.proto`](https://github.com/istio/api/blob/master/security/v1alpha1/ca.proto)).

use std::collections::BTreeMap;

use prost_types::value::Kind;
use prost_types::{Struct, Value};

/// `istio.v1.auth.IstioCertificateRequest`
#[derive(Clone, PartialEq, prost::Message)]
pub struct CertificateRequest {
    /// PKCS #10 in PEM.
    #[prost(string, tag = "1")]
    pub csr: String,
    /// Seconds; the CA may shorten it.
    #[prost(int64, tag = "3")]
    pub validity_duration: i64,
    #[prost(message, optional, tag = "4")]
    pub metadata: Option<Struct>,
}

/// `istio.v1.auth.IstioCertificateResponse`
#[derive(Clone, PartialEq, prost::Message)]
pub struct CertificateResponse {
    /// PEM, leaf first, root last.
    #[prost(string, repeated, tag = "1")]
    pub cert_chain: Vec<String>,
}

impl CertificateRequest {
    /// A request of a node's agent for one of its pods' identities.
    pub fn impersonating(csr: String, validity_duration: i64, identity: &str) -> Self {
        let value = Value { kind: Some(Kind::StringValue(identity.to_owned())) };
        let fields = BTreeMap::from([(IMPERSONATED.to_owned(), value)]);
        Self { csr, validity_duration, metadata: Some(Struct { fields }) }
    }

    /// Whom the caller asks for.
    pub fn impersonated(&self) -> Option<&str> {
        match self.metadata.as_ref()?.fields.get(IMPERSONATED)?.kind.as_ref()? {
            Kind::StringValue(identity) => Some(identity),
            _ => None,
        }
    }
}

pub const SERVICE: &str = "istio.v1.auth.IstioCertificateService";
pub const CREATE_CERTIFICATE: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";
const IMPERSONATED: &str = "ImpersonatedIdentity";

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    /// The bytes by hand, from the encoding of Protocol Buffers.
    #[test]
    fn a_request_has_the_bytes_of_the_published_protocol() {
        let request = CertificateRequest::impersonating("PEM".to_owned(), 86_400, "spiffe://d/ns/a/sa/b");
        let mut wanted =
            b"\x0a\x03PEM\x18\x80\xa3\x05\x22\x30\x0a\x2e\x0a\x14ImpersonatedIdentity\x12\x16\x1a\x14".to_vec();
        wanted.extend_from_slice(b"spiffe://d/ns/a/sa/b");
        assert_eq!(request.encode_to_vec(), wanted);
        assert_eq!(CertificateRequest::decode(&wanted[..]).unwrap().impersonated(), Some("spiffe://d/ns/a/sa/b"));
    }

    #[test]
    fn a_request_that_names_nobody_asks_for_nobody() {
        let request = CertificateRequest { csr: "PEM".to_owned(), validity_duration: 1, metadata: None };
        assert_eq!(request.impersonated(), None);
        let number = Value { kind: Some(Kind::NumberValue(1.0)) };
        let fields = BTreeMap::from([(IMPERSONATED.to_owned(), number)]);
        let request = CertificateRequest { metadata: Some(Struct { fields }), ..request };
        assert_eq!(request.impersonated(), None);
    }
}
