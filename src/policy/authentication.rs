//! Whose tokens are taken, of requests to which pods.

use std::sync::Arc;

use super::object::Unenforced;
use super::{Policies, Query, Scope, Selection};
use crate::authentication::{Found, KeySet, KeySource, Rule};
use crate::mesh::NamespacedName;

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RequestAuthentication {
    pub name: NamespacedName,
    pub scope: Scope,
    pub rules: Vec<Arc<Rule>>,
    /// The rules whose keys are not there.
    pub lacking: Vec<Unenforced>,
    /// A rule with a field that is not known takes no token.
    pub unenforced: Vec<Unenforced>,
}

impl RequestAuthentication {
    /// The ConfigMaps whose keys it takes.
    pub fn config_maps(&self) -> impl Iterator<Item = NamespacedName> {
        self.rules.iter().filter_map(|rule| match &rule.keys.source {
            KeySource::ConfigMap { name, .. } => Some(NamespacedName::new(self.name.namespace.clone(), name.clone())),
            _ => None,
        })
    }

    /// The same beside these ConfigMaps, by name and key.
    pub fn beside_config_maps(&self, text: impl Fn(&NamespacedName, &str) -> Option<String>) -> Self {
        let mut beside = self.clone();
        for rule in &mut beside.rules {
            let KeySource::ConfigMap { name, key } = rule.keys.source.clone() else { continue };
            let name = NamespacedName::new(self.name.namespace.clone(), name);
            let set = text(&name, &key).and_then(|text| KeySet::parse(&text).ok());
            Arc::make_mut(rule).keys.found = set.map(|set| Found { set: Arc::new(set), until: None });
        }
        let found = |note: &Unenforced| {
            let of = |(at, rule): (usize, &Arc<Rule>)| {
                rule.keys.found.is_some() && note.field.starts_with(&format!("spec.jwtRules[{at}]."))
            };
            beside.rules.iter().enumerate().any(of)
        };
        beside.lacking.retain(|note| !found(note));
        beside
    }

    /// What is in force while targets of it are not there: it stands over all of its namespace, and takes no token.
    pub(super) fn close(&mut self, missing: impl IntoIterator<Item = Unenforced>) {
        self.scope.selection = Selection::All;
        self.rules.iter_mut().for_each(|rule| Arc::make_mut(rule).opaque = true);
        self.unenforced.extend(missing);
    }
}

impl Policies {
    /// What stands over the tokens of requests to a destination; none: a token means nothing there, and is passed on.
    pub fn token_rules(&self, query: &Query<'_>) -> Vec<Arc<Rule>> {
        self.over_tokens(query, |over| over.iter().flat_map(|one| one.rules.iter().cloned()).collect())
    }

    /// The policies that these rules are of, in the same order.
    pub fn token_policies(&self, query: &Query<'_>) -> Vec<RequestAuthentication> {
        self.over_tokens(query, |over| over.iter().copied().cloned().collect())
    }

    fn over_tokens<T>(&self, query: &Query<'_>, make: impl FnOnce(&[&RequestAuthentication]) -> T) -> T {
        let standing = self.standing(query.destination);
        let mut over: Vec<_> = standing.authentications.iter().collect();
        over.extend(query.own_services().flat_map(|service| self.authentications_at_service(service)));
        over.sort_by(|a, b| a.name.cmp(&b.name));
        over.dedup_by(|a, b| a.name == b.name);
        make(&over)
    }
}
