//! Who gets which certificate: an agent, by its token, and only for an identity that a pod of its node runs as; and a
//! waypoint, by its own token, for its own identity alone.
//!
//! Sans-io: what the API server said of the token and of the pods comes in, a decision goes out.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::authentication::v1::TokenReviewStatus;

use super::pods::PodFacts;
use crate::mesh::{Identity, NamespacedName, TrustDomain, own_name};

/// Who counts as an agent.
#[derive(Clone, Debug)]
pub struct AgentRules {
    pub namespace: String,
    pub service_account: String,
    pub daemon_set: String,
    /// Of the tokens that agents bring.
    pub audience: String,
    pub trust_domain: TrustDomain,
}

/// What a genuine token says of its bearer: a pod on a node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Bearer {
    pub namespace: Arc<str>,
    pub service_account: Arc<str>,
    pub role: Role,
    pub node: Arc<str>,
    pub pod: Arc<str>,
    pub uid: Arc<str>,
}

/// What the bearer may be, by its service account. That it is one its pod has to show.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// Gets what the pods of its node run as.
    Agent,
    /// Gets its own identity, and nothing else.
    Waypoint,
}

/// Why no certificate is signed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Refusal {
    #[error("there is no bearer token in the request's `authorization`")]
    NoToken,
    #[error("the API server does not accept the token: {0}")]
    BadToken(String),
    #[error(
        "the token is {got}'s; only {wanted} may ask, and waypoints, whose service accounts end with -selvedge-waypoint"
    )]
    NotTheAgent { wanted: String, got: String },
    #[error(
        "the token is bound to no pod on a node (it lacks {0}): it must be projected by the kubelet into the agent's own \
         pod, of a Kubernetes of 1.32 or later"
    )]
    Unbound(&'static str),
    #[error("the token's pod {pod} is no agent on {node}: {why}")]
    NotAnAgentPod { pod: Arc<str>, node: Arc<str>, why: String },
    #[error("the token's pod {pod} is no waypoint: {why}")]
    NotAWaypoint { pod: Arc<str>, why: String },
    #[error("a waypoint gets a certificate for itself alone: {own} is not {identity}")]
    NotOwn { own: String, identity: Identity },
    #[error("the request names no identity in its metadata's ImpersonatedIdentity")]
    NoIdentity,
    #[error("{0}")]
    BadIdentity(String),
    #[error("{identity} is not of trust domain {trust_domain}")]
    OtherTrustDomain { identity: Identity, trust_domain: TrustDomain },
    #[error("no live pod on {node} runs as {identity}")]
    NotOnNode { node: Arc<str>, identity: Identity },
}

impl Refusal {
    /// Whether a fresh look at the API server could change the answer: a pod may be younger than what the watch told.
    pub fn may_be_news(&self) -> bool {
        matches!(self, Self::NotAnAgentPod { .. } | Self::NotAWaypoint { .. } | Self::NotOnNode { .. })
    }
}

