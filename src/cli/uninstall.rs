use std::collections::BTreeSet;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{ApiResource, DeleteParams, DynamicObject, ListParams};
use kube::{Api, Client};

use super::agent::parse_duration;
use super::{Failure, terminal};

/// Remove Selvedge from the cluster that your kubeconfig names, in the right order.
///
/// First the agents: each takes the CNI plugin off its node, lets its pods leave, open connections going on up to the
/// drain limit, and removes every rule, route and file. Then everything else. The kinds that users write stay, and every
/// object of them, unless --crds is given.
#[derive(Args, Debug)]
pub struct UninstallArgs {
    /// The CustomResourceDefinitions too, and so every policy.
    #[arg(long)]
    crds: bool,

    /// How long agents may take. It should be longer than their drain limit.
    #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = parse_duration)]
    timeout: Duration,
}

pub fn run(args: &UninstallArgs) -> Result<ExitCode, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Failure::new)?;
    runtime.block_on(async {
        let client = Client::try_default().await.map_err(Failure::new)?;
        uninstall(&client, args).await
    })
}

async fn uninstall(client: &Client, args: &UninstallArgs) -> Result<ExitCode, Failure> {
    let down = nodes_that_are_down(client).await?;
    delete_all(client, &AGENTS).await?;
    let left = wait_for_agents(client, &down, args.timeout).await?;
    if !left.is_empty() {
        return Err(Failure::new(format!(
            "agents still run on {}: they serve open connections up to their drain limit. Nothing else has been removed; \
             type the same again",
            words(&left)
        )));
    }
    for kind in &REST {
        delete_all(client, kind).await?;
    }
    if args.crds {
        delete_all(client, &CRDS).await?;
    }
    delete_all(client, &NAMESPACE).await?;
    if !down.is_empty() {
        terminal::say(format_args!(
            "\n{} did not answer. When such a node is back: `selvedge cni-install --remove` there, with --bin-dir and \
             --conf-dir where they are not the usual ones, then remove /var/lib/selvedge. Pods that still run there have \
             their rules until they are deleted.\n",
            words(&down)
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn nodes_that_are_down(client: &Client) -> Result<BTreeSet<String>, Failure> {
    let nodes = Api::<Node>::all(client.clone()).list(&ListParams::default()).await.map_err(Failure::new)?;
    let ready = |node: &Node| {
        let conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
        conditions.into_iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
    };
    Ok(nodes.items.into_iter().filter(|node| !ready(node)).filter_map(|node| node.metadata.name).collect())
}

/// The nodes whose agents have not ended in time. Those of nodes that are down are waited for in vain.
async fn wait_for_agents(
    client: &Client,
    down: &BTreeSet<String>,
    timeout: Duration,
) -> Result<BTreeSet<String>, Failure> {
    let began = Instant::now();
    let pods = Api::<Pod>::namespaced(client.clone(), SYSTEM);
    let agents = ListParams::default().labels("app.kubernetes.io/name=selvedge-agent");
    loop {
        let here = pods.list(&agents).await.map_err(Failure::new)?.items;
        let nodes = here.into_iter().filter_map(|pod| pod.spec?.node_name).filter(|node| !down.contains(node));
        let left: BTreeSet<String> = nodes.collect();
        if left.is_empty() || began.elapsed() > timeout {
            return Ok(left);
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Deletes every object of a kind that is ours, and says which.
async fn delete_all(client: &Client, kind: &Kind) -> Result<(), Failure> {
    let resource = ApiResource {
        group: kind.group.to_owned(),
        version: kind.version.to_owned(),
        api_version: match kind.group {
            "" => kind.version.to_owned(),
            group => format!("{group}/{}", kind.version),
        },
        kind: kind.kind.to_owned(),
        plural: kind.plural.to_owned(),
    };
    let api: Api<DynamicObject> = match kind.namespaced {
        true => Api::namespaced_with(client.clone(), SYSTEM, &resource),
        false => Api::all_with(client.clone(), &resource),
    };
    let found = match api.list(&ListParams::default()).await {
        Ok(found) => found.items,
        // A kind that the cluster does not have.
        Err(kube::Error::Api(status)) if status.code == 404 => return Ok(()),
        Err(error) => return Err(about(kind, error)),
    };
    for object in found.iter().filter(|object| is_ours(kind, object)) {
        let name = object.metadata.name.as_deref().unwrap_or_default();
        match api.delete(name, &DeleteParams::background()).await {
            Ok(_) => terminal::say(format_args!("{} {name} deleted\n", kind.kind))?,
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => return Err(about(kind, error)),
        }
    }
    Ok(())
}

fn is_ours(kind: &Kind, object: &DynamicObject) -> bool {
    let name = object.metadata.name.as_deref().unwrap_or_default();
    let labels = object.metadata.labels.as_ref();
    match kind.kind {
        "Namespace" => name == SYSTEM,
        "CustomResourceDefinition" => name.ends_with(".selvedge.dev"),
        "MeshNode" => true,
        _ => labels.and_then(|labels| labels.get("app.kubernetes.io/part-of")).is_some_and(|of| of == "selvedge"),
    }
}

fn about(kind: &Kind, error: kube::Error) -> Failure {
    Failure::new(format!("{}: {error}. What was removed stays removed; type the same again", kind.plural))
}

fn words(nodes: &BTreeSet<String>) -> String {
    nodes.iter().cloned().collect::<Vec<_>>().join(", ")
}

struct Kind {
    group: &'static str,
    version: &'static str,
    kind: &'static str,
    plural: &'static str,
    namespaced: bool,
}

const fn kind(
    group: &'static str,
    version: &'static str,
    kind: &'static str,
    plural: &'static str,
    namespaced: bool,
) -> Kind {
    Kind { group, version, kind, plural, namespaced }
}

const SYSTEM: &str = "selvedge-system";
const AGENTS: Kind = kind("apps", "v1", "DaemonSet", "daemonsets", true);
/// What agents need to the end goes only after them.
const REST: [Kind; 13] = [
    kind("apps", "v1", "Deployment", "deployments", true),
    kind("policy", "v1", "PodDisruptionBudget", "poddisruptionbudgets", true),
    kind("", "v1", "Service", "services", true),
    kind(
        "admissionregistration.k8s.io",
        "v1",
        "ValidatingAdmissionPolicyBinding",
        "validatingadmissionpolicybindings",
        false,
    ),
    kind("admissionregistration.k8s.io", "v1", "ValidatingAdmissionPolicy", "validatingadmissionpolicies", false),
    kind("gateway.networking.k8s.io", "v1", "GatewayClass", "gatewayclasses", false),
    kind("selvedge.dev", "v1alpha1", "MeshNode", "meshnodes", false),
    kind("rbac.authorization.k8s.io", "v1", "RoleBinding", "rolebindings", true),
    kind("rbac.authorization.k8s.io", "v1", "Role", "roles", true),
    kind("rbac.authorization.k8s.io", "v1", "ClusterRoleBinding", "clusterrolebindings", false),
    kind("rbac.authorization.k8s.io", "v1", "ClusterRole", "clusterroles", false),
    kind("security.openshift.io", "v1", "SecurityContextConstraints", "securitycontextconstraints", false),
    kind("", "v1", "ServiceAccount", "serviceaccounts", true),
];
const CRDS: Kind = kind("apiextensions.k8s.io", "v1", "CustomResourceDefinition", "customresourcedefinitions", false);
const NAMESPACE: Kind = kind("", "v1", "Namespace", "namespaces", false);
const LOOK: Duration = Duration::from_millis(500);
