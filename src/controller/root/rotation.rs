//! What is to be done next about the root. Sans-io, and without memory: all that a rotation has come to stands in the
//! Secret and the ConfigMap, so that any replica goes on where another stopped.
//!
//! | phase | trust bundle | who signs | goes on when |
//! | --- | --- | --- | --- |
//! | `stable` | the root | the root | a new root is asked for, or somebody has replaced the Secret's |
//! | `introducing` | old and new | old | every MeshNode lists the hash of this bundle |
//! | `retiring` | old and new | new | no certificate of the old root is in use, or could be valid |
//! | `stable` | new | new | |

use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use rustls::pki_types::CertificateDer;

use super::material::{Bundle, CaSecret, Pair};

/// The next step of the leader.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step {
    Nothing,
    /// Put a new root into the Secret.
    MakeRoot,
    /// Take back the request for a new root: this one is not ours to replace, or one is on its way.
    DropRequest,
    /// Add these anchors to the bundle.
    Introduce(Vec<CertificateDer<'static>>),
    /// These nodes do not list the new bundle yet.
    AwaitNodes(Vec<String>),
    /// Everybody trusts the new anchors: sign by them.
    Switch,
    /// The last certificates of the old anchors end by then.
    AwaitRenewal(Timestamp),
    /// Take the old anchors away.
    Retire,
    /// Forget the key of the root before.
    DropPrevious,
}

/// How far a rotation is, for people.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    Stable,
    Introducing,
    Retiring,
}

impl Phase {
    pub const ALL: [Self; 3] = [Self::Stable, Self::Introducing, Self::Retiring];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stable => "stable",
            Self::Introducing => "introducing",
            Self::Retiring => "retiring",
        }
    }

    pub(super) fn of(secret: &CaSecret, bundle: &Bundle) -> Self {
        match () {
            () if !bundle.is_known_to_all(&secret.current.anchors) => Self::Introducing,
            () if bundle.retiring_since.is_some() => Self::Retiring,
            () => Self::Stable,
        }
    }
}

/// What one node's agent says of the bundle that it holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodeTrust {
    pub node: String,
    pub hash: Option<String>,
}

/// What is to be done next. `longest` is how long a certificate may live at most.
pub fn next(secret: &CaSecret, bundle: &Bundle, nodes: &[NodeTrust], now: Timestamp, longest: Duration) -> Step {
    let anchors = &secret.current.anchors;
    let missing: Vec<_> = anchors.iter().filter(|anchor| !bundle.has(anchor)).cloned().collect();
    if !missing.is_empty() {
        return Step::Introduce(missing);
    }
    if !bundle.introducing.is_empty() {
        let wanted = bundle.hash();
        let behind = nodes.iter().filter(|node| node.hash.as_ref() != Some(&wanted));
        let behind: Vec<String> = behind.map(|node| node.node.clone()).collect();
        return if behind.is_empty() { Step::Switch } else { Step::AwaitNodes(behind) };
    }
    let has_old = bundle.anchors.iter().any(|anchor| !anchors.contains(anchor));
    match bundle.retiring_since {
        // An anchor that was taken out of the Secret's ca.crt goes the same way.
        None if has_old => return Step::Switch,
        Some(since) if has_old => {
            let over = since + (longest + MARGIN);
            return if now >= over { Step::Retire } else { Step::AwaitRenewal(over) };
        }
        Some(_) => return Step::Retire,
        None => {}
    }
    match (&secret.previous, &secret.rotate) {
        (Some(_), _) => Step::DropPrevious,
        (None, Some(_)) if secret.is_ours => Step::MakeRoot,
        (None, Some(_)) => Step::DropRequest,
        (None, None) => Step::Nothing,
    }
}

/// Who signs: the Secret's own pair once everybody trusts it, until then the one before. `None`: whoever signed so far.
pub fn signing_pair<'a>(secret: &'a CaSecret, bundle: &Bundle) -> Option<&'a Pair> {
    if bundle.is_known_to_all(&secret.current.anchors) {
        return Some(&secret.current);
    }
    secret.previous.as_ref().filter(|previous| bundle.is_known_to_all(&previous.anchors))
}

/// For clocks that differ, and replicas that hear late of a switch.
const MARGIN: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests;
