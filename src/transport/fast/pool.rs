use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::time::{Duration, SystemTime};

use metrics::counter;
use tokio::sync::{oneshot, watch};
use tokio::time::Instant;

use super::client::{self, Flow, Unopened};
use super::early::Early;
use super::header::Header;
use super::link::Link;
use crate::mesh::PodUid;
use crate::transport::hbone::{OpenError, PoolKey, PoolStatus};
use crate::transport::metrics::{FAST_POOLED, FastConnection};
use crate::transport::tls::{PeerInfo, Session, Spoken};

/// The connections of one worker thread that wait for a flow, or carry one.
#[derive(Clone)]
pub struct Pool {
    inner: Rc<Inner>,
}

#[derive(Clone, Debug)]
pub struct PoolSettings {
    /// Connections of one key, and in all. Flows beyond share one by HBONE.
    pub most_per_key: usize,
    pub most_total: usize,
    /// Those of them that wait for a flow.
    pub idle_per_key: usize,
    pub idle_total: usize,
    /// One that no flow has wanted for so long is closed.
    pub idle: Duration,
    /// From the header to its answer, which comes once the far application has accepted.
    pub answer: Duration,
    /// A peer that spoke HBONE is asked again after so long.
    pub ask_again: Duration,
}

impl Default for PoolSettings {
    fn default() -> Self {
        Self {
            // Few flows are for bytes, and many for requests, of which HBONE carries several in one packet: at twice the
            // requests for a second of processor time.
            most_per_key: 12,
            most_total: 2048,
            idle_per_key: 12,
            idle_total: 512,
            idle: Duration::from_secs(60),
            answer: Duration::from_secs(15),
            ask_again: Duration::from_secs(300),
        }
    }
}

/// Makes a connection. Called also ahead of the flow that will use it.
pub type Dial = Rc<dyn Fn() -> Pin<Box<dyn Future<Output = Result<Spoken, OpenError>>>>>;

/// How the peer is to be spoken to.
pub enum Opened {
    Fast(Flow, Rc<PeerInfo>),
    /// By HBONE, perhaps on this connection, which was made to find that out.
    Hbone(Option<Box<Session>>),
}

impl Pool {
    /// Must be called on the thread that it is for, inside its `LocalSet`.
    pub fn new(settings: PoolSettings) -> Self {
        let inner = Rc::new(Inner { settings, state: RefCell::default(), alive: watch::Sender::new(0) });
        tokio::task::spawn_local(tidy(Rc::downgrade(&inner)));
        Self { inner }
    }

    /// Opens a flow, on a connection of this key that waits, else on one that `dial` makes. What the application says
    /// meanwhile is sent with it, and kept.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub async fn open(
        &self,
        key: &PoolKey,
        header: &Header,
        early: &mut Early,
        dial: Dial,
    ) -> Result<Opened, OpenError> {
        let mut last = String::new();
        // A connection that went away as it was taken costs another look, never the flow.
        for _ in 0..TRIES {
            let lease = match self.inner.claim(key, &dial).await? {
                Claimed::Connection(lease) => lease,
                Claimed::Hbone(session) => return Ok(Opened::Hbone(session.map(Box::new))),
            };
            let (new, peer) = (lease.is_new(), lease.peer.clone());
            match client::open(lease, header, early, self.inner.settings.answer).await {
                Ok(flow) => {
                    counter!(FAST_POOLED, "result" => if new { "miss" } else { "hit" }).increment(1);
                    return Ok(Opened::Fast(flow, peer));
                }
                Err(Unopened::Open(error)) => return Err(error),
                Err(Unopened::Unprocessed(cause)) => last = cause,
                Err(Unopened::Unanswered(cause)) if new => return Err(OpenError::Broken(cause.into())),
                Err(Unopened::Unanswered(cause)) => last = cause,
            }
        }
        Err(OpenError::Broken(last.into()))
    }

    /// A pod left: its connections take no new flow.
    pub fn evict(&self, pod: &PodUid) {
        let mut state = self.inner.state.borrow_mut();
        let gone: Vec<Entry> = state
            .keys
            .extract_if(|key, _| key.source_pod == *pod || key.destination_pod == *pod)
            .map(|(_, e)| e)
            .collect();
        state.idle -= gone.iter().map(|entry| entry.idle.len()).sum::<usize>();
        drop(state);
        gone.into_iter().flat_map(|entry| entry.idle).for_each(Waiting::close);
    }

    /// Connections end with their flow, and those without one at once; completes when all have.
    pub async fn close(&self) {
        let keys = {
            let mut state = self.inner.state.borrow_mut();
            state.closing = true;
            state.idle = 0;
            std::mem::take(&mut state.keys)
        };
        keys.into_values().flat_map(|entry| entry.idle).for_each(Waiting::close);
        // The sender is ours and lives.
        let _ = self.inner.alive.subscribe().wait_for(|alive| *alive == 0).await;
    }

    pub fn snapshot(&self) -> Vec<PoolStatus> {
        let state = self.inner.state.borrow();
        let status = |key: &PoolKey, peer: &PeerInfo, streams| PoolStatus::new("fast", key, peer, streams);
        let idle = state.keys.iter().flat_map(|(key, e)| e.idle.iter().map(move |w| status(key, &w.peer, 0)));
        let busy = state.keys.iter().flat_map(|(key, e)| e.busy.values().map(move |peer| status(key, peer, 1)));
        idle.chain(busy).collect()
    }
}

