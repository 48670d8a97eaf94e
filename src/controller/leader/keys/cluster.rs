//! The cluster's own addresses, from which nothing is fetched.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::Api;
use kube::{Client, Error};
use tracing::warn;

use super::Forbidden;
use crate::controller::leader::taints::TaintedNode;

/// Of its nodes and its API server, as they are now.
pub struct ClusterAddresses {
    client: Client,
    /// None: not known yet.
    api_server: Option<HashSet<IpAddr>>,
    due: Instant,
}

impl ClusterAddresses {
    pub fn new(client: Client) -> Self {
        Self { client, api_server: None, due: Instant::now() }
    }

    /// None while they are not known: until then nothing is fetched.
    pub async fn forbidden(&mut self, nodes: &[Arc<TaintedNode>]) -> Option<Arc<Forbidden>> {
        if self.due <= Instant::now() {
            match self.ask().await {
                Ok(found) => {
                    self.api_server = Some(found);
                    self.due = Instant::now() + INTERVAL;
                }
                Err(error) => {
                    warn!(%error, "The API server's addresses cannot be read; no keys are fetched before they are known.");
                    self.due = Instant::now() + AFTER_FAILURE;
                }
            }
        }
        let api_server = self.api_server.as_ref()?;
        let of_nodes = nodes.iter().flat_map(|node| node.addresses());
        Some(Arc::new(Forbidden(of_nodes.chain(api_server.iter().copied()).collect())))
    }

    async fn ask(&self) -> Result<HashSet<IpAddr>, Error> {
        let services: Api<Service> = Api::namespaced(self.client.clone(), "default");
        let service = services.get_opt("kubernetes").await?;
        let slices: Api<EndpointSlice> = Api::namespaced(self.client.clone(), "default");
        let slice = slices.get_opt("kubernetes").await?;
        let of_service = service.and_then(|service| service.spec).and_then(|spec| spec.cluster_ips).unwrap_or_default();
        let of_slice =
            slice.into_iter().flat_map(|slice| slice.endpoints.unwrap_or_default()).flat_map(|one| one.addresses);
        let of_environment = std::env::var("KUBERNETES_SERVICE_HOST").ok();
        let all = of_service.into_iter().chain(of_slice).chain(of_environment);
        Ok(all.filter_map(|text| text.parse::<IpAddr>().ok()).map(|ip| ip.to_canonical()).collect())
    }
}

const INTERVAL: Duration = Duration::from_secs(60);
const AFTER_FAILURE: Duration = Duration::from_secs(10);
