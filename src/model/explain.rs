//! Says what would become of a connection: which way it goes, and what policy makes of it. The same model decides
//! here and in the agent.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use serde::Serialize;

use super::State;
use crate::mesh::balance::{self, Client};
use crate::mesh::{
    Destination, Identity, Membership, NamespacedName, Path, PlainBecause, Reason, Service, ServiceKind, TargetPort,
    Workload, believable_source, is_reserved_port,
};
use crate::policy::{self, PeerMode, Query, Verdict};

/// Who is asked about, as a person names it.
#[derive(Clone, Debug)]
pub enum Party {
    Address(IpAddr),
    /// A pod, or as the destination also a Service.
    Named(NamespacedName),
}

#[derive(Clone, Debug)]
pub struct Question {
    pub from: Party,
    pub to: Party,
    pub port: Option<u16>,
}

/// The answer to one question.
#[derive(Clone, Debug, Serialize)]
pub struct Explanation {
    pub verdict: Verdict,
    /// The reason code of a denial, as metrics and access log have it.
    pub reason: Option<String>,
    /// The verdict in one sentence.
    pub summary: String,
    pub from: String,
    pub to: String,
    pub port: u16,
    /// What was found for each address that may answer: one for a pod, one for each endpoint of a Service. A Service
    /// is allowed only where all of them are.
    pub endpoints: Vec<EndpointExplanation>,
}

#[derive(Clone, Debug, Serialize)]
pub struct EndpointExplanation {
    pub address: SocketAddr,
    pub workload: Option<String>,
    pub verdict: Verdict,
    pub reason: Option<String>,
    /// `tunnel`, `plaintext`, or why nothing is sent.
    pub path: String,
    /// The identity that the source proves there, if any.
    pub source_identity: Option<String>,
    pub summary: String,
    /// What each policy said; absent where no policy has a word.
    pub policies: Option<policy::Explanation>,
}

/// Answers a question, or says what is wrong with it.
pub fn explain(state: &State, question: &Question) -> Result<Explanation, String> {
    let from = From::find(state, &question.from)?;
    let targets = targets(state, &from, &question.to, question.port)?;
    let endpoints: Vec<EndpointExplanation> =
        targets.addresses.iter().map(|address| one_endpoint(state, &from, &targets, *address)).collect();
    let deciding = endpoints.iter().find(|endpoint| endpoint.verdict == Verdict::Deny).or(endpoints.first());
    let (verdict, reason, summary) = match (deciding, targets.refused) {
        (_, Some((reason, text))) => (Verdict::Deny, Some(reason.to_string()), text),
        (Some(endpoint), None) => (endpoint.verdict, endpoint.reason.clone(), endpoint.summary.clone()),
        (None, None) => (Verdict::Deny, Some(Reason::NoEndpoint.to_string()), "nobody answers there".to_owned()),
    };
    Ok(Explanation { verdict, reason, summary, from: from.words, to: targets.words, port: targets.port, endpoints })
}

/// The side that dials.
struct From {
    words: String,
    /// The addresses that it may dial from: of a pod, one a family.
    ips: Vec<IpAddr>,
    workload: Option<Arc<Workload>>,
}

impl From {
    fn find(state: &State, party: &Party) -> Result<Self, String> {
        match party {
            Party::Address(ip) => {
                let workload = state.mesh.workload_by_ip(*ip).cloned();
                let words = match &workload {
                    Some(workload) => format!("{ip} (pod {})", workload.name()),
                    None if state.mesh.is_node_address(*ip) => format!("{ip} (a node)"),
                    None => ip.to_string(),
                };
                Ok(Self { words, ips: vec![*ip], workload })
            }
            Party::Named(name) => {
                let workload = state.mesh.workload_by_name(name).ok_or_else(|| format!("there is no Pod {name}"))?;
                if workload.pod.ips.is_empty() {
                    return Err(format!("Pod {name} has no status.podIPs yet"));
                }
                let ips = workload.pod.ips.clone();
                Ok(Self { words: format!("pod {name}"), ips, workload: Some(workload.clone()) })
            }
        }
    }

    /// The one of some addresses that it dials: of a family of its own, if there is one.
    fn dials(&self, ips: &[IpAddr]) -> Option<IpAddr> {
        let own_family = |ip: &&IpAddr| self.ips.iter().any(|own| own.is_ipv4() == ip.is_ipv4());
        ips.iter().find(own_family).or(ips.first()).copied()
    }

    /// The address that the other side sees.
    fn ip_towards(&self, to: IpAddr) -> IpAddr {
        self.ips.iter().find(|own| own.is_ipv4() == to.is_ipv4()).or(self.ips.first()).copied().unwrap_or(to)
    }

    /// Whether this side's agent carries what it dials there.
    fn is_captured_towards(&self, dialled: SocketAddr) -> bool {
        let Some(workload) = &self.workload else { return false };
        match &workload.membership {
            Membership::Joined(exclusions) => workload.captured && !exclusions.exclude_outbound(dialled),
            Membership::Outside(_) => false,
        }
    }
}

