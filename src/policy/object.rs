use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use http::HeaderName;
use ipnet::IpNet;
use k8s_openapi::jiff::Timestamp;

use super::{RequestAuthentication, Scope, Selection};
use crate::mesh::NamespacedName;

/// One policy as read: typed, and with a note of what in it cannot be enforced.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PolicyObject {
    Authorization(Box<AuthorizationPolicy>),
    PeerAuthentication(Box<PeerAuthentication>),
    RequestAuthentication(Box<RequestAuthentication>),
    /// Refused, and without a last good version.
    Malformed(Box<Malformed>),
}

impl PolicyObject {
    pub fn reference(&self) -> PolicyRef {
        match self {
            Self::Authorization(policy) => {
                PolicyRef { kind: PolicyKind::AuthorizationPolicy, name: policy.name.clone() }
            }
            Self::PeerAuthentication(policy) => {
                PolicyRef { kind: PolicyKind::PeerAuthentication, name: policy.name.clone() }
            }
            Self::RequestAuthentication(policy) => {
                PolicyRef { kind: PolicyKind::RequestAuthentication, name: policy.name.clone() }
            }
            Self::Malformed(policy) => policy.reference.clone(),
        }
    }

    pub fn scope(&self) -> &Scope {
        match self {
            Self::Authorization(policy) => &policy.scope,
            Self::PeerAuthentication(policy) => &policy.scope,
            Self::RequestAuthentication(policy) => &policy.scope,
            Self::Malformed(policy) => &policy.scope,
        }
    }

    /// What is enforced in its place where targets of it are not there: as with a target of a kind that cannot be
    /// enforced, it stands over all of its namespace and fails closed.
    pub fn without_targets(&self, missing: impl IntoIterator<Item = Unenforced>) -> Self {
        let mut closed = self.clone();
        match &mut closed {
            Self::Authorization(policy) => {
                policy.scope.selection = Selection::All;
                policy.opaque = true;
                policy.unenforced.extend(missing);
            }
            Self::RequestAuthentication(policy) => policy.close(missing),
            Self::Malformed(policy) => policy.scope.selection = Selection::All,
            // It has no targets.
            Self::PeerAuthentication(_) => {}
        }
        closed
    }

    /// What of it cannot be enforced as written.
    pub fn unenforced(&self) -> &[Unenforced] {
        match self {
            Self::Authorization(policy) => &policy.unenforced,
            Self::PeerAuthentication(policy) => &policy.unenforced,
            Self::RequestAuthentication(policy) => &policy.unenforced,
            Self::Malformed(_) => &[],
        }
    }
}

/// Names one policy.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct PolicyRef {
    pub kind: PolicyKind,
    pub name: NamespacedName,
}

impl fmt::Display for PolicyRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.name)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum PolicyKind {
    AuthorizationPolicy,
    PeerAuthentication,
    RequestAuthentication,
}

impl fmt::Display for PolicyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AuthorizationPolicy => "AuthorizationPolicy",
            Self::PeerAuthentication => "PeerAuthentication",
            Self::RequestAuthentication => "RequestAuthentication",
        })
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AuthorizationPolicy {
    pub name: NamespacedName,
    pub scope: Scope,
    pub action: Action,
    /// Who is asked, of action CUSTOM: the name of an `ExternalAuthorizer`.
    pub provider: Option<Arc<str>>,
    /// Annotation `selvedge.dev/dry-run: "true"`: observed, never enforced.
    pub dry_run: bool,
    pub rules: Vec<Rule>,
    /// Something beside the rules cannot be enforced, so that the policy may mean more than its rules say.
    pub opaque: bool,
    pub unenforced: Vec<Unenforced>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    Allow,
    Deny,
    Audit,
    /// Asks an external authorizer about each request. About a connection nobody can be asked: what it matches is denied.
    Custom,
}

impl Action {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Allow => "ALLOW",
            Self::Deny => "DENY",
            Self::Audit => "AUDIT",
            Self::Custom => "CUSTOM",
        }
    }
}

/// One rule: one of `from`, one of `to` and all of `when`; an empty list matches anything.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Rule {
    pub from: Vec<Terms>,
    pub to: Vec<Terms>,
    pub when: Vec<Terms>,
    /// The rule has a part that cannot be enforced; that part is not among the terms.
    pub opaque: bool,
}

impl Rule {
    /// Whether it speaks of requests.
    pub fn reads_requests(&self) -> bool {
        let mut terms = [&self.from, &self.to, &self.when].into_iter().flatten().flatten();
        terms.any(|term| matches!(term.attribute, Attribute::Request(_)))
    }
}

/// All of these must hold; none of them holds always.
pub type Terms = Vec<Term>;

/// One field of a source, operation or condition.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Term {
    pub attribute: Attribute,
    /// A `not...` field: none of the values may match.
    pub negated: bool,
    pub values: Values,
    /// The field as the policy writes it: `notPrincipals`, `source.ip`.
    pub field: Arc<str>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Attribute {
    Principal,
    Namespace,
    ServiceAccount,
    SourceIp,
    DestinationIp,
    DestinationPort,
    /// What one request says, and no connection.
    Request(RequestAttribute),
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RequestAttribute {
    /// The client's address as the last one on the way that is believed says it.
    RemoteIp,
    Host,
    Method,
    Path,
    Header(HeaderName),
    /// Issuer and subject of a valid token.
    Principal,
    /// A claim of a valid token, by the names that lead to it.
    Claim(Arc<[String]>),
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Values {
    Text(Vec<Pattern>),
    /// Namespace and service account.
    Accounts(Vec<NamespacedName>),
    Blocks(Vec<IpNet>),
    Ports(Vec<u16>),
}

/// Istio's string match.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Pattern {
    Exact(Arc<str>),
    Prefix(Arc<str>),
    Suffix(Arc<str>),
    /// Anything but nothing.
    Presence,
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(text) => f.write_str(text),
            Self::Prefix(text) => write!(f, "{text}*"),
            Self::Suffix(text) => write!(f, "*{text}"),
            Self::Presence => f.write_str("*"),
        }
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PeerAuthentication {
    pub name: NamespacedName,
    pub scope: Scope,
    /// `metadata.creationTimestamp`; none, as in a folder of manifests, counts as oldest.
    pub created: Option<Timestamp>,
    /// None leaves it to the next wider policy.
    pub mode: Option<Mode>,
    pub ports: BTreeMap<u16, Mode>,
    /// A field that is not known may have meant STRICT anywhere: so it does, whatever other policies say.
    pub unenforced: Vec<Unenforced>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    Strict,
    Permissive,
}

/// Refused, and without a last good version: denies all in what can be read of its scope.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Malformed {
    pub reference: PolicyRef,
    pub scope: Scope,
    /// It can be read that it would change nothing (AUDIT, dry-run): then it is observed only.
    pub observes: bool,
    pub field: String,
    pub cause: String,
}

/// A field that cannot be enforced as written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Unenforced {
    pub field: String,
    pub cause: String,
}
