//! Services and their endpoints.

use std::net::IpAddr;
use std::time::Duration;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::field::{
    Fault, LABEL, SUBDOMAIN, address, check_namespaced, is_label, is_subdomain, is_tcp, port, settings,
};
use super::{Item, Key, Read};
use crate::mesh::{
    Endpoint, EndpointSlice, InternalTrafficPolicy, NamespacedName, Object, PodUid, Service, ServiceKind, ServicePort,
    TargetPort, TrafficDistribution,
};

pub(super) fn service(key: &Key, service: core::Service) -> Result<Read, Fault> {
    check_namespaced(key, is_label, LABEL)?;
    let core::Service { metadata, spec, status } = service;
    let spec = spec.unwrap_or_default();
    let (settings, mut passed_over) = settings(&metadata);
    let kind = service_kind(&spec)?;
    let external_ips = match kind {
        ServiceKind::ClusterIp(_) => external_ips(&spec, status.as_ref())?,
        ServiceKind::Headless | ServiceKind::ExternalName => Vec::new(),
    };
    if matches!(&kind, ServiceKind::ClusterIp(ips) if ips.is_empty()) {
        let cause = "nobody hands out addresses for a folder: write one of the Service range, or None for a headless \
                     Service; until then only its pods can be dialled";
        passed_over.push(Fault::new("spec.clusterIP", cause));
    }
    let service = Service {
        name: key.name.clone(),
        kind,
        external_ips,
        ports: service_ports(&spec)?,
        session_affinity: session_affinity(&spec)?,
        internal_traffic_policy: match spec.internal_traffic_policy.as_deref() {
            None | Some("" | "Cluster") => InternalTrafficPolicy::Cluster,
            Some("Local") => InternalTrafficPolicy::Local,
            Some(other) => return Err(one_of("spec.internalTrafficPolicy", other, "Cluster, Local")),
        },
        traffic_distribution: match spec.traffic_distribution.as_deref() {
            None | Some("") => None,
            Some("PreferClose" | "PreferSameZone") => Some(TrafficDistribution::PreferSameZone),
            Some("PreferSameNode") => Some(TrafficDistribution::PreferSameNode),
            // A preference, of a later Kubernetes maybe: no reason to do without the Service.
            Some(other) => {
                let wanted = "PreferSameZone, PreferClose, PreferSameNode; it has no effect";
                passed_over.push(one_of("spec.trafficDistribution", other, wanted));
                None
            }
        },
        publish_not_ready_addresses: spec.publish_not_ready_addresses.unwrap_or(false),
        settings,
    };
    Ok((Item::Service(service, spec.selector.unwrap_or_default()), passed_over))
}

fn service_kind(spec: &core::ServiceSpec) -> Result<ServiceKind, Fault> {
    match spec.type_.as_deref() {
        Some("ExternalName") => return Ok(ServiceKind::ExternalName),
        None | Some("" | "ClusterIP" | "NodePort" | "LoadBalancer") => {}
        Some(other) => return Err(one_of("spec.type", other, "ClusterIP, NodePort, LoadBalancer, ExternalName")),
    }
    let written = |ip: &&String| !ip.is_empty();
    let several = spec.cluster_ips.iter().flatten().filter(written).map(String::as_str);
    if spec.cluster_ip.as_deref().into_iter().chain(several).any(|ip| ip == "None") {
        return Ok(ServiceKind::Headless);
    }
    let mut ips = Vec::new();
    if let Some(ip) = spec.cluster_ip.as_ref().filter(written) {
        add_address(&mut ips, || "spec.clusterIP".to_owned(), ip)?;
    }
    for (i, ip) in spec.cluster_ips.iter().flatten().enumerate() {
        add_address(&mut ips, || format!("spec.clusterIPs[{i}]"), ip)?;
    }
    Ok(ServiceKind::ClusterIp(ips))
}