/// What the destination stands for.
struct Targets {
    words: String,
    port: u16,
    dialled: Option<SocketAddr>,
    addresses: Vec<SocketAddr>,
    refused: Option<(Reason, String)>,
}

fn targets(state: &State, from: &From, to: &Party, port: Option<u16>) -> Result<Targets, String> {
    match to {
        Party::Named(name) => {
            if let Some(workload) = state.mesh.workload_by_name(name) {
                return pod_target(from, workload, port);
            }
            let service =
                state.mesh.service(name).ok_or_else(|| format!("there is neither a Pod nor a Service {name}"))?;
            service_targets(state, from, service, port)
        }
        Party::Address(ip) => address_target(state, from, *ip, port),
    }
}

fn pod_target(from: &From, workload: &Workload, port: Option<u16>) -> Result<Targets, String> {
    let ports: Vec<u16> = workload.pod.container_ports.iter().map(|port| port.port).collect();
    let port = port.or(only(&ports)).ok_or_else(|| choose_port(&format!("pod {}", workload.name()), &ports))?;
    let ip = from.dials(&workload.pod.ips);
    let ip = ip.ok_or_else(|| format!("Pod {} has no status.podIPs yet", workload.name()))?;
    let address = SocketAddr::new(ip, port);
    Ok(Targets {
        words: format!("pod {}", workload.name()),
        port,
        dialled: Some(address),
        addresses: vec![address],
        refused: None,
    })
}

fn service_targets(state: &State, from: &From, service: &Arc<Service>, port: Option<u16>) -> Result<Targets, String> {
    let ports: Vec<u16> = service.ports.iter().map(|port| port.port).collect();
    let words = format!("service {}", service.name);
    let port = port.or(only(&ports)).ok_or_else(|| choose_port(&words, &ports))?;
    let vip = match &service.kind {
        ServiceKind::ClusterIp(ips) => from.dials(ips).map(|ip| SocketAddr::new(ip, port)),
        ServiceKind::Headless | ServiceKind::ExternalName => None,
    };
    let Some(found) = state.mesh.service_destination(service, port) else {
        let text = format!("Service {} has no TCP port {port}; it has {}", service.name, list(&ports));
        return Ok(Targets {
            words,
            port,
            dialled: vip,
            addresses: Vec::new(),
            refused: Some((Reason::NoEndpoint, text)),
        });
    };
    let candidates = match (vip, &from.workload) {
        (Some(vip), Some(workload)) => {
            let client =
                Client { ip: from.ip_towards(vip.ip()), node: workload.pod.node.clone(), zone: workload.zone.clone() };
            balance::eligible(&found, &client)
        }
        // A headless Service has no address: clients dial its pods, on the port that they have. Who is no pod may dial
        // from anywhere.
        _ => balance::answering(service, found.candidates.iter().collect()),
    };
    let addresses: Vec<SocketAddr> = candidates.iter().map(|candidate| candidate.addr).collect();
    let target = match &found.port.target {
        TargetPort::Number(number) => number.to_string(),
        TargetPort::Name(name) => name.to_string(),
    };
    let refused = addresses.is_empty().then(|| {
        (
            Reason::NoEndpoint,
            format!("Service {} has no ready endpoint for port {port} (target {target})", service.name),
        )
    });
    Ok(Targets { words, port, dialled: vip, addresses, refused })
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
            Ok(Targets { words: ip.to_string(), port, dialled: Some(address), addresses: vec![address], refused: None })
        }
    }
}

fn one_endpoint(state: &State, from: &From, targets: &Targets, address: SocketAddr) -> EndpointExplanation {
    let captured = from.is_captured_towards(targets.dialled.unwrap_or(address));
    let destination = match state.mesh.destination(address) {
        Destination::Workload(workload) => Some(workload),
        Destination::Unknown if captured => {
            let text = format!("{address} lies in the cluster's ranges, but no Pod or Service has it");
            return refused(address, None, Reason::UnknownDestination, text);
        }
        _ => None,
    };
    let Some(destination) = destination else {
        return open(address, None, "plaintext", "it is not in the mesh, so no policy of the mesh applies".to_owned());
    };
    if captured && targets.dialled.is_some_and(|dialled| is_reserved_port(dialled.port())) {
        let text = format!("port {} belongs to the mesh and is no destination", targets.port);
        return refused(address, Some(&destination), Reason::Protocol, text);
    }
    let source = from.workload.as_ref().filter(|_| captured);
    let path = source.map(|source| Path::between(source, &destination, address.port()));
    match path {
        Some(Path::Refused(reason, text)) => refused(address, Some(&destination), reason, text),
        Some(Path::Tunnel { own, .. }) => decided(state, from, &destination, address, Some(&own)),
        Some(Path::Plain(PlainBecause::OwnPod)) => {
            open(address, Some(&destination), "plaintext", "a pod that talks to itself is not captured".to_owned())
        }
        Some(Path::Uncaptured) => match state.policies.peer_mode(&destination, address.port()) {
            PeerMode::Strict(_) => {
                let text = format!("{} is to be in the mesh, but its node has not captured it", destination.name());
                refused(address, Some(&destination), Reason::PeerUncaptured, text)
            }
            PeerMode::Permissive => arriving_in_plaintext(state, from, &destination, address),
        },
        Some(Path::Plain(_)) | None => arriving_in_plaintext(state, from, &destination, address),
    }
}

