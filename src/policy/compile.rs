use std::sync::Arc;

use super::matcher::{Bias, Matcher, Subject};
use super::object::{Action, AuthorizationPolicy, Malformed, PolicyKind, PolicyRef, Rule, Terms};
use super::word;
use crate::mesh::TrustDomain;

/// One policy, ready to be held against connections: its action, and whether it matches.
#[derive(Debug)]
pub(super) struct Compiled {
    pub(super) reference: PolicyRef,
    pub(super) effect: Effect,
    /// Who is asked about what it matches.
    pub(super) provider: Option<Arc<str>>,
    pub(super) reads: Reads,
    matching: Matching,
}

/// Whether what stands over a destination has to read requests.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Reads {
    Nothing,
    /// To tell what it would do: it changes no verdict.
    ToObserve,
    ToDecide,
}

/// What a match does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Effect {
    Allow,
    Deny,
    /// Each request is denied unless this authorizer lets it pass.
    Ask,
    Audit,
    /// Dry-run of ALLOW, of DENY.
    WouldAllow,
    WouldDeny,
}

#[derive(Debug)]
enum Matching {
    /// Everything, and why.
    Always(String),
    /// Nothing, and why.
    Never(&'static str),
    Rules(Vec<CompiledRule>),
}

#[derive(Debug)]
struct CompiledRule {
    from: Vec<Group>,
    to: Vec<Group>,
    when: Vec<Group>,
    /// It has a part that cannot be enforced, and may therefore match nothing.
    dead: bool,
}

/// One source, operation or condition.
#[derive(Debug)]
struct Group {
    matchers: Vec<Matcher>,
    words: String,
}

/// How one rule, or the policy as a whole, fared.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Outcome {
    /// Counted from 1; none where the policy matches, or fails to, as a whole.
    pub(super) rule: Option<usize>,
    pub(super) matched: bool,
    pub(super) words: String,
}

impl Compiled {
    pub(super) fn of(policy: &AuthorizationPolicy, trust_domain: &TrustDomain) -> Self {
        let effect = match (policy.action, policy.dry_run) {
            (Action::Allow, false) => Effect::Allow,
            (Action::Allow, true) => Effect::WouldAllow,
            // What cannot be read of it may have been why nobody is to be let in.
            (Action::Custom, false) if !policy.opaque && policy.provider.is_some() => Effect::Ask,
            (Action::Deny | Action::Custom, false) => Effect::Deny,
            (Action::Deny | Action::Custom, true) => Effect::WouldDeny,
            (Action::Audit, _) => Effect::Audit,
        };
        let denies = matches!(effect, Effect::Deny | Effect::Ask | Effect::WouldDeny);
        let matching = match (policy.opaque, denies) {
            // What cannot be read may have been its rules.
            (true, true) if policy.rules.is_empty() => {
                Matching::Always("it has a field that cannot be enforced, and no rules: it denies all".into())
            }
            (true, false) => Matching::Never("it has a field that cannot be enforced, so none of its rules matches"),
            _ => {
                let bias = if denies { Bias::Towards } else { Bias::Away };
                Matching::Rules(policy.rules.iter().map(|rule| CompiledRule::of(rule, bias, trust_domain)).collect())
            }
        };
        let reads = match policy.rules.iter().any(Rule::reads_requests) {
            _ if effect == Effect::Ask => Reads::ToDecide,
            true if matches!(effect, Effect::Allow | Effect::Deny) => Reads::ToDecide,
            true => Reads::ToObserve,
            false => Reads::Nothing,
        };
        Self {
            reference: PolicyRef { kind: PolicyKind::AuthorizationPolicy, name: policy.name.clone() },
            effect,
            provider: policy.provider.clone(),
            reads,
            matching,
        }
    }

    pub(super) fn malformed(policy: &Malformed) -> Self {
        Self {
            reference: policy.reference.clone(),
            effect: if policy.observes { Effect::WouldDeny } else { Effect::Deny },
            provider: None,
            reads: Reads::Nothing,
            matching: Matching::Always(format!("it is malformed and denies all: {}: {}", policy.field, policy.cause)),
        }
    }

