use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use serde::Serialize;

use super::ROOT_NAMESPACE;
use super::RequestHead;
use super::compile::{Compiled, Effect, Outcome, Reads};
use super::matcher::Subject;
use super::object::{PolicyKind, PolicyRef};
use super::standing::PeerMode;
use super::store::Policies;
use crate::mesh::{Identity, NamespacedName, Reason, Workload};

/// One connection, as the destination's side sees it.
#[derive(Clone, Copy, Debug)]
pub struct Query<'a> {
    pub source_ip: IpAddr,
    /// Some where it is proven, by mutual TLS or by capture on the same node.
    pub source_identity: Option<&'a Identity>,
    pub destination: &'a Workload,
    /// The pod's address and port.
    pub destination_addr: SocketAddr,
    /// Services that have `destination_addr` among their endpoints ([`crate::mesh::Mesh::services_at`]).
    pub services: &'a [NamespacedName],
    /// Whether each request of it is asked about by itself, by [`Policies::decide_request`]. Where not, policies that speak
    /// of requests fail closed.
    pub requests: bool,
}

impl<'a> Query<'a> {
    /// The Services whose policies may stand over the destination. Anybody may list a neighbour's pod as an endpoint
    /// of a Service of their own; that gives their policies no say over it.
    pub fn own_services(&self) -> impl Iterator<Item = &'a NamespacedName> {
        let own = &self.destination.pod.name.namespace;
        self.services.iter().filter(move |service| service.namespace == *own || &*service.namespace == ROOT_NAMESPACE)
    }
}

/// What policy makes of a connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Decision {
    pub verdict: Verdict,
    /// Some if and only if denied.
    pub reason: Option<Reason>,
    /// What decided; none where nothing stands over the destination.
    pub clause: Option<Clause>,
    /// AUDIT and dry-run policies that had something to say; they changed nothing.
    pub observed: Vec<Observed>,
    /// Who else has to let a request pass that is allowed so far.
    pub asks: Vec<Ask>,
}

/// One policy of action CUSTOM that a request meets.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ask {
    pub policy: NamespacedName,
    /// The name of its `ExternalAuthorizer`.
    pub provider: Arc<str>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Allow,
    Deny,
}

/// What of a policy decided.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Clause {
    pub policy: PolicyRef,
    /// Counted from 1; none where the policy decided as a whole.
    pub rule: Option<usize>,
    /// `rule 1: from principals cluster.local/ns/shop/sa/cart; to ports 8080`
    pub words: String,
}

/// What a policy would have done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Observed {
    pub policy: PolicyRef,
    /// Counted from 1; none where the policy spoke as a whole.
    pub rule: Option<usize>,
    /// The verdict were the dry-run over; none for AUDIT.
    pub would: Option<Verdict>,
}

impl Policies {
    /// Decides a connection: STRICT first, then any DENY match denies, no ALLOW policy allows, an ALLOW match allows,
    /// and what is left is denied. The cost depends on what stands over this destination alone.
    ///
    /// Where requests are asked about by themselves, it says whether any of them may be allowed.
    pub fn decide(&self, query: &Query<'_>) -> Decision {
        self.decided(query, &Subject::of(query))
    }

    /// Decides one request of a connection, by the same rules.
    pub fn decide_request(&self, query: &Query<'_>, request: &RequestHead<'_>) -> Decision {
        self.decided(query, &Subject::of_request(query, request))
    }

    /// Whether what stands over the destination has to read requests.
    pub fn reads(&self, query: &Query<'_>) -> Reads {
        let standing = self.standing(query.destination);
        let by_service = query.own_services().flat_map(|service| self.at_service(service));
        let reads = standing.policies.iter().chain(by_service).map(|policy| policy.reads);
        let mut tokens_by_service = query.own_services().flat_map(|service| self.authentications_at_service(service));
        if !standing.authentications.is_empty() || tokens_by_service.next().is_some() {
            return Reads::ToDecide;
        }
        reads.max().unwrap_or(Reads::Nothing)
    }

    fn decided(&self, query: &Query<'_>, subject: &Subject<'_>) -> Decision {
        let standing = self.standing(query.destination);
        let policies = self.over(query, &standing.policies);
        let peer = standing.peer_mode(query.destination_addr.port());
        let (reason, clause) = match peer {
            PeerMode::Strict(policy) if !subject.is_proven() => {
                let clause = policy.clone().map(|name| Clause {
                    policy: PolicyRef { kind: PolicyKind::PeerAuthentication, name },
                    rule: None,
                    words: "STRICT: mutual TLS only, and the source proved no identity".into(),
                });
                (Some(Reason::Plaintext(policy)), clause)
            }
            _ => authorize(&policies, subject),
        };
        let verdict = if reason.is_some() { Verdict::Deny } else { Verdict::Allow };
        let observed = match (subject.is_awaited(), verdict) {
            (false, _) => observe(&policies, subject),
            // Each request tells it for itself.
            (true, Verdict::Allow) => Vec::new(),
            (true, Verdict::Deny) => observe(&policies, &Subject::unread(query)),
        };
        let asks = match verdict {
            Verdict::Allow if subject.is_request() => asks(&policies, subject),
            _ => Vec::new(),
        };
        Decision { verdict, reason, clause, observed, asks }
    }

