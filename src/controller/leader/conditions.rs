//! What became of a policy, in its `status.conditions`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use kube::Client;
use kube::api::DynamicObject;
use kube::core::ApiResource;
use kube::runtime::reflector::Store;
use serde_json::{Value, json};

use super::status::{ByGeneration, MANAGER, MOST_CHARACTERS, Told, now};
use crate::api::{MeshNode, PolicyStatus, StatusCondition};
use crate::policy::{PolicyKind, decode};

/// Writes the conditions of one kind's policies where they say something else than what is so.
pub struct Conditions {
    client: Client,
    kind: PolicyKind,
    resource: ApiResource,
    policies: Store<DynamicObject>,
    judged: ByGeneration<Judgement>,
}

/// What the decoder says of a policy.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Judgement {
    Malformed(String),
    /// With the fields that cannot be enforced as written.
    Read(Vec<String>),
}

/// Kind, namespace and name.
type PolicyName = (String, String, String);

impl Conditions {
    pub fn new(client: Client, kind: PolicyKind, resource: ApiResource, policies: Store<DynamicObject>) -> Self {
        Self { client, kind, resource, policies, judged: ByGeneration::default() }
    }

    pub async fn tell(&mut self, nodes: &[Arc<MeshNode>]) {
        let (kind, problems) = (self.kind.to_string(), problems_of(nodes));
        let policies = self.policies.state();
        self.judged.keep(policies.iter().map(|policy| &**policy));
        for policy in &policies {
            let metadata = &policy.metadata;
            let (Some(namespace), Some(name)) = (&metadata.namespace, &metadata.name) else { continue };
            let Some(judgement) = self.judged.of(policy, || judge(self.kind, policy)) else { continue };
            let generation = metadata.generation.unwrap_or_default();
            let before: PolicyStatus = policy
                .data
                .get("status")
                .and_then(|status| serde_json::from_value(status.clone()).ok())
                .unwrap_or_default();
            let told = problems.get(&(kind.clone(), namespace.clone(), name.clone()));
            let told = told.into_iter().flatten().filter(|(of, _)| of.is_none_or(|of| of == generation));
            let told: BTreeSet<&str> = told.map(|(_, problem)| problem.as_str()).collect();
            let wanted = conditions(&judgement, &told, !nodes.is_empty(), generation, &before, &now());
            if same(&wanted, &before.conditions) {
                continue;
            }
            let told = Told { client: &self.client, resource: &self.resource, object: policy, what: "condition" };
            told.apply(MANAGER, json!({"conditions": wanted})).await;
        }
    }
}

fn judge(kind: PolicyKind, policy: &DynamicObject) -> Judgement {
    let value = serde_json::to_value(policy).unwrap_or(Value::Null);
    match decode(kind, &value_of_user(value)) {
        Ok(object) => {
            Judgement::Read(object.unenforced().iter().map(|note| format!("{}: {}", note.field, note.cause)).collect())
        }
        Err(error) => Judgement::Malformed(error.to_string()),
    }
}

/// Without what no user writes.
fn value_of_user(mut value: Value) -> Value {
    if let Some(object) = value.as_object_mut() {
        object.remove("status");
    }
    value
}

/// What agents say that they cannot enforce, with the generation that they speak of.
fn problems_of(nodes: &[Arc<MeshNode>]) -> BTreeMap<PolicyName, BTreeSet<(Option<i64>, String)>> {
    let mut problems: BTreeMap<PolicyName, BTreeSet<_>> = BTreeMap::new();
    for one in nodes.iter().flat_map(|node| &node.status.policies_not_enforced) {
        let name = (one.kind.clone(), one.namespace.clone(), one.name.clone());
        let problem = match one.field.as_str() {
            "" => one.message.clone(),
            field => format!("{field}: {}", one.message),
        };
        problems.entry(name).or_default().insert((one.generation, problem));
    }
    problems
}

