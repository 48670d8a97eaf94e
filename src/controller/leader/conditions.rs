//! What became of a policy, in its `status.conditions`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::api::{Api, DynamicObject, Patch, PatchParams};
use kube::core::ApiResource;
use serde_json::{Value, json};

use super::record;
use crate::api::{PolicyStatus, StatusCondition};
use crate::controller::mesh_node::MeshNodeView;
use crate::policy::{PolicyKind, decode};

/// Writes conditions where they say something else than what is so.
pub struct Conditions {
    client: Client,
    /// By kind and UID: what the decoder said of one generation.
    judged: HashMap<(String, String), (i64, Judgement)>,
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
    pub fn new(client: Client) -> Self {
        Self { client, judged: HashMap::new() }
    }

    /// About all policies of one kind.
    pub async fn tell(
        &mut self,
        kind: PolicyKind,
        resource: &ApiResource,
        policies: Vec<Arc<DynamicObject>>,
        nodes: &[Arc<MeshNodeView>],
    ) {
        let problems = problems_of(nodes);
        let mut seen = BTreeSet::new();
        for policy in policies {
            let metadata = &policy.metadata;
            let (Some(uid), Some(namespace), Some(name)) = (&metadata.uid, &metadata.namespace, &metadata.name) else {
                continue;
            };
            let id = (kind.to_string(), uid.clone());
            let generation = metadata.generation.unwrap_or_default();
            let judgement = match self.judged.get(&id) {
                Some((judged, judgement)) if *judged == generation => judgement.clone(),
                _ => {
                    let judgement = judge(kind, &policy);
                    self.judged.insert(id.clone(), (generation, judgement.clone()));
                    judgement
                }
            };
            seen.insert(id);
            let before: PolicyStatus = policy
                .data
                .get("status")
                .and_then(|status| serde_json::from_value(status.clone()).ok())
                .unwrap_or_default();
            let told = problems.get(&(kind.to_string(), namespace.clone(), name.clone()));
            let told = told.into_iter().flatten().filter(|(of, _)| of.is_none_or(|of| of == generation));
            let told: BTreeSet<&str> = told.map(|(_, problem)| problem.as_str()).collect();
            let now = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
            let wanted = conditions(&judgement, &told, !nodes.is_empty(), generation, &before, &now);
            if same(&wanted, &before.conditions) {
                continue;
            }
            let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), namespace, resource);
            let object = json!({
                "apiVersion": resource.api_version,
                "kind": resource.kind,
                "metadata": {"name": name, "namespace": namespace, "uid": uid},
                "status": {"conditions": wanted},
            });
            let manager = PatchParams::apply(MANAGER).force();
            let written = api.patch_status(name, &manager, &Patch::Apply(&object)).await;
            record("condition", &format!("{kind} {namespace}/{name}"), written.as_ref().map(drop));
        }
        self.judged.retain(|id, _| id.0 != kind.to_string() || seen.contains(id));
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
fn problems_of(nodes: &[Arc<MeshNodeView>]) -> BTreeMap<PolicyName, BTreeSet<(Option<i64>, String)>> {
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

/// As the schema has it, with room.
fn cut(text: &str) -> String {
    text.chars().take(4096).collect()
}

const MANAGER: &str = "selvedge-controller";

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
