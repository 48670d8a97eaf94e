use std::net::SocketAddr;
use std::sync::Arc;

use http::StatusCode;

use super::Proxy;
use super::connections::Connection;
use super::failure::Failure;
use super::pods::ServedPod;
use crate::authentication::Rule;
use crate::authorizer::Authorizer;
use crate::mesh::{Beside, Identity, NamespacedName, Reason, Workload, believable_source, is_reserved_port};
use crate::model::State;
use crate::policy::{Ask, Decision, ROOT_NAMESPACE, Reads, RequestHead, Verdict};
use crate::waypoint::Refusal;

/// What both ways into a pod check before they dial its application.
pub struct Arrival<'a> {
    pub proxy: &'a Proxy,
    pub pod: &'a ServedPod,
    /// The TCP peer's address; or what the destination's own waypoint says, whom alone it is believed.
    pub client: SocketAddr,
    pub identity: Option<&'a Identity>,
    /// The waypoint that says so.
    pub via: Option<&'a Identity>,
    pub to: SocketAddr,
}

impl Arrival<'_> {
    pub fn check_source(&self) -> Result<(), Failure> {
        if believable_source(self.client.ip(), &self.pod.captured.workload.pod.ips) {
            return Ok(());
        }
        let text = format!("{} cannot have come from outside the pod", self.client.ip());
        Err(Failure::new(Reason::Source, text))
    }

    /// Who is dialled, and what policy says of it. From then on a change of policy finds the connection.
    pub fn decide(&self, connection: &Connection) -> Result<Decided, Failure> {
        if !self.proxy.limits.admits(self.pod.uid()) {
            return Err(Failure::new(Reason::Limit, "too many connections; raise the descriptor limit of the agent"));
        }
        if is_reserved_port(self.to.port()) {
            let text = format!("port {} belongs to the mesh and is no destination", self.to.port());
            return Err(Failure::new(Reason::Protocol, text));
        }
        let decided = decide(self.proxy, self.pod, self.who(), self.to)?;
        connection.decided(&decided.decision);
        match decided.reads {
            Reads::ToObserve | Reads::ToDecide => connection.reads_requests(),
            // What came meanwhile would have found nothing to reset.
            Reads::Nothing if reads(self.proxy, self.pod, self.who(), self.to) == Reads::ToDecide => {
                return Err(Failure::new(Reason::Drain, READ_NOW));
            }
            Reads::Nothing => {}
        }
        Ok(decided)
    }
}

impl<'a> Arrival<'a> {
    fn who(&self) -> Who<'a> {
        (self.client, self.identity, self.via)
    }
}

/// What policy says of a connection.
pub struct Decided {
    pub workload: Arc<Workload>,
    pub decision: Decision,
    /// Whether its requests are to be read, each for itself.
    pub reads: Reads,
}

/// Where a connection comes from, who that proved to be, and which waypoint says so.
pub type Who<'a> = (SocketAddr, Option<&'a Identity>, Option<&'a Identity>);

/// Asks policy about one arrival. The pod must still be in the model, and hold the address.
pub fn decide(
    proxy: &Proxy,
    pod: &ServedPod,
    (client, identity, via): Who<'_>,
    to: SocketAddr,
) -> Result<Decided, Failure> {
    let state = proxy.model.read();
    let workload = destination(&state, pod, to)?;
    check_waypoint(&state, via, to)?;
    let (query, reads) = state.query(client.ip(), identity, workload, to);
    let reads = read_here(&state, (client, identity, via), to, reads)?;
    Ok(Decided { workload: workload.clone(), decision: state.policies.decide(&query), reads })
}

/// Asks policy about one request that arrives.
pub fn decide_request(
    proxy: &Proxy,
    pod: &ServedPod,
    (client, identity, via): Who<'_>,
    to: SocketAddr,
    request: &RequestHead<'_>,
) -> Result<Decision, Failure> {
    let state = proxy.model.read();
    let workload = destination(&state, pod, to)?;
    check_waypoint(&state, via, to)?;
    let (query, _) = state.query(client.ip(), identity, workload, to);
    Ok(state.policies.decide_request(&query, request))
}

