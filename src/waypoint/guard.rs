//! What is remembered of each backend between its requests: how much it holds, how many of them were repetitions, which
//! of its endpoints fail. All threads share it, and it is kept by the namespace of the clients: no tenant fills or ejects
//! what is another's.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::{EJECTED, REFUSED};
use crate::mesh::{NamespacedName, Reason};
use crate::proxy::Failure;
use crate::route::resilience::{Breaker, Budget, BudgetRules, Full, Limits, OutlierRules, Outliers};

/// All that is remembered.
#[derive(Default)]
pub struct Guards(RwLock<HashMap<GuardKey, Arc<Guard>>>);

/// A Service port, as the clients of one namespace know it.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct GuardKey {
    pub clients: Arc<str>,
    pub service: NamespacedName,
    pub port: u16,
}

/// What is remembered of one backend.
pub struct Guard {
    state: Mutex<State>,
    /// A connection was closed, or waits for its next request.
    freed: Notify,
}

struct State {
    breaker: Breaker,
    budget: Budget,
    outliers: Outliers<SocketAddr>,
    /// Requests that wait for a connection, by their threads.
    waiting: HashMap<ThreadId, usize>,
    used: Instant,
}

impl Guards {
    pub fn of(&self, key: GuardKey) -> Arc<Guard> {
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner).get(&key).cloned();
        let guard = known.unwrap_or_else(|| {
            self.0.write().unwrap_or_else(PoisonError::into_inner).entry(key).or_insert_with(Guard::new).clone()
        });
        guard.lock().used = Instant::now();
        guard
    }

    /// Forgets what nobody has asked for lately; called now and then.
    pub fn expire(&self, now: Instant) {
        let mut known = self.0.write().unwrap_or_else(PoisonError::into_inner);
        known.retain(|_, guard| {
            let state = guard.lock();
            !state.breaker.is_idle() || now.saturating_duration_since(state.used) < KEPT
        });
    }
}

impl Guard {
    fn new() -> Arc<Self> {
        let state = State {
            breaker: Breaker::default(),
            budget: Budget::default(),
            outliers: Outliers::default(),
            waiting: HashMap::new(),
            used: Instant::now(),
        };
        Arc::new(Self { state: Mutex::new(state), freed: Notify::new() })
    }

    /// A request is sent for the first time.
    pub fn request(&self, rules: &BudgetRules) {
        self.lock().budget.request(rules, Instant::now());
    }

    /// Whether one may be sent once more.
    pub fn repeat(&self, rules: &BudgetRules) -> bool {
        self.lock().budget.repeat(rules, Instant::now())
    }

    pub fn is_ejected(&self, endpoint: SocketAddr) -> bool {
        self.lock().outliers.is_ejected(&endpoint, Instant::now())
    }

    /// How an endpoint, one of so many, has answered.
    pub fn tell(&self, rules: &OutlierRules, endpoint: SocketAddr, is_success: bool, known: usize) {
        if self.lock().outliers.tell(rules, &endpoint, is_success, known, Instant::now()) {
            metrics::counter!(EJECTED).increment(1);
        }
    }

    /// Whether somebody waits for a connection, and nobody of this thread does, who could take one that is kept.
    pub fn is_wanted_elsewhere(&self) -> bool {
        let state = self.lock();
        !state.waiting.is_empty() && !state.waiting.contains_key(&std::thread::current().id())
    }

    /// A connection is there for the next request of this thread.
    pub fn freed(&self) {
        self.freed.notify_waiters();
    }

    // Nothing panics while it is held.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A backend's guard, with what a policy allows it.
#[derive(Clone)]
pub struct Admission {
    pub guard: Arc<Guard>,
    pub limits: Limits,
}

impl Admission {
    /// Counts one more request that is under way, until what is returned is dropped.
    pub fn begin(&self) -> Result<Begun, Failure> {
        self.guard.lock().breaker.begin(&self.limits).map_err(refused)?;
        Ok(Begun(self.guard.clone()))
    }

    /// Leave for one more connection, until what is returned is dropped; or whatever `kept` finds meanwhile. Waits while
    /// there are as many as there may be; `full` is called once then.
    pub async fn open<T>(&self, kept: impl Fn() -> Option<T>, full: impl FnOnce()) -> Result<Leave<T>, Failure> {
        let _waiting = self.wait()?;
        let mut full = Some(full);
        let waiting = async {
            loop {
                let freed = self.guard.freed.notified();
                tokio::pin!(freed);
                // From here on nothing that is freed is missed.
                freed.as_mut().enable();
                if let Some(kept) = kept() {
                    return Leave::Kept(kept);
                }
                if self.guard.lock().breaker.open(&self.limits).is_ok() {
                    return Leave::Open(Opened(self.guard.clone()));
                }
                full.take().into_iter().for_each(|full| full());
                freed.await;
            }
        };
        tokio::time::timeout(PATIENCE, waiting).await.map_err(|_| refused(Full::Connections))
    }

    fn wait(&self) -> Result<Waiting, Failure> {
        let thread = std::thread::current().id();
        let mut state = self.guard.lock();
        state.breaker.wait(&self.limits).map_err(refused)?;
        *state.waiting.entry(thread).or_default() += 1;
        Ok(Waiting(self.guard.clone(), thread))
    }
}

/// What came of waiting for a connection.
pub enum Leave<T> {
    /// One that had waited.
    Kept(T),
    /// One may be made.
    Open(Opened),
}

fn refused(full: Full) -> Failure {
    metrics::counter!(REFUSED, "what" => full.name()).increment(1);
    Failure::new(Reason::CircuitBreaker, format!("the backend has as many {} as it may", full.words()))
}

/// One request under way.
pub struct Begun(Arc<Guard>);

impl Drop for Begun {
    fn drop(&mut self) {
        self.0.lock().breaker.end();
    }
}

/// One connection.
pub struct Opened(Arc<Guard>);

impl Opened {
    pub fn guard(&self) -> &Arc<Guard> {
        &self.0
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        self.0.lock().breaker.close();
        self.0.freed.notify_waiters();
    }
}

/// One request that waits for a connection.
struct Waiting(Arc<Guard>, ThreadId);

impl Drop for Waiting {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.breaker.give_up();
        if let Some(count) = state.waiting.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                state.waiting.remove(&self.1);
            }
        }
    }
}

/// How long a backend that nobody asks for is remembered: no ejection lasts longer.
const KEPT: Duration = Duration::from_secs(600);
/// How long a request waits for one of the connections that there may be.
const PATIENCE: Duration = Duration::from_secs(5);
