//! The cluster that a person's kubeconfig names.

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use kube::Client;

use super::Failure;
use crate::mesh::{MeshSettings, TrustDomain};
use crate::model::Model;
use crate::policy;
use crate::source::Problem;
use crate::source::kube::{self as source, Access, Loaded};

/// Which cluster a person asks.
#[derive(Args, Debug)]
pub struct ClusterArgs {
    /// How to reach the cluster. Default: as kubectl does.
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
}

impl ClusterArgs {
    /// Reads the cluster into a model, with the rights of whoever asks.
    pub fn load(&self, model: &Arc<Model>) -> Result<Loaded, Failure> {
        block_on(async { source::load(&self.access(), model).await.map_err(Failure::new) })
    }

    /// What an agent would make of the cluster.
    pub async fn view(&self, trust_domain: &TrustDomain) -> Result<View, Failure> {
        let settings = MeshSettings { trust_domain: trust_domain.clone(), cluster_cidrs: Vec::new() };
        let model = Arc::new(Model::new(settings));
        let loaded = source::load(&self.access(), &model).await.map_err(Failure::new)?;
        let unread = unread(&model);
        Ok(View { problems: loaded.problems.iter().cloned().chain(unread).collect(), model })
    }

    /// A client of an API server that answers.
    pub async fn client(&self) -> Result<Client, Failure> {
        let client = source::client(&self.access()).await.map_err(Failure::new)?;
        source::answers(&client).await.map_err(Failure::new)?;
        Ok(client)
    }

    fn access(&self) -> Access {
        self.kubeconfig.clone().map_or(Access::Person, Access::File)
    }
}

/// The model that an agent would have, and what is wrong with the objects behind it.
pub struct View {
    pub model: Arc<Model>,
    pub problems: Arc<[Problem]>,
}

/// Policies that speak of requests which nobody reads.
pub fn unread(model: &Model) -> Vec<Problem> {
    let problem = |problem: policy::Problem| Problem {
        file: PathBuf::new(),
        line: 0,
        object: problem.policy.to_string(),
        field: problem.field,
        cause: problem.cause,
    };
    model.read().unread().into_iter().map(problem).collect()
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
