use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;

use super::Failure;
use crate::model::Model;
use crate::source::kube::{self, Access, Loaded};

/// Which cluster a person asks.
#[derive(Args, Debug)]
pub struct ClusterArgs {
    /// How to reach the cluster. Default: as kubectl does.
    #[arg(long, value_name = "FILE", conflicts_with = "manifests")]
    kubeconfig: Option<PathBuf>,
}

impl ClusterArgs {
    /// Reads the cluster into a model, with the rights of whoever asks.
    pub fn load(&self, model: &Arc<Model>) -> Result<Loaded, Failure> {
        let access = self.kubeconfig.clone().map_or(Access::Person, Access::File);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Failure::new)?;
        runtime.block_on(kube::load(&access, model)).map_err(Failure::new)
    }
}
