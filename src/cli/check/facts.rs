//! What the cluster says of itself. What a person may not read is a fact too.

use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Node, Pod};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{ApiResource, DynamicObject, GroupVersionKind, ListParams, PostParams};
use kube::{Api, Client};
use serde::de::DeserializeOwned;

use super::super::Failure;
use super::super::cluster::{AGENT, CONTROLLER, NAMESPACE, TRUST_BUNDLE};
use super::waypoints;
use crate::api::MeshNode;
use crate::mesh::WAYPOINT_CLASS;
use crate::source::kube::sentence;

/// Read from the API server, each kind once.
pub struct Facts {
    /// `v1.36.4`
    pub version: String,
    pub nodes: Fact<Vec<Node>>,
    pub daemon_sets: Fact<Vec<DaemonSet>>,
    pub agent_pods: Fact<Vec<Pod>>,
    pub controller: Fact<Option<Deployment>>,
    pub crds: Fact<Vec<CustomResourceDefinition>>,
    pub mesh_nodes: Fact<Vec<MeshNode>>,
    pub trust_bundle: Fact<Option<ConfigMap>>,
    pub cilium: Fact<Option<ConfigMap>>,
    pub node_leases: Fact<Vec<Lease>>,
    pub network_policies: Fact<Vec<NetworkPolicy>>,
    pub waypoints: waypoints::Facts,
}

/// A fact, or why it cannot be known.
pub type Fact<T> = Result<T, String>;

impl Facts {
    /// # Errors
    /// An API server that does not answer at all.
    pub async fn ask(client: &Client) -> Result<Self, Failure> {
        let about = |cause: kube::Error| Failure::new(format!("the API server does not answer: {}", sentence(&cause)));
        let version = client.apiserver_version().await.map_err(about)?.git_version;
        let agents = ListParams::default().labels(&format!("app.kubernetes.io/name={AGENT}"));
        let all = ListParams::default();
        let system = || Api::<ConfigMap>::namespaced(client.clone(), "kube-system");
        Ok(Self {
            version,
            nodes: list(Api::all(client.clone()), &all).await,
            daemon_sets: list(Api::all(client.clone()), &all).await,
            agent_pods: list(Api::namespaced(client.clone(), NAMESPACE), &agents).await,
            controller: get(Api::namespaced(client.clone(), NAMESPACE), CONTROLLER).await,
            crds: list(Api::all(client.clone()), &all).await,
            mesh_nodes: list(Api::all(client.clone()), &all).await,
            trust_bundle: get(Api::namespaced(client.clone(), NAMESPACE), TRUST_BUNDLE).await,
            cilium: get(system(), "cilium-config").await,
            node_leases: list(Api::namespaced(client.clone(), "kube-node-lease"), &all).await,
            network_policies: list(Api::all(client.clone()), &all).await,
            waypoints: waypoints::Facts {
                class: gateway_class(client).await,
                role: get(Api::all(client.clone()), waypoints::READERS).await,
                binding: get(Api::all(client.clone()), waypoints::READERS).await,
            },
        })
    }

    /// The DaemonSet of our agents.
    pub fn agents(&self) -> Fact<Option<&DaemonSet>> {
        let sets = self.daemon_sets.as_ref().map_err(Clone::clone)?;
        Ok(sets.iter().find(|set| {
            set.metadata.name.as_deref() == Some(AGENT) && set.metadata.namespace.as_deref() == Some(NAMESPACE)
        }))
    }
}

/// What an installation creates, and whether this person may.
pub async fn rights(client: &Client) -> Vec<Right> {
    let reviews = Api::<SelfSubjectAccessReview>::all(client.clone());
    let mut rights = Vec::new();
    for (group, resource) in CREATED {
        let attributes = ResourceAttributes {
            verb: Some("create".to_owned()),
            group: Some((*group).to_owned()),
            resource: Some((*resource).to_owned()),
            ..ResourceAttributes::default()
        };
        let spec = SelfSubjectAccessReviewSpec { resource_attributes: Some(attributes), ..Default::default() };
        let review = SelfSubjectAccessReview { spec, ..Default::default() };
        let answer = reviews.create(&PostParams::default(), &review).await;
        let allowed = answer.map(|review| review.status.is_some_and(|status| status.allowed));
        rights.push(Right { resource, allowed: allowed.map_err(|error| sentence(&error)) });
    }
    rights
}

/// Whether a person may create objects of one kind.
pub struct Right {
    pub resource: &'static str,
    pub allowed: Fact<bool>,
}

async fn gateway_class(client: &Client) -> Fact<Option<DynamicObject>> {
    let named = GroupVersionKind::gvk("gateway.networking.k8s.io", "v1", "GatewayClass");
    let resource = ApiResource::from_gvk_with_plural(&named, "gatewayclasses");
    get(Api::all_with(client.clone(), &resource), WAYPOINT_CLASS).await
}

/// A kind that the cluster does not have has no objects.
async fn list<K>(api: Api<K>, which: &ListParams) -> Fact<Vec<K>>
where
    K: Clone + DeserializeOwned + std::fmt::Debug,
{
    match api.list(which).await {
        Ok(found) => Ok(found.items),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(Vec::new()),
        Err(error) => Err(sentence(&error)),
    }
}

async fn get<K>(api: Api<K>, name: &str) -> Fact<Option<K>>
where
    K: Clone + DeserializeOwned + std::fmt::Debug,
{
    api.get_opt(name).await.map_err(|error| sentence(&error))
}

const CREATED: &[(&str, &str)] = &[
    ("", "namespaces"),
    ("", "serviceaccounts"),
    ("apiextensions.k8s.io", "customresourcedefinitions"),
    ("admissionregistration.k8s.io", "validatingadmissionpolicies"),
    ("admissionregistration.k8s.io", "validatingadmissionpolicybindings"),
    ("apps", "daemonsets"),
    ("apps", "deployments"),
    ("rbac.authorization.k8s.io", "clusterroles"),
    ("rbac.authorization.k8s.io", "clusterrolebindings"),
];
