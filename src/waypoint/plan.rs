//! What policies about traffic make of one request.

use std::cell::Cell;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use http::request::Parts;
use http::{HeaderMap, StatusCode, response};
use rand::Rng;

use super::FAULTED;
use super::answer::Refusal;
use super::guard::{Admission, Guard};
use super::place::Receiver;
use super::session::Session;
use crate::mesh::ServiceDestination;
use crate::mesh::balance::{Strategy, Wish, stable_hash};
use crate::proxy::{Choosing, of_source, wish, with_random};
use crate::route::resilience::{Abort, OutlierRules, RetryRules};
use crate::route::session::{Token, append_cookie, cookie};
use crate::route::traffic::{Balance, HashOn, InForce, Way};
use crate::route::{Forward, GrpcStatus, RouteRef, SessionPersistence};

/// What is in force for one request, and what has been found out for it.
#[derive(Default)]
pub struct Plan {
    in_force: InForce,
    /// None: whoever sent it here has seen to that.
    chosen: Option<Chosen>,
    session: Option<Sticky>,
    /// Of a client that had no cookie to be told by: its name, and the value that it is given.
    cookie: Option<(HashOn, u64)>,
    strategy: Strategy,
    /// The rule that the request has met, or the Service, as sessions and rates are kept by; empty where neither is.
    scope: String,
    /// Where the answer came from.
    answered_by: Cell<Option<SocketAddr>>,
}

struct Chosen {
    choosing: Choosing,
    service: ServiceDestination,
    guard: Option<Arc<Guard>>,
}

/// Who wants to know how well an endpoint did.
pub struct Telling {
    endpoint: SocketAddr,
    /// To the head of its answer.
    took: Duration,
    /// With how many endpoints there are.
    outliers: Option<(OutlierRules, Arc<Guard>, usize)>,
    choosing: Option<Choosing>,
}

impl Telling {
    pub fn tell(self, is_success: bool) {
        if let Some((rules, guard, known)) = self.outliers {
            guard.tell(&rules, self.endpoint, is_success, known);
        }
        if let Some(choosing) = self.choosing {
            // One that fails fast is not to look like a fast one.
            choosing.took(self.endpoint, if is_success { self.took } else { self.took.max(FAILED) });
        }
    }
}

/// The session that a request belongs to, or begins.
struct Sticky {
    persistence: Arc<SessionPersistence>,
    scope: String,
    token: Option<Token>,
    /// Where its token leads.
    endpoint: Option<SocketAddr>,
}

/// A session of a rule is looked for before a backend is chosen by weight: it outlives the weight of its backend.
pub fn stick_to_backend(session: &Session, forward: &mut Forward<'_>, headers: &HeaderMap) {
    let route = forward.route();
    let persistence = session.place.model().read().traffic.session_of_rule(&route, forward.rule());
    let Some((persistence, choosing)) = persistence.and_then(|found| Some((found, session.place.choosing()?))) else {
        return;
    };
    let Some(token) = persistence.read(&scope_of(&route, forward), headers, seconds()) else { return };
    for backend in forward.backends() {
        if let Some(Receiver::Service(service)) = backend.to.as_ref().and_then(|to| session.backend(to))
            && choosing.of_key(&service, token.endpoint).is_some()
        {
            return forward.go_to(backend);
        }
    }
}

impl Plan {
    /// Of a request that is about to go to `to`.
    pub fn of(session: &Session, forward: Option<&Forward<'_>>, to: &Receiver, head: &Parts) -> Self {
        let (Some(choosing), Receiver::Service(service)) = (session.place.choosing(), to) else {
            return Self::default();
        };
        let route = forward.map(Forward::route);
        let rule = route.as_ref().zip(forward.map(Forward::rule));
        let (in_force, is_of_rule) = {
            let state = session.place.model().read();
            let in_force = state.traffic.in_force(rule, &service.service.name);
            let of_rule = in_force.session.as_ref().zip(rule);
            let of_rule = of_rule.and_then(|(_, (route, rule))| state.traffic.session_of_rule(route, rule));
            (in_force, of_rule.is_some())
        };
        let of_service = || format!("Service {}", service.service.name);
        let scope = match forward.zip(route.as_ref()) {
            _ if in_force.session.is_none() && in_force.rate_limits.is_none() => String::new(),
            Some((forward, route)) => scope_of(route, forward),
            None => of_service(),
        };
        let guard = (in_force.breaker.is_some() || in_force.outliers.is_some() || in_force.retry_constraint.is_some())
            .then(|| choosing.guard(service));
        let session = in_force.session.clone().map(|persistence| {
            let scope = if is_of_rule { scope.clone() } else { of_service() };
            let token = persistence.read(&scope, &head.headers, seconds());
            let endpoint = token.and_then(|token| choosing.of_key(service, token.endpoint));
            Sticky { persistence, scope, token, endpoint }
        });
        let (strategy, cookie) = match &in_force.balance {
            Some(balance) => strategy(balance, &choosing, &head.headers),
            None => (Strategy::LeastRequest, None),
        };
        let chosen = Some(Chosen { choosing, service: service.clone(), guard });
        Self { in_force, chosen, session, cookie, strategy, scope, answered_by: Cell::default() }
    }

