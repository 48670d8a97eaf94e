use std::fmt;

use aws_lc_rs::signature::{self, RsaParameters, VerificationAlgorithm};

/// What a token may be signed with: RFC 7518, section 3.1, and RFC 8037. There is no `none` and no HMAC among them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Algorithm {
    Rs256,
    Rs384,
    Rs512,
    Ps256,
    Ps384,
    Ps512,
    Es256,
    Es384,
    Es512,
    /// With Ed25519.
    EdDsa,
}

impl Algorithm {
    pub const ALL: [Self; 10] = [
        Self::Rs256,
        Self::Rs384,
        Self::Rs512,
        Self::Ps256,
        Self::Ps384,
        Self::Ps512,
        Self::Es256,
        Self::Es384,
        Self::Es512,
        Self::EdDsa,
    ];

    /// By its registered name. `Ed25519` is RFC 9864's for what most issuers still call `EdDSA`.
    pub fn named(name: &str) -> Option<Self> {
        if name == "Ed25519" {
            return Some(Self::EdDsa);
        }
        Self::ALL.into_iter().find(|algorithm| algorithm.as_str() == name)
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Rs256 => "RS256",
            Self::Rs384 => "RS384",
            Self::Rs512 => "RS512",
            Self::Ps256 => "PS256",
            Self::Ps384 => "PS384",
            Self::Ps512 => "PS512",
            Self::Es256 => "ES256",
            Self::Es384 => "ES384",
            Self::Es512 => "ES512",
            Self::EdDsa => "EdDSA",
        }
    }

    /// Of those that an RSA key may be used with. Keys of fewer than 2048 bits verify nothing (RFC 7518, section 3.3).
    pub(super) fn rsa(self) -> Option<&'static RsaParameters> {
        Some(match self {
            Self::Rs256 => &signature::RSA_PKCS1_2048_8192_SHA256,
            Self::Rs384 => &signature::RSA_PKCS1_2048_8192_SHA384,
            Self::Rs512 => &signature::RSA_PKCS1_2048_8192_SHA512,
            Self::Ps256 => &signature::RSA_PSS_2048_8192_SHA256,
            Self::Ps384 => &signature::RSA_PSS_2048_8192_SHA384,
            Self::Ps512 => &signature::RSA_PSS_2048_8192_SHA512,
            Self::Es256 | Self::Es384 | Self::Es512 | Self::EdDsa => return None,
        })
    }

    /// The one of a curve, with the length of a coordinate (RFC 7518, section 6.2.1).
    pub(super) fn of_curve(curve: &str) -> Option<(Self, &'static dyn VerificationAlgorithm, usize)> {
        match curve {
            "P-256" => Some((Self::Es256, &signature::ECDSA_P256_SHA256_FIXED, 32)),
            "P-384" => Some((Self::Es384, &signature::ECDSA_P384_SHA384_FIXED, 48)),
            "P-521" => Some((Self::Es512, &signature::ECDSA_P521_SHA512_FIXED, 66)),
            _ => None,
        }
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
