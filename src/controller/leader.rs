//! What the leader alone does: statuses of policies, authorizers and routes, keys of token issuers, Events on pods, taints
//! of nodes, waypoints.

mod authorizers;
mod conditions;
mod events;
pub mod keys;
mod routes;
mod status;
mod taints;
mod traffic;
mod waypoints;

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{FutureExt, StreamExt};
use kube::api::{Api, DynamicObject};
use kube::core::{ApiResource, GroupVersionKind};
use kube::runtime::WatchStreamExt;
use kube::runtime::reflector::store::Writer;
use kube::runtime::reflector::{Lookup, Store, reflector};
use kube::runtime::watcher::{self, watcher};
use kube::{Client, Resource};
use metrics::counter;
use serde::de::DeserializeOwned;
use tracing::{debug, warn};

use super::WaypointSettings;
use super::lease::Leadership;
use super::metrics::WRITES;
use super::pods::Pods;
use crate::api::{GROUP, MeshNode, VERSION};
use crate::policy::PolicyKind;
use crate::route::RouteKind;
use crate::route::traffic::TrafficKind;
use authorizers::AuthorizerStatuses;
use conditions::Conditions;
use events::Events;
use keys::{ClusterAddresses, Keys, Tunnels};
use routes::{RouteStatuses, RoutedNamespace, RoutedService, RoutesOf};
use taints::{TaintedNode, Taints};
use traffic::{PoliciesOf, TrafficStatuses};
use waypoints::{LeanDeployment, OF_WAYPOINTS, Waypoints};

/// Does the leader's work whenever this replica leads.
pub struct Leader {
    pub client: Client,
    /// This replica, for those who read Events.
    pub name: String,
    /// Of the agents.
    pub namespace: String,
    pub daemon_set: String,
    pub pods: Arc<Pods>,
    pub tunnels: Tunnels,
    /// None: no waypoint is deployed.
    pub waypoints: Option<WaypointSettings>,
}

impl Leader {
    pub async fn run(self, mut leadership: Leadership) {
        loop {
            leadership.gained().await;
            tokio::select! {
                () = leadership.lost() => debug!("What the leader does is left to another."),
                () = self.lead() => {}
            }
        }
    }

    /// Never completes by itself. Dropped at any point it leaves nothing half done: every write stands alone.
    async fn lead(&self) {
        let kind = |kind: PolicyKind, plural: &str| {
            let named = GroupVersionKind::gvk(GROUP, VERSION, &kind.to_string());
            ApiResource::from_gvk_with_plural(&named, plural)
        };
        let authorization = kind(PolicyKind::AuthorizationPolicy, "authorizationpolicies");
        let peer = kind(PolicyKind::PeerAuthentication, "peerauthentications");
        let tokens = kind(PolicyKind::RequestAuthentication, "requestauthentications");
        let (authorizations, authorization_watch) = watch_objects(&self.client, &authorization);
        let (peers, peer_watch) = watch_objects(&self.client, &peer);
        let (token_rules, token_watch) = watch_objects(&self.client, &tokens);
        let (reports, report_watch) = watch::<MeshNode>(&self.client);
        let (nodes, node_watch) = watch::<TaintedNode>(&self.client);
        let (services, service_watch) = watch::<RoutedService>(&self.client);
        let (namespaces, namespace_watch) = watch::<RoutedNamespace>(&self.client);
        let ((http, http_watch), (grpc, grpc_watch)) =
            (self.watch_routes(RouteKind::Http, "httproutes"), self.watch_routes(RouteKind::Grpc, "grpcroutes"));
        let routes = [grpc, http];
        let (ours, our_watch) = self.watch_traffic(TrafficKind::Traffic, GROUP, "trafficpolicies");
        let (theirs, their_watch) = self.watch_traffic(TrafficKind::Backend, EXPERIMENTAL, "xbackendtrafficpolicies");
        let traffic = [ours, theirs];
        let authorizer = GroupVersionKind::gvk(GROUP, VERSION, "ExternalAuthorizer");
        let authorizer = ApiResource::from_gvk_with_plural(&authorizer, "externalauthorizers");
        let (authorizers, authorizer_watch) = watch_objects(&self.client, &authorizer);
        let gateway = GroupVersionKind::gvk("gateway.networking.k8s.io", "v1", "Gateway");
        let gateway = ApiResource::from_gvk_with_plural(&gateway, "gateways");
        let (gateways, gateway_watch) = watch_objects(&self.client, &gateway);

        let conditions = |kind, resource: &ApiResource, policies: &Store<DynamicObject>| {
            Conditions::new(self.client.clone(), kind, resource.clone(), policies.clone())
        };
        let mut conditions = [
            conditions(PolicyKind::AuthorizationPolicy, &authorization, &authorizations),
            conditions(PolicyKind::PeerAuthentication, &peer, &peers),
            conditions(PolicyKind::RequestAuthentication, &tokens, &token_rules),
        ];
        let mut keys = Keys::new(self.client.clone(), self.tunnels.clone());
        let mut cluster = ClusterAddresses::new(self.client.clone());
        let mut events = Events::new(self.client.clone(), &self.name);
        let (deployments, deployment_watch) = watch_labelled::<LeanDeployment>(&self.client, OF_WAYPOINTS);
        let client = self.client.clone();
        let mut waypoints =
            Waypoints::new(client, self.waypoints.clone(), gateway.clone(), gateways.clone(), deployments);
        let mut statuses = RouteStatuses::new(self.client.clone(), services, namespaces, gateways);
        let mut traffic_statuses = TrafficStatuses::new(self.client.clone());
        let mut authorizer_statuses = AuthorizerStatuses::new(self.client.clone(), authorizer, authorizers);
        let taints = Taints::new(self.client.clone(), &self.namespace, &self.daemon_set);
        let work = async {
            let mut ticks = tokio::time::interval(BREATH);
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                ticks.tick().await;
                let told = reports.state();
                for of_kind in &mut conditions {
                    of_kind.tell(&told).await;
                }
                if !token_rules.state().is_empty() {
                    let forbidden = cluster.forbidden(&nodes.state()).await;
                    keys.tell(&tokens, token_rules.state(), &told, forbidden.as_ref()).await;
                }
                statuses.tell(&routes).await;
                waypoints.tell().await;
                traffic_statuses.tell(&traffic, &statuses, &routes).await;
                authorizer_statuses.tell(&statuses).await;
                events.tell(&told).await;
                taints.take_off(&nodes.state(), &self.pods).await;
            }
        };
        let watches = futures_util::future::join_all([
            authorization_watch.boxed(),
            peer_watch.boxed(),
            token_watch.boxed(),
            report_watch.boxed(),
            node_watch.boxed(),
            service_watch.boxed(),
            namespace_watch.boxed(),
            http_watch.boxed(),
            grpc_watch.boxed(),
            our_watch.boxed(),
            their_watch.boxed(),
            authorizer_watch.boxed(),
            gateway_watch.boxed(),
            deployment_watch.boxed(),
        ]);
        tokio::join!(work, watches);
    }

    fn watch_traffic(
        &self,
        kind: TrafficKind,
        group: &str,
        plural: &str,
    ) -> (PoliciesOf, impl Future<Output = ()> + use<>) {
        let named = GroupVersionKind::gvk(group, VERSION, kind.as_str());
        let resource = ApiResource::from_gvk_with_plural(&named, plural);
        let (store, watch) = watch_objects(&self.client, &resource);
        (PoliciesOf { kind, resource, store }, watch)
    }

    fn watch_routes(&self, kind: RouteKind, plural: &str) -> (RoutesOf, impl Future<Output = ()> + use<>) {
        let named = GroupVersionKind::gvk("gateway.networking.k8s.io", "v1", kind.as_str());
        let resource = ApiResource::from_gvk_with_plural(&named, plural);
        let (store, watch) = watch_objects(&self.client, &resource);
        (RoutesOf { kind, resource, store }, watch)
    }
}