/// What shall stand in the status.
fn conditions(
    judgement: &Judgement,
    told: &BTreeSet<&str>,
    has_agents: bool,
    generation: i64,
    before: &PolicyStatus,
    now: &str,
) -> Vec<StatusCondition> {
    let condition = |kind: &str, status: &str, reason: &str, message: String| {
        let before = before.conditions.iter().find(|before| before.kind == kind && before.status == status);
        StatusCondition {
            kind: kind.to_owned(),
            status: status.to_owned(),
            observed_generation: Some(generation),
            last_transition_time: before.map_or(now, |before| &before.last_transition_time).to_owned(),
            reason: reason.to_owned(),
            message,
        }
    };
    match judgement {
        Judgement::Malformed(why) => vec![
            condition("Accepted", "False", "Malformed", cut(why)),
            condition(
                "Enforced",
                "False",
                "Malformed",
                "What of it was readable last stays in force; where there is none, it denies all in its scope."
                    .to_owned(),
            ),
        ],
        Judgement::Read(notes) => {
            let accepted = condition("Accepted", "True", "Accepted", "It is well-formed.".to_owned());
            let notes: BTreeSet<&str> = notes.iter().map(String::as_str).chain(told.iter().copied()).collect();
            let enforced = if !notes.is_empty() {
                let notes = notes.into_iter().collect::<Vec<_>>().join("; ");
                condition("Enforced", "False", "FailsClosed", cut(&notes))
            } else if has_agents {
                condition("Enforced", "True", "Enforced", "It is enforced as written.".to_owned())
            } else {
                condition("Enforced", "Unknown", "NoAgents", "No agent has told what it enforces.".to_owned())
            };
            vec![accepted, enforced]
        }
    }
}

/// Whether they say the same, whenever that was first said.
fn same(wanted: &[StatusCondition], written: &[StatusCondition]) -> bool {
    wanted.iter().all(|one| {
        written.iter().any(|other| {
            let other = StatusCondition { last_transition_time: one.last_transition_time.clone(), ..other.clone() };
            *one == other
        })
    })
}

fn cut(text: &str) -> String {
    text.chars().take(MOST_CHARACTERS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const THEN: &str = "2026-01-01T00:00:00Z";
    const NOW: &str = "2026-06-01T00:00:00Z";

    fn of(judgement: &Judgement, told: &[&str], before: &PolicyStatus, now: &str) -> Vec<StatusCondition> {
        conditions(judgement, &told.iter().copied().collect(), true, 3, before, now)
    }

    fn status<'a>(conditions: &'a [StatusCondition], kind: &str) -> &'a StatusCondition {
        conditions.iter().find(|one| one.kind == kind).unwrap()
    }

    #[test]
    fn a_well_formed_policy_is_accepted_and_enforced() {
        let told = of(&Judgement::Read(Vec::new()), &[], &PolicyStatus::default(), NOW);
        assert_eq!(status(&told, "Accepted").status, "True");
        assert_eq!(status(&told, "Enforced").status, "True");
        assert_eq!(status(&told, "Enforced").observed_generation, Some(3));
    }

    #[test]
    fn what_the_decoder_or_an_agent_cannot_enforce_is_named() {
        let told =
            of(&Judgement::Read(vec!["spec.b: no".to_owned()]), &["spec.a: neither"], &PolicyStatus::default(), NOW);
        assert_eq!(status(&told, "Accepted").status, "True");
        let enforced = status(&told, "Enforced");
        assert_eq!((enforced.status.as_str(), enforced.message.as_str()), ("False", "spec.a: neither; spec.b: no"));
    }

    #[test]
    fn a_malformed_policy_is_neither() {
        let told = of(&Judgement::Malformed("spec.action: no".to_owned()), &[], &PolicyStatus::default(), NOW);
        assert_eq!(status(&told, "Accepted").message, "spec.action: no");
        assert_eq!(status(&told, "Enforced").status, "False");
    }

    #[test]
    fn without_agents_nobody_knows_whether_it_is_enforced() {
        let told = conditions(&Judgement::Read(Vec::new()), &BTreeSet::new(), false, 1, &PolicyStatus::default(), NOW);
        assert_eq!(status(&told, "Enforced").status, "Unknown");
    }

    #[test]
    fn the_time_of_a_transition_moves_only_with_the_status() {
        let before = PolicyStatus { conditions: of(&Judgement::Read(Vec::new()), &[], &PolicyStatus::default(), THEN) };
        let after = of(&Judgement::Read(vec!["spec.b: no".to_owned()]), &[], &before, NOW);
        assert_eq!(status(&after, "Accepted").last_transition_time, THEN);
        assert_eq!(status(&after, "Enforced").last_transition_time, NOW);
        assert!(same(&before.conditions, &of(&Judgement::Read(Vec::new()), &[], &before, NOW)));
        assert!(!same(&after, &before.conditions));
    }
}
