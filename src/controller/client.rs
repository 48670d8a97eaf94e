//! The way to the API server.

use std::path::Path;

use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

/// By a kubeconfig, or as the pod that this is.
///
/// # Errors
/// Which of both could not be read, and what to do.
pub async fn connect(kubeconfig: Option<&Path>) -> Result<Client, String> {
    let config = match kubeconfig {
        Some(path) => {
            let read = Kubeconfig::read_from(path).map_err(|error| format!("{}: {error}", path.display()))?;
            let options = KubeConfigOptions::default();
            Config::from_custom_kubeconfig(read, &options)
                .await
                .map_err(|error| format!("{}: {error}", path.display()))?
        }
        None => Config::incluster()
            .map_err(|error| format!("{error}: outside of a cluster, name a file by --kubeconfig"))?,
    };
    Client::try_from(config).map_err(|error| format!("the API server's client cannot be made: {error}"))
}

/// As kubectl finds it: `KUBECONFIG`, `~/.kube/config`, else the pod that this is.
///
/// # Errors
/// None of them can be read.
pub async fn as_kubectl(kubeconfig: Option<&Path>) -> Result<Client, String> {
    if kubeconfig.is_some() {
        return connect(kubeconfig).await;
    }
    let config = Config::infer().await.map_err(|error| format!("{error}: name a kubeconfig by --kubeconfig"))?;
    Client::try_from(config).map_err(|error| format!("the API server's client cannot be made: {error}"))
}
