use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::shared_map::SharedMap;
use super::{Labels, NamespacedName, Pod, PodUid};

/// What somebody else enforces at pods' interfaces: a NetworkPolicy, or a CNI's own kind. Which pods it selects is all
/// that is known of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NetworkPolicy {
    /// Without a namespace it stands over the whole cluster.
    pub name: NamespacedName,
    pub selects: PodSelection,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PodSelection {
    /// Every pod where the policy stands: of a kind whose selectors are not read.
    All,
    Matching(LabelSelector),
}

/// `metav1.LabelSelector`: every part must hold; the empty one selects everything.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct LabelSelector {
    pub labels: BTreeMap<String, String>,
    pub expressions: Vec<LabelExpression>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LabelExpression {
    pub key: String,
    pub operator: LabelOperator,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LabelOperator {
    In(BTreeSet<String>),
    /// Holds for a pod without the label too.
    NotIn(BTreeSet<String>),
    Exists,
    DoesNotExist,
}

impl PodSelection {
    fn selects(&self, pod: &Pod) -> bool {
        match self {
            Self::All => true,
            Self::Matching(selector) => selector.matches(&pod.labels),
        }
    }
}

impl LabelSelector {
    pub fn matches(&self, labels: &Labels) -> bool {
        self.labels.iter().all(|(key, value)| labels.get(key) == Some(value))
            && self.expressions.iter().all(|expression| expression.matches(labels))
    }
}

impl LabelExpression {
    fn matches(&self, labels: &Labels) -> bool {
        let value = labels.get(&self.key);
        match &self.operator {
            LabelOperator::In(values) => value.is_some_and(|value| values.contains(value)),
            LabelOperator::NotIn(values) => value.is_none_or(|value| !values.contains(value)),
            LabelOperator::Exists => value.is_some(),
            LabelOperator::DoesNotExist => value.is_none(),
        }
    }
}

/// Which pods are selected, kept as policies and pods change, so that asking costs the same however many there are.
#[derive(Clone, Debug, Default)]
pub(super) struct NetworkPolicies {
    of_cluster: SharedMap<Arc<str>, ()>,
    by_namespace: SharedMap<Arc<str>, SharedMap<Arc<str>, Arc<PodSelection>>>,
    /// How many policies of its namespace select a pod; those that none selects are left out.
    selecting: SharedMap<PodUid, usize>,
}

impl NetworkPolicies {
    pub fn selects(&self, pod: &PodUid) -> bool {
        !self.of_cluster.is_empty() || self.selecting.contains_key(pod)
    }

    /// Whether a policy stands over every pod there is.
    pub fn stands_over_cluster(&self) -> bool {
        !self.of_cluster.is_empty()
    }

    pub fn set_of_cluster(&mut self, name: &Arc<str>, exists: bool) {
        if exists {
            self.of_cluster.insert(name.clone(), ());
        } else {
            self.of_cluster.remove(name);
        }
    }

    /// Puts a policy in, or takes it out. `pods` are those of its namespace; returns which of them are selected now and
    /// were not, or the other way round.
    pub fn set<'a>(
        &mut self,
        name: &NamespacedName,
        selection: Option<PodSelection>,
        pods: impl Iterator<Item = &'a Pod>,
    ) -> BTreeSet<PodUid> {
        let selection = selection.map(Arc::new);
        let mut old = None;
        self.by_namespace.change(&name.namespace, |of_namespace| {
            old = match &selection {
                Some(selection) => of_namespace.insert(name.name.clone(), selection.clone()),
                None => of_namespace.remove(&name.name),
            };
        });
        let selects = |selection: &Option<Arc<PodSelection>>, pod| {
            usize::from(selection.as_ref().is_some_and(|s| s.selects(pod)))
        };
        let mut changed = BTreeSet::new();
        for pod in pods {
            let before = self.selecting.get(&pod.uid).copied().unwrap_or_default();
            let now = (before + selects(&selection, pod)).saturating_sub(selects(&old, pod));
            self.count(&pod.uid, now);
            if (before > 0) != (now > 0) {
                changed.insert(pod.uid.clone());
            }
        }
        changed
    }

    /// A pod came, or its labels changed.
    pub fn set_pod(&mut self, pod: &Pod) {
        let of_namespace = self.by_namespace.get(&pod.name.namespace).into_iter().flat_map(SharedMap::values);
        let count = of_namespace.filter(|selection| selection.selects(pod)).count();
        self.count(&pod.uid, count);
    }

    pub fn remove_pod(&mut self, pod: &PodUid) {
        self.selecting.remove(pod);
    }

    fn count(&mut self, pod: &PodUid, count: usize) {
        if count == 0 {
            self.selecting.remove(pod);
        } else {
            self.selecting.insert(pod.clone(), count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selector_matches_where_each_part_of_it_holds() {
        let labels: Labels =
            [("app", "cart"), ("tier", "back")].map(|(k, v)| (k.into(), v.into())).into_iter().collect();
        let values = |values: &[&str]| values.iter().map(|value| (*value).to_owned()).collect::<BTreeSet<_>>();
        let matches = |key: &str, operator| {
            let expressions = vec![LabelExpression { key: key.to_owned(), operator }];
            LabelSelector { expressions, ..LabelSelector::default() }.matches(&labels)
        };
        assert!(LabelSelector::default().matches(&labels) && LabelSelector::default().matches(&Labels::default()));
        assert!(matches("app", LabelOperator::In(values(&["web", "cart"]))));
        assert!(
            !matches("app", LabelOperator::In(values(&["web"]))) && !matches("x", LabelOperator::In(values(&["x"])))
        );
        assert!(!matches("app", LabelOperator::NotIn(values(&["cart"]))));
        assert!(
            matches("app", LabelOperator::NotIn(values(&["web"])))
                && matches("x", LabelOperator::NotIn(values(&["x"])))
        );
        assert!(matches("tier", LabelOperator::Exists) && !matches("x", LabelOperator::Exists));
        assert!(!matches("tier", LabelOperator::DoesNotExist) && matches("x", LabelOperator::DoesNotExist));
        let both = LabelSelector {
            labels: [("app".to_owned(), "cart".to_owned())].into(),
            expressions: vec![LabelExpression { key: "tier".to_owned(), operator: LabelOperator::DoesNotExist }],
        };
        assert!(!both.matches(&labels), "one part that holds is not all");
    }
}
