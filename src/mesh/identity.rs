use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// The name under which one set of trust anchors speaks: `cluster.local`.
///
/// [SPIFFE ID, section 2.1](https://github.com/spiffe/spiffe/blob/main/standards/SPIFFE-ID.md#21-trust-domain):
/// lower-case letters, digits, dots, dashes and underscores, at most 255 bytes.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TrustDomain {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-' | b'_');
        if text.is_empty() || text.len() > 255 || !text.bytes().all(allowed) {
            return Err(IdentityError::TrustDomain(text.to_owned()));
        }
        Ok(Self(text.into()))
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Who a workload is: `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Identity {
    pub trust_domain: TrustDomain,
    pub namespace: Arc<str>,
    pub service_account: Arc<str>,
}

impl Identity {
    /// An identity, or `None` where the namespace or the service account is empty: nobody is not somebody.
    pub fn new(trust_domain: &TrustDomain, namespace: &Arc<str>, service_account: &Arc<str>) -> Option<Self> {
        if !is_segment(namespace) || !is_segment(service_account) {
            return None;
        }
        Some(Self {
            trust_domain: trust_domain.clone(),
            namespace: namespace.clone(),
            service_account: service_account.clone(),
        })
    }

    /// The identity without its scheme, as policies write principals: `cluster.local/ns/shop/sa/cart`.
    pub fn principal(&self) -> String {
        format!("{}/ns/{}/sa/{}", self.trust_domain, self.namespace, self.service_account)
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/ns/{}/sa/{}", self.trust_domain, self.namespace, self.service_account)
    }
}

impl FromStr for Identity {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refused = || IdentityError::Form(text.to_owned());
        let rest = text.strip_prefix("spiffe://").ok_or_else(refused)?;
        let parts: Vec<&str> = rest.split('/').collect();
        let [domain, "ns", namespace, "sa", account] = parts[..] else { return Err(refused()) };
        if !is_segment(namespace) || !is_segment(account) {
            return Err(refused());
        }
        Ok(Self { trust_domain: domain.parse()?, namespace: namespace.into(), service_account: account.into() })
    }
}

/// Why a text is no identity of ours.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("{0:?} is not a trust domain: lower-case letters, digits, '.', '-' and '_', at most 255 bytes")]
    TrustDomain(String),
    #[error("{0:?} is not of the form spiffe://<trust domain>/ns/<namespace>/sa/<service account>")]
    Form(String),
}

// SPIFFE ID, section 2.2: a path segment is not empty, not a dot segment, and of a small alphabet.
fn is_segment(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    !text.is_empty() && text != "." && text != ".." && text.bytes().all(allowed)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::mutation::mutated_text;

    #[test]
    fn an_identity_reads_back_what_it_writes() {
        let text = "spiffe://cluster.local/ns/shop/sa/cart";
        let id: Identity = text.parse().unwrap();
        assert_eq!(id.to_string(), text);
        assert_eq!(id.principal(), "cluster.local/ns/shop/sa/cart");
    }

    #[test]
    fn what_is_not_an_identity_is_refused() {
        for text in [
            "",
            "cluster.local/ns/a/sa/b",
            "spiffe:///ns/a/sa/b",
            "spiffe://UPPER/ns/a/sa/b",
            "spiffe://d/ns//sa/b",
            "spiffe://d/ns/a/sa/",
            "spiffe://d/ns/a/sa/..",
            "spiffe://d/ns/a/sa/b/c",
            "spiffe://d/ns/a/sa/b?q",
            "https://d/ns/a/sa/b",
        ] {
            assert!(text.parse::<Identity>().is_err(), "{text} was taken for an identity");
        }
    }

    #[test]
    fn an_empty_service_account_has_no_identity() {
        let domain: TrustDomain = "cluster.local".parse().unwrap();
        assert_eq!(Identity::new(&domain, &"shop".into(), &"".into()), None);
    }

    proptest! {
        #[test]
        fn what_is_taken_for_an_identity_is_written_as_it_was_read(
            text in mutated_text(&["spiffe://cluster.local/ns/shop/sa/cart", "spiffe://a.b/ns/x-y/sa/z.0"]),
        ) {
            if let Ok(identity) = text.parse::<Identity>() {
                prop_assert_eq!(identity.to_string(), text);
            }
        }
    }
}
