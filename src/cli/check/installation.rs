//! Whether Selvedge can be installed, and whether it is there as a whole.

use std::collections::BTreeSet;

use super::super::cluster::{AGENT, CONTROLLER, NAMESPACE};
use super::facts::{Facts, Right};
use super::{Area, Findings};
use crate::api::GROUP;

/// Whether this person may install.
pub fn judge_rights(rights: &[Right], findings: &mut Findings) {
    let (mut missing, mut unknown) = (Vec::new(), None);
    for right in rights {
        match &right.allowed {
            Ok(true) => {}
            Ok(false) => missing.push(right.resource),
            Err(cause) => unknown = Some(cause),
        }
    }
    if let Some(cause) = unknown {
        findings.unknown(Area::Installation, format!("your rights: {cause}"));
    }
    match missing[..] {
        [] if unknown.is_none() => findings.ok(Area::Installation, "you may create all that an installation creates"),
        [] => {}
        _ => findings.error(
            Area::Installation,
            format!("you may not create {}", missing.join(", ")),
            "ask for these rights, or let somebody who has them install (cluster-admin does)",
        ),
    }
}

/// Whether something is in the way of a new installation.
pub fn judge_absence(facts: &Facts, findings: &mut Findings) {
    match facts.agents() {
        Err(cause) => findings.unknown(Area::Installation, format!("the DaemonSets: {cause}")),
        Ok(Some(_)) => findings.ok(Area::Installation, "Selvedge is installed: an installation over it is an upgrade"),
        Ok(None) => findings.ok(Area::Installation, "Selvedge is not installed yet"),
    }
}

pub fn judge(facts: &Facts, findings: &mut Findings) {
    definitions(facts, findings);
    agents(facts, findings);
    controller(facts, findings);
}

fn definitions(facts: &Facts, findings: &mut Findings) {
    let crds = match &facts.crds {
        Ok(crds) => crds,
        Err(cause) => return findings.unknown(Area::Installation, format!("the CustomResourceDefinitions: {cause}")),
    };
    let established = crds.iter().filter(|crd| {
        let conditions = crd.status.iter().flat_map(|status| status.conditions.iter().flatten());
        conditions.into_iter().any(|condition| condition.type_ == "Established" && condition.status == "True")
    });
    let have: BTreeSet<&str> = established.filter_map(|crd| crd.metadata.name.as_deref()).collect();
    let missing: Vec<String> =
        KINDS.iter().map(|plural| format!("{plural}.{GROUP}")).filter(|name| !have.contains(name.as_str())).collect();
    match missing[..] {
        [] => findings.ok(Area::Installation, "every CustomResourceDefinition is there"),
        _ => findings.error(
            Area::Installation,
            format!("CustomResourceDefinitions are missing: {}", missing.join(", ")),
            "kubectl apply --server-side -k crd, or install the chart selvedge-crds",
        ),
    }
}

fn agents(facts: &Facts, findings: &mut Findings) {
    let set = match facts.agents() {
        Err(cause) => return findings.unknown(Area::Installation, format!("the agents: {cause}")),
        Ok(None) => {
            return findings.error(
                Area::Installation,
                format!("there is no DaemonSet {NAMESPACE}/{AGENT}"),
                "install Selvedge: kubectl apply -k daemonset/base, or the chart selvedge",
            );
        }
        Ok(Some(set)) => set,
    };
    let (wanted, ready) =
        set.status.as_ref().map_or((0, 0), |status| (status.desired_number_scheduled, status.number_ready));
    if ready < wanted {
        findings.error(
            Area::Installation,
            format!("{ready} of {wanted} agents are ready"),
            format!(
                "kubectl -n {NAMESPACE} get pods -o wide, then kubectl -n {NAMESPACE} logs of one that is not ready"
            ),
        );
    } else {
        findings.ok(Area::Installation, format!("{ready} of {wanted} agents are ready"));
    }
    nodes_without_agent(facts, findings);
    versions(facts, findings);
}

fn nodes_without_agent(facts: &Facts, findings: &mut Findings) {
    let (Ok(nodes), Ok(pods)) = (&facts.nodes, &facts.agent_pods) else { return };
    let served: BTreeSet<&str> = pods.iter().filter_map(|pod| pod.spec.as_ref()?.node_name.as_deref()).collect();
    let is_linux = |labels: &std::collections::BTreeMap<String, String>| {
        labels.get("kubernetes.io/os").is_none_or(|system| system == "linux")
    };
    let bare: Vec<&str> = nodes
        .iter()
        .filter(|node| node.metadata.labels.as_ref().is_none_or(is_linux))
        .filter_map(|node| node.metadata.name.as_deref())
        .filter(|name| !served.contains(name))
        .collect();
    if !bare.is_empty() {
        findings.error(
            Area::Installation,
            format!("no agent runs on {}", bare.join(", ")),
            "give the DaemonSet their tolerations and selectors; until then connections of captured pods there wait, and \
             pods that join stay uncaptured",
        );
    }
}

fn versions(facts: &Facts, findings: &mut Findings) {
    let nodes = match &facts.mesh_nodes {
        Ok(nodes) => nodes,
        Err(cause) => return findings.unknown(Area::Installation, format!("what the agents say: {cause}")),
    };
    let versions: BTreeSet<&str> =
        nodes.iter().map(|node| &*node.status.version).filter(|version| !version.is_empty()).collect();
    if versions.len() > 1 {
        let list = versions.into_iter().collect::<Vec<_>>().join(", ");
        findings.warn(
            Area::Installation,
            format!("agents of several versions run: {list}"),
            format!("is an upgrade under way? kubectl -n {NAMESPACE} rollout status daemonset/{AGENT}"),
        );
    }
}

fn controller(facts: &Facts, findings: &mut Findings) {
    let deployment = match &facts.controller {
        Err(cause) => return findings.unknown(Area::Installation, format!("the controller: {cause}")),
        Ok(None) => {
            return findings.warn(
                Area::Installation,
                format!("there is no Deployment {NAMESPACE}/{CONTROLLER}"),
                "right where istiod or istio-csr signs; else no certificate can be had and no status is written",
            );
        }
        Ok(Some(deployment)) => deployment,
    };
    let wanted = deployment.spec.replicas.unwrap_or(1);
    let ready = deployment.status.as_ref().and_then(|status| status.ready_replicas).unwrap_or(0);
    let text = format!("{ready} of {wanted} controllers are ready");
    let cure = format!("kubectl -n {NAMESPACE} logs deployment/{CONTROLLER}");
    match ready {
        0 => findings.error(Area::Installation, text, cure),
        _ if ready < wanted => findings.warn(Area::Installation, text, cure),
        _ => findings.ok(Area::Installation, text),
    }
}

/// The kinds that an agent needs to know.
const KINDS: [&str; 6] = [
    "authorizationpolicies",
    "externalauthorizers",
    "meshnodes",
    "peerauthentications",
    "requestauthentications",
    "trafficpolicies",
];
