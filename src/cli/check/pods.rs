//! Whether every joined pod is captured.

use std::collections::BTreeMap;

use super::facts::Facts;
use super::{Area, Findings};
use crate::api::CaptureFailure;
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
