//! The way to the API server: by a kubeconfig, or as the pod's service account.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ::kube::config::{InferConfigError, KubeConfigOptions, Kubeconfig};
use ::kube::{Client, Config};

/// How to reach the API server.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Access {
    /// A kubeconfig file, with its current context.
    File(PathBuf),
    /// As the service account of the pod that this process runs in.
    InCluster,
    /// What kubectl would take: `$KUBECONFIG`, `~/.kube/config`, else the service account.
    Person,
}

/// Why the API server cannot be asked at all.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("{}: no kubeconfig that can be used: {cause}; name another by --kubeconfig", path.display())]
    File { path: PathBuf, cause: String },
    #[error(
        "not in a pod of a cluster ({0}); name a kubeconfig by --kubeconfig, or a folder of manifests by --manifests"
    )]
    NotInCluster(String),
    #[error("no cluster to ask ({0}); name a kubeconfig by --kubeconfig or KUBECONFIG")]
    NoCluster(String),
    #[error("the credentials for {server} cannot be used: {cause}")]
    Credentials { server: String, cause: String },
    #[error(
        "the API server is of Kubernetes {version}; Selvedge needs {}.{} or later: upgrade the cluster",
        LEAST.0,
        LEAST.1
    )]
    TooOld { version: String },
    #[error("the API server does not know you (401 Unauthorized); are the credentials of your kubeconfig still good?")]
    Stranger,
    #[error("the API server does not answer: {0}")]
    Silent(String),
}

/// A client that has not said a word yet.
pub async fn client(access: &Access) -> Result<Client, ConnectError> {
    let mut config = match access {
        Access::File(path) => from_file(path).await?,
        Access::InCluster => Config::incluster().map_err(|cause| ConnectError::NotInCluster(cause.to_string()))?,
        Access::Person => Config::infer().await.map_err(no_cluster)?,
    };
    config.connect_timeout = Some(CONNECT_LIMIT);
    // Watches are tried again here, at a pace that knows what they are.
    config.default_retry = false;
    let server = config.cluster_url.to_string();
    Client::try_from(config).map_err(|cause| ConnectError::Credentials { server, cause: cause.to_string() })
}

/// That a person is not in a pod either is no news to them.
fn no_cluster(cause: InferConfigError) -> ConnectError {
    ConnectError::NoCluster(cause.source().map_or_else(|| cause.to_string(), ToString::to_string))
}

async fn from_file(path: &Path) -> Result<Config, ConnectError> {
    let refused =
        |cause: &dyn std::fmt::Display| ConnectError::File { path: path.to_owned(), cause: cause.to_string() };
    let written = Kubeconfig::read_from(path).map_err(|cause| refused(&cause))?;
    Config::from_custom_kubeconfig(written, &KubeConfigOptions::default()).await.map_err(|cause| refused(&cause))
}

/// Whether the server is new enough, once it answers.
pub async fn check_version(client: &Client) -> Result<Result<(), ConnectError>, ::kube::Error> {
    let info = client.apiserver_version().await?;
    let number = |text: &str| text.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap_or(0);
    let version: (u32, u32) = (number(&info.major), number(&info.minor));
    if version >= LEAST {
        return Ok(Ok(()));
    }
    Ok(Err(ConnectError::TooOld { version: info.git_version }))
}

/// The oldest version that is tested.
const LEAST: (u32, u32) = (1, 32);
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
