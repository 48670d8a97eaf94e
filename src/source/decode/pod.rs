//! Pods: who runs where, as whom, and on which ports.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::field::{Fault, SUBDOMAIN, address, check, check_namespaced, is_subdomain, is_tcp, port, settings};
use super::{Item, Key, Read};
use crate::mesh::{ContainerPort, Owner, Phase, Pod, PodUid, Probe};

pub(super) fn pod(key: &Key, pod: core::Pod) -> Result<Read, Fault> {
    check_namespaced(key, is_subdomain, SUBDOMAIN)?;
    let core::Pod { metadata, spec, status } = pod;
    let (spec, status) = (spec.unwrap_or_default(), status.unwrap_or_default());
    let (settings, mut passed_over) = settings(&metadata);

    if let Some(node) = spec.node_name.as_deref().filter(|node| !node.is_empty()) {
        check(is_subdomain, node, "spec.nodeName", SUBDOMAIN)?;
    }
    // An absent account is `default`, as admission fills it in; an empty one stays empty, and is nobody.
    let account = spec.service_account_name.as_deref().or(spec.service_account.as_deref()).unwrap_or("default");
    if !account.is_empty() {
        check(is_subdomain, account, "spec.serviceAccountName", SUBDOMAIN)?;
    }
    let ips = addresses(&status)?;
    let ready = status
        .conditions
        .iter()
        .flatten()
        .find(|condition| condition.type_ == "Ready")
        .is_none_or(|condition| condition.status == "True");
    let (container_ports, probes) = ports(&spec, &mut passed_over)?;
    let pod = Pod {
        uid: uid(key, &metadata, &ips)?,
        name: key.name.clone(),
        node: spec.node_name.filter(|node| !node.is_empty()).map(Into::into),
        phase: phase(status.phase.as_deref(), &ips)?,
        ips,
        owner: owner(key, &metadata),
        service_account: account.into(),
        host_network: spec.host_network.unwrap_or(false),
        host_users: spec.host_users.unwrap_or(true),
        deleting: metadata.deletion_timestamp.is_some(),
        labels: metadata.labels.unwrap_or_default().into(),
        settings,
        container_ports,
        probes,
    };
    Ok((Item::Pod(pod, ready), passed_over))
}

fn addresses(status: &core::PodStatus) -> Result<Vec<IpAddr>, Fault> {
    let mut ips = Vec::new();
    for (i, written) in status.pod_ips.iter().flatten().enumerate() {
        ips.push(address(|| format!("status.podIPs[{i}].ip"), &written.ip)?);
    }
    if let Some(written) = status.pod_ip.as_deref().filter(|ip| !ip.is_empty()) {
        let ip = address(|| "status.podIP".to_owned(), written)?;
        if ips.is_empty() {
            ips.push(ip);
        }
    }
    let unique: BTreeSet<_> = ips.iter().collect();
    if unique.len() < ips.len() {
        return Err(Fault::new("status.podIPs", "an address stands here twice; write each once"));
    }
    if let Some(i) = ips.iter().position(|ip| ip.is_unspecified() || ip.is_loopback() || ip.is_multicast()) {
        let cause = format!("{} cannot be a pod's; write the address that its interface has", ips[i]);
        return Err(Fault::new(format!("status.podIPs[{i}].ip"), cause));
    }
    Ok(ips)
}

fn phase(written: Option<&str>, ips: &[IpAddr]) -> Result<Phase, Fault> {
    Ok(match written.unwrap_or_default() {
        "" if ips.is_empty() => Phase::Pending,
        "" | "Running" => Phase::Running,
        "Pending" => Phase::Pending,
        "Succeeded" => Phase::Succeeded,
        "Failed" => Phase::Failed,
        "Unknown" => Phase::Unknown,
        other => {
            let cause = format!("{other:?} is none of Pending, Running, Succeeded, Failed, Unknown");
            return Err(Fault::new("status.phase", cause));
        }
    })
}

/// A pod written by hand has no UID. It is then made from its name and addresses: the same for every agent that reads
/// the folder, and another one when the pod gets another address, as a new pod would.
fn uid(key: &Key, metadata: &ObjectMeta, ips: &[IpAddr]) -> Result<PodUid, Fault> {
    if let Some(uid) = metadata.uid.as_deref().filter(|uid| !uid.is_empty()) {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        if uid.len() > 253 || !uid.bytes().all(allowed) || uid.starts_with('.') {
            return Err(Fault::new("metadata.uid", "write letters, digits and '-' only, or leave it out"));
        }
        return Ok(PodUid::new(uid));
    }
    let mut seed = key.name.to_string();
    for ip in ips {
        seed.push_str(&format!(" {ip}"));
    }
    let hex = format!("{:032x}", fnv1a(seed.as_bytes()));
    Ok(PodUid::new(format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])))
}

// FNV-1a, 128 bits: stable over releases and machines, which the standard hasher does not promise.
fn fnv1a(bytes: &[u8]) -> u128 {
    bytes.iter().fold(0x6c62272e07bb014262b821756295c58d, |hash: u128, byte| {
        (hash ^ u128::from(*byte)).wrapping_mul(0x0000000001000000000000000000013b)
    })
}

