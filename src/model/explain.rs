//! Says what would become of a connection: which way it goes, and what policy makes of it. The same model decides
//! here and in the agent.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use serde::Serialize;

use self::decided::{asked, decided};
use self::request::Sent;
use self::target::{Targets, targets};
use self::through::{Between, between, is_beside};
use super::State;
use crate::mesh::balance::Client;
use crate::mesh::{
    Beside, Destination, Identity, Membership, NamespacedName, Path, PlainBecause, Reason, TUNNEL_PORT, Workload,
    believable_source, is_reserved_port,
};
use crate::policy::{self, PeerMode, Reads, Verdict};

mod decided;
mod request;
mod target;
mod text;
mod through;
mod token;

pub use request::{AnswerExplanation, BackendExplanation, RequestExplanation, explain_request};
pub use token::TokenExplanation;

/// Who is asked about, as a person names it.
#[derive(Clone, Debug)]
pub enum Party {
    Address(IpAddr),
    /// A Pod; or as the destination a Service, where only one of the two has the name.
    Named(NamespacedName),
    Pod(NamespacedName),
    Service(NamespacedName),
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
    /// The waypoint in a process of its own that it goes through: `infra/gw`.
    pub through: Option<String>,
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
    /// `tunnel`, `same-node` (joined in the kernel, unless `--same-node tunnel` forbids it), `plaintext`, or `none`.
    pub path: String,
    /// The identity that the source proves there, if any.
    pub source_identity: Option<String>,
    pub summary: String,
    /// What beside policy may matter.
    pub note: Option<String>,
    /// What becomes of the token of a request; absent where nobody asks for one, and the request has none.
    pub token: Option<TokenExplanation>,
    /// What each policy said; absent where no policy has a word.
    pub policies: Option<policy::Explanation>,
}

impl EndpointExplanation {
    /// Whether another endpoint of a Service is tried instead of this one.
    fn is_passed_over(&self) -> bool {
        let passed_over = [Reason::Tls, Reason::PeerUncaptured, Reason::UnknownDestination];
        passed_over.iter().any(|reason| self.reason.as_deref() == Some(reason.code()))
    }
}

/// Answers a question, or says what is wrong with it.
pub fn explain(state: &State, question: &Question) -> Result<Explanation, String> {
    explain_sent(state, question, &Hop::Dialled, None)
}

/// The same of a request that goes over the connection, where one does.
fn explain_sent(state: &State, question: &Question, hop: &Hop, sent: Option<Sent<'_>>) -> Result<Explanation, String> {
    let from = From::find(state, &question.from)?;
    let from = match question.to {
        Party::Address(ip) => from.towards(ip),
        Party::Named(_) | Party::Pod(_) | Party::Service(_) => from,
    };
    let mut targets = targets(state, &from, &question.to, question.port)?;
    // The source's agent looks at the port before anything else.
    if targets.dialled.is_some_and(|dialled| is_reserved_port(dialled.port()) && from.is_captured_towards(dialled)) {
        targets.refused = Some((Reason::Protocol, reserved(targets.port)));
        targets.addresses.clear();
    }
    let between = match hop {
        Hop::Dialled => between(state, &from, targets.dialled),
        Hop::Routed(between) => between.clone().map(Ok),
    };
    let between = match between {
        Some(Err(why)) => {
            targets.refused = Some(why);
            targets.addresses.clear();
            None
        }
        Some(Ok(between)) => Some(between),
        None => None,
    };
    let look = |address: &SocketAddr| match &between {
        Some(between) => between.one_endpoint(state, &from, *address, sent),
        None => one_endpoint(state, &from, &targets, *address, sent),
    };
    let mut endpoints: Vec<EndpointExplanation> = targets.addresses.iter().map(look).collect();
    if endpoints.iter().all(EndpointExplanation::is_passed_over) {
        endpoints.extend(targets.further.iter().map(look));
    }
    // Only where nobody else is left does one that is passed over decide.
    let counts = |endpoint: &&EndpointExplanation| {
        !endpoint.is_passed_over() || endpoints.iter().all(EndpointExplanation::is_passed_over)
    };
    let denies = |endpoint: &&EndpointExplanation| counts(endpoint) && endpoint.verdict == Verdict::Deny;
    let denied = endpoints.iter().filter(denies).count();
    let deciding = endpoints.iter().find(denies).or(endpoints.iter().find(counts));
    let (verdict, reason, summary) = match (deciding, targets.refused) {
        (_, Some((reason, text))) => (Verdict::Deny, Some(reason.to_string()), text),
        (Some(endpoint), None) if denied > 0 && denied < endpoints.len() => {
            let text = format!("{denied} of {} endpoints deny it, such as: {}", endpoints.len(), endpoint.summary);
            (endpoint.verdict, endpoint.reason.clone(), text)
        }
        (Some(endpoint), None) => (endpoint.verdict, endpoint.reason.clone(), endpoint.summary.clone()),
        (None, None) => (Verdict::Deny, Some(Reason::NoEndpoint.to_string()), "nobody answers there".to_owned()),
    };
    let (from, to, port) = (from.words, targets.words, targets.port);
    let through = between.map(|between| between.gateway().to_string());
    Ok(Explanation { verdict, reason, summary, from, to, port, through, endpoints })
}

/// How a connection comes to its endpoint.
enum Hop {
    /// The client dials it.
    Dialled,
    /// A route leads there: from the client's agent, or from a waypoint.
    Routed(Option<Between>),
}

