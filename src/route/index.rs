//! Rules by what they match, so that a request looks at few of them however many there are.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::sync::Arc;

use http::HeaderName;

use super::head::Head;
use super::{Match, PathMatch, Place, Route, RouteRef, Rule, TextMatch};
use crate::mesh::{SharedMap, Vacant};

/// The rules of some routes of one kind and one namespace. A clone shares everything; adding or removing a route costs
/// in proportion to its matches.
#[derive(Clone, Debug, Default)]
pub(super) struct RuleSet {
    /// By whole path.
    exact: SharedMap<Arc<str>, Bucket>,
    /// By what paths begin with, without slashes at its end.
    prefixes: SharedMap<Arc<str>, Bucket>,
    /// How many matches begin with so many bytes.
    lengths: BTreeMap<usize, usize>,
    /// What only looking at it tells.
    others: Bucket,
}

impl RuleSet {
    pub fn add(&mut self, route: &Arc<Route>) {
        for (rule, at) in places(route) {
            let entry = Entry::new(route.clone(), rule, at);
            let gate = entry.gate();
            self.change(&entry.key(), 1, |bucket| bucket.change(gate, |entries| entries.add(entry)));
        }
    }

    pub fn remove(&mut self, route: &Arc<Route>) {
        let name = route.reference();
        for (rule, at) in places(route) {
            let entry = Entry::new(route.clone(), rule, at);
            self.change(&entry.key(), -1, |bucket| bucket.change(entry.gate(), |entries| entries.remove(&name)));
        }
    }

    /// The match of highest precedence that a request meets.
    pub fn find(&self, head: &Head<'_>) -> Option<&Entry> {
        let exact = self.exact.get(head.path()).and_then(|bucket| bucket.find(head));
        // Among paths an exact one goes before all others.
        if exact.is_some_and(Entry::is_path) {
            return exact;
        }
        let path = head.path();
        let lengths = self.lengths.range(..=path.len()).rev().map(|(length, _)| *length);
        let is_whole = |length: &usize| *length == path.len() || path.as_bytes().get(*length) == Some(&b'/');
        let buckets = lengths.filter(is_whole).filter_map(|length| self.prefixes.get(path.get(..length)?));
        buckets.filter_map(|bucket| bucket.find(head)).chain(exact).chain(self.others.find(head)).min()
    }

    fn change(&mut self, key: &Key, by: isize, change: impl FnOnce(&mut Bucket)) {
        match key {
            Key::Exact(path) => self.exact.change(path, change),
            Key::Other => change(&mut self.others),
            Key::Prefix(elements) => {
                let count = self.lengths.entry(elements.len()).or_default();
                *count = count.saturating_add_signed(by);
                if *count == 0 {
                    self.lengths.remove(&elements.len());
                }
                self.prefixes.change(elements, change);
            }
        }
    }
}

impl Vacant for RuleSet {
    fn is_vacant(&self) -> bool {
        self.exact.is_empty() && self.prefixes.is_empty() && self.others.is_vacant()
    }
}

/// A rule and its match, by their places.
fn places(route: &Route) -> impl Iterator<Item = (usize, usize)> {
    route.rules.iter().enumerate().flat_map(|(rule, written)| (0..written.matches.len()).map(move |at| (rule, at)))
}

/// Under what a match is filed.
enum Key {
    Exact(Arc<str>),
    Prefix(Arc<str>),
    Other,
}

/// One match of one rule, in the order of precedence: the least goes first.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    route: Arc<Route>,
    rule: usize,
    at: usize,
    specificity: [u32; 5],
}

impl Entry {
    pub fn new(route: Arc<Route>, rule: usize, at: usize) -> Self {
        let specificity = route.rules[rule].matches[at].specificity();
        Self { route, rule, at, specificity }
    }

    pub fn route(&self) -> &Route {
        &self.route
    }

    pub fn rule(&self) -> &Rule {
        &self.route.rules[self.rule]
    }

    pub fn matched(&self) -> &Match {
        &self.rule().matches[self.at]
    }