/// Whose tokens are taken of requests that arrive there.
pub fn token_rules(
    proxy: &Proxy,
    pod: &ServedPod,
    client: SocketAddr,
    identity: Option<&Identity>,
    to: SocketAddr,
) -> Result<Vec<Arc<Rule>>, Failure> {
    let state = proxy.model.read();
    let workload = destination(&state, pod, to)?;
    let (query, _) = state.query(client.ip(), identity, workload, to);
    Ok(state.policies.token_rules(&query))
}

/// Who else has to let a request pass that is allowed so far.
pub fn asked(state: &State, decision: &Decision) -> Result<Vec<Arc<Authorizer>>, Refusal> {
    let find = |ask: &Ask| {
        let found = state.authorizers.find(&ask.policy.namespace, &ask.provider, ROOT_NAMESPACE).cloned();
        found.ok_or_else(|| {
            let name = NamespacedName::new(ask.policy.namespace.clone(), ask.provider.clone());
            let text =
                format!("AuthorizationPolicy {} names it, and there is none, nor one in {ROOT_NAMESPACE}", ask.policy);
            Refusal::unasked(&name, StatusCode::FORBIDDEN, &text)
        })
    };
    decision.asks.iter().map(find).collect()
}

/// Whether requests that arrive there are to be read now.
pub fn reads(proxy: &Proxy, pod: &ServedPod, who: Who<'_>, to: SocketAddr) -> Reads {
    let state = proxy.model.read();
    let Ok(workload) = destination(&state, pod, to) else { return Reads::Nothing };
    let reads = state.query(who.0.ip(), None, workload, to).1;
    // Who may not come by here is not let in either way.
    read_here(&state, who, to, reads).unwrap_or(Reads::ToDecide)
}

/// Behind a waypoint of its own requests are read there, and nobody else may bring any that policy decides.
fn read_here(state: &State, (_, identity, via): Who<'_>, to: SocketAddr, reads: Reads) -> Result<Reads, Failure> {
    if reads == Reads::Nothing || !state.mesh.is_behind_waypoint(to) {
        return Ok(reads);
    }
    if via.or(identity).is_some_and(|peer| state.mesh.is_own_waypoint(peer, to)) {
        return Ok(Reads::Nothing);
    }
    if reads == Reads::ToObserve {
        return Ok(Reads::Nothing);
    }
    Err(Failure::new(Reason::Waypoint, Beside(to).to_string()))
}

fn destination<'a>(state: &'a State, pod: &ServedPod, to: SocketAddr) -> Result<&'a Arc<Workload>, Failure> {
    let Some(workload) = state.mesh.workload(pod.uid()) else {
        return Err(Failure::new(Reason::Drain, "the pod is gone"));
    };
    if !workload.pod.ips.contains(&to.ip()) {
        let text = format!("{} is not an address of pod {}", to.ip(), workload.name());
        return Err(Failure::new(Reason::Protocol, text));
    }
    Ok(workload)
}

fn check_waypoint(state: &State, via: Option<&Identity>, to: SocketAddr) -> Result<(), Failure> {
    match via {
        Some(via) if !state.mesh.is_own_waypoint(via, to) => {
            let text =
                format!("{via} spoke for its client, and is the waypoint of no Service that leads to {to} any more");
            Err(Failure::new(Reason::Waypoint, text))
        }
        _ => Ok(()),
    }
}

/// Turns a denial into the failure that the connection ends with.
pub fn allowed(decision: &Decision) -> Result<(), Failure> {
    match decision.verdict {
        Verdict::Allow => Ok(()),
        Verdict::Deny => {
            let reason = decision.reason.clone().unwrap_or(Reason::Denied);
            let words = decision
                .clause
                .as_ref()
                .map_or_else(|| reason.to_string(), |clause| format!("{}: {}", clause.policy, clause.words));
            Err(Failure::new(reason, words))
        }
    }
}

pub const READ_NOW: &str = "a policy that speaks of requests came: those of the next connection are decided one by one";
