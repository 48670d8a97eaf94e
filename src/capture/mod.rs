//! Finds the pods' network namespaces, programs their rules, keeps both true.
//!
//! | part | what it knows |
//! | --- | --- |
//! | `reconcile` | desired against actual, joining and leaving |
//! | `proof`, `handed` | which namespace is a pod's |
//! | `pod` | one pod's capture: made, checked, taken away |
//! | `rules`, `iptables`, `fingerprint` | the rules: their text, putting them in, seeing them changed |
//! | `hold`, `icmp` | SYNs that wait until the agent knows what to tell their senders |
//! | `routes`, `sysctl`, [`socket`] | what else capture needs of the kernel |
//! | `probe`, `nfqueue`, [`sock_diag`] | telling the node's probes from everything else |
//! | [`show`] | all of it, for people |

mod address;
mod fingerprint;
mod handed;
mod hold;
mod icmp;
mod iptables;
mod keeper;
mod netlink;
pub mod netns;
mod nfqueue;
mod own;
mod pod;
mod probe;
mod proof;
mod reconcile;
mod reset;
mod routes;
mod rules;
pub mod show;
pub mod sock_diag;
pub mod socket;
mod sysctl;

#[cfg(test)]
mod tests;

pub use address::{addresses_in, ipv6_usable};
pub use handed::HandedOver;
pub use hold::{Answer, HoldDirection, HoldQueue, Room, WaitingSyn};
pub use icmp::Unreachable;
pub use iptables::{BackEnd, CaptureUnavailable, Found};
pub use keeper::ListenerKeeper;
pub use netns::{NetNs, NetNsId};
pub use pod::{CaptureError, CapturedPod, Drift, Listeners};
pub use proof::Impostor;
pub use reconcile::{CaptureSettings, Event, Flows, OnExit, Order, Reconciler, ReconcilerError};
pub use routes::{Routing, Timeouts};
pub use rules::{IpVersion, Marks, Mode, OtherMesh, Ports};

/// Tells the unit and meaning of this room's metrics.
pub fn describe_metrics() {
    use metrics::{Unit, describe_counter, describe_gauge};
    describe_gauge!("selvedge_pods", Unit::Count, "Joined pods of this node, by state: captured, pending or failed.");
    describe_gauge!(
        "selvedge_capture_info",
        Unit::Count,
        "Always 1; its labels say how this node captures: mode (tproxy, redirect), back_end (nft, legacy), probes \
         (queued where the kernel has NFQUEUE, else plaintext), connect (truthful, eager)."
    );
    describe_gauge!(
        "selvedge_capture_impostors",
        Unit::Count,
        "Network namespaces that hold a joined pod's address and are not proven to be that pod's."
    );
    describe_counter!(
        "selvedge_capture_drift_repaired_total",
        Unit::Count,
        "Parts of capture that somebody else had changed and that were mended, by what it was."
    );
    describe_counter!(
        "selvedge_capture_probes_total",
        Unit::Count,
        "Connections from the node to probed ports, by verdict: probe (let through) or plaintext (under policy)."
    );
}
