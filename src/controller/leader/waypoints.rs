//! Waypoints for Gateways of class `selvedge-waypoint`: their objects, and the status of Gateway and GatewayClass.

mod objects;
mod status;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::{Duration, Instant};

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Api, DynamicObject, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::runtime::reflector::{ObjectRef, Store};
use kube::{Client, Resource};
use serde::Deserialize;
use serde_json::{Value, json};

use super::super::WaypointSettings;
use super::record;
use super::routes::is_ready;
use super::status::{MANAGER, Told, now};
use crate::mesh::{Gateway, WAYPOINT_CLASS, own_name};
use crate::source::decode::read_gateway;
use objects::{Plan, Wanted};
use status::{Findings, class_status, gateway_status};

/// Makes what is wanted, mends it, and tells of it.
pub struct Waypoints {
    client: Client,
    settings: Option<WaypointSettings>,
    gateways: Store<DynamicObject>,
    gateway: ApiResource,
    deployments: Store<LeanDeployment>,
    /// By the Gateway's UID.
    made: HashMap<String, Made>,
    /// When the class was looked after last, and whether that went well.
    class_looked: Option<(Instant, bool)>,
    bound: Option<(BTreeSet<(String, String)>, Instant)>,
}

/// What was made for a Gateway last.
struct Made {
    plan: u64,
    at: Instant,
    /// What stood in the way.
    failure: Option<String>,
}

/// A Deployment without what is not asked of it.
#[derive(Resource, Clone, Debug, Deserialize)]
#[resource(inherit = Deployment)]
pub struct LeanDeployment {
    metadata: ObjectMeta,
    #[serde(default)]
    status: LeanStatus,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct LeanStatus {
    #[serde(default)]
    available_replicas: i32,
}

/// The Deployments to watch.
pub const OF_WAYPOINTS: &str = "gateway.networking.k8s.io/gateway-class-name=selvedge-waypoint";

impl Waypoints {
    pub fn new(
        client: Client,
        settings: Option<WaypointSettings>,
        gateway: ApiResource,
        gateways: Store<DynamicObject>,
        deployments: Store<LeanDeployment>,
    ) -> Self {
        let (made, class_looked, bound) = (HashMap::new(), None, None);
        Self { client, settings, gateways, gateway, deployments, made, class_looked, bound }
    }

    pub async fn tell(&mut self) {
        // A cluster without the Gateway API has none.
        if !is_ready(&self.gateways) || !is_ready(&self.deployments) {
            return;
        }
        self.tell_class().await;
        let mut accounts = BTreeSet::new();
        let mut alive = BTreeSet::new();
        for object in self.gateways.state() {
            let is_ours = object.data.pointer("/spec/gatewayClassName").and_then(Value::as_str) == Some(WAYPOINT_CLASS);
            let (Some(uid), true) = (object.metadata.uid.clone(), is_ours) else { continue };
            if object.metadata.deletion_timestamp.is_some() {
                continue;
            }
            let Ok(value) = serde_json::to_value(&*object) else { continue };
            alive.insert(uid.clone());
            let findings = match read_gateway(value) {
                Ok((gateway, notes)) => {
                    accounts.insert((gateway.name.namespace.to_string(), own_name(&gateway.name).to_string()));
                    self.attend(&object, &uid, gateway, notes).await
                }
                Err(cause) => Findings { refused: Some(cause), ..Findings::default() },
            };
            self.tell_gateway(&object, &findings).await;
        }
        self.made.retain(|uid, _| alive.contains(uid));
        self.bind(accounts).await;
    }

