//! What plugin and agent say to each other: one JSON message a packet (`SOCK_SEQPACKET`), the namespace beside the first.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// What the plugin says, once a connection.
#[derive(Serialize, Deserialize, Debug)]
#[serde(rename_all = "lowercase")]
pub(super) enum Request {
    /// With the descriptor of the pod's network namespace. Answered once the pod is captured, or is none of ours.
    Add {
        pod: PodNames,
        /// `CNI_CONTAINERID`, of the pod's sandbox.
        sandbox: String,
        ips: Vec<IpAddr>,
        /// The pod's own that are ours, as far as the runtime passes them.
        annotations: BTreeMap<String, String>,
    },
    /// The sandbox goes. Not answered.
    Del { pod: PodNames, sandbox: String },
}

/// Which pod.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub(super) struct PodNames {
    pub namespace: String,
    pub name: String,
    /// Older runtimes do not pass it.
    pub uid: Option<String>,
}

/// What the agent answers.
#[derive(Serialize, Deserialize, Debug)]
#[serde(rename_all = "lowercase")]
pub(super) enum Answer {
    /// The pod may start.
    Start,
    /// Not yet, and why.
    Refused(String),
}
