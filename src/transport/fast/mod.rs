//! The fast tunnel: one flow at a time on a TLS connection, which then waits for the next. docs/fast-tunnel.md says how
//! it looks on the wire.

mod buffer;
mod client;
mod early;
mod flow;
mod frame;
mod header;
mod link;
mod pool;
mod record;
mod server;
mod stream;
#[cfg(test)]
mod tests;

pub(super) use buffer::give_back as give_back_buffers;
pub use client::Flow;
pub use early::Early;
pub use flow::After;
pub use header::Header;
pub use link::Link;
pub use pool::{Dial, Opened, Pool, PoolSettings};
pub use server::{Lent, Request, Server, ServerError, ServerSettings};
pub use stream::Stream;

use record::RecordError;

/// What a peer of the fast tunnel did wrong. The connection ends with it, and its flow is reset.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ProtocolError {
    #[error("a record holds no whole frames")]
    Frame,
    #[error("the header of a flow cannot be read")]
    Header,
    #[error("the header has version {0}; this side knows 1")]
    Version(u8),
    #[error("a frame came out of its order")]
    Order,
    #[error("an alert came: {0}")]
    Alert(u8),
    #[error("a TLS message came that has no place here")]
    Handshake,
    #[error(transparent)]
    Record(#[from] RecordError),
}

impl From<ProtocolError> for std::io::Error {
    fn from(error: ProtocolError) -> Self {
        Self::new(std::io::ErrorKind::InvalidData, error)
    }
}
