//! Policies that are not in force as written.

use std::collections::BTreeMap;

use super::facts::Facts;
use super::{Area, Findings};
use crate::source::Problem;

/// `problems` is what this program makes of the objects, `facts` what the agents say of them.
pub fn judge(facts: &Facts, problems: &[Problem], findings: &mut Findings) {
    let before = findings.0.len();
    for problem in problems {
        let text = format!("{}: {}", problem.object, problem.field);
        findings.error(Area::Policies, text.trim_end_matches([':', ' ']).to_owned(), problem.cause.clone());
    }
    // What only an agent can tell.
    let mut told: BTreeMap<(String, &str, &str), Vec<&str>> = BTreeMap::new();
    for node in facts.mesh_nodes.iter().flatten() {
        for policy in &node.status.policies_not_enforced {
            let object = format!("{} {}/{}", policy.kind, policy.namespace, policy.name);
            if !problems.iter().any(|problem| problem.object == object && problem.field == policy.field) {
                let name = node.metadata.name.as_deref().unwrap_or_default();
                told.entry((object, &policy.field, &policy.message)).or_default().push(name);
            }
        }
    }
    for ((object, field, message), nodes) in told {
        let text = format!("{object}: {field} is not enforced on {}", nodes.join(", "));
        findings.error(Area::Policies, text, message);
    }
    if findings.0.len() == before {
        findings.ok(Area::Policies, "every object that the mesh reads is in force as written");
    }
}
