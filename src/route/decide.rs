//! What is to be done with one request.

use std::sync::Arc;

use http::{request, response};

use super::answer::is_grpc;
use super::cors::{self, Grant};
use super::head::Head;
use super::index::{Entry, RuleSet};
use super::{Action, Answer, Backend, BackendRef, Because, Filters, RouteKind, RouteRef, Rule, Target};
use crate::authorizer::Authorizer;

/// What rules the requests to one port of one Service from one client namespace.
#[derive(Clone, Debug)]
pub struct Routes {
    kind: RouteKind,
    /// The Service port that was dialled.
    port: u16,
    /// One for each way in which routes name this port.
    sets: Vec<Arc<RuleSet>>,
    names_port: bool,
}

impl Routes {
    pub(super) fn new(kind: RouteKind, port: u16, sets: Vec<Arc<RuleSet>>, names_port: bool) -> Self {
        Self { kind, port, sets, names_port }
    }

    /// Whether one of the routes names this very port: what it is for then is requests alone.
    pub fn names_port(&self) -> bool {
        self.names_port
    }

    /// Of which kind the routes are: they are all of one.
    pub fn kind(&self) -> RouteKind {
        self.kind
    }

    /// The rule that a request meets, and whose it is.
    pub fn meet(&self, head: &request::Parts) -> Option<(RouteRef, &Rule)> {
        self.find(&Head::new(head)).map(|entry| (entry.route().reference(), entry.rule()))
    }

    /// What is to be done with a request. `random` is drawn by the caller, anew for each request.
    pub fn decide(&self, head: &request::Parts, random: u64) -> Decision<'_> {
        if let Some(answer) = self.answer_preflight(head) {
            return Decision::Answer(answer);
        }
        let Some(entry) = self.find(&Head::new(head)) else {
            return Decision::Answer(Answer::to(head, Because::NoMatch));
        };
        let rule = entry.rule();
        let refuse = |because| Decision::Answer(of_route(Answer::to(head, because), entry));
        let backend = match &rule.action {
            Action::Refuse => return refuse(Because::Filter),
            Action::Redirect(redirect) => {
                let mut answer = of_route(redirect.answer(head, &entry.matched().place, self.port), entry);
                if let Some(grant) = rule.filters.cors.as_ref().and_then(|cors| cors.grant(&head.headers)) {
                    grant.write(&mut answer.headers);
                }
                rule.filters.response_headers.edit(&mut answer.headers);
                return Decision::Answer(answer);
            }
            Action::Parent => None,
            Action::Backends(backends) => match choose(backends, random) {
                Some(backend @ Backend { to: Some(_), .. }) => Some(backend),
                _ => return refuse(Because::NoBackend),
            },
        };
        let cors = rule.filters.cors.as_ref().and_then(|cors| cors.grant(&head.headers));
        Decision::Forward(Forward { entry, backend, random, cors, is_grpc: is_grpc(head) })
    }

    /// The answer to a preflight request, where the rule of the request that it asks about has the filter `CORS`.
    fn answer_preflight(&self, head: &request::Parts) -> Option<Answer> {
        let method = cors::asked_method(&head.method, &head.headers)?;
        let entry = self.find(&Head::with_method(head, &method)).or_else(|| self.find(&Head::new(head)))?;
        let rule = entry.rule();
        let cors = rule.filters.cors.as_ref().filter(|_| rule.action != Action::Refuse)?;
        let mut answer = of_route(Answer::error(false, Because::Preflight), entry);
        answer.headers = cors.preflight(&head.headers);
        Some(answer)
    }

    fn find(&self, head: &Head<'_>) -> Option<&Entry> {
        self.sets.iter().filter_map(|set| set.find(head)).min()
    }
}

fn of_route(answer: Answer, entry: &Entry) -> Answer {
    Answer { route: Some(entry.route().reference()), ..answer }
}

/// One of them, each in its share; none where all weigh nothing.
fn choose(backends: &[Backend], random: u64) -> Option<&Backend> {
    let total: u64 = backends.iter().map(|backend| u64::from(backend.weight)).sum();
    let mut at = random.checked_rem(total)?;
    backends.iter().find(|backend| match at.checked_sub(backend.weight.into()) {
        Some(rest) => {
            at = rest;
            false
        }
        None => true,
    })
}

/// What is to be done with a request.
#[derive(Clone, Debug)]
pub enum Decision<'a> {
    /// It is answered here.
    Answer(Answer),
    Forward(Forward<'a>),
}

/// A request that goes on.
#[derive(Clone, Debug)]
pub struct Forward<'a> {
    entry: &'a Entry,
    backend: Option<&'a Backend>,
    random: u64,
    cors: Option<Grant<'a>>,
    is_grpc: bool,
}

impl<'a> Forward<'a> {
    pub fn route(&self) -> RouteRef {
        self.entry.route().reference()
    }

    pub fn rule(&self) -> &'a Rule {
        self.entry.rule()
    }

    pub fn target(&self) -> Target<'a> {
        match self.backend.and_then(|backend| backend.to.as_ref()) {
            Some(to) => Target::Backend(to),
            None => Target::Parent,
        }
    }

    /// Changes the request as the filters have it; once, before it is first sent.
    pub fn edit_request(&self, head: &mut request::Parts) {
        let [rule, backend] = self.filters();
        rule.request_headers.edit_request(head);
        backend.request_headers.edit_request(head);
        rule.rewrite.edit(&backend.rewrite, &self.entry.matched().place, head);
    }

    /// Changes the answer as the filters have it, whoever gave it.
    pub fn edit_response(&self, head: &mut response::Parts) {
        if let Some(grant) = &self.cors {
            grant.write(&mut head.headers);
        }
        let [rule, backend] = self.filters();
        backend.response_headers.edit(&mut head.headers);
        rule.response_headers.edit(&mut head.headers);
    }

    /// Who gets a copy of this request.
    pub fn mirrors(&self) -> impl Iterator<Item = &'a BackendRef> + use<'a> {
        let random = self.random;
        let [rule, backend] = self.filters();
        let mirrors = (1..).zip(rule.mirrors.iter().chain(&backend.mirrors));
        mirrors
            .filter(move |(index, mirror)| mirror.share.takes(mix(random, *index)))
            .filter_map(|(_, m)| m.to.as_ref())
    }

    /// Who is asked whether it may go on, before anything is changed.
    pub fn authorizers(&self) -> impl Iterator<Item = &'a Authorizer> + use<'a> {
        self.filters().into_iter().filter_map(|filters| filters.authorizer.as_deref())
    }

    /// All backends of its rule, whatever they weigh.
    pub fn backends(&self) -> &'a [Backend] {
        if let Action::Backends(backends) = &self.rule().action { backends } else { &[] }
    }

    /// To this one of them, whatever was drawn.
    pub fn go_to(&mut self, backend: &'a Backend) {
        self.backend = Some(backend);
    }

    /// What is answered in place of the backend, such as that it is not there.
    pub fn answer(&self, because: Because) -> Answer {
        of_route(Answer::error(self.is_grpc, because), self.entry)
    }

    /// Of the rule, and of the backend.
    fn filters(&self) -> [&'a Filters; 2] {
        [&self.entry.rule().filters, self.backend.map_or(&NO_FILTERS, |backend| &backend.filters)]
    }
}

/// Another number of the same draw (splitmix64).
fn mix(random: u64, index: u64) -> u64 {
    let mut z = random.wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

static NO_FILTERS: Filters = Filters::NONE;
