use std::io;

use rustls::AlertDescription;

use crate::capture::{Answer, Unreachable};
use crate::identity::CertificateError;
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
    pub finding: Finding,
}

/// What a failure says of the server and of policy. `docs/truthful-connect.md` has the table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Finding {
    /// Whoever knows has spoken: the application's host, the network, or policy. A client that waits hears it.
    Definite(Answer),
    /// The server is silent, and so is `connect()`.
    Silence,
    /// Something on the way failed that may work a moment later, and nothing is known of the server. A client that
    /// waits goes on waiting.
    Passing,
}

impl Failure {
    /// A failure that its reason tells all of.
    pub fn new(reason: Reason, detail: impl Into<String>) -> Self {
        Self { finding: Finding::of_reason(&reason), reason, detail: detail.into(), retry: false }
    }

    /// A TCP connect that failed towards an application or an outside address.
    pub fn connect(what: &str, cause: &io::Error) -> Self {
        let finding = match cause.kind() {
            // The second: it had accepted, and thought better of it.
            io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset => Finding::Definite(Answer::Refuse),
            _ => Finding::of_network(cause),
        };
        Self { reason: reason_of(cause), detail: format!("{what}: {cause}"), retry: true, finding }
    }

    /// A tunnel that could not be opened.
    pub fn open(peer: &str, error: &OpenError) -> Self {
        let reason = match error {
            OpenError::Refused { .. } => match error.refusal() {
                Some(Refusal::Denied) => Reason::Denied,
                Some(Refusal::Malformed) => Reason::Protocol,
                Some(Refusal::Silent) => Reason::Timeout,
                Some(Refusal::Unreachable | Refusal::NotNow) | None => Reason::Connect,
            },
            OpenError::Timeout(_) => Reason::Timeout,
            OpenError::Tls(error) => Self::tls(error).reason,
            OpenError::Connect(cause) => reason_of(cause),
            OpenError::Broken(_) => Reason::Connect,
            OpenError::Lost(_) => Reason::Reset,
        };
        Self {
            finding: Finding::of_tunnel(error, &reason),
            reason,
            detail: format!("tunnel to {peer}: {error}"),
            retry: error.retry(),
        }
    }

    /// A TLS handshake that failed.
    pub fn tls(error: &TlsError) -> Self {
        let reason = match error {
            TlsError::Own(_) => Reason::Identity,
            TlsError::Busy => Reason::Limit,
            _ => Reason::Tls,
        };
        Self { finding: Finding::of_handshake(error), ..Self::new(reason, error.to_string()) }
    }
}

impl Finding {
    /// What a client is told whose `connect()` waits.
    pub fn answer(self) -> Answer {
        match self {
            Self::Definite(answer) => answer,
            // It asks again, by its own clock, until its own time is up.
            Self::Silence | Self::Passing => Answer::Ignore,
        }
    }

    fn of_reason(reason: &Reason) -> Self {
        match reason {
            Reason::Timeout => Self::Silence,
            // The peer's node may be about to capture it.
            Reason::Drain | Reason::Reset | Reason::Internal | Reason::PeerUncaptured => Self::Passing,
            Reason::Connect | Reason::NoEndpoint | Reason::Protocol | Reason::Limit => Self::Definite(Answer::Refuse),
            // Of requests, whose connections have been accepted.
            Reason::CircuitBreaker | Reason::RetryBudget | Reason::RateLimit | Reason::Fault => {
                Self::Definite(Answer::Refuse)
            }
            Reason::UnknownDestination => Self::Definite(Answer::Unreachable(Unreachable::Host)),
            Reason::Policy(_)
            | Reason::Plaintext(_)
            | Reason::Token(_)
            | Reason::Authorizer(_)
            | Reason::Denied
            | Reason::Identity
            | Reason::Tls
            | Reason::Waypoint
            | Reason::Source => PROHIBITED,
        }
    }

    /// What the kernel heard of the way there: ICMP, a missing route, or nothing.
    fn of_network(cause: &io::Error) -> Self {
        match cause.kind() {
            io::ErrorKind::HostUnreachable => Self::Definite(Answer::Unreachable(Unreachable::Host)),
            io::ErrorKind::NetworkUnreachable => Self::Definite(Answer::Unreachable(Unreachable::Network)),
            io::ErrorKind::PermissionDenied => PROHIBITED,
            io::ErrorKind::TimedOut => Self::Silence,
            // This agent's own: no descriptor, no port, an address or interface that is not there yet.
            _ => Self::Passing,
        }
    }

    fn of_tunnel(error: &OpenError, reason: &Reason) -> Self {
        match error {
            OpenError::Refused { status } => match error.refusal() {
                Some(Refusal::NotNow) => Self::Passing,
                None if *status >= 500 => Self::Passing,
                _ => Self::of_reason(reason),
            },
            OpenError::Timeout(_) => Self::Silence,
            OpenError::Tls(error) => Self::of_handshake(error),
            // Who refuses or resets here is no application: the peer's agent is away.
            OpenError::Connect(cause) => Self::of_network(cause),
            OpenError::Broken(_) | OpenError::Lost(_) => Self::Passing,
        }
    }

    fn of_handshake(error: &TlsError) -> Self {
        match error {
            TlsError::Timeout(_) => Self::Silence,
            TlsError::Busy | TlsError::Io(_) => Self::Passing,
            TlsError::PeerRefused(AlertDescription::InternalError | AlertDescription::UserCanceled) => Self::Passing,
            TlsError::Own(CertificateError::Timeout { .. }) => Self::Passing,
            TlsError::Own(CertificateError::Ca { cause, .. }) if cause.may_pass() => Self::Passing,
            TlsError::Own(CertificateError::Ca { .. })
            | TlsError::NoCertificate
            | TlsError::Refused(_)
            | TlsError::NotTls
            | TlsError::Alpn
            | TlsError::PeerRefused(_)
            | TlsError::Protocol(_) => PROHIBITED,
        }
    }
}

fn reason_of(cause: &io::Error) -> Reason {
    match (cause.kind(), cause.raw_os_error()) {
        (io::ErrorKind::TimedOut, _) => Reason::Timeout,
        (_, Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM)) => Reason::Limit,
        _ => Reason::Connect,
    }
}

const PROHIBITED: Finding = Finding::Definite(Answer::Unreachable(Unreachable::Prohibited));
