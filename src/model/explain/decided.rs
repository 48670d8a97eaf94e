//! What the policies over an endpoint make of a connection, or of a request of it: in the order in which the engine asks.

use std::net::SocketAddr;
use std::sync::Arc;

use super::request::Sent;
use super::{EndpointExplanation, From, TokenExplanation, refused, token};
use crate::mesh::{Identity, NamespacedName, Reason, Workload};
use crate::model::State;
use crate::policy::{self, Query, ROOT_NAMESPACE, RequestHead, Verdict};

pub(super) fn decided(
    state: &State,
    from: &From,
    destination: &Arc<Workload>,
    address: SocketAddr,
    identity: Option<&Identity>,
    sent: Option<Sent<'_>>,
) -> EndpointExplanation {
    let (query, _) = state.query(from.ip, identity, destination, address);
    let connection = state.policies.explain(&query);
    // Of whom no request is allowed, none is looked at.
    let sent = sent.filter(|_| query.requests);
    let (policies, token) = match sent.filter(|_| connection.verdict == Verdict::Allow) {
        None => (connection, None),
        Some(sent) => match request(state, &query, sent) {
            Ok(judged) => judged,
            Err((reason, text, token)) => {
                let source_identity = identity.map(ToString::to_string);
                let refused = refused(address, Some(destination), reason, text);
                return EndpointExplanation { source_identity, token: token.map(|token| *token), ..refused };
            }
        },
    };
    let each = (query.requests && sent.is_none()).then(|| EACH.to_owned());
    EndpointExplanation {
        address,
        workload: Some(destination.name().to_string()),
        verdict: policies.verdict,
        reason: policies.reason.clone(),
        path: if identity.is_some() { "tunnel" } else { "plaintext" }.to_owned(),
        source_identity: identity.map(ToString::to_string),
        summary: policies.sentence.clone(),
        note: probe_note(state, from, destination, address).or(each),
        token,
        policies: Some(policies),
    }
}

type Judged = (policy::Explanation, Option<TokenExplanation>);
type Refused = (Reason, String, Option<Box<TokenExplanation>>);

/// Its path is settled, its token verified, and then it is decided: as whom that says.
fn request(state: &State, query: &Query<'_>, sent: Sent<'_>) -> Result<Judged, Refused> {
    let mut request = sent.arriving().map_err(|fault| (Reason::Protocol, fault.to_string(), None))?;
    let token = token::verify(state, query, &mut request, sent.now)
        .map_err(|(fault, token)| (Reason::Token(fault.code()), token.summary.clone(), Some(token)))?;
    Ok((state.policies.explain_request(query, &RequestHead::of(&request)), token))
}

/// Where policy allows a request, whoever else is to be asked about it may not.
pub(super) fn asked(state: &State, judged: EndpointExplanation) -> EndpointExplanation {
    let mut names = Vec::new();
    for ask in judged.policies.iter().flat_map(|policies| &policies.asks) {
        if state.authorizers.find(&ask.policy.namespace, &ask.provider, ROOT_NAMESPACE).is_none() {
            let name = NamespacedName::new(ask.policy.namespace.clone(), ask.provider.clone());
            let summary = format!(
                "AuthorizationPolicy {} asks ExternalAuthorizer {name}, and there is none, nor one in {ROOT_NAMESPACE}",
                ask.policy
            );
            let reason = Some(Reason::Authorizer(name).to_string());
            return EndpointExplanation { verdict: Verdict::Deny, reason, summary, ..judged };
        }
        names.push(format!("ExternalAuthorizer {} (of AuthorizationPolicy {})", ask.provider, ask.policy));
    }
    if names.is_empty() {
        return judged;
    }
    let note = format!("policy lets it pass if this says so too, which is asked then: {}", names.join(", "));
    EndpointExplanation { note: Some(note), ..judged }
}

/// A node's address proves nothing: what counts is whether the socket is the node's own, which no manifest tells.
fn probe_note(state: &State, from: &From, destination: &Workload, address: SocketAddr) -> Option<String> {
    let probed = destination.pod.probes.iter().any(|probe| probe.port == address.port());
    (from.workload.is_none() && probed && state.mesh.is_node_address(from.ip))
        .then(|| "the pod's spec probes this port: a probe by its own node's kubelet is let through".to_owned())
}

const EACH: &str = "each request to it is decided for itself: ask about one with --method, --path and --header";
