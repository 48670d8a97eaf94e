//! A rotation as a person at a terminal sees it.

use std::fmt;

use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::api::{Api, ListParams, Patch, PatchParams};
use serde_json::json;

use super::material::{Bundle, CaSecret, ROTATE, SECRET, TRUST_BUNDLE};
use crate::controller::mesh_node::MeshNodeView;

/// One cluster's root, seen from outside.
pub struct Rotation {
    secrets: Api<Secret>,
    bundles: Api<ConfigMap>,
    nodes: Api<MeshNodeView>,
}

/// How far a rotation is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Progress {
    Stable,
    /// The controller has not taken it up yet.
    Asked,
    /// Nodes whose agents do not list the new bundle yet, of so many.
    Introducing {
        behind: Vec<String>,
        nodes: usize,
    },
    Retiring {
        since: Timestamp,
    },
}

impl Rotation {
    pub fn new(client: Client, namespace: &str) -> Self {
        Self {
            secrets: Api::namespaced(client.clone(), namespace),
            bundles: Api::namespaced(client.clone(), namespace),
            nodes: Api::all(client),
        }
    }

    /// Asks the controller for a new root.
    ///
    /// # Errors
    /// A root that is not the controller's to replace, or an API server that says no.
    pub async fn ask(&self) -> Result<(), String> {
        if !self.secret().await?.is_ours {
            return Err(format!(
                "the root in Secret {SECRET} was brought: replace it where it comes from (cert-manager: `cmctl renew`), and \
                 the controller introduces the new one"
            ));
        }
        let patch = json!({"metadata": {"annotations": {ROTATE: Timestamp::now().to_string()}}});
        let patched = self.secrets.patch_metadata(SECRET, &PatchParams::default(), &Patch::Merge(&patch)).await;
        patched.map(drop).map_err(|error| format!("Secret {SECRET}: {error}"))
    }

    /// # Errors
    /// What cannot be read.
    pub async fn look(&self) -> Result<Progress, String> {
        let bundle =
            self.bundles.get(TRUST_BUNDLE).await.map_err(|error| format!("ConfigMap {TRUST_BUNDLE}: {error}"))?;
        let bundle = Bundle::read(bundle).map_err(|alarm| alarm.to_string())?;
        let secret = self.secret().await?;
        if !bundle.is_known_to_all(&secret.current.anchors) {
            let listed =
                self.nodes.list(&ListParams::default()).await.map_err(|error| format!("MeshNodes: {error}"))?;
            let hash = bundle.hash();
            let behind = listed.iter().filter(|node| node.status.trust_bundle_hash.as_ref() != Some(&hash));
            let behind = behind.filter_map(|node| node.metadata.name.clone()).collect();
            return Ok(Progress::Introducing { behind, nodes: listed.items.len() });
        }
        match (bundle.retiring_since, secret.rotate) {
            (Some(since), _) => Ok(Progress::Retiring { since }),
            (None, Some(_)) => Ok(Progress::Asked),
            (None, None) if secret.previous.is_some() => Ok(Progress::Asked),
            (None, None) => Ok(Progress::Stable),
        }
    }

    async fn secret(&self) -> Result<CaSecret, String> {
        let secret = self.secrets.get(SECRET).await.map_err(|error| format!("Secret {SECRET}: {error}"))?;
        CaSecret::read(secret).map_err(|alarm| alarm.to_string())
    }
}

impl fmt::Display for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stable => f.write_str("stable: one root signs, and is trusted"),
            Self::Asked => f.write_str("asked: the controller takes it up"),
            Self::Introducing { behind, nodes } if behind.is_empty() => {
                write!(f, "introducing: all {nodes} nodes hold the new root; the old one signs for a moment still")
            }
            Self::Introducing { behind, nodes } => write!(
                f,
                "introducing: the old root signs until every node holds the new one; {} of {nodes} to go: {}",
                behind.len(),
                behind.join(", ")
            ),
            Self::Retiring { since } => write!(
                f,
                "retiring: the new root signs, since {since:.0}; the old one is trusted until the last certificate under \
                 it has ended"
            ),
        }
    }
}
