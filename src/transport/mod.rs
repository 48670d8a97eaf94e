//! What carries a connection between nodes: mutual TLS, HBONE tunnels in it, and the relay between two ends.

#![forbid(unsafe_code)]

mod admission;
mod behalf;
pub mod fast;
pub mod hbone;
mod metrics;
pub mod relay;
mod stream;
pub mod tls;
pub mod unsent;

pub use admission::{Admission, AdmissionSettings, Permit};
pub use behalf::Behalf;
pub use metrics::describe_metrics;
pub use stream::{Socket, Stream};

/// Lets go of the buffers that the calling thread keeps for the bytes of later.
pub fn give_back_buffers() {
    fast::give_back_buffers();
    relay::give_back_buffers();
}