struct Inner {
    settings: PoolSettings,
    state: RefCell<State>,
    /// How many connections there are, in whatever state.
    alive: watch::Sender<usize>,
}

#[derive(Default)]
struct State {
    keys: HashMap<PoolKey, Entry>,
    numbers: u64,
    idle: usize,
    closing: bool,
}

struct Entry {
    key: Rc<PoolKey>,
    number: u64,
    speaks: Speaks,
    /// The one that waits longest is in front, and is taken first: the server's threads all get their turn.
    idle: VecDeque<Waiting>,
    busy: HashMap<u64, Rc<PeerInfo>>,
    asking: VecDeque<oneshot::Sender<Result<Claimed, OpenError>>>,
    dialling: usize,
    /// Flows at once, at most, of late.
    peak: usize,
    /// Flows since the last look.
    opens: usize,
}

#[derive(Clone, Copy)]
enum Speaks {
    Unknown,
    Fast,
    Hbone(Instant),
}

enum Claimed {
    Connection(Lease),
    Hbone(Option<Session>),
}

/// A connection that waits for its next flow.
struct Waiting {
    link: Link,
    peer: Rc<PeerInfo>,
    since: Instant,
    counted: Counted,
}

impl Waiting {
    fn is_usable(&self) -> bool {
        self.peer.is_current(SystemTime::now()) && self.link.is_quiet()
    }

    fn close(self) {
        let Self { link, counted, .. } = self;
        tokio::task::spawn_local(async move {
            link.close().await;
            drop(counted);
        });
    }
}

/// One connection, lent to one flow. Dropping it ends the connection.
pub(super) struct Lease {
    pub link: Link,
    peer: Rc<PeerInfo>,
    /// Whether this is the connection's first flow.
    new: bool,
    counted: Counted,
    busy: Busy,
}

impl Lease {
    pub fn is_new(&self) -> bool {
        self.new
    }

    /// The flow has ended, and the connection can carry another.
    pub fn give_back(self) {
        let Self { link, peer, counted, busy, .. } = self;
        let waiting = Waiting { link, peer, since: Instant::now(), counted };
        match busy.pool.upgrade() {
            Some(pool) if waiting.is_usable() => pool.take_back(&busy, waiting),
            _ => waiting.close(),
        }
    }
}

/// Counts a flow for its key, until it has ended.
struct Busy {
    pool: Weak<Inner>,
    key: Rc<PoolKey>,
    entry: u64,
    number: u64,
}

impl Drop for Busy {
    fn drop(&mut self) {
        let Some(pool) = self.pool.upgrade() else { return };
        if let Some(entry) = pool.state.borrow_mut().entry(&self.key, self.entry) {
            entry.busy.remove(&self.number);
        }
    }
}

impl State {
    /// The entry of a key, unless it is another than it was: then a pod has left in between.
    fn entry(&mut self, key: &PoolKey, number: u64) -> Option<&mut Entry> {
        self.keys.get_mut(key).filter(|entry| entry.number == number)
    }

    fn next_number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }
}

