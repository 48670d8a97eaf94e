//! Who signs for this agent, and whom it trusts.

use std::future::pending;
use std::path::Path;
use std::sync::Arc;

use futures_util::future::BoxFuture;

use crate::cli::{AgentArgs, Failure};
use crate::identity::anchors::{CaRoot, ConfigMapAnchors, FileAnchors};
use crate::identity::{CaAddress, CertificateAuthority, EmbeddedCa, RemoteCa, TrustSource};
use crate::mesh::TrustDomain;
use crate::source::kube::{self, Access};

/// A CA with its trust bundle.
pub struct Ca {
    pub authority: Arc<dyn CertificateAuthority>,
    pub trust: TrustSource,
    /// Follows what both were read from; never completes.
    pub upkeep: BoxFuture<'static, ()>,
}

/// What the flags say of it.
pub struct CaChoice<'a> {
    pub address: Option<&'a CaAddress>,
    pub folder: Option<&'a Path>,
    pub root: &'a CaRoot,
    pub token: &'a Path,
    /// The controller's.
    pub namespace: &'a str,
    pub trust_domain: &'a TrustDomain,
}

impl<'a> From<&'a AgentArgs> for CaChoice<'a> {
    fn from(args: &'a AgentArgs) -> Self {
        Self {
            address: args.ca_address.as_ref(),
            folder: args.ca_dir.as_deref(),
            root: &args.ca_root,
            token: &args.ca_token,
            namespace: &args.namespace,
            trust_domain: &args.trust_domain,
        }
    }
}

impl Ca {
    /// The CA that the flags name: in a cluster the controller, where they name none; else the one of the folder.
    pub async fn open(choice: &CaChoice<'_>, cluster: Option<&::kube::Client>) -> Result<Self, Failure> {
        let address = match (choice.address, choice.folder, cluster) {
            (Some(address), _, _) => address.clone(),
            (None, None, Some(_)) => CaAddress::of_controller(choice.namespace).map_err(Failure::usage)?,
            (None, dir, _) => {
                let dir = dir.unwrap_or(Path::new(DEFAULT_FOLDER));
                let ca = EmbeddedCa::open(dir, choice.trust_domain).map_err(Failure::configuration)?;
                let (authority, trust) = (ca.clone(), ca.trust());
                return Ok(Self { authority, trust, upkeep: Box::pin(async move { ca.watch().await }) });
            }
        };
        let (trust, upkeep): (_, BoxFuture<'static, ()>) = match (choice.root, cluster) {
            (CaRoot::File(path), _) => {
                let anchors = FileAnchors::open(path).map_err(Failure::configuration)?;
                (anchors.trust(), Box::pin(anchors.follow()))
            }
            (CaRoot::ConfigMap, cluster) => {
                let client = match cluster {
                    Some(client) => client.clone(),
                    // The objects come from a folder, and yet the agent runs in a pod.
                    None => kube::client(&Access::InCluster).await.map_err(|why| {
                        let cure = "outside of a cluster give --ca-root FILE, with the CA's root certificates in PEM";
                        Failure::configuration(format!("ConfigMap selvedge-trust-bundle: {why}; {cure}"))
                    })?,
                };
                let anchors = ConfigMapAnchors::new(client, choice.namespace);
                (anchors.trust(), Box::pin(anchors.follow()))
            }
        };
        let authority = RemoteCa::new(address, choice.token.to_owned(), trust.clone());
        let upkeep = Box::pin(async move {
            upkeep.await;
            // A watch that ends leaves what stood in force.
            pending().await
        });
        Ok(Self { authority, trust, upkeep })
    }
}

const DEFAULT_FOLDER: &str = "/var/lib/selvedge/ca";
