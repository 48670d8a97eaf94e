//! What would become of a request: which rule it meets, where it goes, and what policy makes of that.

use std::net::SocketAddr;
use std::sync::Arc;

use http::header::{HOST, LOCATION};
use http::request::Parts;
use http::{Request, Uri};
use serde::Serialize;

use super::target::targets;
use super::through::between;
use super::{Explanation, From, Hop, Party, Question, explain_sent};
use crate::mesh::{Destination, NamespacedName, ServiceDestination, Waypoint};
use crate::model::State;
use crate::policy::{PathFault, normal_path};
use crate::route::{Action, Answer, Because, Decision, RouteRef, Routes, Rule, Target};

/// The answer to a question about one request.
#[derive(Clone, Debug, Serialize)]
pub struct RequestExplanation {
    pub from: String,
    pub to: String,
    pub port: u16,
    /// `GET /a?b`
    pub request: String,
    /// The waypoint in a process of its own that it goes through, and that routes it: `infra/gw`.
    pub through: Option<String>,
    /// In one sentence, what decides.
    pub summary: String,
    /// `HTTPRoute shop/cart`
    pub route: Option<String>,
    /// `spec.rules[1] (canary)`
    pub rule: Option<String>,
    /// What the client's agent answers itself, whoever would be the backend.
    pub answer: Option<AnswerExplanation>,
    pub backends: Vec<BackendExplanation>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct AnswerExplanation {
    /// Of HTTP; a gRPC client gets 200 and `grpcStatus`.
    pub status: u16,
    pub grpc_status: Option<u16>,
    pub location: Option<String>,
}

#[derive(Clone, Debug, Serialize)]
pub struct BackendExplanation {
    /// `service shop/cart port 80`
    pub to: String,
    /// So many of so many requests go there.
    pub weight: u64,
    pub of: u64,
    /// The request as the route makes it; policy and the application get its path in the one form, and no token.
    pub request: Option<String>,
    /// What is answered in its place, where it is not there.
    pub answer: Option<AnswerExplanation>,
    /// What policies about traffic, and the rule itself, say of it.
    pub traffic: Vec<TrafficExplanation>,
    /// What becomes of the connection to it.
    pub connection: Option<Explanation>,
}

/// One field that is in force.
#[derive(Clone, Debug, Serialize)]
pub struct TrafficExplanation {
    /// `timeouts.request`
    pub field: &'static str,
    /// `TrafficPolicy shop/cart`, or the rule itself.
    pub from: String,
}

/// A request as it is sent, and when: in seconds since 1970.
#[derive(Clone, Copy)]
pub(super) struct Sent<'a> {
    pub(super) head: &'a Parts,
    pub(super) now: i64,
}

/// Answers a question about one request at a time, in seconds since 1970, or says what is wrong with it.
pub fn explain_request(
    state: &State,
    question: &Question,
    head: &Parts,
    now: i64,
) -> Result<RequestExplanation, String> {
    let sent = Sent { head, now };
    let from = From::find(state, &question.from)?;
    let from = match question.to {
        Party::Address(ip) => from.towards(ip),
        Party::Named(_) | Party::Pod(_) | Party::Service(_) => from,
    };
    let found = targets(state, &from, &question.to, question.port)?;
    let mut explanation = RequestExplanation {
        from: from.words.clone(),
        to: found.words,
        port: found.port,
        request: words(head),
        through: None,
        summary: String::new(),
        route: None,
        rule: None,
        answer: None,
        backends: Vec::new(),
    };
    let (through, refused) = match between(state, &from, found.dialled) {
        Some(Ok(through)) => (Some(through), None),
        Some(Err((_, why))) => (None, Some(format!("connections to the Service are refused: {why}"))),
        None => (None, None),
    };
    explanation.through = through.as_ref().map(|through| through.gateway().to_string());
    let service = found.dialled.and_then(|dialled| match state.mesh.destination(dialled) {
        Destination::Service(service) => Some((dialled, service)),
        _ => None,
    });
    let routes = service
        .clone()
        .ok_or_else(|| "routes rule the ports of Services, and this is none".to_owned())
        .and_then(|(dialled, service)| match refused {
            Some(why) => Err(why),
            None => rule(state, &from, dialled, &service).map(|routes| (service, routes)),
        });
    match routes {
        Ok((service, routes)) => {
            let hop = Hop::Routed(through);
            explanation.decide(state, question, sent, (&service, &routes), &hop);
        }
        Err(why) => {
            explanation.summary = format!("no route has a say: {why}");
            let connection = Some(explain_sent(state, question, &Hop::Dialled, Some(sent))?);
            let to = format!("{} port {}", explanation.to, explanation.port);
            let request = Some(words(head));
            let dialled = service.filter(|_| why == NO_ROUTE);
            let traffic = dialled.map(|(_, service)| traffic(state, None, &service.service.name)).unwrap_or_default();
            let backend = BackendExplanation { to, weight: 1, of: 1, request, answer: None, traffic, connection };
            explanation.backends.push(backend);
        }
    }
    Ok(explanation)
}

/// What rules the requests, or why nothing does.
fn rule(state: &State, from: &From, dialled: SocketAddr, service: &ServiceDestination) -> Result<Arc<Routes>, String> {
    let Some(client) = from.workload.as_ref().filter(|_| from.is_captured_towards(dialled)) else {
        return Err("the client's agent routes, or leads to the waypoint, and this client has none".to_owned());
    };
    if *state.mesh.waypoint_of(&service.service) == Waypoint::None {
        return Err("neither the Service nor its namespace says selvedge.dev/waypoint".to_owned());
    }
    let routes = state.routes.routes(&service.service.name, &service.port, &client.name().namespace);
    routes.ok_or_else(|| NO_ROUTE.to_owned())
}

