use serde::Serialize;

use super::compile::Effect;
use super::matcher::Subject;
use super::object::{PolicyObject, PolicyRef};
use super::standing::PeerMode;
use super::store::{Entry, Policies};
use super::{Ask, Decision, Query, RequestHead, Selection, Verdict};

/// A decision, with everything that had a say in it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    pub verdict: Verdict,
    /// The reason code as metrics have it: `policy`, `plaintext`; none where allowed.
    pub code: Option<&'static str>,
    /// The reason as the access log has it: `policy:shop/deny-all`; none where allowed.
    pub reason: Option<String>,
    /// The policy that decided: `AuthorizationPolicy shop/deny-all`.
    pub policy: Option<String>,
    /// Its rule, counted from 1; none where it decided as a whole.
    pub rule: Option<usize>,
    /// The clause in words.
    pub clause: Option<String>,
    /// All of it in one sentence.
    pub sentence: String,
    /// Every policy of the destination's namespace and of the root namespace.
    pub policies: Vec<Considered>,
    /// Who else has to let a request pass that is allowed so far.
    #[serde(skip)]
    pub asks: Vec<Ask>,
}

/// One policy, and whether it had a say.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Considered {
    pub kind: String,
    /// `namespace/name`
    pub policy: String,
    pub action: &'static str,
    /// Whether it stands over the destination.
    pub stands: bool,
    pub matched: bool,
    pub why: String,
    pub rules: Vec<RuleOutcome>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RuleOutcome {
    /// Counted from 1; none where the policy spoke as a whole.
    pub rule: Option<usize>,
    pub matched: bool,
    pub why: String,
}

impl Policies {
    /// Decides as [`Policies::decide`] does, and says how every policy fared, from the same compiled form.
    pub fn explain(&self, query: &Query<'_>) -> Explanation {
        self.explained(query, &Subject::of(query), &self.decide(query))
    }

    /// The same of [`Policies::decide_request`].
    pub fn explain_request(&self, query: &Query<'_>, request: &RequestHead<'_>) -> Explanation {
        self.explained(query, &Subject::of_request(query, request), &self.decide_request(query, request))
    }

    fn explained(&self, query: &Query<'_>, subject: &Subject<'_>, decision: &Decision) -> Explanation {
        let namespace = &query.destination.name().namespace;
        let mut policies: Vec<Considered> =
            self.around(namespace).map(|entry| self.consider(entry, query, subject)).collect();
        policies.sort_by(|a, b| (&a.kind, &a.policy).cmp(&(&b.kind, &b.policy)));
        Explanation {
            verdict: decision.verdict,
            code: decision.reason.as_ref().map(|reason| reason.code()),
            reason: decision.reason.as_ref().map(ToString::to_string),
            policy: decision.clause.as_ref().map(|clause| clause.policy.to_string()),
            rule: decision.clause.as_ref().and_then(|clause| clause.rule),
            clause: decision.clause.as_ref().map(|clause| clause.words.clone()),
            sentence: sentence(query, decision),
            policies,
            asks: decision.asks.clone(),
        }
    }

    fn consider(&self, entry: &Entry, query: &Query<'_>, subject: &Subject<'_>) -> Considered {
        let PolicyRef { kind, name } = entry.object.reference();
        let scope = entry.object.scope();
        let stands = match &scope.selection {
            Selection::Services(services) => query.own_services().any(|service| services.contains(service)),
            _ => scope.selects(&query.destination.pod),
        };
        let mut considered = Considered {
            kind: kind.to_string(),
            policy: name.to_string(),
            action: action(entry),
            stands,
            matched: false,
            why: format!("it stands over {scope}"),
            rules: Vec::new(),
        };
        if !stands {
            considered.why = format!("it stands over {scope}, not over {}", query.destination.name());
            return considered;
        }
        if let PolicyObject::RequestAuthentication(policy) = &entry.object {
            let issuers: Vec<&str> = policy.rules.iter().map(|rule| &*rule.issuer).collect();
            considered.why = format!("it judges tokens of {}, and no connection", issuers.join(", "));
            return considered;
        }
        match &entry.compiled {
            Some(compiled) => {
                let outcomes = compiled.outcomes(subject);
                considered.matched = outcomes.iter().any(|outcome| outcome.matched);
                if let Some(told) = outcomes.iter().find(|outcome| outcome.matched).or(outcomes.first()) {
                    considered.why = told.words.clone();
                }
                considered.rules = outcomes
                    .into_iter()
                    .map(|outcome| RuleOutcome { rule: outcome.rule, matched: outcome.matched, why: outcome.words })
                    .collect();
            }
            None => {
                let port = query.destination_addr.port();
                (considered.matched, considered.why) = match self.peer_mode(query.destination, port) {
                    PeerMode::Strict(Some(policy)) if policy == name => match subject.is_proven() {
                        true => (false, "STRICT, and the source proved its identity".into()),
                        false => (true, "STRICT, and the source proved no identity".into()),
                    },
                    _ => (false, format!("it does not make port {port} STRICT, or a narrower or older one decides")),
                };
            }
        }
        considered
    }
}

fn action(entry: &Entry) -> &'static str {
    match (&entry.object, entry.compiled.as_ref().map(|compiled| compiled.effect)) {
        (PolicyObject::Authorization(_), Some(Effect::WouldAllow)) => "ALLOW (dry-run)",
        (PolicyObject::Authorization(_), Some(Effect::WouldDeny)) => "DENY (dry-run)",
        (PolicyObject::Authorization(policy), _) => policy.action.as_str(),
        (PolicyObject::PeerAuthentication(_), _) => "mtls",
        (PolicyObject::RequestAuthentication(_), _) => "tokens",
        (PolicyObject::Malformed(policy), _) if policy.observes => "malformed (observed only)",
        (PolicyObject::Malformed(_), _) => "malformed (denies all)",
    }
}

fn sentence(query: &Query<'_>, decision: &Decision) -> String {
    let source = match query.source_identity {
        Some(identity) => format!("{} ({})", identity.principal(), query.source_ip.to_canonical()),
        None => format!("{}, which proved no identity,", query.source_ip.to_canonical()),
    };
    let destination = format!("{} ({})", query.destination.name(), query.destination_addr);
    let verdict = match decision.verdict {
        Verdict::Allow => "allowed",
        Verdict::Deny => "denied",
    };
    match &decision.clause {
        Some(clause) => {
            format!("{source} to {destination} is {verdict} by {}: {}", clause.policy, clause.words)
        }
        None => format!(
            "{source} to {destination} is {verdict}: no ALLOW policy stands over it, and no DENY policy matches"
        ),
    }
}