fn external_ips(spec: &core::ServiceSpec, status: Option<&core::ServiceStatus>) -> Result<Vec<IpAddr>, Fault> {
    let mut ips = Vec::new();
    for (i, ip) in spec.external_ips.iter().flatten().enumerate() {
        add_address(&mut ips, || format!("spec.externalIPs[{i}]"), ip)?;
    }
    let ingress = status.and_then(|s| s.load_balancer.as_ref()).and_then(|balancer| balancer.ingress.as_ref());
    for (i, ingress) in ingress.into_iter().flatten().enumerate() {
        // A load balancer in mode Proxy wants its traffic sent to it (KEP-1860).
        if let Some(ip) = ingress.ip.as_ref().filter(|_| ingress.ip_mode.as_deref() != Some("Proxy")) {
            add_address(&mut ips, || format!("status.loadBalancer.ingress[{i}].ip"), ip)?;
        }
    }
    Ok(ips)
}

fn add_address(ips: &mut Vec<IpAddr>, field: impl FnOnce() -> String, text: &str) -> Result<(), Fault> {
    let ip = address(field, text)?;
    if !ips.contains(&ip) {
        ips.push(ip);
    }
    Ok(())
}

fn service_ports(spec: &core::ServiceSpec) -> Result<Vec<ServicePort>, Fault> {
    let all = spec.ports.as_deref().unwrap_or_default();
    let mut ports: Vec<ServicePort> = Vec::new();
    for (i, written) in all.iter().enumerate() {
        let name = written.name.as_deref().unwrap_or_default();
        if name.is_empty() && all.len() > 1 {
            return Err(Fault::new(format!("spec.ports[{i}].name"), "a Service of several ports names each of them"));
        }
        let number = port(|| format!("spec.ports[{i}].port"), written.port)?;
        let field = || format!("spec.ports[{i}].targetPort");
        let target = match &written.target_port {
            None => TargetPort::Number(number),
            Some(IntOrString::Int(0)) => TargetPort::Number(number),
            Some(IntOrString::Int(target)) => TargetPort::Number(port(field, *target)?),
            Some(IntOrString::String(text)) if text.is_empty() => TargetPort::Number(number),
            Some(IntOrString::String(text)) => match text.parse::<i32>() {
                Ok(target) => TargetPort::Number(port(field, target)?),
                Err(_) if is_label(text) && text.len() <= 15 => TargetPort::Name(text.as_str().into()),
                Err(_) => {
                    let cause = format!("{text:?} is neither a port nor a port's name (at most 15 of a-z, 0-9, '-')");
                    return Err(Fault::new(field(), cause));
                }
            },
        };
        if !is_tcp(written.protocol.as_deref()) {
            continue;
        }
        if ports.iter().any(|other| &*other.name == name) {
            return Err(Fault::new(format!("spec.ports[{i}].name"), format!("the name {name:?} stands here twice")));
        }
        if ports.iter().any(|other| other.port == number) {
            return Err(Fault::new(format!("spec.ports[{i}].port"), format!("the port {number} stands here twice")));
        }
        let app_protocol = written.app_protocol.as_deref().map(Into::into);
        ports.push(ServicePort { name: name.into(), port: number, target, app_protocol });
    }
    Ok(ports)
}

fn session_affinity(spec: &core::ServiceSpec) -> Result<Option<Duration>, Fault> {
    match spec.session_affinity.as_deref() {
        None | Some("" | "None") => return Ok(None),
        Some("ClientIP") => {}
        Some(other) => return Err(one_of("spec.sessionAffinity", other, "None, ClientIP")),
    }
    let config = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
    match config.and_then(|config| config.timeout_seconds) {
        None => Ok(Some(DEFAULT_AFFINITY)),
        Some(seconds) if (1..=86_400).contains(&seconds) => {
            Ok(Some(Duration::from_secs(seconds.unsigned_abs().into())))
        }
        Some(seconds) => Err(Fault::new(
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
            format!("{seconds} is out of range; write 1 to 86400"),
        )),
    }
}

