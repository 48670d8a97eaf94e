use std::collections::BTreeSet;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use super::{Fields, PolicyRef, RateLimit, Target, TrafficPolicy};
use crate::mesh::{NamespacedName, SharedMap, Vacant};
use crate::route::{RouteRef, Rule, SessionPersistence, Timeouts};

/// All policies about traffic. One applied costs in proportion to its targets; a clone shares what neither side
/// changes.
#[derive(Clone, Debug, Default)]
pub struct Table {
    policies: SharedMap<PolicyRef, Arc<TrafficPolicy>>,
    by_target: SharedMap<Target, Level>,
}

/// One step of the table.
#[derive(Clone, PartialEq, Debug)]
pub enum Delta {
    Apply(Arc<TrafficPolicy>),
    Delete(PolicyRef),
}

/// Those about one thing; the first that says something is right.
#[derive(Clone, Debug, Default)]
struct Level(Arc<Vec<Arc<TrafficPolicy>>>);

impl Vacant for Level {
    fn is_vacant(&self) -> bool {
        self.0.is_empty()
    }
}

impl Table {
    /// Says which Services may be limited in another way now.
    pub fn apply(&mut self, delta: Delta) -> BTreeSet<NamespacedName> {
        let mut limited = BTreeSet::new();
        let (name, new) = match delta {
            Delta::Apply(policy) => (policy.name.clone(), Some(policy)),
            Delta::Delete(name) => (name, None),
        };
        if let Some(old) = self.policies.remove(&name) {
            limited.extend(old.limited().cloned());
            for target in &old.targets {
                self.by_target.change(&target.target, |level| {
                    Arc::make_mut(&mut level.0).retain(|policy| policy.name != name);
                });
            }
        }
        let Some(new) = new else { return limited };
        limited.extend(new.limited().cloned());
        for target in &new.targets {
            self.by_target.change(&target.target, |level| {
                let level = Arc::make_mut(&mut level.0);
                // Named twice, it still stands there once.
                if level.iter().all(|policy| policy.name != name) {
                    let at = level.partition_point(|policy| age(policy) < age(&new));
                    level.insert(at, new.clone());
                }
            });
        }
        self.policies.insert(name, new);
        limited
    }

    /// Every policy, in no order.
    pub fn all(&self) -> impl Iterator<Item = &Arc<TrafficPolicy>> {
        self.policies.values()
    }

    /// What is in force for a request that goes to a Service, by this rule of a route or without any: of each field
    /// what the rule itself says, else the policy on the rule, on its route, on the Service. But for the rate limits of
    /// Services, which are counted where their pods are: [`Table::rate_limits`].
    pub fn in_force(&self, rule: Option<(&RouteRef, &Rule)>, service: &NamespacedName) -> InForce {
        // Most requests: nobody has asked for anything.
        let says = |rule: &Rule| rule.timeouts != Timeouts::default() || rule.retry.is_some() || rule.session.is_some();
        if self.by_target.is_empty() && !rule.is_some_and(|(_, rule)| says(rule)) {
            return InForce::nothing();
        }
        let mut fields = rule.map(|(_, rule)| own(rule)).unwrap_or_default();
        if !self.by_target.is_empty() {
            if let Some((route, rule)) = rule {
                if let Some(name) = &rule.name {
                    self.fill(&mut fields, &Target::Rule(route.clone(), name.clone()));
                }
                self.fill(&mut fields, &Target::Route(route.clone()));
            }
            self.fill(&mut fields, &Target::Service(service.clone()));
        }
        InForce(Arc::new(fields))
    }

    /// The session that the requests of one rule belong to, whatever their backend is.
    pub fn session_of_rule(&self, route: &RouteRef, rule: &Rule) -> Option<Arc<SessionPersistence>> {
        if rule.session.is_some() || self.by_target.is_empty() {
            return rule.session.clone();
        }
        let on_rule = rule.name.as_ref().map(|name| Target::Rule(route.clone(), name.clone()));
        let levels = on_rule.into_iter().chain([Target::Route(route.clone())]);
        levels.into_iter().find_map(|level| self.at(&level).iter().find_map(|policy| policy.fields.session.clone()))
    }

    /// The limits that are counted where a Service's pods are.
    pub fn rate_limits(&self, service: &NamespacedName) -> Option<Arc<[RateLimit]>> {
        if self.by_target.is_empty() {
            return None;
        }
        let level = self.at(&Target::Service(service.clone()));
        level.iter().find_map(|policy| policy.fields.rate_limits.clone())
    }

    /// What is in force for whoever goes to a Service.
    pub fn of_service(&self, service: &NamespacedName) -> InForce {
        self.in_force(None, service)
    }

