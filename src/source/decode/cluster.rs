//! Kinds without a namespace.

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::networking::v1::ServiceCIDR;

use super::field::{Fault, LABEL, SUBDOMAIN, address, check, cidr, is_label, is_subdomain, settings};
use super::{Item, Key, Read};
use crate::api::MeshNode;
use crate::mesh::{Namespace, Node, Object, PodUid};

pub(super) fn namespace(key: &Key, namespace: core::Namespace) -> Result<Read, Fault> {
    check(is_label, &key.name.name, "metadata.name", LABEL)?;
    let (settings, passed_over) = settings(&namespace.metadata);
    let labels = namespace.metadata.labels.unwrap_or_default().into();
    Ok((Item::Other(Object::Namespace(Namespace { name: key.name.name.clone(), settings, labels })), passed_over))
}

pub(super) fn node(key: &Key, node: core::Node) -> Result<Object, Fault> {
    check(is_subdomain, &key.name.name, "metadata.name", SUBDOMAIN)?;
    let mut addresses = Vec::new();
    for (i, written) in node.status.and_then(|status| status.addresses).into_iter().flatten().enumerate() {
        if matches!(&*written.type_, "InternalIP" | "ExternalIP") {
            let ip = address(|| format!("status.addresses[{i}].address"), &written.address)?;
            if !addresses.contains(&ip) {
                addresses.push(ip);
            }
        }
    }
    let spec = node.spec.unwrap_or_default();
    let pod_cidrs = match (spec.pod_cidrs, spec.pod_cidr) {
        (Some(several), _) if !several.is_empty() => several
            .iter()
            .enumerate()
            .map(|(i, text)| cidr(|| format!("spec.podCIDRs[{i}]"), text))
            .collect::<Result<_, _>>()?,
        (_, Some(one)) => vec![cidr(|| "spec.podCIDR".to_owned(), &one)?],
        _ => Vec::new(),
    };
    let zone = node.metadata.labels.and_then(|mut labels| labels.remove(ZONE)).map(Into::into);
    Ok(Object::Node(Node { name: key.name.name.clone(), addresses, pod_cidrs, zone }))
}

pub(super) fn service_cidr(key: &Key, object: ServiceCIDR) -> Result<Object, Fault> {
    check(is_subdomain, &key.name.name, "metadata.name", SUBDOMAIN)?;
    let written = object.spec.and_then(|spec| spec.cidrs).unwrap_or_default();
    if written.is_empty() {
        return Err(Fault::new("spec.cidrs", "a ServiceCIDR needs a range, such as 10.96.0.0/16"));
    }
    let cidrs = written.iter().enumerate().map(|(i, text)| cidr(|| format!("spec.cidrs[{i}]"), text));
    Ok(Object::ServiceCidr { name: key.name.name.clone(), cidrs: cidrs.collect::<Result<_, _>>()? })
}

pub(super) fn mesh_node(key: &Key, node: MeshNode) -> Result<Object, Fault> {
    check(is_subdomain, &key.name.name, "metadata.name", SUBDOMAIN)?;
    let captured = node.status.captured.iter().map(|uid| PodUid::new(uid.as_str())).collect();
    Ok(Object::MeshNode { node: key.name.name.clone(), captured })
}

const ZONE: &str = "topology.kubernetes.io/zone";