/// The side that dials.
#[derive(Clone)]
struct From {
    words: String,
    ip: IpAddr,
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
                Ok(Self { words, ip: *ip, workload })
            }
            // Nobody dials as a Service.
            Party::Service(name) => Err(format!("Service {name} dials nobody: name one of its pods")),
            Party::Named(name) | Party::Pod(name) => {
                let workload = state.mesh.workload_by_name(name).ok_or_else(|| format!("there is no Pod {name}"))?;
                let ip = workload.pod.ips.first().ok_or_else(|| format!("Pod {name} has no status.podIPs yet"))?;
                Ok(Self { words: format!("pod {name}"), ip: *ip, workload: Some(workload.clone()) })
            }
        }
    }

    /// The same pod, at its address of the family of what it dials: that is the one it is seen with.
    fn towards(mut self, dialled: IpAddr) -> Self {
        let ips = self.workload.iter().flat_map(|workload| &workload.pod.ips);
        let same_family = ips.copied().find(|ip| ip.is_ipv4() == dialled.is_ipv4());
        if self.ip.is_ipv4() != dialled.is_ipv4() {
            self.ip = same_family.unwrap_or(self.ip);
        }
        self
    }

    /// As the balancer knows this side.
    fn client(&self, state: &State) -> Client {
        let node = self.workload.as_ref().and_then(|workload| workload.pod.node.clone());
        let zone = node.as_ref().and_then(|node| state.mesh.node(node)).and_then(|node| node.zone.clone());
        Client { ip: self.ip, node, zone }
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

fn one_endpoint(
    state: &State,
    from: &From,
    targets: &Targets,
    address: SocketAddr,
    sent: Option<Sent<'_>>,
) -> EndpointExplanation {
    let captured = from.is_captured_towards(targets.dialled.unwrap_or(address));
    reach(state, &from.clone().towards(address.ip()), captured, address, sent)
}

/// The way from one side, whose agent carries what it dials or does not, to one address.
fn reach(
    state: &State,
    from: &From,
    captured: bool,
    address: SocketAddr,
    sent: Option<Sent<'_>>,
) -> EndpointExplanation {
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
    let source = from.workload.as_ref().filter(|_| captured);
    let path = source.map(|source| Path::between(source, &destination, address.port()));
    match path {
        Some(Path::Refused(reason, text)) => refused(address, Some(&destination), reason, text),
        Some(Path::Tunnel { .. }) if is_reserved_port(address.port()) => {
            refused(address, Some(&destination), Reason::Protocol, reserved(address.port()))
        }
        Some(Path::Tunnel { own, .. }) => {
            let joined = source.is_some_and(|source| {
                source.pod.node.is_some()
                    && source.pod.node == destination.pod.node
                    && state.mesh.may_join(source.uid(), &destination, address)
                    && state.query(from.ip, Some(&own), &destination, address).1 == Reads::Nothing
            });
            let path = if joined { "same-node" } else { "tunnel" };
            EndpointExplanation {
                path: path.to_owned(),
                ..arriving(state, from, &destination, address, Some(&own), sent)
            }
        }
        Some(Path::Plain(PlainBecause::OwnPod)) => {
            open(address, Some(&destination), "plaintext", "a pod that talks to itself is not captured".to_owned())
        }
        Some(Path::Uncaptured) => match state.policies.peer_mode(&destination, address.port()) {
            PeerMode::Strict(_) => {
                let text = format!("{} is to be in the mesh, but its node has not captured it", destination.name());
                refused(address, Some(&destination), Reason::PeerUncaptured, text)
            }
            PeerMode::Permissive => arriving_in_plaintext(state, from, &destination, address, sent),
        },
        Some(Path::Plain(_)) | None => arriving_in_plaintext(state, from, &destination, address, sent),
    }
}

fn arriving_in_plaintext(
    state: &State,
    from: &From,
    destination: &Arc<Workload>,
    address: SocketAddr,
    sent: Option<Sent<'_>>,
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
        Membership::Joined(_) if !believable_source(from.ip, &destination.pod.ips) => {
            let text = format!("{} cannot have come from outside the pod", from.ip);
            refused(address, Some(destination), Reason::Source, text)
        }
        Membership::Joined(_) if address.port() == TUNNEL_PORT => {
            let text = format!("port {TUNNEL_PORT} is the tunnel's, which takes mutual TLS alone");
            refused(address, Some(destination), Reason::Tls, text)
        }
        Membership::Joined(_) if is_reserved_port(address.port()) => {
            refused(address, Some(destination), Reason::Protocol, reserved(address.port()))
        }
        Membership::Joined(_) => arriving(state, from, destination, address, None, sent),
    }
}

/// What the endpoint's agent makes of it, which lets nobody in beside a waypoint that reads requests.
fn arriving(
    state: &State,
    from: &From,
    destination: &Arc<Workload>,
    address: SocketAddr,
    identity: Option<&Identity>,
    sent: Option<Sent<'_>>,
) -> EndpointExplanation {
    let (_, reads) = state.query(from.ip, identity, destination, address);
    if reads == Reads::ToDecide && is_beside(state, identity, address) {
        return refused(address, Some(destination), Reason::Waypoint, Beside(address).to_string());
    }
    asked(state, decided(state, from, destination, address, identity, sent))
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
        note: None,
        token: None,
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
        note: None,
        token: None,
        policies: None,
    }
}

fn reserved(port: u16) -> String {
    format!("port {port} belongs to the mesh and is no destination")
}

#[cfg(test)]
mod tests;