impl Inner {
    async fn claim(self: &Rc<Self>, key: &PoolKey, dial: &Dial) -> Result<Claimed, OpenError> {
        let asked = {
            let mut state = self.state.borrow_mut();
            if state.closing {
                return Err(OpenError::Broken("the agent is ending".into()));
            }
            let number = state.next_number();
            let State { keys, idle, .. } = &mut *state;
            let entry = keys.entry(key.clone()).or_insert_with(|| Entry::new(key, number));
            if let Speaks::Hbone(since) = entry.speaks {
                if since.elapsed() < self.settings.ask_again {
                    return Ok(Claimed::Hbone(None));
                }
                entry.speaks = Speaks::Unknown;
            }
            entry.opens += 1;
            while let Some(waiting) = entry.idle.pop_front() {
                *idle -= 1;
                if waiting.is_usable() {
                    let lease = entry.lend(self, number, waiting, false);
                    self.make_ahead(entry, dial);
                    return Ok(Claimed::Connection(lease));
                }
                waiting.close();
            }
            if self.is_full(entry) && matches!(entry.speaks, Speaks::Fast) {
                return Ok(Claimed::Hbone(None));
            }
            let (sender, receiver) = oneshot::channel();
            entry.asking.push_back(sender);
            self.dial_for_those_who_ask(entry, dial);
            receiver
        };
        asked.await.unwrap_or_else(|_| Err(OpenError::Broken("one of the pods left".into())))
    }

    /// Whether there are as many connections of a key, or in all, as there may be.
    fn is_full(&self, entry: &Entry) -> bool {
        let promised = entry.busy.len() + entry.asking.len();
        promised >= self.settings.most_per_key || *self.alive.borrow() >= self.settings.most_total
    }

    fn dial_for_those_who_ask(self: &Rc<Self>, entry: &mut Entry, dial: &Dial) {
        // As long as nobody knows what the peer speaks, one finds out for all.
        let most = if matches!(entry.speaks, Speaks::Fast) { MOST_DIALS } else { 1 };
        let wanted = entry.asking.len().min(most);
        while entry.dialling < wanted {
            self.dial(entry, dial);
        }
    }

    /// Keeps a connection in hand for a key that is asked for again and again.
    fn make_ahead(self: &Rc<Self>, entry: &mut Entry, dial: &Dial) {
        let is_wanted = entry.opens > 1 && entry.idle.is_empty() && entry.dialling == 0;
        if is_wanted && !self.is_full(entry) {
            self.dial(entry, dial);
        }
    }

    fn dial(self: &Rc<Self>, entry: &mut Entry, dial: &Dial) {
        entry.dialling += 1;
        let (pool, key, number, dial) = (Rc::downgrade(self), entry.key.clone(), entry.number, dial.clone());
        tokio::task::spawn_local(async move {
            let made = dial().await;
            if let Some(pool) = pool.upgrade() {
                pool.made(&key, number, made, &dial);
            }
        });
    }

    fn made(self: &Rc<Self>, key: &PoolKey, number: u64, made: Result<Spoken, OpenError>, dial: &Dial) {
        let mut state = self.state.borrow_mut();
        let lease = state.next_number();
        let Some(entry) = state.entry(key, number) else {
            // One of the pods left meanwhile.
            drop(state);
            if let Ok(Spoken::Fast(session)) = made {
                self.waiting(session).close();
            }
            return;
        };
        entry.dialling -= 1;
        match made {
            Ok(Spoken::Fast(session)) => {
                entry.speaks = Speaks::Fast;
                let left = entry.hand_out(self, lease, self.waiting(session), true);
                self.dial_for_those_who_ask(entry, dial);
                if let Some(waiting) = left {
                    self.keep(&mut state, key, waiting);
                }
            }
            Ok(Spoken::Hbone(session)) => {
                entry.speaks = Speaks::Hbone(Instant::now());
                let mut session = Some(session);
                for asking in entry.asking.drain(..) {
                    // Whoever has gone leaves the connection to the next.
                    if let Err(Ok(Claimed::Hbone(unused))) = asking.send(Ok(Claimed::Hbone(session.take()))) {
                        session = unused;
                    }
                }
            }
            Err(error) => {
                let all = !matches!(entry.speaks, Speaks::Fast);
                while let Some(asking) = entry.asking.pop_front() {
                    let heard = asking.send(Err(error.clone())).is_ok();
                    if heard && !all {
                        break;
                    }
                }
                if entry.is_unused() {
                    state.keys.remove(key);
                } else {
                    self.dial_for_those_who_ask(entry, dial);
                }
            }
        }
    }