    /// The fields that are in force for a request, each with where it comes from; none is the rule itself.
    pub fn sources(
        &self,
        rule: Option<(&RouteRef, &Rule)>,
        service: &NamespacedName,
    ) -> Vec<(&'static str, Option<PolicyRef>)> {
        let mut found: Vec<(&'static str, Option<PolicyRef>)> =
            rule.map(|(_, rule)| own(rule)).iter().flat_map(Fields::names).map(|name| (name, None)).collect();
        let mut levels = Vec::new();
        if let Some((route, rule)) = rule {
            levels.extend(rule.name.as_ref().map(|name| Target::Rule(route.clone(), name.clone())));
            levels.push(Target::Route(route.clone()));
        }
        levels.push(Target::Service(service.clone()));
        for target in levels {
            for policy in self.at(&target) {
                for name in policy.fields.names().filter(|name| takes(&target, name)) {
                    if found.iter().all(|(known, _)| *known != name) {
                        found.push((name, Some(policy.name.clone())));
                    }
                }
            }
        }
        found.sort_by_key(|(name, _)| super::NAMES.iter().position(|known| known == name));
        found
    }

    /// What another, older policy says already about the same thing.
    pub fn lost(&self, policy: &TrafficPolicy) -> Vec<Lost> {
        let mut lost = Vec::new();
        for target in &policy.targets {
            let older = self.at(&target.target).iter().take_while(|other| other.name != policy.name);
            let older: Vec<_> = older.collect();
            for field in policy.fields.names() {
                if let Some(winner) = older.iter().find(|other| other.fields.names().any(|name| name == field)) {
                    lost.push(Lost { field, target: target.target.clone(), to: winner.name.clone() });
                }
            }
        }
        lost
    }

    #[cfg(test)]
    pub(super) fn by_target_is_empty(&self) -> bool {
        self.by_target.is_empty()
    }

    fn at(&self, target: &Target) -> &[Arc<TrafficPolicy>] {
        self.by_target.get(target).map_or(&[], |level| level.0.as_slice())
    }

    /// Takes from one level what is not said yet.
    fn fill(&self, fields: &mut Fields, target: &Target) {
        let is_service = target.is_service();
        for policy in self.at(target) {
            let more = &policy.fields;
            fields.request = fields.request.or(more.request);
            fields.backend_request = fields.backend_request.or(more.backend_request);
            fill(&mut fields.retry, &more.retry);
            fields.retry_constraint = fields.retry_constraint.or(more.retry_constraint);
            fill(&mut fields.session, &more.session);
            fill(&mut fields.fault, &more.fault);
            if is_service {
                fields.breaker = fields.breaker.or(more.breaker);
                fields.outliers = fields.outliers.or(more.outliers);
                fill(&mut fields.balance, &more.balance);
            } else {
                fill(&mut fields.rate_limits, &more.rate_limits);
            }
        }
    }
}

impl TrafficPolicy {
    /// The Services whose pods' agents count requests.
    fn limited(&self) -> impl Iterator<Item = &NamespacedName> {
        let targets = self.fields.rate_limits.iter().flat_map(|_| &self.targets);
        targets.filter_map(|target| if let Target::Service(name) = &target.target { Some(name) } else { None })
    }
}

fn fill<T: ?Sized>(said: &mut Option<Arc<T>>, more: &Option<Arc<T>>) {
    if said.is_none() {
        said.clone_from(more);
    }
}

fn takes(target: &Target, field: &str) -> bool {
    target.is_service() || !super::OF_SERVICES.contains(&field)
}

/// The oldest goes first, then the first by name.
fn age(policy: &TrafficPolicy) -> (i64, &NamespacedName, super::TrafficKind) {
    (policy.created.unwrap_or(i64::MAX), &policy.name.name, policy.name.kind)
}

/// What a rule says itself.
fn own(rule: &Rule) -> Fields {
    Fields {
        request: rule.timeouts.request,
        backend_request: rule.timeouts.backend_request,
        retry: rule.retry.clone(),
        session: rule.session.clone(),
        ..Fields::default()
    }
}

/// What is in force for one request.
#[derive(Clone, PartialEq, Debug)]
pub struct InForce(Arc<Fields>);

impl InForce {
    fn nothing() -> Self {
        static NOTHING: LazyLock<Arc<Fields>> = LazyLock::new(Arc::default);
        Self(NOTHING.clone())
    }

    /// With zero read as what it means: no limit.
    pub fn timeouts(&self) -> Timeouts {
        let limit = |time: Option<Duration>| time.filter(|time| *time > Duration::ZERO);
        Timeouts { request: limit(self.request), backend_request: limit(self.backend_request) }
    }
}

impl std::ops::Deref for InForce {
    type Target = Fields;

    fn deref(&self) -> &Fields {
        &self.0
    }
}

impl Default for InForce {
    fn default() -> Self {
        Self::nothing()
    }
}

/// A field that has no effect at one of its policy's targets.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Lost {
    pub field: &'static str,
    pub target: Target,
    /// The older policy that says it.
    pub to: PolicyRef,
}
