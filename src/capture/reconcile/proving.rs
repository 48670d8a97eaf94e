//! Pods get their namespaces, and who else holds their addresses is reported.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::{MISSING_LOOKS, Reconciler, Tracked};
use crate::capture::address;
use crate::capture::proof::{Evidence, Held, Wanted};
use crate::mesh::{PodUid, Workload};

impl Reconciler {
    /// Looks over the node when a pod waits for its namespace, and now and then for impostors.
    pub(super) async fn gather(&mut self, desired: &HashMap<PodUid, Arc<Workload>>) {
        let waits = desired.keys().any(|uid| !self.pods.contains_key(uid));
        let age = self.evidence.as_ref().map(|(at, _)| at.elapsed());
        let fresh = age.is_some_and(|age| age < if waits { WAITING_LOOK } else { LOOK });
        if fresh || (desired.is_empty() && self.former.is_empty()) {
            return;
        }
        let (directory, kernel) = (self.settings.netns_dir.clone(), self.kernel.clone());
        let gathered = tokio::task::spawn_blocking(move || {
            let evidence = Evidence::gather(&directory, &kernel.node)?;
            Ok::<_, io::Error>((evidence, address::addresses_in(&kernel.node)?))
        });
        let (evidence, addresses) = match gathered.await {
            Ok(Ok(gathered)) => gathered,
            Ok(Err(error)) => return tracing::error!(%error, "The node's network namespaces cannot be looked over."),
            Err(error) => return tracing::error!(%error, "Looking over the node's network namespaces failed."),
        };
        // Link-local addresses are no probe's source, and mean another host on another link.
        let mut sorted: Vec<IpAddr> = addresses.iter().copied().filter(|ip| !is_link_local(*ip)).collect();
        sorted.sort_unstable();
        if sorted != self.node_addresses {
            self.node_addresses = sorted;
            self.model.update(|state| state.mesh.set_local_addresses(addresses));
        }
        self.former.retain(|cookie, (_, ips)| evidence.lingers(*cookie, ips));
        for pod in self.pods.values_mut() {
            let there = evidence.still_holds(pod.capture.netns.id(), &pod.capture.workload.pod.ips);
            pod.missing = if there { 0 } else { pod.missing.saturating_add(1) };
        }
        self.evidence = Some((Instant::now(), Arc::new(evidence)));
    }

    /// Gives pods their namespaces, and reports who else holds their addresses. Returns why each other pod waits.
    pub(super) fn prove(
        &mut self,
        desired: &HashMap<PodUid, Arc<Workload>>,
    ) -> BTreeMap<PodUid, (Arc<Workload>, String)> {
        let mut pending = BTreeMap::new();
        self.take_handed(desired);
        let Some((_, evidence)) = self.evidence.clone() else { return pending };
        let mut held = self.held();
        let mut impostors = HashSet::new();
        for (uid, workload) in desired {
            let wanted = wanted(workload);
            if !self.pods.contains_key(uid) {
                match evidence.prove(&wanted, &held) {
                    Ok(netns) => {
                        held.present.insert(netns.id(), uid.clone());
                        self.pods.insert(uid.clone(), Tracked::new(workload.clone(), netns));
                    }
                    Err(why) => drop(pending.insert(uid.clone(), (workload.clone(), why))),
                }
            }
            let proven = self.pods.get(uid).map(|pod| pod.capture.netns.id());
            impostors.extend(evidence.impostors(&wanted, proven, &held).into_iter().map(|i| (uid.clone(), i)));
        }
        for (uid, impostor) in impostors.difference(&self.reported) {
            let pod = desired.get(uid).map(|workload| workload.name().to_string()).unwrap_or_default();
            tracing::warn!(
                %pod, ip = %impostor.ip, netns = %impostor.netns, place = %impostor.place.display(),
                "Another network namespace holds the pod's address and is not proven to be the pod's; it gets nothing."
            );
        }
        metrics::gauge!("selvedge_capture_impostors").set(impostors.len() as f64);
        self.reported = impostors;
        pending
    }

    /// What the runtime itself handed over needs no other proof: it made the namespace, and named the pod.
    fn take_handed(&mut self, desired: &HashMap<PodUid, Arc<Workload>>) {
        for (uid, workload) in desired {
            let Some(netns) = self.settings.handed.of(uid) else { continue };
            match self.pods.get_mut(uid) {
                None => drop(self.pods.insert(uid.clone(), Tracked::new(workload.clone(), netns))),
                // A new sandbox of the same pod: the old one is on its way out.
                Some(pod) if pod.capture.netns.id() != netns.id() => pod.missing = MISSING_LOOKS,
                Some(_) => {}
            }
        }
    }

    pub(super) fn held(&self) -> Held {
        Held {
            present: self.pods.iter().map(|(uid, pod)| (pod.capture.netns.id(), uid.clone())).collect(),
            former: self.former.iter().map(|(cookie, (uid, _))| (*cookie, uid.clone())).collect(),
        }
    }
}

pub(super) fn wanted(workload: &Workload) -> Wanted {
    let pod = &workload.pod;
    Wanted { uid: pod.uid.clone(), ips: pod.ips.clone(), host_users: pod.host_users }
}

fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

/// How old a look over the node may be.
const LOOK: Duration = Duration::from_secs(5);
const WAITING_LOOK: Duration = Duration::from_millis(200);
