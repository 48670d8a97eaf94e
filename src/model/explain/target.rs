//! What a destination, as a person names it, stands for.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::{From, Party};
use crate::mesh::balance;
use crate::mesh::{Destination, InternalTrafficPolicy, Reason, Service, ServiceKind, TargetPort, Workload};
use crate::model::State;

/// What the destination stands for.
pub(super) struct Targets {
    pub(super) words: String,
    pub(super) port: u16,
    pub(super) dialled: Option<SocketAddr>,
    pub(super) addresses: Vec<SocketAddr>,
    /// Those that are tried once all of these have been passed over.
    pub(super) further: Vec<SocketAddr>,
    pub(super) refused: Option<(Reason, String)>,
}

pub(super) fn targets(state: &State, from: &From, to: &Party, port: Option<u16>) -> Result<Targets, String> {
    match to {
        Party::Named(name) => match (state.mesh.workload_by_name(name), state.mesh.service(name)) {
            (Some(workload), None) => pod_target(from, workload, port),
            (None, Some(service)) => service_targets(state, from, service, port),
            (Some(_), Some(_)) => {
                Err(format!("there are both a Pod and a Service {name}: write pod/{name} or service/{name}"))
            }
            (None, None) => Err(format!("there is neither a Pod nor a Service {name}")),
        },
        Party::Pod(name) => {
            let workload = state.mesh.workload_by_name(name).ok_or_else(|| format!("there is no Pod {name}"))?;
            pod_target(from, workload, port)
        }
        Party::Service(name) => {
            let service = state.mesh.service(name).ok_or_else(|| format!("there is no Service {name}"))?;
            service_targets(state, from, service, port)
        }
        Party::Address(ip) => address_target(state, from, *ip, port),
    }
}

fn pod_target(from: &From, workload: &Workload, port: Option<u16>) -> Result<Targets, String> {
    let ports: Vec<u16> = workload.pod.container_ports.iter().map(|port| port.port).collect();
    let port = port.or(only(&ports)).ok_or_else(|| choose_port(&format!("pod {}", workload.name()), &ports))?;
    let family = |ip: &&IpAddr| ip.is_ipv4() == from.ip.is_ipv4();
    let ip = workload.pod.ips.iter().find(family).or(workload.pod.ips.first());
    let ip = ip.ok_or_else(|| format!("Pod {} has no status.podIPs yet", workload.name()))?;
    let address = SocketAddr::new(*ip, port);
    Ok(Targets {
        words: format!("pod {}", workload.name()),
        port,
        dialled: Some(address),
        addresses: vec![address],
        further: Vec::new(),
        refused: None,
    })
}

fn service_targets(state: &State, from: &From, service: &Arc<Service>, port: Option<u16>) -> Result<Targets, String> {
    let ports: Vec<u16> = service.ports.iter().map(|port| port.port).collect();
    let words = format!("service {}", service.name);
    let port = port.or(only(&ports)).ok_or_else(|| choose_port(&words, &ports))?;
    let vip = match &service.kind {
        ServiceKind::ClusterIp(ips) => {
            ips.iter().find(|ip| ip.is_ipv4() == from.ip.is_ipv4()).or(ips.first()).map(|ip| SocketAddr::new(*ip, port))
        }
        ServiceKind::Headless | ServiceKind::ExternalName => None,
    };
    let Some(found) = state.mesh.service_destination(service, port) else {
        let text = format!("Service {} has no TCP port {port}; it has {}", service.name, list(&ports));
        return Ok(Targets {
            words,
            port,
            dialled: vip,
            addresses: Vec::new(),
            further: Vec::new(),
            refused: Some((Reason::NoEndpoint, text)),
        });
    };
    // A headless Service has no address: clients dial its pods, on the port that they have.
    let (addresses, mut further) = balance::endpoints(&found, &from.client(state));
    further.retain(|address| !addresses.contains(address));
    let target = match &found.port.target {
        TargetPort::Number(number) => number.to_string(),
        TargetPort::Name(name) => name.to_string(),
    };
    let refused = addresses.is_empty().then(|| {
        (
            Reason::NoEndpoint,
            match service.internal_traffic_policy {
                InternalTrafficPolicy::Cluster => {
                    format!("Service {} has no ready endpoint for port {port} (target {target})", service.name)
                }
                InternalTrafficPolicy::Local => format!(
                    "Service {} has no ready endpoint for port {port} (target {target}) on the source's node, and its \
                     internalTrafficPolicy is Local",
                    service.name
                ),
            },
        )
    });
    Ok(Targets { words, port, dialled: vip, addresses, further, refused })
}

fn address_target(state: &State, from: &From, ip: IpAddr, port: Option<u16>) -> Result<Targets, String> {
    // The port matters to the look-up of a Service's address alone; any will do to learn whose address it is.
    match state.mesh.destination(SocketAddr::new(ip, port.unwrap_or(1))) {
        Destination::Service(found) => {
            let targets = service_targets(state, from, &found.service, port)?;
            Ok(Targets { dialled: Some(SocketAddr::new(ip, targets.port)), ..targets })
        }
        Destination::NoSuchPort(service) => {
            let targets = service_targets(state, from, &service, port)?;
            Ok(Targets { dialled: Some(SocketAddr::new(ip, targets.port)), ..targets })
        }
        Destination::Workload(workload) => {
            let mut targets = pod_target(from, &workload, port)?;
            let address = SocketAddr::new(ip, targets.port);
            (targets.dialled, targets.addresses) = (Some(address), vec![address]);
            Ok(targets)
        }
        Destination::Node | Destination::Outside | Destination::Unknown => {
            let port = port.ok_or_else(|| format!("{ip} is no pod or service: give --port"))?;
            let address = SocketAddr::new(ip, port);
            Ok(Targets {
                words: ip.to_string(),
                port,
                dialled: Some(address),
                addresses: vec![address],
                further: Vec::new(),
                refused: None,
            })
        }
    }
}

fn only(ports: &[u16]) -> Option<u16> {
    match ports {
        [port] => Some(*port),
        _ => None,
    }
}

fn choose_port(what: &str, ports: &[u16]) -> String {
    match ports {
        [] => format!("{what} declares no port: give --port"),
        _ => format!("{what} has several ports: give --port, one of {}", list(ports)),
    }
}

fn list(ports: &[u16]) -> String {
    if ports.is_empty() {
        return "none".to_owned();
    }
    ports.iter().map(u16::to_string).collect::<Vec<_>>().join(", ")
}
