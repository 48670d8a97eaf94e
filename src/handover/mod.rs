//! The small parent that keeps the listeners while a worker is replaced.
//!
//! `selvedge agent` is two processes. The parent ([`supervise`]) does nothing but hold a copy of every listener that
//! the worker opened inside a pod, and start the worker again when it dies. A listener lives as long as anybody
//! holds it, so while there is no worker the kernel goes on answering SYNs: new connections wait in the backlog
//! until the next worker has taken the listener over ([`Keeper::inherit`]). The queues of waiting SYNs are kept in the same
//! way. What the dead worker carried is reset by
//! the kernel, never cut so that it looks complete (DESIGN, section 11).
//!
//! The two speak over a socket pair (`SOCK_SEQPACKET`), one JSON message a packet, a descriptor beside it:
//!
//! | from | message | descriptor |
//! | --- | --- | --- |
//! | parent, at the worker's start | `{"offer":{"key":..}}`, once for each held listener | the listener |
//! | parent, after them | `{"offered":{"count":n}}` | |
//! | worker | `{"seq":1,"action":{"keep":{"key":..}}}` | the listener |
//! | worker | `{"seq":2,"action":{"forget":{"key":..}}}` | |
//! | parent, to each of these | `{"answer":{"seq":1,"refused":null}}` | |
//!
//! **Exit codes.** A worker that ends with 0, [`EXIT_USAGE`] or [`EXIT_CONFIG`] has ended in order: the parent ends
//! with the same code. Every other code, and every signal, is a death: the worker is started again, at once at
//! first, later with a delay that grows to ten seconds. When the parent itself was asked to stop (SIGTERM, SIGINT,
//! SIGQUIT) it passes that on and ends with whatever code the worker ends with, 128 + n for signal n.
//!
//! **When the parent dies** its worker is killed with it: the rules stay, and nothing leaves in plaintext.
//! The worker has a process group of its own, so that a Ctrl-C reaches it once, from the parent.

mod channel;
mod keeper;
mod parent;
mod restart;
mod shelf;
mod succession;
pub(crate) mod wire;

#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::mesh::PodUid;

pub use channel::{Channel, Door};
pub use keeper::Keeper;
pub use parent::supervise;
pub use succession::{Inheritance, Predecessor, Progress, Succession, Successor, Turn};

/// Which listener this is: one pod has one of each role and family, in one namespace. The queue of its waiting SYNs is
/// kept like a listener.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct ListenerKey {
    #[serde(serialize_with = "write_uid", deserialize_with = "read_uid")]
    pub pod: PodUid,
    pub role: Role,
    pub family: Family,
    /// Device and inode of the network namespace that the listener is in. While it is held, no other namespace can
    /// have that inode.
    pub netns: (u64, u64),
}

impl fmt::Display for ListenerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} of pod {} in network namespace {}", self.family, self.role, self.pod, self.netns.1)
    }
}

/// What a listener is for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Captured connections of the pod, port 15001.
    Outbound,
    /// Captured plaintext to the pod, port 15006.
    Plaintext,
    /// Tunnels to the pod, port 15008.
    Tunnel,
    /// SYNs that wait for an answer. Those go on waiting, and the next worker hears of them.
    Hold,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Outbound => "outbound listener",
            Self::Plaintext => "plaintext listener",
            Self::Tunnel => "tunnel listener",
            Self::Hold => "queue of SYNs",
        })
    }
}

/// The address family of a listener.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    V4,
    V6,
    Both,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
            Self::Both => "IPv4 and IPv6",
        })
    }
}

/// Whether this process is a worker: started by a parent that keeps its listeners.
pub fn is_worker() -> bool {
    std::env::var_os(FD_VARIABLE).is_some()
}

/// How often the parent has started a worker again before this one.
pub fn restarts() -> u64 {
    std::env::var(RESTARTS_VARIABLE).ok().and_then(|count| count.parse().ok()).unwrap_or(0)
}

/// Tells `selvedge_worker_restarts_total` to the recorder; a worker calls it once, after the recorder is there.
pub fn record_restarts() {
    metrics::counter!("selvedge_worker_restarts_total").absolute(restarts());
}

pub fn describe_metrics() {
    metrics::describe_counter!(
        "selvedge_worker_restarts_total",
        metrics::Unit::Count,
        "How often the worker has died and was started again since the agent started."
    );
}

/// The command line is wrong, as clap ends: starting again would not help.
pub const EXIT_USAGE: u8 = 2;
/// The configuration or the machine is such that the agent cannot run until a person changes it
/// (`EX_CONFIG` of sysexits.h): starting again would not help.
pub const EXIT_CONFIG: u8 = 78;

/// Number of the worker's end of the socket pair.
const FD_VARIABLE: &str = "SELVEDGE_HANDOVER_FD";
const RESTARTS_VARIABLE: &str = "SELVEDGE_RESTARTS";

fn write_uid<S: Serializer>(uid: &PodUid, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(uid.as_str())
}

fn read_uid<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PodUid, D::Error> {
    Arc::<str>::deserialize(deserializer).map(PodUid::new)
}
