//! Keys, certificates and the CA: who a pod is, proven.
//!
//! A key is made in memory, used for one certificate and never leaves the agent. [`Identities`] holds one certificate
//! for each identity that this node's pods run as and renews it at half life; a [`CertificateAuthority`] signs. The
//! [`verify`] module says whom a peer's certificate proves, and why it does not.

#![forbid(unsafe_code)]

pub mod anchors;
mod authority;
pub mod ca;
mod certificate;
mod metrics;
mod remote;
mod signer;
mod store;
mod trust;
pub mod verify;
pub mod wire;

pub use authority::{CaError, CertificateAuthority, Csr, SignedCertificate};
pub use ca::EmbeddedCa;
pub use certificate::WorkloadCertificate;
pub use metrics::describe_metrics;
pub use remote::{CaAddress, RemoteCa};
pub use signer::{NewRoot, Signer, Unfit, is_root};
pub use store::{CertificateError, CertificateStatus, Identities, IdentitySettings};
pub use trust::{
    SIGNED_BY, TrustBundle, TrustKeeper, TrustSource, certificates_from_pem, certificates_to_pem, hash_of,
};
pub use verify::Refusal;
