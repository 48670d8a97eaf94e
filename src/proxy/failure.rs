use std::io;

use crate::capture::{Answer, Unreachable};
use crate::mesh::Reason;
use crate::transport::hbone::{OpenError, Refusal};
use crate::transport::tls::TlsError;

/// Why one connection did not come about: the reason code, and a sentence that names the thing and the next step.
#[derive(Debug)]
pub struct Failure {
    pub reason: Reason,
    pub detail: String,
    /// Whether another endpoint may be tried: nothing was delivered, and the cause may be this endpoint's alone.
    pub retry: bool,
    /// What the kernel said, where it did.
    pub kernel: Option<io::ErrorKind>,
}

impl Failure {
    pub fn new(reason: Reason, detail: impl Into<String>) -> Self {
        Self { reason, detail: detail.into(), retry: false, kernel: None }
    }

    /// A TCP connect that failed towards an application or an outside address.
    pub fn connect(what: &str, cause: &io::Error) -> Self {
        let reason = match cause.kind() {
            io::ErrorKind::TimedOut => Reason::Timeout,
            _ if matches!(cause.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM)) => {
                Reason::Limit
            }
            _ => Reason::Connect,
        };
        Self { reason, detail: format!("{what}: {cause}"), retry: true, kernel: Some(cause.kind()) }
    }

    /// A tunnel that could not be opened.
    pub fn open(peer: &str, error: &OpenError) -> Self {
        let reason = match error {
            OpenError::Refused { .. } => match error.refusal() {
                Some(Refusal::Denied) => Reason::Denied,
                Some(Refusal::Malformed) => Reason::Protocol,
                Some(Refusal::Silent) => Reason::Timeout,
                Some(Refusal::Unreachable) | None => Reason::Connect,
            },
            OpenError::Timeout(_) => Reason::Timeout,
            OpenError::Tls(error) => Self::tls(error).reason,
            OpenError::Connect(cause) => Self::connect(peer, cause).reason,
            OpenError::Broken(_) => Reason::Connect,
            OpenError::Lost(_) => Reason::Reset,
        };
        let kernel = match error {
            OpenError::Connect(cause) => Some(cause.kind()),
            _ => None,
        };
        Self { reason, detail: format!("tunnel to {peer}: {error}"), retry: error.retry(), kernel }
    }

    /// What a client is told whose `connect()` waits: what it would hear without a mesh, and "prohibited" where the mesh
    /// says no.
    pub fn answer(&self) -> Answer {
        match (&self.reason, self.kernel) {
            (Reason::Connect, Some(io::ErrorKind::HostUnreachable)) => Answer::Unreachable(Unreachable::Host),
            (Reason::Connect, Some(io::ErrorKind::NetworkUnreachable)) => Answer::Unreachable(Unreachable::Network),
            (Reason::Connect, Some(io::ErrorKind::PermissionDenied)) => Answer::Unreachable(Unreachable::Prohibited),
            (Reason::UnknownDestination, _) => Answer::Unreachable(Unreachable::Host),
            // Nobody answered; or whoever asks again finds things changed.
            (Reason::Timeout | Reason::Drain | Reason::Reset | Reason::Internal, _) => Answer::Ignore,
            (Reason::Connect | Reason::NoEndpoint | Reason::Protocol | Reason::Limit, _) => Answer::Refuse,
            (
                Reason::Policy(_)
                | Reason::Plaintext(_)
                | Reason::Denied
                | Reason::Identity
                | Reason::Tls
                | Reason::PeerUncaptured
                | Reason::Source,
                _,
            ) => Answer::Unreachable(Unreachable::Prohibited),
        }
    }

    /// A TLS handshake that failed.
    pub fn tls(error: &TlsError) -> Self {
        let reason = match error {
            TlsError::Own(_) => Reason::Identity,
            TlsError::Busy => Reason::Limit,
            _ => Reason::Tls,
        };
        Self::new(reason, error.to_string())
    }
}