    /// Makes what a Gateway wants, where it is new or was not looked at for a while.
    async fn attend(&mut self, object: &DynamicObject, uid: &str, gateway: Gateway, notes: Vec<String>) -> Findings {
        let (plan, mut more) = plan(object, uid, &gateway);
        more.splice(0..0, notes);
        let refused = gateway.admits(&gateway.name.namespace.clone(), &Default::default()).err().and_then(|problem| {
            // Whom it admits is its own affair.
            let is_own = matches!(problem, crate::mesh::WaypointProblem::NotAllowed { .. });
            (!is_own).then(|| problem.to_string())
        });
        let deployment = self.deployments.get(&ObjectRef::new(&plan.name()).within(&gateway.name.namespace));
        let available = deployment.as_ref().map_or(0, |deployment| deployment.status.available_replicas);
        let annotations = object.metadata.annotations.as_ref();
        let by_hand = annotations.is_some_and(|all| all.get(MANAGED).is_some_and(|value| value == "false"));
        let mut findings = Findings { refused, notes: more, available, by_hand, failure: None };
        if findings.refused.is_some() || by_hand {
            return findings;
        }
        let Some(settings) = self.settings.clone() else {
            findings.failure = Some(
                "the controller does not know the image of its own pod: start it with --waypoint-image".to_owned(),
            );
            return findings;
        };
        let mut hasher = DefaultHasher::new();
        plan.hash(&mut hasher);
        let wanted = hasher.finish();
        let made = self.made.get(uid).filter(|made| {
            let rest = if made.failure.is_some() { AGAIN } else { MENDING };
            made.plan == wanted && made.at.elapsed() < rest && (deployment.is_some() || made.failure.is_some())
        });
        if let Some(made) = made {
            findings.failure.clone_from(&made.failure);
            return findings;
        }
        let failure = self.make(&plan, &settings).await.err();
        findings.failure.clone_from(&failure);
        self.made.insert(uid.to_owned(), Made { plan: wanted, at: Instant::now(), failure });
        findings
    }

    async fn make(&self, plan: &Plan, settings: &WaypointSettings) -> Result<(), String> {
        for wanted in plan.objects(settings) {
            let (api, name) = (self.api(plan, &wanted), plan.name());
            let what = format!("{} {}/{name}", wanted.kind, plan.gateway.namespace);
            let told = |error: kube::Error| format!("{what} cannot be written: {error}");
            if let Some(before) = api.get_opt(&name).await.map_err(told)? {
                let owners = before.metadata.owner_references.unwrap_or_default();
                if !owners.iter().any(|owner| owner.uid == plan.uid) {
                    return Err(format!(
                        "{what} is there already and is not this Gateway's: remove it, or annotate the Gateway with \
                         {MANAGED}=false to deploy the waypoint by hand"
                    ));
                }
            }
            let written = api.patch(&name, &PatchParams::apply(MANAGER).force(), &Patch::Apply(&wanted.object)).await;
            record("waypoint", &what, written.as_ref().map(drop));
            written.map_err(told)?;
        }
        if !plan.is_scaled() {
            let scaler = GroupVersionKind::gvk("autoscaling", "v2", "HorizontalPodAutoscaler");
            let resource = ApiResource::from_gvk_with_plural(&scaler, "horizontalpodautoscalers");
            let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), &plan.gateway.namespace, &resource);
            let before = api.get_opt(&plan.name()).await.map_err(|error| error.to_string())?;
            let owners = before.and_then(|before| before.metadata.owner_references).unwrap_or_default();
            if owners.iter().any(|owner| owner.uid == plan.uid) {
                api.delete(&plan.name(), &Default::default()).await.map_err(|error| error.to_string())?;
            }
        }
        Ok(())
    }

    fn api(&self, plan: &Plan, wanted: &Wanted) -> Api<DynamicObject> {
        let named = GroupVersionKind::gvk(wanted.group, wanted.version, wanted.kind);
        let resource = ApiResource::from_gvk_with_plural(&named, wanted.plural);
        Api::namespaced_with(self.client.clone(), &plan.gateway.namespace, &resource)
    }

    async fn tell_gateway(&self, object: &DynamicObject, findings: &Findings) {
        let before = object.data.get("status").cloned().unwrap_or_default();
        let Some(status) = gateway_status(object, &before, findings, &now()) else { return };
        Told { client: &self.client, resource: &self.gateway, object, what: "gateway" }.merge(status).await;
    }

    /// The class that users name, which there is only where the Gateway API is.
    async fn tell_class(&mut self) {
        if self.class_looked.is_some_and(|(looked, well)| looked.elapsed() < if well { MENDING } else { AGAIN }) {
            return;
        }
        self.class_looked = Some((Instant::now(), false));
        let named = GroupVersionKind::gvk("gateway.networking.k8s.io", "v1", "GatewayClass");
        let resource = ApiResource::from_gvk_with_plural(&named, "gatewayclasses");
        let api: Api<DynamicObject> = Api::all_with(self.client.clone(), &resource);
        let class = json!({
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "GatewayClass",
            "metadata": {"name": WAYPOINT_CLASS, "labels": {"app.kubernetes.io/part-of": "selvedge"}},
            "spec": {
                "controllerName": CONTROLLER,
                "description": "Selvedge: requests are routed and judged in pods apart.",
            },
        });
        let written = api.patch(WAYPOINT_CLASS, &PatchParams::apply(MANAGER).force(), &Patch::Apply(&class)).await;
        record("gateway", "GatewayClass selvedge-waypoint", written.as_ref().map(drop));
        let Ok(object) = written else { return };
        self.class_looked = Some((Instant::now(), true));
        let before = object.data.get("status").cloned().unwrap_or_default();
        let generation = object.metadata.generation.unwrap_or_default();
        let Some(status) = class_status(&before, generation, &now()) else { return };
        Told { client: &self.client, resource: &resource, object: &object, what: "gateway" }.merge(status).await;
    }

    /// Lets the waypoints' service accounts read what they need: all of them in one binding, whose role is fixed.
    async fn bind(&mut self, accounts: BTreeSet<(String, String)>) {
        if self.bound.as_ref().is_some_and(|(bound, at)| *bound == accounts && at.elapsed() < MENDING) {
            return;
        }
        let named = GroupVersionKind::gvk("rbac.authorization.k8s.io", "v1", "ClusterRoleBinding");
        let resource = ApiResource::from_gvk_with_plural(&named, "clusterrolebindings");
        let api: Api<DynamicObject> = Api::all_with(self.client.clone(), &resource);
        let subject = |(namespace, name): &(String, String)| json!({"kind": "ServiceAccount", "namespace": namespace, "name": name});
        let subjects: Vec<Value> = accounts.iter().map(subject).collect();
        // A list without keys is replaced as a whole.
        let written = api.patch(READERS, &PatchParams::default(), &Patch::Merge(&json!({"subjects": subjects}))).await;
        record("waypoint", "ClusterRoleBinding selvedge-waypoint", written.as_ref().map(drop));
        self.bound = written.is_ok().then(|| (accounts, Instant::now()));
    }
}

