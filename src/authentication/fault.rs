use std::fmt;

use super::algorithm::Algorithm;

/// Why a token does not hold.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Fault {
    Malformed(&'static str),
    /// Signed with something that is no signature of a public key: `none`, HMAC, or unheard of.
    Algorithm(String),
    /// Nobody here takes tokens of this issuer, or not at this place in a request.
    Issuer(String),
    /// There are no keys of the issuer, or none that were fetched lately.
    NoKeys(String),
    /// The issuer has no key of this name for this algorithm.
    UnknownKey(Option<String>, Algorithm),
    Signature,
    /// It ended, at this second.
    Expired(i64),
    /// It has no end.
    NoExpiry,
    /// It begins, or was issued, only then.
    NotYet(i64),
    /// It is for somebody else.
    Audience,
    /// The request has more than one.
    Several,
    /// The rule of its issuer has a field that is not known: it accepts none.
    Unenforced(String),
}

impl Fault {
    /// One word, for a label.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Malformed(_) => "malformed",
            Self::Algorithm(_) => "algorithm",
            Self::Issuer(_) => "issuer",
            Self::NoKeys(_) => "no-keys",
            Self::UnknownKey(..) => "unknown-key",
            Self::Signature => "signature",
            Self::Expired(_) | Self::NoExpiry => "expired",
            Self::NotYet(_) => "not-yet",
            Self::Audience => "audience",
            Self::Several => "several",
            Self::Unenforced(_) => "unenforced",
        }
    }

    /// A few words for the client, of which it learns nothing that it does not have: visible ASCII without `%`, `"` and `\`.
    pub fn message(&self) -> &'static str {
        match self {
            Self::Malformed(_) => "the token cannot be read",
            Self::Algorithm(_) => "the token is signed with an algorithm that is not taken",
            Self::Issuer(_) => "the issuer of the token is not known here",
            Self::NoKeys(_) | Self::Unenforced(_) => "tokens of this issuer cannot be verified now",
            Self::UnknownKey(..) => "the key that the token is signed with is not known",
            Self::Signature => "the signature of the token is not valid",
            Self::Expired(_) => "the token has expired",
            Self::NoExpiry => "the token has no expiry",
            Self::NotYet(_) => "the token is not valid yet",
            Self::Audience => "the token is for another audience",
            Self::Several => "the request has more than one token",
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed(why) => write!(f, "the token cannot be read: {why}"),
            Self::Algorithm(name) => write!(f, "the token is signed with {name:?}, which is not taken"),
            Self::Issuer(issuer) => write!(f, "no rule over this destination takes tokens of {issuer:?} at this place"),
            Self::NoKeys(issuer) => write!(f, "there are no keys of {issuer:?} that hold now"),
            Self::UnknownKey(Some(id), algorithm) => write!(f, "its issuer has no key {id:?} for {algorithm}"),
            Self::UnknownKey(None, algorithm) => write!(f, "its issuer has no key for {algorithm}"),
            Self::Expired(at) => write!(f, "the token expired at {at}"),
            Self::NotYet(at) => write!(f, "the token holds from {at} only"),
            Self::Unenforced(issuer) => write!(f, "the rule of {issuer:?} has a field that is not known"),
            Self::Signature | Self::NoExpiry | Self::Audience | Self::Several => f.write_str(self.message()),
        }
    }
}
