//! Who signs for this agent, and whom it trusts.

use std::future::pending;
use std::sync::Arc;

use futures_util::future::BoxFuture;

use crate::cli::{AgentArgs, Failure};
use crate::controller::client;
use crate::identity::anchors::{CaRoot, ConfigMapAnchors, FileAnchors};
use crate::identity::{CertificateAuthority, EmbeddedCa, RemoteCa, TrustSource};

/// A CA with its trust bundle.
pub struct Ca {
    pub authority: Arc<dyn CertificateAuthority>,
    pub trust: TrustSource,
    /// Follows what both were read from; never completes.
    pub upkeep: BoxFuture<'static, ()>,
}

impl Ca {
    /// The CA that the flags name; without a cluster, the one of the folder.
    pub async fn open(args: &AgentArgs, cluster: Option<&kube::Client>) -> Result<Self, Failure> {
        let address = match (&args.ca_address, cluster) {
            (Some(address), _) => address.clone(),
            (None, Some(_)) => args.default_ca_address()?,
            (None, None) => {
                let ca = EmbeddedCa::open(&args.ca_dir, &args.trust_domain).map_err(Failure::configuration)?;
                let (authority, trust) = (ca.clone(), ca.trust());
                return Ok(Self { authority, trust, upkeep: Box::pin(async move { ca.watch().await }) });
            }
        };
        let (trust, upkeep): (_, BoxFuture<'static, ()>) = match (&args.ca_root, cluster) {
            (CaRoot::File(path), _) => {
                let anchors = FileAnchors::open(path).map_err(Failure::configuration)?;
                (anchors.trust(), Box::pin(anchors.follow()))
            }
            (CaRoot::ConfigMap, cluster) => {
                let client = match cluster {
                    Some(client) => client.clone(),
                    // The objects come from a folder, and yet the agent runs in a pod.
                    None => client::connect(None).await.map_err(|why| {
                        let cure = "outside of a cluster give --ca-root FILE, with the CA's root certificates in PEM";
                        Failure::configuration(format!("ConfigMap selvedge-trust-bundle: {why}; {cure}"))
                    })?,
                };
                let anchors = ConfigMapAnchors::new(client, &args.namespace);
                (anchors.trust(), Box::pin(anchors.follow()))
            }
        };
        let authority = RemoteCa::new(address, args.ca_token.clone(), trust.clone());
        let upkeep = Box::pin(async move {
            upkeep.await;
            // A watch that ends leaves what stood in force.
            pending().await
        });
        Ok(Self { authority, trust, upkeep })
    }
}
