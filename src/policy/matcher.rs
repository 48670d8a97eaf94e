use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::block::Blocks;
use super::object::{Attribute, Pattern, Term, Values};
use super::reading::{Reading, RequestMatcher};
use super::{Query, RequestHead};
use crate::mesh::{NamespacedName, TrustDomain};

/// What the terms are held against: one connection, or one request of it, its texts made once.
pub(super) struct Subject<'a> {
    source_ip: IpAddr,
    /// Principal and service account; none where nothing was proven.
    identity: Option<(String, NamespacedName)>,
    destination: SocketAddr,
    known: Known<'a>,
}

/// What is known of requests.
pub(super) enum Known<'a> {
    /// Nothing, ever: what speaks of them fails closed.
    Nothing,
    /// Nothing yet: each will be asked about, and what is asked is whether any of them may be allowed.
    Later,
    One(Reading<'a>),
}

impl<'a> Subject<'a> {
    /// A connection.
    pub(super) fn of(query: &Query<'_>) -> Self {
        Self::new(query, if query.requests { Known::Later } else { Known::Nothing })
    }

    /// A connection as if nobody read its requests.
    pub(super) fn unread(query: &Query<'_>) -> Self {
        Self::new(query, Known::Nothing)
    }

    pub(super) fn of_request(query: &Query<'_>, request: &RequestHead<'a>) -> Self {
        Self::new(query, Known::One(Reading::of(request, query.source_ip)))
    }

    fn new(query: &Query<'_>, known: Known<'a>) -> Self {
        Self {
            source_ip: query.source_ip.to_canonical(),
            identity: query.source_identity.map(|identity| {
                let account = NamespacedName::new(identity.namespace.clone(), identity.service_account.clone());
                (identity.principal(), account)
            }),
            destination: SocketAddr::new(query.destination_addr.ip().to_canonical(), query.destination_addr.port()),
            known,
        }
    }

    pub(super) fn is_proven(&self) -> bool {
        self.identity.is_some()
    }

    /// Whether it is one request.
    pub(super) fn is_request(&self) -> bool {
        matches!(self.known, Known::One(_))
    }

    /// Whether requests will be asked about one by one.
    pub(super) fn is_awaited(&self) -> bool {
        matches!(self.known, Known::Later)
    }
}

/// One term, compiled: its cost does not grow with the number of its exact values, ranges or ports.
#[derive(Debug)]
pub(super) struct Matcher {
    negated: bool,
    values: Compiled,
    bias: Bias,
}

/// What is safe to think where a term cannot be told, or can be told in two ways.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Bias {
    /// That it does not match: a match allows.
    Away,
    /// That it matches: a match denies.
    Towards,
}

#[derive(Debug)]
enum Compiled {
    Principal(Texts),
    Namespace(Texts),
    Account(HashSet<NamespacedName>),
    SourceIp(Blocks),
    DestinationIp(Blocks),
    Port(HashSet<u16>),
    Request(RequestMatcher),
    /// Values of a type that the attribute does not have; decoding makes none.
    Never,
}

impl Matcher {
    pub(super) fn compile(term: &Term, bias: Bias, trust_domain: &TrustDomain) -> Self {
        let values = match (&term.attribute, &term.values) {
            (Attribute::Principal, Values::Text(patterns)) => {
                Compiled::Principal(patterns.iter().map(|pattern| in_trust_domain(pattern, trust_domain)).collect())
            }
            (Attribute::Namespace, Values::Text(patterns)) => Compiled::Namespace(patterns.iter().cloned().collect()),
            (Attribute::ServiceAccount, Values::Accounts(accounts)) => {
                Compiled::Account(accounts.iter().cloned().collect())
            }
            (Attribute::SourceIp, Values::Blocks(blocks)) => Compiled::SourceIp(blocks.iter().collect()),
            (Attribute::DestinationIp, Values::Blocks(blocks)) => Compiled::DestinationIp(blocks.iter().collect()),
            (Attribute::DestinationPort, Values::Ports(ports)) => Compiled::Port(ports.iter().copied().collect()),
            (Attribute::Request(attribute), values) => {
                RequestMatcher::compile(attribute, values).map_or(Compiled::Never, Compiled::Request)
            }
            _ => Compiled::Never,
        };
        Self { negated: term.negated, values, bias }
    }