    pub fn in_force(&self) -> &InForce {
        &self.in_force
    }

    /// Which requests are worth another try; without a word, those that provably reached nobody.
    pub fn retry(&self) -> RetryRules {
        self.in_force.retry.as_deref().map(RetryRules::from).unwrap_or_default()
    }

    /// Another endpoint than those; none where there is no way of choosing but the place's own.
    pub fn pick(&self, tried: &[SocketAddr]) -> Option<Option<SocketAddr>> {
        let Chosen { choosing, service, guard } = self.chosen.as_ref()?;
        let ejected = |endpoint: SocketAddr| guard.as_ref().is_some_and(|guard| guard.is_ejected(endpoint));
        let wanted = self.in_force.balance.as_ref().map(|balance| wish(balance, self.strategy)).unwrap_or_default();
        let wish = Wish {
            stuck: self.session.as_ref().and_then(|session| session.endpoint),
            avoid: self.in_force.outliers.and(guard.as_ref()).map(|_| &ejected as &dyn Fn(SocketAddr) -> bool),
            ..wanted
        };
        Some(choosing.pick(service, &wish, tried))
    }

    /// What the backend is allowed.
    pub fn admission(&self) -> Option<Admission> {
        let guard = self.chosen.as_ref()?.guard.clone()?;
        Some(Admission { guard, limits: self.in_force.breaker? })
    }

    /// Closes connections of the backend that nobody uses.
    pub fn free(&self) {
        if let Some(Chosen { choosing, guard: Some(guard), .. }) = &self.chosen {
            choosing.free(guard);
        }
    }

    /// The request is sent for the first time.
    pub fn count(&self) {
        if let Some((rules, guard)) = self.budget() {
            guard.request(&rules);
        }
    }

    /// Whether it may be sent once more.
    pub fn may_repeat(&self) -> bool {
        self.budget().is_none_or(|(rules, guard)| guard.repeat(&rules))
    }

    /// How many endpoints there are to choose from, as far as this side knows.
    pub fn known(&self) -> Option<usize> {
        self.chosen.as_ref().map(|chosen| chosen.choosing.count(&chosen.service))
    }

    /// What came of a try.
    pub fn tell(&self, endpoint: SocketAddr, is_success: bool, took: Duration) {
        self.telling(endpoint, took).into_iter().for_each(|telling| telling.tell(is_success));
    }

    /// An answer has begun, and how well the endpoint did will be told by its end; none where nobody wants to know.
    pub fn telling(&self, endpoint: SocketAddr, took: Duration) -> Option<Box<Telling>> {
        self.answered_by.set(Some(endpoint));
        let Chosen { choosing, service, guard } = self.chosen.as_ref()?;
        let outliers = self.in_force.outliers.zip(guard.clone());
        let outliers = outliers.map(|(rules, guard)| (rules, guard, choosing.count(service)));
        let choosing = (self.strategy == Strategy::PeakEwma).then(|| choosing.clone());
        (outliers.is_some() || choosing.is_some()).then(|| Box::new(Telling { endpoint, took, outliers, choosing }))
    }

