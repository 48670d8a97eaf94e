//! What CNIs enforce: read as far as which pods are selected, since traffic of those must cross their interfaces.

use k8s_openapi::api::networking::v1::NetworkPolicy as Written;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector as WrittenSelector, LabelSelectorRequirement};

use super::{Fault, Key, SUBDOMAIN, check_namespaced, is_subdomain};
use crate::mesh::{LabelExpression, LabelOperator, LabelSelector, NetworkPolicy, Object, PodSelection};

/// One kind of a CNI, or of those that several CNIs share. Its selectors are the CNI's own language: that an object of
/// it is there counts as selecting every pod of its namespace, or of the cluster.
#[derive(PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct CniKind {
    pub group: &'static str,
    pub kind: &'static str,
    pub is_cluster_wide: bool,
}

impl CniKind {
    pub fn find(group: Option<&str>, kind: &str) -> Option<&'static Self> {
        CNI_KINDS.iter().find(|known| known.kind == kind && group.is_none_or(|group| known.group == group))
    }
}

pub(super) fn network_policy(key: &Key, policy: Written) -> Result<Object, Fault> {
    check_namespaced(key, is_subdomain, SUBDOMAIN)?;
    let written = policy.spec.and_then(|spec| spec.pod_selector).unwrap_or_default();
    Ok(object(key, PodSelection::Matching(selector(written)?)))
}

/// What is known of a policy whose selector is not read, or cannot be.
pub(super) fn selects_all(key: &Key) -> Object {
    object(key, PodSelection::All)
}

fn object(key: &Key, selects: PodSelection) -> Object {
    Object::NetworkPolicy(NetworkPolicy { name: key.model_name(), selects })
}

/// As a `podSelector` of a NetworkPolicy says it.
pub(super) fn selector(written: WrittenSelector) -> Result<LabelSelector, Fault> {
    let expressions = written.match_expressions.into_iter().flatten().enumerate();
    Ok(LabelSelector {
        labels: written.match_labels.unwrap_or_default(),
        expressions: expressions.map(|(i, written)| expression(i, written)).collect::<Result<_, _>>()?,
    })
}

fn expression(i: usize, written: LabelSelectorRequirement) -> Result<LabelExpression, Fault> {
    let values: std::collections::BTreeSet<_> = written.values.into_iter().flatten().collect();
    let at = |field: &str| format!("spec.podSelector.matchExpressions[{i}].{field}");
    let operator = match (&*written.operator, values.is_empty()) {
        ("In", false) => LabelOperator::In(values),
        ("NotIn", false) => LabelOperator::NotIn(values),
        ("In" | "NotIn", true) => return Err(Fault::new(at("values"), "In and NotIn need at least one value")),
        ("Exists", true) => LabelOperator::Exists,
        ("DoesNotExist", true) => LabelOperator::DoesNotExist,
        ("Exists" | "DoesNotExist", false) => {
            return Err(Fault::new(at("values"), "Exists and DoesNotExist take no values; remove them"));
        }
        (other, _) => {
            let cause = format!("{other:?} is none of In, NotIn, Exists, DoesNotExist");
            return Err(Fault::new(at("operator"), cause));
        }
    };
    Ok(LabelExpression { key: written.key, operator })
}

const fn of_namespace(group: &'static str, kind: &'static str) -> CniKind {
    CniKind { group, kind, is_cluster_wide: false }
}

const fn of_cluster(group: &'static str, kind: &'static str) -> CniKind {
    CniKind { group, kind, is_cluster_wide: true }
}

static CNI_KINDS: [CniKind; 13] = [
    of_namespace("cilium.io", "CiliumNetworkPolicy"),
    of_cluster("cilium.io", "CiliumClusterwideNetworkPolicy"),
    of_namespace("projectcalico.org", "NetworkPolicy"),
    of_cluster("projectcalico.org", "GlobalNetworkPolicy"),
    of_namespace("crd.projectcalico.org", "NetworkPolicy"),
    of_cluster("crd.projectcalico.org", "GlobalNetworkPolicy"),
    of_cluster("policy.networking.k8s.io", "AdminNetworkPolicy"),
    of_cluster("policy.networking.k8s.io", "BaselineAdminNetworkPolicy"),
    of_cluster("policy.networking.k8s.io", "ClusterNetworkPolicy"),
    of_namespace("crd.antrea.io", "NetworkPolicy"),
    of_cluster("crd.antrea.io", "ClusterNetworkPolicy"),
    of_namespace("networking.k8s.aws", "ApplicationNetworkPolicy"),
    of_cluster("networking.k8s.aws", "ClusterNetworkPolicy"),
];