impl AgentRules {
    /// Reads what the API server found about a token.
    pub fn bearer(&self, review: &TokenReviewStatus) -> Result<Bearer, Refusal> {
        let bad = |why: &str| Err(Refusal::BadToken(why.to_owned()));
        if let Some(error) = review.error.as_deref().filter(|error| !error.is_empty()) {
            return bad(error);
        }
        if review.authenticated != Some(true) {
            return bad("it is not genuine, has expired, or its pod is gone");
        }
        // A server that knows nothing of audiences would accept a token made for somebody else.
        if !review.audiences.iter().flatten().any(|audience| *audience == self.audience) {
            return bad(&format!("it is not meant for audience {}", self.audience));
        }
        let Some(user) = &review.user else { return bad("it belongs to nobody") };
        let wanted = format!("system:serviceaccount:{}:{}", self.namespace, self.service_account);
        let got = user.username.clone().unwrap_or_default();
        let account = got.strip_prefix("system:serviceaccount:").and_then(|rest| rest.split_once(':'));
        let (namespace, service_account, role) = match account {
            Some((namespace, account)) if got == wanted => (namespace.into(), account.into(), Role::Agent),
            Some((namespace, account)) if account.ends_with(OWN_SUFFIX) => {
                (namespace.into(), account.into(), Role::Waypoint)
            }
            _ => return Err(Refusal::NotTheAgent { wanted, got }),
        };
        let empty = BTreeMap::new();
        let extra = user.extra.as_ref().unwrap_or(&empty);
        let claim = |name: &'static str| match extra.get(name).map(Vec::as_slice) {
            Some([value]) if !value.is_empty() => Ok(Arc::from(value.as_str())),
            _ => Err(Refusal::Unbound(name)),
        };
        let (node, pod, uid) = (claim(NODE_NAME)?, claim(POD_NAME)?, claim(POD_UID)?);
        Ok(Bearer { namespace, service_account, role, node, pod, uid })
    }

    /// Whether the token's pod is what its bearer is to be.
    pub fn check_bearer(&self, bearer: &Bearer, pod: Option<&PodFacts>) -> Result<(), Refusal> {
        match bearer.role {
            Role::Agent => self.check_agent(bearer, pod),
            Role::Waypoint => check_waypoint(bearer, pod),
        }
    }

    /// Whether it is one of the agent's DaemonSet, on the node that the token names.
    fn check_agent(&self, bearer: &Bearer, pod: Option<&PodFacts>) -> Result<(), Refusal> {
        let no = |why: String| Err(Refusal::NotAnAgentPod { pod: bearer.pod.clone(), node: bearer.node.clone(), why });
        let Some(pod) = pod else { return no("there is no such pod".to_owned()) };
        if pod.uid != bearer.uid {
            return no("there is another pod of that name".to_owned());
        }
        if pod.node.as_deref() != Some(&*bearer.node) {
            return no(format!("it runs on {}", pod.node.as_deref().unwrap_or("no node yet")));
        }
        if *pod.service_account != *self.service_account {
            return no(format!("its service account is {:?}", pod.service_account));
        }
        match &pod.daemon_set {
            Some(owner) if **owner == *self.daemon_set => Ok(()),
            _ => no(format!("it is not one of DaemonSet {}/{}", self.namespace, self.daemon_set)),
        }
    }

    /// The identity asked for, as written in the request.
    pub fn identity(&self, asked: Option<&str>) -> Result<Identity, Refusal> {
        let identity: Identity =
            asked.ok_or(Refusal::NoIdentity)?.parse().map_err(|error| Refusal::BadIdentity(format!("{error}")))?;
        if identity.trust_domain != self.trust_domain {
            return Err(Refusal::OtherTrustDomain { identity, trust_domain: self.trust_domain.clone() });
        }
        Ok(identity)
    }

    /// What a bearer may ask for without a look at any other pod than its own.
    ///
    /// # Errors
    /// A waypoint asks for another identity than its own.
    pub fn check_own(&self, bearer: &Bearer, identity: &Identity) -> Result<(), Refusal> {
        match identity.namespace == bearer.namespace && identity.service_account == bearer.service_account {
            true => Ok(()),
            false => {
                let own = format!("{}/{}", bearer.namespace, bearer.service_account);
                Err(Refusal::NotOwn { own, identity: identity.clone() })
            }
        }
    }

    /// Whether one of these pods, all of the bearer's node, runs as the identity.
    pub fn check_identity<'a>(
        &self,
        bearer: &Bearer,
        identity: &Identity,
        pods: impl IntoIterator<Item = &'a PodFacts>,
    ) -> Result<(), Refusal> {
        let mut pods = pods.into_iter();
        match pods.any(|pod| pod.node.as_deref() == Some(&*bearer.node) && pod.runs_as(identity)) {
            true => Ok(()),
            false => Err(Refusal::NotOnNode { node: bearer.node.clone(), identity: identity.clone() }),
        }
    }
}

/// A pod is a waypoint by the label of its Gateway and by the service account that is named after it. That the kubelet
/// started it so is what its token's claims say.
fn check_waypoint(bearer: &Bearer, pod: Option<&PodFacts>) -> Result<(), Refusal> {
    let no = |why: &str| Err(Refusal::NotAWaypoint { pod: bearer.pod.clone(), why: why.to_owned() });
    let Some(pod) = pod else { return no("there is no such pod") };
    if pod.uid != bearer.uid {
        return no("there is another pod of that name");
    }
    if pod.is_mirror || pod.is_finished || pod.node.as_deref() != Some(&*bearer.node) {
        return no("it does not run on the node that the token names");
    }
    let gateway = pod.gateway.as_ref().map(|gateway| NamespacedName::new(pod.namespace.clone(), gateway.clone()));
    match pod.service_account == bearer.service_account
        && gateway.is_some_and(|gateway| own_name(&gateway) == pod.service_account)
    {
        true => Ok(()),
        false => {
            no("its label gateway.networking.k8s.io/gateway-name and its service account name no Gateway together")
        }
    }
}

/// Of the service accounts of waypoints.
const OWN_SUFFIX: &str = "-selvedge-waypoint";
/// [Service accounts](https://kubernetes.io/docs/reference/access-authn-authz/service-accounts-admin/): what a token
/// that is bound to a pod says of it.
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";

#[cfg(test)]
mod tests;