    pub fn takes(&self, head: &Head<'_>) -> bool {
        #[cfg(test)]
        crate::mesh::work::step();
        self.matched().takes(head)
    }

    fn is_path(&self) -> bool {
        matches!(self.matched().place, Place::Path(_))
    }

    fn key(&self) -> Key {
        match &self.matched().place {
            Place::Path(PathMatch::Exact(path)) => Key::Exact(path.clone()),
            Place::Path(PathMatch::Prefix(prefix)) => Key::Prefix(prefix.elements().clone()),
            Place::Path(PathMatch::Pattern(pattern)) => {
                pattern.first_elements().map_or(Key::Other, |elements| Key::Prefix(elements.into()))
            }
            Place::Rpc(rpc) => match (&rpc.service, &rpc.method) {
                (None, None) => Key::Prefix("".into()),
                (Some(TextMatch::Exact(service)), Some(TextMatch::Exact(method))) => {
                    Key::Exact(format!("/{service}/{method}").into())
                }
                (Some(TextMatch::Exact(service)), _) => Key::Prefix(format!("/{service}").into()),
                _ => Key::Other,
            },
        }
    }

    /// A header that must have one value: of the matches of one path, most may differ in that.
    fn gate(&self) -> Option<(HeaderName, Arc<str>)> {
        self.matched().headers.iter().find_map(|header| match &header.value {
            TextMatch::Exact(value) => Some((header.name.clone(), value.clone())),
            TextMatch::Pattern(_) => None,
        })
    }
}

impl Ord for Entry {
    // HTTPRouteRule and GRPCRouteRule, `matches`: after what is most specific comes the older route, then the one
    // first by name, then the first rule. All routes of a set are of one namespace.
    fn cmp(&self, other: &Self) -> Ordering {
        let age = |entry: &Self| entry.route.created.unwrap_or(i64::MAX);
        other.specificity.cmp(&self.specificity).then_with(|| age(self).cmp(&age(other))).then_with(|| {
            let place = |entry: &'_ Self| (entry.rule, entry.at);
            self.route.name.name.cmp(&other.route.name.name).then_with(|| place(self).cmp(&place(other)))
        })
    }
}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Entry {}

/// The matches of one path.
#[derive(Clone, Debug, Default)]
struct Bucket {
    plain: Entries,
    /// By a header and the value that it must have.
    gated: SharedMap<HeaderName, SharedMap<Arc<str>, Entries>>,
}

impl Bucket {
    fn find(&self, head: &Head<'_>) -> Option<&Entry> {
        let gated = self.gated.iter().filter_map(|(name, values)| {
            let value = head.header(name)?;
            values.get(std::str::from_utf8(&value).ok()?)?.find(head)
        });
        gated.chain(self.plain.find(head)).min()
    }

    fn change(&mut self, gate: Option<(HeaderName, Arc<str>)>, change: impl FnOnce(&mut Entries)) {
        match gate {
            None => change(&mut self.plain),
            Some((name, value)) => self.gated.change(&name, |values| values.change(&value, change)),
        }
    }
}

impl Vacant for Bucket {
    fn is_vacant(&self) -> bool {
        self.plain.is_vacant() && self.gated.is_empty()
    }
}

/// Sorted.
#[derive(Clone, Debug, Default)]
struct Entries(Arc<Vec<Entry>>);

impl Entries {
    fn find(&self, head: &Head<'_>) -> Option<&Entry> {
        self.0.iter().find(|entry| entry.takes(head))
    }

    fn add(&mut self, entry: Entry) {
        let at = self.0.partition_point(|other| *other < entry);
        Arc::make_mut(&mut self.0).insert(at, entry);
    }

    fn remove(&mut self, route: &RouteRef) {
        let is_of = |entry: &Entry| entry.route.kind == route.kind && entry.route.name == route.name;
        Arc::make_mut(&mut self.0).retain(|entry| !is_of(entry));
    }
}

impl Vacant for Entries {
    fn is_vacant(&self) -> bool {
        self.0.is_empty()
    }
}