    fn waiting(&self, session: Session<Link>) -> Waiting {
        let Session { stream: link, peer, .. } = session;
        Waiting { link, peer: Rc::new(peer), since: Instant::now(), counted: Counted::begin(&self.alive) }
    }

    fn take_back(self: &Rc<Self>, busy: &Busy, waiting: Waiting) {
        let mut state = self.state.borrow_mut();
        let number = state.next_number();
        let Some(entry) = state.entry(&busy.key, busy.entry) else {
            drop(state);
            return waiting.close();
        };
        if let Some(waiting) = entry.hand_out(self, number, waiting, false) {
            self.keep(&mut state, &busy.key, waiting);
        }
    }

    /// Keeps a connection for its next flow, within bounds.
    fn keep(&self, state: &mut State, key: &PoolKey, waiting: Waiting) {
        let PoolSettings { idle_total, idle_per_key, .. } = self.settings;
        match state.keys.get_mut(key) {
            Some(entry) if state.idle < idle_total && entry.idle.len() < idle_per_key => {
                state.idle += 1;
                entry.idle.push_back(waiting);
            }
            _ => waiting.close(),
        }
    }
}

impl Entry {
    fn new(key: &PoolKey, number: u64) -> Self {
        Self {
            key: Rc::new(key.clone()),
            number,
            speaks: Speaks::Unknown,
            idle: VecDeque::new(),
            busy: HashMap::new(),
            asking: VecDeque::new(),
            dialling: 0,
            peak: 0,
            opens: 0,
        }
    }

    fn lend(&mut self, pool: &Rc<Inner>, number: u64, waiting: Waiting, new: bool) -> Lease {
        let Waiting { link, peer, counted, .. } = waiting;
        self.busy.insert(number, peer.clone());
        self.peak = self.peak.max(self.busy.len());
        let busy = Busy { pool: Rc::downgrade(pool), key: self.key.clone(), entry: self.number, number };
        Lease { link, peer, new, counted, busy }
    }

    /// Gives a connection to the one who has asked longest; back, if nobody asks.
    fn hand_out(&mut self, pool: &Rc<Inner>, number: u64, waiting: Waiting, new: bool) -> Option<Waiting> {
        while let Some(asking) = self.asking.pop_front() {
            if asking.is_closed() {
                continue;
            }
            let lease = self.lend(pool, number, waiting, new);
            // It was open just now, and nobody else runs on this thread.
            drop(asking.send(Ok(Claimed::Connection(lease))));
            return None;
        }
        Some(waiting)
    }

    fn is_unused(&self) -> bool {
        self.idle.is_empty() && self.busy.is_empty() && self.asking.is_empty() && self.dialling == 0
    }
}

/// Counts a connection for as long as it is there.
struct Counted {
    alive: watch::Sender<usize>,
    _metric: FastConnection,
}

impl Counted {
    fn begin(alive: &watch::Sender<usize>) -> Self {
        alive.send_modify(|alive| *alive += 1);
        Self { alive: alive.clone(), _metric: FastConnection::begin("client") }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.alive.send_modify(|alive| *alive -= 1);
    }
}

/// Closes what has waited too long or can take no flow any more, and what demand does not call for.
async fn tidy(pool: Weak<Inner>) {
    let mut ticks = tokio::time::interval(TIDYING);
    loop {
        ticks.tick().await;
        let Some(pool) = pool.upgrade() else { return };
        let mut closing = Vec::new();
        let mut state = pool.state.borrow_mut();
        state.keys.retain(|_, entry| {
            let wanted = entry.peak + 1;
            for waiting in std::mem::take(&mut entry.idle) {
                let surplus = entry.busy.len() + entry.idle.len() >= wanted;
                if !surplus && waiting.since.elapsed() < pool.settings.idle && waiting.is_usable() {
                    entry.idle.push_back(waiting);
                } else {
                    closing.push(waiting);
                }
            }
            entry.opens = 0;
            entry.peak = entry.busy.len().max(entry.peak - entry.peak.div_ceil(8));
            let remembered = matches!(entry.speaks, Speaks::Hbone(since) if since.elapsed() < pool.settings.ask_again);
            remembered || !entry.is_unused()
        });
        state.idle -= closing.len();
        drop(state);
        closing.into_iter().for_each(Waiting::close);
    }
}

const TRIES: usize = 4;
/// Handshakes with one peer at once: a quarter of what it admits.
const MOST_DIALS: usize = 64;
const TIDYING: Duration = Duration::from_secs(5);