pub(super) fn endpoint_slice(key: &Key, slice: discovery::EndpointSlice) -> Result<Object, Fault> {
    check_namespaced(key, is_subdomain, SUBDOMAIN)?;
    let is_v4 = match &*slice.address_type {
        "IPv4" => true,
        "IPv6" => false,
        "FQDN" => return Err(Fault::new("addressType", "FQDN endpoints cannot be dialled; write IPv4 or IPv6")),
        other => return Err(one_of("addressType", other, "IPv4, IPv6")),
    };
    let service = slice.metadata.labels.and_then(|mut labels| labels.remove(SERVICE_NAME)).unwrap_or_default();
    if service.is_empty() {
        let cause = format!("the label {SERVICE_NAME} must name the Service that these endpoints belong to");
        return Err(Fault::new("metadata.labels", cause));
    }
    let mut ports = Vec::new();
    for (i, written) in slice.ports.into_iter().flatten().enumerate() {
        // A port without a number means every port, which no Service has.
        let Some(number) = written.port.filter(|_| is_tcp(written.protocol.as_deref())) else { continue };
        let number = port(|| format!("ports[{i}].port"), number)?;
        ports.push((written.name.unwrap_or_default().into(), number));
    }
    let mut endpoints = Vec::new();
    for (i, written) in slice.endpoints.into_iter().flatten().enumerate() {
        endpoints.push(endpoint(key, i, is_v4, written)?);
    }
    let service = NamespacedName { namespace: key.name.namespace.clone(), name: service.into() };
    Ok(Object::EndpointSlice(EndpointSlice { name: key.name.clone(), service, ports, endpoints }))
}

// EndpointConditions, as the API documents its absent fields: unknown ready is ready, unknown serving is as ready.
fn endpoint(key: &Key, i: usize, is_v4: bool, written: discovery::Endpoint) -> Result<Endpoint, Fault> {
    let mut addresses = Vec::new();
    for (j, text) in written.addresses.iter().enumerate() {
        let field = || format!("endpoints[{i}].addresses[{j}]");
        let ip = address(field, text)?;
        if ip.is_ipv4() != is_v4 {
            let family = if is_v4 { "IPv4" } else { "IPv6" };
            let cause = format!("{ip} is not of this slice's addressType {family}; put it into a slice of its own");
            return Err(Fault::new(field(), cause));
        }
        addresses.push(ip);
    }
    let conditions = written.conditions.unwrap_or_default();
    let ready = conditions.ready.unwrap_or(true);
    let hints = written.hints.unwrap_or_default();
    let target = written.target_ref.filter(|target| target.kind.as_deref() == Some("Pod"));
    let pod_uid = target.as_ref().and_then(|target| target.uid.as_deref()).filter(|uid| !uid.is_empty());
    let pod_uid = pod_uid.map(PodUid::new);
    let pod = target.and_then(|target| {
        let namespace = target.namespace.map_or_else(|| key.name.namespace.clone(), Into::into);
        Some(NamespacedName { namespace, name: target.name?.into() })
    });
    Ok(Endpoint {
        addresses,
        ready,
        serving: conditions.serving.unwrap_or(ready),
        terminating: conditions.terminating.unwrap_or(false),
        node: written.node_name.map(Into::into),
        zone: written.zone.map(Into::into),
        zone_hints: hints.for_zones.into_iter().flatten().map(|hint| hint.name.into()).collect(),
        node_hints: hints.for_nodes.into_iter().flatten().map(|hint| hint.name.into()).collect(),
        pod,
        pod_uid,
    })
}

fn one_of(field: &str, written: &str, wanted: &str) -> Fault {
    Fault::new(field, format!("{written:?} is none of {wanted}"))
}

const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// ServiceSpec `sessionAffinityConfig.clientIP.timeoutSeconds`: "Default value is 10800 (for 3 hours)".
const DEFAULT_AFFINITY: Duration = Duration::from_secs(10_800);