/// A probe of a port that has no number is passed over: the API server takes such a pod, and one that we refused
/// would run outside the mesh.
fn ports(spec: &core::PodSpec, passed_over: &mut Vec<Fault>) -> Result<(Vec<ContainerPort>, Vec<Probe>), Fault> {
    let mut ports = Vec::new();
    let mut probes = BTreeSet::new();
    let groups = [("containers", Some(&spec.containers)), ("initContainers", spec.init_containers.as_ref())];
    let containers = groups.into_iter().flat_map(|(group, containers)| {
        containers.into_iter().flatten().enumerate().map(move |(i, container)| (group, i, container))
    });
    for (group, i, container) in containers {
        // An init container that ends before the others start serves nobody; one that restarts is a sidecar.
        if group == "initContainers" && container.restart_policy.as_deref() != Some("Always") {
            continue;
        }
        let field = format!("spec.{group}[{i}]");
        let mut own = BTreeMap::new();
        for (j, written) in container.ports.iter().flatten().enumerate() {
            let number = port(|| format!("{field}.ports[{j}].containerPort"), written.container_port)?;
            let name = written.name.as_deref().filter(|name| !name.is_empty());
            if is_tcp(written.protocol.as_deref()) {
                own.extend(name.map(|name| (name, number)));
                ports.push(ContainerPort { name: name.map(Into::into), port: number });
            }
        }
        for (name, target) in probe_targets(container) {
            let number = match target {
                IntOrString::Int(number) => port(|| format!("{field}.{name}.port"), *number)?,
                // A named port is one of the same container, and a number may be written as text.
                IntOrString::String(text) => match (own.get(text.as_str()), text.parse::<u16>()) {
                    (Some(number), _) => *number,
                    (None, Ok(number)) if number > 0 => number,
                    _ => {
                        let cause = format!(
                            "no TCP port of this container is named {text:?}; name one under `ports`: until then the \
                             probe is ordinary traffic"
                        );
                        passed_over.push(Fault::new(format!("{field}.{name}.port"), cause));
                        continue;
                    }
                },
            };
            probes.insert(Probe { port: number });
        }
        for (name, probe) in probes_of(container) {
            if let Some(grpc) = &probe.grpc {
                probes.insert(Probe { port: port(|| format!("{field}.{name}.grpc.port"), grpc.port)? });
            }
        }
    }
    Ok((ports, probes.into_iter().collect()))
}

fn probes_of(container: &core::Container) -> impl Iterator<Item = (&'static str, &core::Probe)> {
    [
        ("livenessProbe", container.liveness_probe.as_ref()),
        ("readinessProbe", container.readiness_probe.as_ref()),
        ("startupProbe", container.startup_probe.as_ref()),
    ]
    .into_iter()
    .filter_map(|(name, probe)| Some((name, probe?)))
}

/// What the kubelet connects to at the pod's own address: a probe with a `host` goes elsewhere.
fn probe_targets(container: &core::Container) -> Vec<(String, &IntOrString)> {
    let mut targets = Vec::new();
    let mut push = |name: String, host: &Option<String>, port| {
        if host.as_deref().is_none_or(str::is_empty) {
            targets.push((name, port));
        }
    };
    for (name, probe) in probes_of(container) {
        if let Some(http) = &probe.http_get {
            push(format!("{name}.httpGet"), &http.host, &http.port);
        }
        if let Some(tcp) = &probe.tcp_socket {
            push(format!("{name}.tcpSocket"), &tcp.host, &tcp.port);
        }
    }
    if let Some(lifecycle) = &container.lifecycle {
        for (name, handler) in [("postStart", &lifecycle.post_start), ("preStop", &lifecycle.pre_stop)] {
            if let Some(http) = handler.as_ref().and_then(|handler| handler.http_get.as_ref()) {
                push(format!("lifecycle.{name}.httpGet"), &http.host, &http.port);
            }
        }
    }
    targets
}

/// The controller that people know: the Deployment rather than its ReplicaSet, the CronJob rather than its Job.
fn owner(key: &Key, metadata: &ObjectMeta) -> Owner {
    let references = metadata.owner_references.as_deref().unwrap_or_default();
    let controller = references.iter().find(|owner| owner.controller == Some(true)).or(references.first());
    let Some(controller) = controller else { return Owner { kind: "Pod".into(), name: key.name.name.clone() } };
    let hash = metadata.labels.as_ref().and_then(|labels| labels.get("pod-template-hash"));
    let deployment = hash.and_then(|hash| controller.name.strip_suffix(hash.as_str())?.strip_suffix('-'));
    // A CronJob names its Jobs by the scheduled minute since 1970: eight digits from 1989 to 2160.
    let cron_job = controller
        .name
        .rsplit_once('-')
        .filter(|(_, minute)| minute.len() == 8 && minute.bytes().all(|b| b.is_ascii_digit()))
        .map(|(name, _)| name);
    let (kind, name) = match (&*controller.kind, deployment, cron_job) {
        ("ReplicaSet", Some(name), _) => ("Deployment", name),
        ("Job", _, Some(name)) => ("CronJob", name),
        (kind, ..) => (kind, &*controller.name),
    };
    Owner { kind: kind.into(), name: name.into() }
}
