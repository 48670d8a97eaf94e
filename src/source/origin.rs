use std::path::PathBuf;
use std::sync::Arc;

use ::kube::Client;

use super::kube::{self, Access, ConnectError};
use super::{Report, directory};
use crate::model::Model;

/// Where the objects of a process are from.
#[derive(Clone)]
pub enum Origin {
    Cluster(Client),
    Folder(PathBuf),
}

impl Origin {
    /// A folder where one is given, else the cluster of the kubeconfig, or the one that this process runs in.
    ///
    /// # Errors
    /// Why the API server cannot be asked at all.
    pub async fn open(manifests: Option<PathBuf>, kubeconfig: Option<PathBuf>) -> Result<Self, ConnectError> {
        match manifests {
            Some(folder) => Ok(Self::Folder(folder)),
            None => kube::client(&kubeconfig.map_or(Access::InCluster, Access::File)).await.map(Self::Cluster),
        }
    }

    pub fn cluster(&self) -> Option<&Client> {
        match self {
            Self::Cluster(client) => Some(client),
            Self::Folder(_) => None,
        }
    }

    /// Feeds the model until that cannot go on; says why. `own_node` is the agent's, as [`kube::run`] takes it.
    pub async fn follow(self, own_node: Option<Arc<str>>, model: Arc<Model>, report: Arc<Report>) -> String {
        match self {
            Self::Cluster(client) => match kube::run(client, own_node, model, report).await {
                Ok(never) => match never {},
                Err(cause) => cause.to_string(),
            },
            Self::Folder(folder) => match directory::run(folder, model, report).await {
                Ok(never) => match never {},
                Err(cause) => cause.to_string(),
            },
        }
    }
}