fn arriving_in_plaintext(
    state: &State,
    from: &From,
    destination: &Arc<Workload>,
    address: SocketAddr,
) -> EndpointExplanation {
    if from.workload.as_ref().is_some_and(|source| source.uid() == destination.uid()) {
        return open(address, Some(destination), "plaintext", "a pod that talks to itself is not captured".to_owned());
    }
    match &destination.membership {
        Membership::Outside(why) => {
            let text = format!("pod {} is not in the mesh: {why}", destination.name());
            open(address, Some(destination), "plaintext", text)
        }
        Membership::Joined(exclusions) if exclusions.inbound_ports.contains(&address.port()) => {
            let text = format!("port {} of pod {} is excluded from capture", address.port(), destination.name());
            open(address, Some(destination), "plaintext", text)
        }
        Membership::Joined(_) if !believable_source(from.ip_towards(address.ip()), &destination.pod.ips) => {
            let text = format!("{} cannot have come from outside the pod", from.ip_towards(address.ip()));
            refused(address, Some(destination), Reason::Source, text)
        }
        Membership::Joined(_) => decided(state, from, destination, address, None),
    }
}

fn decided(
    state: &State,
    from: &From,
    destination: &Arc<Workload>,
    address: SocketAddr,
    identity: Option<&Identity>,
) -> EndpointExplanation {
    if is_reserved_port(address.port()) {
        let text = format!("port {} belongs to the mesh and is no destination", address.port());
        return refused(address, Some(destination), Reason::Protocol, text);
    }
    let services: Vec<NamespacedName> = state.mesh.services_at(address).cloned().collect();
    let explanation = state.policies.explain(&Query {
        source_ip: from.ip_towards(address.ip()),
        source_identity: identity,
        destination,
        destination_addr: address,
        services: &services,
    });
    EndpointExplanation {
        address,
        workload: Some(destination.name().to_string()),
        verdict: explanation.verdict,
        reason: explanation.reason.clone(),
        path: if identity.is_some() { "tunnel" } else { "plaintext" }.to_owned(),
        source_identity: identity.map(ToString::to_string),
        summary: explanation.sentence.clone(),
        policies: Some(explanation),
    }
}

fn refused(address: SocketAddr, workload: Option<&Arc<Workload>>, reason: Reason, text: String) -> EndpointExplanation {
    EndpointExplanation {
        address,
        workload: workload.map(|workload| workload.name().to_string()),
        verdict: Verdict::Deny,
        reason: Some(reason.to_string()),
        path: "none".to_owned(),
        source_identity: None,
        summary: text,
        policies: None,
    }
}

fn open(address: SocketAddr, workload: Option<&Arc<Workload>>, path: &str, text: String) -> EndpointExplanation {
    EndpointExplanation {
        address,
        workload: workload.map(|workload| workload.name().to_string()),
        verdict: Verdict::Allow,
        reason: None,
        path: path.to_owned(),
        source_identity: None,
        summary: text,
        policies: None,
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = if self.verdict == Verdict::Allow { "allowed" } else { "denied" };
        writeln!(f, "{} to {} port {}: {verdict}", self.from, self.to, self.port)?;
        writeln!(f, "  because {}", self.summary)?;
        if let Some(reason) = &self.reason {
            writeln!(f, "  reason  {reason}")?;
        }
        for endpoint in &self.endpoints {
            let verdict = if endpoint.verdict == Verdict::Allow { "allowed" } else { "denied" };
            let workload = endpoint.workload.as_deref().map(|name| format!(" (pod {name})")).unwrap_or_default();
            writeln!(f, "\n  {}{workload}: {verdict}, by {}", endpoint.address, endpoint.path)?;
            if let Some(identity) = &endpoint.source_identity {
                writeln!(f, "    source is {identity}")?;
            }
            match &endpoint.policies {
                Some(policies) => {
                    writeln!(f, "    {}", policies.sentence)?;
                    policies.policies.iter().try_for_each(|policy| write_policy(f, policy))?;
                }
                None => writeln!(f, "    {}", endpoint.summary)?,
            }
        }
        Ok(())
    }
}

fn write_policy(f: &mut fmt::Formatter<'_>, policy: &policy::Considered) -> fmt::Result {
    let mark = if policy.matched { "matches" } else { "does not match" };
    let mark = if policy.stands { mark } else { "does not apply" };
    writeln!(f, "    - {} {} ({}) {mark}: {}", policy.kind, policy.policy, policy.action, policy.why)?;
    for rule in policy.rules.iter().filter(|rule| rule.matched || policy.rules.len() > 1) {
        writeln!(f, "        {}: {}", if rule.matched { "yes" } else { "no " }, rule.why)?;
    }
    Ok(())
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

#[cfg(test)]
mod tests;
