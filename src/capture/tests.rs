//! Against the real kernel: each test makes network namespaces of its own, which end with it.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::mpsc::UnboundedReceiver;

use super::fingerprint::Fingerprint;
use super::iptables::{BackEnd, Chosen, Found};
use super::netns::{self, NetNs};
use super::routes::{Routing, Timeouts, raise_timeouts};
use super::rules::{IpVersion, Marks, Mode, Phase, Ports, Probes, RuleSet};
use super::show::{Actual, CaptureStatus, PodState};
use super::{CaptureSettings, CapturedPod, Event, Flows, OnExit, Reconciler, sock_diag, socket};
use crate::handover::Keeper;
use crate::mesh::{self, Connect, Exclusions, NamespacedName, Object, Pod, PodUid};
use crate::model::{Delta, Model};

mod kernel;
mod reconcile;

/// Runs a test inside a new network namespace with `lo` up.
fn in_namespace<T: Send>(f: impl FnOnce() -> T + Send) -> T {
    netns::in_scratch(|| {
        sh("ip link set lo up");
        Ok(f())
    })
    .expect("a network namespace can be made: run as root, or under `unshare -Urn`")
}

fn sh(script: &str) -> String {
    let output = Command::new("sh").args(["-ec", script]).output().expect("sh runs");
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}