impl RequestExplanation {
    fn decide(
        &mut self,
        state: &State,
        question: &Question,
        sent: Sent<'_>,
        (parent, routes): (&ServiceDestination, &Routes),
        hop: &Hop,
    ) {
        let head = sent.head;
        if let Some((route, rule)) = routes.meet(head) {
            self.route = Some(format!("{} {}", route.kind, route.name));
            let name = rule.name.as_ref().map(|name| format!(" ({name})")).unwrap_or_default();
            self.rule = Some(format!("spec.rules[{}]{name}", rule.index));
        }
        self.summary = match (&self.route, &self.rule) {
            (Some(route), Some(rule)) => format!("{route}, {rule}, is met"),
            _ => format!("no rule of the {}s for this Service port is met", routes.kind()),
        };
        match routes.decide(head, 0) {
            Decision::Answer(answer) if answer.because != Because::NoBackend => {
                self.summary = format!("{}: {}", self.summary, answer.because.message());
                self.answer = Some(in_numbers(&answer));
                return;
            }
            _ => {}
        }
        let Some((_, rule)) = routes.meet(head) else { return };
        let weights: Vec<u64> = match &rule.action {
            Action::Backends(backends) => backends.iter().map(|backend| backend.weight.into()).collect(),
            _ => vec![1],
        };
        let of: u64 = weights.iter().sum();
        if of == 0 {
            let answer = Answer::to(head, Because::NoBackend);
            self.summary = format!("{}: its backends weigh nothing", self.summary);
            self.answer = Some(in_numbers(&answer));
        }
        let mut before = 0;
        for weight in weights.into_iter().filter(|weight| *weight > 0) {
            let decision = routes.decide(head, before);
            self.backends.push(backend(state, question, sent, (parent, hop), decision, (weight, of)));
            before += weight;
        }
    }
}

fn backend(
    state: &State,
    question: &Question,
    Sent { head, now }: Sent<'_>,
    (parent, hop): (&ServiceDestination, &Hop),
    decision: Decision<'_>,
    (weight, of): (u64, u64),
) -> BackendExplanation {
    let nowhere = |to: String, answer: &Answer| BackendExplanation {
        to,
        weight,
        of,
        request: None,
        answer: Some(in_numbers(answer)),
        traffic: Vec::new(),
        connection: None,
    };
    let forward = match decision {
        Decision::Forward(forward) => forward,
        Decision::Answer(answer) => return nowhere("nobody: it is no backend".to_owned(), &answer),
    };
    let mut sent = head.clone();
    forward.edit_request(&mut sent);
    let (name, port) = match forward.target() {
        Target::Parent => (&parent.service.name, parent.port.port),
        Target::Backend(to) => (&to.service, to.port),
    };
    let words_of = format!("service {name} port {port}");
    let service = state.mesh.service(name).filter(|service| state.mesh.service_destination(service, port).is_some());
    let Some(service) = service else { return nowhere(words_of, &forward.answer(Because::NoBackend)) };
    let to = Party::Service(service.name.clone());
    let asked = Question { from: question.from.clone(), to, port: Some(port) };
    let connection = explain_sent(state, &asked, hop, Some(Sent { head: &sent, now })).ok();
    let traffic = traffic(state, Some((&forward.route(), forward.rule())), name);
    BackendExplanation { to: words_of, weight, of, request: Some(words(&sent)), answer: None, traffic, connection }
}

fn traffic(state: &State, rule: Option<(&RouteRef, &Rule)>, service: &NamespacedName) -> Vec<TrafficExplanation> {
    let itself = || "the rule itself".to_owned();
    let sources = state.traffic.sources(rule, service).into_iter();
    sources
        .map(|(field, from)| TrafficExplanation { field, from: from.map_or_else(itself, |from| from.to_string()) })
        .collect()
}

impl Sent<'_> {
    /// The request as it is where it is judged.
    pub(super) fn arriving(&self) -> Result<Request<()>, PathFault> {
        let mut head = self.head.clone();
        let path = normal_path(head.uri.path())?;
        let query = head.uri.query().map(|query| format!("?{query}")).unwrap_or_default();
        let settled = format!("{path}{query}");
        let mut uri = std::mem::take(&mut head.uri).into_parts();
        // What was a path is one in its plain form.
        uri.path_and_query = settled.parse().ok();
        head.uri = Uri::from_parts(uri).unwrap_or_default();
        Ok(Request::from_parts(head, ()))
    }
}

fn in_numbers(answer: &Answer) -> AnswerExplanation {
    let location = answer.headers.get(LOCATION).and_then(|location| location.to_str().ok());
    AnswerExplanation {
        status: answer.status.as_u16(),
        grpc_status: answer.grpc.map(|status| status as u16),
        location: location.map(str::to_owned),
    }
}

/// `GET /a?b`, with the host where it has one.
fn words(head: &Parts) -> String {
    let host = head.headers.get(HOST).and_then(|host| host.to_str().ok());
    let host = host.or(head.uri.authority().map(|authority| authority.as_str()));
    let host = host.map(|host| format!(" of {host}")).unwrap_or_default();
    format!("{} {}{host}", head.method, head.uri.path_and_query().map_or("/", |path| path.as_str()))
}

const NO_ROUTE: &str = "there is none for this Service port and this client's namespace";

#[cfg(test)]
mod tests;
