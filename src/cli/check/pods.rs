//! Whether every joined pod is captured.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::facts::Facts;
use super::{Area, Findings};
use crate::api::CaptureFailure;
use crate::mesh::NamespacedName;
use crate::model::State;

pub fn judge(facts: &Facts, state: &State, findings: &mut Findings) {
    let nodes = match &facts.mesh_nodes {
        Ok(nodes) => nodes,
        Err(cause) => return findings.unknown(Area::Pods, format!("what the agents say: {cause}")),
    };
    let failures = nodes.iter().flat_map(|node| &node.status.failed);
    let failed: BTreeMap<&str, &CaptureFailure> = failures.map(|failure| (&*failure.uid, failure)).collect();
    let joined = state.mesh.workloads().filter(|workload| workload.membership.is_joined() && workload.pod.is_live());
    let mut captured = 0;
    for workload in joined.filter(|workload| workload.pod.node.is_some()) {
        if workload.captured {
            captured += 1;
            continue;
        }
        let name = workload.name();
        match failed.get(workload.uid().as_str()) {
            Some(failure) => findings.error(
                Area::Pods,
                format!("pod {name} is not captured: {}", failure.message),
                "see docs/troubleshooting.md, \"A pod is not captured\"",
            ),
            None => findings.warn(
                Area::Pods,
                format!("pod {name} is not captured yet"),
                "it takes a moment; if it stays so: does the agent of its node run, and what does its /ready say?",
            ),
        }
    }
    findings.ok(Area::Pods, format!("{captured} joined pods are captured"));
}

/// Whether an address has one pod: policy and identity go by it.
pub fn judge_addresses(state: &State, findings: &mut Findings) {
    let mut holders: BTreeMap<IpAddr, Vec<&NamespacedName>> = BTreeMap::new();
    // Those on the network of their node share its addresses.
    let own = state.mesh.workloads().filter(|workload| {
        let pod = &workload.pod;
        pod.is_live() && !pod.deleting && !pod.host_network
    });
    for workload in own {
        workload.pod.ips.iter().for_each(|ip| holders.entry(*ip).or_default().push(workload.name()));
    }
    for (ip, mut names) in holders.into_iter().filter(|(_, names)| names.len() > 1) {
        names.sort();
        let names: Vec<_> = names.into_iter().map(ToString::to_string).collect();
        findings.error(
            Area::Pods,
            format!("pods {} all report the address {ip}", names.join(" and ")),
            "an address has one pod, and the mesh tells pods apart by it: delete all but the one that has it (kubectl exec \
             POD -- ip address), and ask the CNI plugin's log why it was given twice",
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::fixture::pod;
    use crate::mesh::{self, MeshSettings, Object, Pod};
    use crate::model::{Delta, Model};

    #[test]
    fn two_pods_that_report_one_address_are_named() {
        let trust_domain = "cluster.local".parse().unwrap();
        let model = Model::new(MeshSettings { trust_domain, cluster_cidrs: Vec::new() });
        let pods = [
            pod("a", "1", &["10.0.0.1", "fd00::1"]),
            pod("b", "2", &["10.0.0.2", "fd00::1"]),
            Pod { host_network: true, ..pod("host", "3", &["10.0.0.1"]) },
            Pod { deleting: true, ..pod("leaving", "4", &["10.0.0.2"]) },
        ];
        model.apply(pods.map(|pod| Delta::Mesh(mesh::Delta::Apply(Object::Pod(pod)))));
        let mut findings = Findings::default();
        judge_addresses(&model.read(), &mut findings);
        let texts: Vec<&str> = findings.0.iter().map(|finding| finding.text.as_str()).collect();
        assert_eq!(texts, ["pods shop/a and shop/b all report the address fd00::1"]);
    }
}
