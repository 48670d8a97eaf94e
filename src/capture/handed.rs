//! Network namespaces that the container runtime handed over with the pod that they are of.

use std::collections::HashMap;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Notify;

use super::address;
use super::netns::NetNs;
use crate::mesh::PodUid;

/// What was handed over, by pod: the first and best proof of which namespace is a pod's. Shared.
#[derive(Clone, Debug, Default)]
pub struct HandedOver(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    pods: Mutex<HashMap<PodUid, NetNs>>,
    moved: Notify,
}

impl HandedOver {
    /// Takes a namespace for a pod, in place of one of an earlier sandbox of the same pod. Whoever hands it over must be
    /// root on the node; the addresses must still be in it.
    ///
    /// # Errors
    /// What was handed over is no network namespace, or not one that holds the addresses.
    pub fn put(&self, pod: PodUid, fd: OwnedFd, ips: &[IpAddr]) -> std::io::Result<NetNs> {
        let netns = NetNs::from_fd(fd)?;
        let held = address::addresses_in(&netns)?;
        if let Some(ip) = ips.iter().find(|ip| !held.contains(ip)) {
            return Err(std::io::Error::other(format!("{} does not hold {ip}", netns.id())));
        }
        self.0.pods.lock().unwrap_or_else(PoisonError::into_inner).insert(pod, netns.clone());
        self.0.moved.notify_one();
        Ok(netns)
    }

    /// Lets go of it, if it is still the one that is held: what is captured holds it by itself.
    pub fn forget(&self, pod: &PodUid, netns: &NetNs) {
        let mut pods = self.0.pods.lock().unwrap_or_else(PoisonError::into_inner);
        if pods.get(pod).is_some_and(|held| held.id() == netns.id()) {
            pods.remove(pod);
        }
    }

    pub(super) fn of(&self, pod: &PodUid) -> Option<NetNs> {
        self.0.pods.lock().unwrap_or_else(PoisonError::into_inner).get(pod).cloned()
    }

    pub(super) async fn moved(&self) {
        self.0.moved.notified().await;
    }
}
