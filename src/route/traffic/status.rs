//! What became of a policy about traffic, for its status.

use std::sync::Arc;

use super::{Fields, Lost, Table, Target, TrafficPolicy};
use crate::mesh::{NamespacedName, Waypoint};
use crate::route::status::{Condition, Refused, ServiceFacts};
use crate::route::{Route, RouteRef};

/// The conditions of a policy. `look` says why what a policy is about is none of it: it is not there, or nobody tells
/// the requests to it apart.
pub fn conditions(
    policy: &TrafficPolicy,
    table: &Table,
    look: impl Fn(&Target) -> Result<(), Refused>,
) -> Vec<Condition> {
    let amiss = amiss(policy, table, &look);
    let enforced = match amiss.first() {
        None => Condition {
            kind: ENFORCED,
            is_true: true,
            reason: ENFORCED,
            message: "It is in force as written.".to_owned(),
        },
        Some((reason, _)) => {
            let sentences: Vec<&str> = amiss.iter().map(|(_, text)| text.as_str()).collect();
            Condition { kind: ENFORCED, is_true: false, reason, message: sentences.join("; ") }
        }
    };
    [accepted(policy, table, &look), enforced].into()
}

/// Whether anything of a policy is in force.
pub fn accepted(policy: &TrafficPolicy, table: &Table, look: impl Fn(&Target) -> Result<(), Refused>) -> Condition {
    let no = |reason, message| Condition { kind: ACCEPTED, is_true: false, reason, message };
    let (mut first, mut is_about_any) = (None, false);
    for target in &policy.targets {
        match look(&target.target) {
            Ok(()) => is_about_any = true,
            Err((reason, message)) => drop(first.get_or_insert((reason, message))),
        }
    }
    if let Some((reason, message)) = first.filter(|_| !is_about_any) {
        return no(reason, message);
    }
    let notes =
        || policy.notes.iter().map(|note| format!("{}: {}", note.field, note.cause)).collect::<Vec<_>>().join("; ");
    let said = policy.fields.names().count() * policy.targets.len();
    if said == 0 {
        let message = if policy.notes.is_empty() { "The policy says nothing.".to_owned() } else { notes() };
        return no(INVALID, message);
    }
    let lost = table.lost(policy);
    if lost.len() >= said {
        return no(CONFLICTED, words(&lost));
    }
    Condition { kind: ACCEPTED, is_true: true, reason: ACCEPTED, message: "The policy is accepted.".to_owned() }
}

/// Everything about a policy that is not in force as written, each with a reason in one word.
pub fn amiss(policy: &TrafficPolicy, table: &Table, look: impl Fn(&Target) -> Result<(), Refused>) -> Vec<Refused> {
    let lost = table.lost(policy);
    let lost = (!lost.is_empty()).then(|| (CONFLICTED, words(&lost)));
    let away = policy.targets.iter().filter_map(|target| look(&target.target).err());
    let notes = policy.notes.iter().map(|note| (INVALID, format!("{}: {}", note.field, note.cause)));
    lost.into_iter().chain(away).chain(notes).collect()
}

/// Why nothing comes of these fields at a target, if so.
///
/// # Errors
/// The reason in one word, and a sentence.
pub fn look(
    target: &Target,
    fields: &Fields,
    service: impl Fn(&NamespacedName) -> Option<ServiceFacts>,
    route: impl Fn(&RouteRef) -> Option<Arc<Route>>,
) -> Result<(), Refused> {
    let missing = |text: String| Err((NO_TARGET, text));
    match target {
        Target::Service(name) => {
            let Some(facts) = service(name) else { return missing(format!("There is no Service {name}.")) };
            // How an endpoint of a connection is chosen, every agent sees to.
            if facts.waypoint != Waypoint::None || fields.names().all(|field| field == "loadBalancer") {
                return Ok(());
            }
            let text = format!(
                "Nobody tells the requests to Service {name} apart: annotate it, or its namespace, with \
                 selvedge.dev/waypoint=node."
            );
            Err(("NoWaypoint", text))
        }
        Target::Route(reference) => match route(reference) {
            Some(_) => Ok(()),
            None => missing(format!("There is no {target}.")),
        },
        Target::Rule(reference, rule) => match route(reference) {
            None => missing(format!("There is no {}.", Target::Route(reference.clone()))),
            Some(found) if found.rules.iter().all(|one| one.name.as_ref() != Some(rule)) => {
                missing(format!("{} has no rule of the name {rule}.", Target::Route(reference.clone())))
            }
            Some(_) => Ok(()),
        },
    }
}

fn words(lost: &[Lost]) -> String {
    let one = |lost: &Lost| format!("{} of {} is what {} says, which is older", lost.field, lost.target, lost.to);
    lost.iter().map(one).collect::<Vec<_>>().join("; ")
}

const ACCEPTED: &str = "Accepted";
const ENFORCED: &str = "Enforced";
const CONFLICTED: &str = "Conflicted";
const INVALID: &str = "Invalid";
const NO_TARGET: &str = "TargetNotFound";
