use std::collections::BTreeSet;
use std::fmt;

use super::object::{PolicyObject, PolicyRef, Unenforced};

/// One reason why a policy is not enforced as written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Problem {
    pub policy: PolicyRef,
    pub field: String,
    pub cause: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}", self.policy, self.field, self.cause)
    }
}

/// Says what this room's metrics are.
pub fn describe_metrics() {
    metrics::describe_gauge!(PROBLEMS, "Policies that are not enforced as written; each fails closed.");
}

pub(super) fn of(object: &PolicyObject) -> Vec<Problem> {
    let policy = object.reference();
    if let PolicyObject::Malformed(malformed) = object {
        let effect = if malformed.observes { "it is observed only" } else { "it denies all in its scope" };
        let cause = format!("{}; malformed: {effect} until it is mended", malformed.cause);
        return vec![Problem { policy, field: malformed.field.clone(), cause }];
    }
    let lacking: &[Unenforced] = match object {
        PolicyObject::RequestAuthentication(policy) => &policy.lacking,
        _ => &[],
    };
    object
        .unenforced()
        .iter()
        .chain(lacking)
        .map(|found| Problem { policy: policy.clone(), field: found.field.clone(), cause: found.cause.clone() })
        .collect()
}

/// Sets the gauge; called every few seconds.
pub fn record_metrics(problems: &[Problem]) {
    let policies: BTreeSet<&PolicyRef> = problems.iter().map(|problem| &problem.policy).collect();
    metrics::gauge!(PROBLEMS).set(policies.len() as f64);
}

const PROBLEMS: &str = "selvedge_policies_not_enforced";