    /// Whether the term holds. A source without an identity has no principal, namespace or service account: it fails
    /// every positive term on these and passes every negated one, as in ztunnel and Envoy. `notPrincipals: [a]` says
    /// "anyone but a"; who wants "anyone proven but a" adds `principals: ["*"]`, or STRICT. Reading it otherwise
    /// would make DENY with a not-field, the usual way to say "only a", let plaintext pass.
    pub(super) fn matches(&self, subject: &Subject<'_>) -> bool {
        let identity = subject.identity.as_ref();
        let found = match &self.values {
            Compiled::Principal(texts) => identity.is_some_and(|(principal, _)| texts.contains(principal)),
            Compiled::Namespace(texts) => identity.is_some_and(|(_, account)| texts.contains(&account.namespace)),
            Compiled::Account(accounts) => identity.is_some_and(|(_, account)| accounts.contains(account)),
            Compiled::SourceIp(blocks) => blocks.contains(subject.source_ip),
            Compiled::DestinationIp(blocks) => blocks.contains(subject.destination.ip()),
            Compiled::Port(ports) => ports.contains(&subject.destination.port()),
            Compiled::Request(matcher) => match &subject.known {
                Known::Nothing => return self.bias == Bias::Towards,
                // The other way round: what allows may yet match, what denies has not.
                Known::Later => return self.bias == Bias::Away,
                // Of several values the safe reading: to deny one suffices, to allow all must be right.
                Known::One(request) => matcher.finds(request, (self.bias == Bias::Towards) != self.negated),
            },
            Compiled::Never => return false,
        };
        found != self.negated
    }
}

#[derive(Debug, Default)]
pub(super) struct Texts {
    exact: HashSet<Arc<str>>,
    prefixes: Vec<Arc<str>>,
    suffixes: Vec<Arc<str>>,
    presence: bool,
}

impl Texts {
    pub(super) fn contains(&self, text: &str) -> bool {
        !text.is_empty()
            && (self.presence
                || self.exact.contains(text)
                || self.prefixes.iter().any(|prefix| text.starts_with(&**prefix))
                || self.suffixes.iter().any(|suffix| text.ends_with(&**suffix)))
    }
}

impl Texts {
    /// Whether anything that is there will do.
    pub(super) fn is_presence(&self) -> bool {
        self.presence
    }
}

impl FromIterator<Pattern> for Texts {
    fn from_iter<I: IntoIterator<Item = Pattern>>(patterns: I) -> Self {
        let mut texts = Self::default();
        for pattern in patterns {
            match pattern {
                Pattern::Exact(text) => drop(texts.exact.insert(text)),
                Pattern::Prefix(text) => texts.prefixes.push(text),
                Pattern::Suffix(text) => texts.suffixes.push(text),
                Pattern::Presence => texts.presence = true,
            }
        }
        texts
    }
}

/// `cluster.local` at the start of a principal points to the mesh's own trust domain, whatever its name
/// ([Istio, trust domain migration](https://istio.io/latest/docs/tasks/security/authorization/authz-td-migration/)).
fn in_trust_domain(pattern: &Pattern, trust_domain: &TrustDomain) -> Pattern {
    let rewrite = |text: &Arc<str>| -> Arc<str> {
        match text.strip_prefix("cluster.local/") {
            Some(rest) => format!("{trust_domain}/{rest}").into(),
            None => text.clone(),
        }
    };
    match pattern {
        Pattern::Exact(text) => Pattern::Exact(rewrite(text)),
        Pattern::Prefix(text) => Pattern::Prefix(rewrite(text)),
        other => other.clone(),
    }
}