    /// Whether the limits let the request through that are counted here.
    pub fn limit(&self, session: &Session, head: &Parts) -> Result<(), Refusal> {
        let Some(Chosen { choosing, service, .. }) = &self.chosen else { return Ok(()) };
        let name = &service.service.name;
        let of_service = session.place.model().read().traffic.rate_limits(name);
        let of_service = of_service.filter(|_| choosing.counts(&service.service));
        let of_service = of_service.map(|limits| (format!("Service {name}"), limits));
        let of_rule = self.in_force.rate_limits.clone().map(|limits| (self.scope.clone(), limits));
        for (scope, limits) in of_rule.into_iter().chain(of_service) {
            let client = session.place.describe().source;
            let taken = choosing.rates().take(&scope, &limits, &client, &head.headers, Instant::now());
            taken.map_err(Refusal::rate_limit)?;
        }
        Ok(())
    }

    /// What befalls the request on purpose: it waits, and then it may be answered here.
    pub async fn befall(&self, head: &Parts, is_grpc: bool, until: Option<Instant>) -> Result<(), Refusal> {
        let Some(rules) = &self.in_force.fault else { return Ok(()) };
        let fault = rules.draw(&head.headers, with_random(|random| [random.next_u64(), random.next_u64()]));
        if let Some(delay) = fault.delay {
            metrics::counter!(FAULTED, "fault" => "delay").increment(1);
            let end = Instant::now() + delay;
            tokio::time::sleep_until(until.map_or(end, |until| until.min(end)).into()).await;
            if until.is_some_and(|until| until <= end) {
                return Err(Refusal::timeout("a fault that is injected took longer than the request may"));
            }
        }
        let refusal = match fault.abort {
            None => return Ok(()),
            Some(Abort::Http(status)) => Refusal::fault(status, GrpcStatus::of_http(status)),
            Some(Abort::Grpc(_)) if !is_grpc => return Ok(()),
            Some(Abort::Grpc(status)) => Refusal::fault(StatusCode::OK, status),
        };
        metrics::counter!(FAULTED, "fault" => "abort").increment(1);
        Err(refusal)
    }

    /// Tells the client what leads its next request to the same endpoint.
    pub fn mark(&self, answer: &mut response::Parts) {
        if let Some((HashOn::Cookie { name, path, ttl }, value)) = &self.cookie {
            let lasts = (!ttl.is_zero()).then(|| ttl.as_secs().max(1));
            append_cookie(&mut answer.headers, name, &format!("{value:016x}"), path.as_deref(), lasts);
        }
        let (Some(session), Some(chosen), Some(endpoint)) = (&self.session, &self.chosen, self.answered_by.get())
        else {
            return;
        };
        if let Some(key) = chosen.choosing.key_of(&chosen.service, endpoint) {
            session.persistence.write(&session.scope, session.token, key, seconds(), &mut answer.headers);
        }
    }

    fn budget(&self) -> Option<(crate::route::resilience::BudgetRules, &Arc<Guard>)> {
        self.in_force.retry_constraint.zip(self.chosen.as_ref()?.guard.as_ref())
    }
}

/// How an endpoint is drawn; and the cookie that tells the client's next request.
fn strategy(balance: &Balance, choosing: &Choosing, headers: &HeaderMap) -> (Strategy, Option<(HashOn, u64)>) {
    let hash = match &balance.way {
        Way::LeastRequest => return (Strategy::LeastRequest, None),
        Way::PeakEwma => return (Strategy::PeakEwma, None),
        Way::RoundRobin => return (Strategy::RoundRobin, None),
        Way::Random => return (Strategy::Random, None),
        Way::Hash(HashOn::Source) => of_source(choosing.client_ip()),
        Way::Hash(HashOn::Header(name)) => match headers.get(name) {
            Some(value) => stable_hash(value.as_bytes()),
            None => return (Strategy::Random, None),
        },
        Way::Hash(on @ HashOn::Cookie { name, .. }) => match cookie(headers, name) {
            Some(value) => stable_hash(value.as_bytes()),
            None => {
                let value = with_random(Rng::next_u64);
                let hash = stable_hash(format!("{value:016x}").as_bytes());
                return (Strategy::Hash(hash), Some((on.clone(), value)));
            }
        },
    };
    (Strategy::Hash(hash), None)
}

fn scope_of(route: &RouteRef, forward: &Forward<'_>) -> String {
    format!("{} {} {}", route.kind, route.name, forward.rule().index)
}

/// Since 1970.
fn seconds() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// What an endpoint that fails counts as having taken at least.
const FAILED: Duration = Duration::from_secs(1);