    /// The first rule that matches, or none.
    pub(super) fn matches(&self, subject: &Subject<'_>) -> Option<Outcome> {
        match &self.matching {
            Matching::Always(why) => Some(Outcome { rule: None, matched: true, words: why.clone() }),
            Matching::Never(_) => None,
            Matching::Rules(rules) => {
                // Words are made for the one rule that matches.
                let index = rules.iter().position(|rule| rule.holds(subject))?;
                rules[index].matches(index + 1, subject).ok()
            }
        }
    }

    /// How each rule fared.
    pub(super) fn outcomes(&self, subject: &Subject<'_>) -> Vec<Outcome> {
        match &self.matching {
            Matching::Always(why) => vec![Outcome { rule: None, matched: true, words: why.clone() }],
            Matching::Never(why) => vec![Outcome { rule: None, matched: false, words: (*why).to_owned() }],
            Matching::Rules(rules) if rules.is_empty() => {
                vec![Outcome { rule: None, matched: false, words: "it has no rules, and matches nothing".into() }]
            }
            Matching::Rules(rules) => {
                let outcome = |(index, rule): (usize, &CompiledRule)| match rule.matches(index + 1, subject) {
                    Ok(outcome) | Err(outcome) => outcome,
                };
                rules.iter().enumerate().map(outcome).collect()
            }
        }
    }
}

impl CompiledRule {
    fn of(rule: &Rule, bias: Bias, trust_domain: &TrustDomain) -> Self {
        let groups = |all: &[Terms]| all.iter().map(|terms| Group::of(terms, bias, trust_domain)).collect();
        let dead = rule.opaque && bias == Bias::Away;
        Self { from: groups(&rule.from), to: groups(&rule.to), when: groups(&rule.when), dead }
    }

    fn holds(&self, subject: &Subject<'_>) -> bool {
        let any = |groups: &[Group]| groups.is_empty() || groups.iter().any(|group| group.matches(subject));
        !self.dead && any(&self.from) && any(&self.to) && self.when.iter().all(|group| group.matches(subject))
    }

    /// The match in words, or else what failed.
    fn matches(&self, number: usize, subject: &Subject<'_>) -> Result<Outcome, Outcome> {
        let outcome =
            |matched, words: String| Outcome { rule: Some(number), matched, words: format!("rule {number}: {words}") };
        if self.dead {
            return Err(outcome(false, "it has a field that cannot be enforced, so it matches nothing".into()));
        }
        let mut words = Vec::new();
        for (name, groups) in [("from", &self.from), ("to", &self.to)] {
            if groups.is_empty() {
                continue;
            }
            let Some(group) = groups.iter().find(|group| group.matches(subject)) else {
                let wanted: Vec<&str> = groups.iter().take(SHOWN).map(Group::words).collect();
                return Err(outcome(false, format!("{name} does not match: {}", wanted.join("; or "))));
            };
            words.push(format!("{name} {}", group.words()));
        }
        for group in &self.when {
            if !group.matches(subject) {
                return Err(outcome(false, format!("when does not match: {}", group.words())));
            }
            words.push(format!("when {}", group.words()));
        }
        let words = if words.is_empty() { "everything".to_owned() } else { words.join("; ") };
        Ok(outcome(true, words))
    }
}

impl Group {
    fn of(terms: &Terms, bias: Bias, trust_domain: &TrustDomain) -> Self {
        Self {
            matchers: terms.iter().map(|term| Matcher::compile(term, bias, trust_domain)).collect(),
            words: word::terms(terms),
        }
    }

    fn matches(&self, subject: &Subject<'_>) -> bool {
        self.matchers.iter().all(|matcher| matcher.matches(subject))
    }

    fn words(&self) -> &str {
        if self.words.is_empty() { "anything (what it says cannot be enforced)" } else { &self.words }
    }
}

/// How many sources or operations of a rule that failed are shown.
const SHOWN: usize = 4;