    /// What stands over the destination, by pod and by Service, each policy once and in the order of names.
    fn over<'a>(&'a self, query: &Query<'_>, by_pod: &'a [Arc<Compiled>]) -> Vec<&'a Compiled> {
        let mut policies: Vec<&Compiled> = by_pod.iter().map(|policy| &**policy).collect();
        for service in query.own_services() {
            policies.extend(self.at_service(service).map(|policy| &**policy));
        }
        if policies.len() > by_pod.len() {
            policies.sort_by(|a, b| a.reference.cmp(&b.reference));
            policies.dedup_by(|a, b| a.reference == b.reference);
        }
        policies
    }
}

fn authorize(policies: &[&Compiled], subject: &Subject<'_>) -> (Option<Reason>, Option<Clause>) {
    let with = |effect| policies.iter().copied().filter(move |policy| policy.effect == effect);
    if let Some((policy, outcome)) = first_match(with(Effect::Deny), subject) {
        return (Some(Reason::Policy(policy.reference.name.clone())), Some(clause(policy, outcome)));
    }
    // Nobody can be asked about a connection whose requests are not told apart.
    if !subject.is_awaited()
        && !subject.is_request()
        && let Some((policy, outcome)) = first_match(with(Effect::Ask), subject)
    {
        return (Some(Reason::Policy(policy.reference.name.clone())), Some(clause(policy, outcome)));
    }
    if let Some((policy, outcome)) = first_match(with(Effect::Allow), subject) {
        let clause = clause(policy, outcome);
        // The rule may be met by some requests, and by others not.
        let is_met = !subject.is_awaited() || policy.reads == Reads::Nothing;
        return (None, Some(if is_met { clause } else { Clause { rule: None, words: AWAITED.to_owned(), ..clause } }));
    }
    let Some(policy) = with(Effect::Allow).next() else { return (None, None) };
    let words = match with(Effect::Allow).count() {
        1 => "no rule of it allows this, and what no ALLOW policy allows is denied".to_owned(),
        count => format!("no rule of it allows this, nor of {} more ALLOW policies over this destination", count - 1),
    };
    let clause = Clause { policy: policy.reference.clone(), rule: None, words };
    (Some(Reason::Policy(policy.reference.name.clone())), Some(clause))
}

/// Whom the policies ask that a request meets, each once.
fn asks(policies: &[&Compiled], subject: &Subject<'_>) -> Vec<Ask> {
    let asking = policies.iter().filter(|policy| policy.effect == Effect::Ask && policy.matches(subject).is_some());
    let ask =
        |policy: &&Compiled| Some(Ask { policy: policy.reference.name.clone(), provider: policy.provider.clone()? });
    let mut asks: Vec<Ask> = asking.filter_map(ask).collect();
    asks.dedup_by(|a, b| a.provider == b.provider && a.policy.namespace == b.policy.namespace);
    asks
}

fn first_match<'a>(
    mut policies: impl Iterator<Item = &'a Compiled>,
    subject: &Subject<'_>,
) -> Option<(&'a Compiled, Outcome)> {
    policies.find_map(|policy| Some((policy, policy.matches(subject)?)))
}

fn clause(policy: &Compiled, outcome: Outcome) -> Clause {
    Clause { policy: policy.reference.clone(), rule: outcome.rule, words: outcome.words }
}

fn observe(policies: &[&Compiled], subject: &Subject<'_>) -> Vec<Observed> {
    let mut observed = Vec::new();
    for policy in policies {
        let would = match policy.effect {
            Effect::Allow | Effect::Deny | Effect::Ask => continue,
            Effect::Audit => None,
            Effect::WouldAllow => Some(Verdict::Allow),
            Effect::WouldDeny => Some(Verdict::Deny),
        };
        let saw = |rule, would| Observed { policy: policy.reference.clone(), rule, would };
        match (policy.matches(subject), policy.effect) {
            (Some(outcome), _) => observed.push(saw(outcome.rule, would)),
            // In force, an ALLOW policy that does not match denies unless another one allows.
            (None, Effect::WouldAllow) if !allowed_by_another(policies, subject) => {
                observed.push(saw(None, Some(Verdict::Deny)));
            }
            (None, _) => {}
        }
    }
    observed
}

fn allowed_by_another(policies: &[&Compiled], subject: &Subject<'_>) -> bool {
    first_match(policies.iter().copied().filter(|policy| policy.effect == Effect::Allow), subject).is_some()
}

const AWAITED: &str = "some requests may meet a rule of it, and each is decided for itself";
