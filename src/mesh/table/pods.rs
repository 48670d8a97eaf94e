//! Pods, and what of namespaces and nodes makes them what they are.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use super::super::{Identity, Membership, Namespace, Node, Pod, PodUid, Workload};
use super::{Change, Mesh};

impl Mesh {
    /// Takes the addresses that a starting pod was given, from whoever gave them. Its object says them only later; what
    /// it says until then is nothing, or the addresses of a sandbox that is gone.
    pub fn hand_over(&mut self, uid: &PodUid, sandbox: &str, ips: Vec<IpAddr>) {
        let Some(workload) = self.pods.get(uid).cloned() else { return };
        let stale = self.handed.get(uid).map_or_else(|| workload.pod.ips.clone(), |before| before.stale.clone());
        self.handed.insert(uid.clone(), Handed { sandbox: sandbox.into(), ips, stale: stale.clone() });
        self.apply_pod(Pod { ips: stale, ..Pod::clone(&workload.pod) });
    }

    /// Takes them back, if they are still those of this sandbox.
    pub fn take_back(&mut self, uid: &PodUid, sandbox: &str) {
        let Some(handed) = self.handed.get(uid).filter(|handed| &*handed.sandbox == sandbox).cloned() else { return };
        self.handed.remove(uid);
        if let Some(workload) = self.pods.get(uid).cloned() {
            self.apply_pod(Pod { ips: handed.stale, ..Pod::clone(&workload.pod) });
        }
    }

    pub(super) fn apply_pod(&mut self, mut pod: Pod) -> Change {
        let mut change = Change::default();
        match self.handed.get(&pod.uid) {
            Some(handed) if pod.ips == handed.stale && pod.is_live() => pod.ips.clone_from(&handed.ips),
            Some(_) => _ = self.handed.remove(&pod.uid),
            None => {}
        }
        let replaced = self.pods_by_name.get(&pod.name).filter(|uid| **uid != pod.uid).cloned();
        if let Some(old) = replaced {
            change.merge(self.remove_pod(&old));
        }
        if self.pods.get(&pod.uid).is_some_and(|old| *old.name() != pod.name) {
            change.merge(self.remove_pod(&pod.uid));
        }
        let previous = self.pods.get(&pod.uid).cloned();
        let workload = Arc::new(self.build(Arc::new(pod)));
        if previous.as_ref() == Some(&workload) {
            return change;
        }
        let uid = workload.uid().clone();
        let pod = &workload.pod;
        let held = held_addresses(pod);
        let before = previous.as_ref().map(|previous| held_addresses(&previous.pod)).unwrap_or_default();
        for ip in before.difference(&held) {
            self.claims.change(ip, |claims| claims.remove(&uid));
        }
        for ip in held.difference(&before) {
            self.claims.change(ip, |claims| claims.add(uid.clone()));
        }
        if let Some(previous) = previous.as_ref().filter(|previous| previous.pod.node != pod.node) {
            self.leave_node(previous);
        }
        if let Some(node) = &pod.node {
            self.pods_by_node.change(node, |pods| _ = pods.insert(uid.clone(), ()));
        }
        self.pods_by_name.insert(pod.name.clone(), uid.clone());
        self.pods_by_namespace.change(&pod.name.namespace, |pods| _ = pods.insert(uid.clone(), ()));
        self.network_policies.set_pod(pod);
        self.pods.insert(uid.clone(), workload);
        change.pods.insert(uid);
        change
    }

    pub(super) fn remove_pod(&mut self, uid: &PodUid) -> Change {
        let Some(workload) = self.pods.remove(uid) else { return Change::default() };
        self.handed.remove(uid);
        for ip in held_addresses(&workload.pod) {
            self.claims.change(&ip, |claims| claims.remove(uid));
        }
        self.leave_node(&workload);
        self.network_policies.remove_pod(uid);
        self.pods_by_name.remove(workload.name());
        self.pods_by_namespace.change(&workload.name().namespace, |pods| _ = pods.remove(uid));
        Change { pods: BTreeSet::from([uid.clone()]), ..Change::default() }
    }

    /// Takes a namespace, or takes it away. Its pods are made anew only if what it says of them changed.
    pub(super) fn set_namespace(&mut self, name: &Arc<str>, namespace: Option<Namespace>) -> Change {
        let settings = namespace.as_ref().map(|namespace| namespace.settings.clone());
        let old = match namespace {
            Some(namespace) => self.namespaces.insert(name.clone(), Arc::new(namespace)),
            None => self.namespaces.remove(name),
        };
        let (old, settings) = (old.map(|old| old.settings.clone()).unwrap_or_default(), settings.unwrap_or_default());
        if old == settings {
            return Change::default();
        }
        let uids = self.pods_by_namespace.get(name).map(|pods| pods.keys().cloned().collect());
        let uids: Vec<PodUid> = uids.unwrap_or_default();
        // A waypoint is no part of a pod as it is made, yet what stands between it and others.
        let passed_by =
            if old.waypoint == settings.waypoint { BTreeSet::new() } else { uids.iter().cloned().collect() };
        let mut change = self.rebuild(uids);
        change.pods.extend(passed_by);
        change
    }

