//! HBONE: one HTTP/2 CONNECT stream for each connection, in mutual TLS, as Istio's node proxies speak it.

mod client;
mod connection;
mod flow;
mod head;
mod send_budget;
mod server;
#[cfg(test)]
mod tests;
mod window;

use std::io;
use std::sync::Arc;

pub use client::{OpenError, Pool, PoolKey, PoolSettings, PoolStatus};
pub use flow::Flow;
pub use head::ConnectHead;
pub use server::{Request, ServerSettings, serve};
pub use window::WindowBudget;

/// Why a server says no, by the status that its answer carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// 400: the request is not one that HBONE knows.
    Malformed,
    /// 401: policy.
    Denied,
    /// 500: the server cannot say: its pod is leaving, or something is not there yet. To be asked again.
    NotNow,
    /// 503: the application, or the next hop, could not be reached.
    Unreachable,
    /// 504: the application, or the next hop, did not answer in time.
    Silent,
}

impl Refusal {
    pub fn status(self) -> u16 {
        match self {
            Self::Malformed => 400,
            Self::Denied => 401,
            Self::NotNow => 500,
            Self::Unreachable => 503,
            Self::Silent => 504,
        }
    }

    pub fn from_status(status: u16) -> Option<Self> {
        let all = [Self::Malformed, Self::Denied, Self::NotNow, Self::Unreachable, Self::Silent];
        all.into_iter().find(|refusal| refusal.status() == status)
    }
}

/// Why a tunnel connection ended other than in order.
#[derive(Clone, Debug, thiserror::Error)]
pub enum HboneError {
    #[error("the peer did not send its first request within {0:?}")]
    FirstRequest(std::time::Duration),
    #[error("the peer answered no PING: the connection is dead")]
    Dead,
    #[error("the peer resets streams faster than they can be answered")]
    RapidReset,
    #[error("the tunnel broke: {0}")]
    Broken(Arc<str>),
    #[error("the tunnel's connection broke: {0}")]
    Io(Arc<io::Error>),
}

impl From<h2::Error> for HboneError {
    fn from(error: h2::Error) -> Self {
        if error.is_io() {
            return Self::Io(Arc::new(io_error(error)));
        }
        Self::Broken(error.to_string().into())
    }
}

/// What an HTTP/2 error is to someone who reads or writes a stream: everything but I/O is a reset.
fn io_error(error: h2::Error) -> io::Error {
    if error.is_io() {
        let text = error.to_string();
        return error.into_io().unwrap_or_else(|| io::Error::other(text));
    }
    io::Error::new(io::ErrorKind::ConnectionReset, error)
}
