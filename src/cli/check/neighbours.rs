//! Other meshes, and settings of CNIs that work against capture.

use super::facts::Facts;
use super::{Area, Findings};

pub fn judge(facts: &Facts, findings: &mut Findings) {
    let before = findings.0.len();
    other_meshes(facts, findings);
    cilium(facts, findings);
    if findings.0.len() == before {
        findings.ok(Area::Neighbours, "no other mesh, and no CNI setting that works against capture");
    }
}

fn other_meshes(facts: &Facts, findings: &mut Findings) {
    let sets = match &facts.daemon_sets {
        Ok(sets) => sets,
        Err(cause) => return findings.unknown(Area::Neighbours, format!("the DaemonSets: {cause}")),
    };
    for set in sets {
        let name = set.metadata.name.as_deref().unwrap_or_default();
        let Some((_, mesh)) = MESHES.iter().find(|(known, _)| *known == name) else { continue };
        let namespace = set.metadata.namespace.as_deref().unwrap_or_default();
        findings.warn(
            Area::Neighbours,
            format!("{mesh} is installed (DaemonSet {namespace}/{name})"),
            "let no namespace join both: a pod that has another mesh's rules is refused, and named as failed",
        );
    }
}

/// Cilium's own settings, as its ConfigMap has them.
fn cilium(facts: &Facts, findings: &mut Findings) {
    let settings = match &facts.cilium {
        Ok(Some(map)) => map.data.clone().unwrap_or_default(),
        Ok(None) => return,
        Err(cause) => return findings.unknown(Area::Neighbours, format!("Cilium's settings: {cause}")),
    };
    let is = |key: &str, value: &str| settings.get(key).is_some_and(|have| have == value);
    if !is("cni-exclusive", "false") {
        findings.warn(
            Area::Neighbours,
            "Cilium takes every other entry out of the nodes' CNI configuration (cni-exclusive)",
            "install Cilium with cni.exclusive=false, else the agent and Cilium rewrite the file in turn",
        );
    }
    let replaces_kube_proxy = is("kube-proxy-replacement", "true") || is("kube-proxy-replacement", "strict");
    if replaces_kube_proxy && !is("bpf-lb-sock-hostns-only", "true") {
        findings.warn(
            Area::Neighbours,
            "Cilium resolves Services inside pods, before the agent sees them (socket load balancing)",
            "install Cilium with socketLB.hostNamespaceOnly=true, else balancing, affinity and Service policies are Cilium's",
        );
    }
}

/// DaemonSets by which other meshes are known.
const MESHES: &[(&str, &str)] = &[
    ("ztunnel", "Istio ambient"),
    ("istio-cni-node", "Istio"),
    ("linkerd-cni", "Linkerd"),
    ("kuma-cni-node", "Kuma"),
    ("osm-cni", "Open Service Mesh"),
];