    /// Takes a node, or takes it away. Its pods are made anew only if its zone changed.
    pub(super) fn set_node(&mut self, name: &Arc<str>, node: Option<Node>) -> Change {
        if self.nodes.get(name).map(|old| &**old) == node.as_ref() {
            return Change::default();
        }
        let zone = node.as_ref().and_then(|node| node.zone.clone());
        let old = self.nodes.remove(name);
        if let Some(old) = &old {
            old.pod_cidrs.iter().for_each(|range| self.ranges.remove(*range));
            for address in &old.addresses {
                match self.node_addresses.remove(address) {
                    Some(count) if count > 1 => drop(self.node_addresses.insert(*address, count - 1)),
                    _ => {}
                }
            }
        }
        if let Some(node) = node {
            node.pod_cidrs.iter().for_each(|range| self.ranges.insert(*range));
            for address in &node.addresses {
                let count = self.node_addresses.get(address).copied().unwrap_or_default();
                self.node_addresses.insert(*address, count + 1);
            }
            self.nodes.insert(name.clone(), Arc::new(node));
        }
        if old.and_then(|old| old.zone.clone()) == zone {
            return Change::default();
        }
        let uids = self.pods_by_node.get(name).map(|pods| pods.keys().cloned().collect());
        self.rebuild(uids.unwrap_or_default())
    }

    /// Takes what a node's agent says it has captured.
    pub(super) fn set_captured(&mut self, node: &Arc<str>, captured: BTreeSet<PodUid>) -> Change {
        let Some(of_nodes) = &mut self.captured else { return Change::default() };
        let captured = Arc::new(captured);
        let before = match captured.is_empty() {
            true => of_nodes.remove(node),
            false => of_nodes.insert(node.clone(), captured.clone()),
        };
        let before = before.unwrap_or_default();
        self.rebuild(before.symmetric_difference(&captured).cloned().collect())
    }

    fn is_captured(&self, pod: &Pod) -> bool {
        let Some(of_nodes) = &self.captured else { return true };
        pod.node.as_ref().and_then(|node| of_nodes.get(node)).is_some_and(|captured| captured.contains(&pod.uid))
    }

    fn leave_node(&mut self, workload: &Workload) {
        if let Some(node) = &workload.pod.node {
            self.pods_by_node.change(node, |pods| _ = pods.remove(workload.uid()));
        }
    }

    pub(super) fn rebuild(&mut self, uids: Vec<PodUid>) -> Change {
        let mut change = Change::default();
        for uid in uids {
            let Some(old) = self.pods.get(&uid) else { continue };
            let workload = self.build(old.pod.clone());
            if **old != workload {
                self.pods.insert(uid.clone(), Arc::new(workload));
                change.pods.insert(uid);
            }
        }
        change
    }

    fn build(&self, pod: Arc<Pod>) -> Workload {
        #[cfg(test)]
        super::super::work::step();
        let namespace = self.namespaces.get(&pod.name.namespace).map(|n| &n.settings);
        let membership = match self.gateway_of(&pod) {
            // It counts as captured all the same: whom it tunnels to knows it by its certificate.
            Some(_) => Membership::Outside("it is a waypoint, which speaks for itself"),
            None => Membership::of(&pod.name, pod.host_network, namespace, &pod.settings),
        };
        Workload {
            identity: Identity::new(&self.settings.trust_domain, &pod.name.namespace, &pod.service_account),
            captured: membership.is_joined() && self.is_captured(&pod),
            connect: pod.settings.connect.or(namespace.and_then(|namespace| namespace.connect)),
            membership,
            zone: pod.node.as_ref().and_then(|node| self.nodes.get(node)).and_then(|node| node.zone.clone()),
            pod,
        }
    }
}

/// What the container runtime gave a pod that its object does not say yet.
#[derive(Clone, Debug)]
pub(super) struct Handed {
    sandbox: Arc<str>,
    ips: Vec<IpAddr>,
    /// What the object said when they were given.
    stale: Vec<IpAddr>,
}

/// The addresses that a pod holds: none of its own on the host's network, none any more once it has finished.
fn held_addresses(pod: &Pod) -> BTreeSet<IpAddr> {
    if pod.host_network || !pod.is_live() {
        return BTreeSet::new();
    }
    pod.ips.iter().map(IpAddr::to_canonical).collect()
}
