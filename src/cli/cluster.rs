//! The cluster that a person's kubeconfig names.

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use kube::Client;

use super::Failure;
use crate::mesh::{MeshSettings, TrustDomain};
use crate::model::Model;
use crate::source::Report;
use crate::source::kube::{self as source, Access};

/// Which cluster to ask, and how its agents see it.
#[derive(Args, Debug, Clone)]
pub struct ClusterArgs {
    /// The kubeconfig that names the cluster, by its current context. Default: as kubectl finds it, `$KUBECONFIG` or
    /// `~/.kube/config`.
    #[arg(long, env = "SELVEDGE_KUBECONFIG", value_name = "FILE")]
    kubeconfig: Option<PathBuf>,

    /// The trust domain, as the agents have it.
    #[arg(long, env = "SELVEDGE_TRUST_DOMAIN", value_name = "NAME", default_value = "cluster.local")]
    trust_domain: TrustDomain,
}

impl ClusterArgs {
    pub async fn client(&self) -> Result<Client, Failure> {
        let access = self.kubeconfig.clone().map_or(Access::Person, Access::File);
        source::client(&access).await.map_err(Failure::new)
    }

    /// The objects of the mesh as an agent sees them, once each kind has been listed.
    pub async fn view(&self, client: Client) -> Result<View, Failure> {
        let settings = MeshSettings { trust_domain: self.trust_domain.clone(), cluster_cidrs: Vec::new() };
        let view = View { model: Arc::new(Model::new(settings)), report: Report::new() };
        view.model.update(|state| state.mesh.believe_mesh_nodes());
        let source = source::run(client, None, view.model.clone(), view.report.clone());
        tokio::select! {
            ended = source => match ended {
                Err(cause) => Err(Failure::new(cause)),
                Ok(()) => Err(Failure::new("what reads the cluster has ended")),
            },
            () = view.model.synced() => Ok(view),
            () = tokio::time::sleep(LIMIT) => {
                let waiting = view.report.waiting().join("; ");
                Err(Failure::new(format!("the cluster could not be read in {} s: {waiting}", LIMIT.as_secs())))
            }
        }
    }
}

/// The model that an agent would have, and what is wrong with the objects behind it.
pub struct View {
    pub model: Arc<Model>,
    pub report: Arc<Report>,
}

/// Runs what asks a cluster to its end.
pub fn block_on<T>(ask: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Failure::new)?;
    runtime.block_on(ask)
}

/// Where Selvedge lives in a cluster, and what it is called there.
pub const NAMESPACE: &str = "selvedge-system";
pub const AGENT: &str = "selvedge-agent";
pub const CONTROLLER: &str = "selvedge-controller";
pub const TRUST_BUNDLE: &str = "selvedge-trust-bundle";

const LIMIT: Duration = Duration::from_secs(60);