fn watch_objects(client: &Client, resource: &ApiResource) -> (Store<DynamicObject>, impl Future<Output = ()> + use<>) {
    let api: Api<DynamicObject> = Api::all_with(client.clone(), resource);
    let writer = Writer::new(resource.clone());
    let all = watcher::Config::default();
    (writer.as_reader(), follow(api, writer, all, |object| object.metadata.managed_fields = None))
}

fn watch<K>(client: &Client) -> (Store<K>, impl Future<Output = ()> + use<K>)
where
    K: Resource<DynamicType = ()> + Lookup<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
{
    watch_labelled(client, "")
}

/// Of objects with these labels alone.
fn watch_labelled<K>(client: &Client, labels: &str) -> (Store<K>, impl Future<Output = ()> + use<K>)
where
    K: Resource<DynamicType = ()> + Lookup<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
{
    let writer = Writer::new(());
    let config = watcher::Config::default().labels(labels);
    let api = Api::all(client.clone());
    (writer.as_reader(), follow(api, writer, config, |object| object.meta_mut().managed_fields = None))
}

/// Keeps a store true to the API server.
async fn follow<K>(api: Api<K>, writer: Writer<K>, config: watcher::Config, lean: fn(&mut K))
where
    K: Resource
        + Lookup<DynamicType = <K as Resource>::DynamicType>
        + Clone
        + Debug
        + DeserializeOwned
        + Send
        + 'static,
    <K as Resource>::DynamicType: Eq + std::hash::Hash + Clone,
{
    let events = watcher(api, config).modify(lean).default_backoff();
    let mut events = Box::pin(reflector(writer, events));
    while let Some(event) = events.next().await {
        if let Err(error) = event {
            debug!(%error, "A watch of the leader failed; it is tried again.");
        }
    }
}

/// Counts what was written for people, and says what could not be.
fn record(kind: &'static str, what: &str, written: Result<(), &kube::Error>) {
    let outcome = if written.is_ok() { "ok" } else { "failed" };
    counter!(WRITES, "kind" => kind, "outcome" => outcome).increment(1);
    if let Err(error) = written {
        warn!(%error, kind, what, "It could not be written; it is tried again.");
    }
}

/// Of the Gateway API's experimental kinds.
const EXPERIMENTAL: &str = "gateway.networking.x-k8s.io";
/// Between two rounds: what changes in a burst is written once.
const BREATH: Duration = Duration::from_secs(1);
