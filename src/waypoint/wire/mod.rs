//! What is decided on the raw bytes of a client, before any library has seen them. Sans-io.

mod body;
mod head;
mod inspect;
mod sniff;

pub use inspect::{Inspector, Limits, Next, Violation};
pub use sniff::{Heard, hear};