/// What a Gateway asks for, and what of it cannot be read.
fn plan(object: &DynamicObject, uid: &str, gateway: &Gateway) -> (Plan, Vec<String>) {
    let empty = BTreeMap::new();
    let annotations = object.metadata.annotations.as_ref().unwrap_or(&empty);
    let mut notes = Vec::new();
    let mut number = |key: &str| -> Option<u32> {
        let written = annotations.get(key)?;
        let read = written.parse().ok().filter(|count| (1..=MOST_REPLICAS).contains(count));
        if read.is_none() {
            notes.push(format!("metadata.annotations[{key}]: {written:?} is no number from 1 to {MOST_REPLICAS}"));
        }
        read
    };
    let replicas = number(REPLICAS).unwrap_or(USUAL_REPLICAS);
    let most_replicas = number(MOST).unwrap_or(replicas);
    let pairs = |field: &str| -> Vec<(String, String)> {
        let written = object.data.pointer(&format!("/spec/infrastructure/{field}")).and_then(Value::as_object);
        let pairs = written.into_iter().flatten();
        pairs.filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect()
    };
    let plan = Plan {
        gateway: gateway.name.clone(),
        uid: uid.to_owned(),
        replicas,
        most_replicas,
        labels: pairs("labels"),
        annotations: pairs("annotations"),
    };
    (plan, notes)
}

/// In the GatewayClass.
pub const CONTROLLER: &str = "selvedge.dev/waypoint";
/// The ClusterRoleBinding of what waypoints read.
const READERS: &str = "selvedge-waypoint";
const MANAGED: &str = "selvedge.dev/managed";
const REPLICAS: &str = "selvedge.dev/replicas";
const MOST: &str = "selvedge.dev/max-replicas";
const USUAL_REPLICAS: u32 = 2;
const MOST_REPLICAS: u32 = 1000;
/// Between two looks at what nobody said has changed.
const MENDING: Duration = Duration::from_secs(60);
const AGAIN: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests;
