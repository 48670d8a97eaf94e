//! Connections to applications that are kept for later requests: one thread's, without a lock.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use metrics::Gauge;
use tokio::sync::Mutex;

use super::guard::Guard;
use super::upstream::Upstream;
use super::{Bond, POOLED};
use crate::mesh::PodUid;

/// A connection is only ever used for what it was made for: the same pod, address, endpoint, and way through the mesh.
#[derive(Default)]
pub struct Pool(RefCell<State>);

#[derive(Default)]
struct State {
    http1: HashMap<Key, Vec<Kept>>,
    http2: HashMap<Key, Vec<Kept>>,
    /// Who makes a connection to an endpoint for others to share.
    turns: HashMap<Key, Rc<Mutex<()>>>,
    /// As many as the gauge says.
    total: usize,
    gauge: Option<Gauge>,
}

struct Kept {
    upstream: Upstream,
    since: Instant,
}

/// One moment by both clocks: rest and age are measured by the one, certificates end by the other.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    pub instant: Instant,
    pub wall: SystemTime,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    source: PodUid,
    source_ip: IpAddr,
    endpoint: SocketAddr,
}

impl Pool {
    /// One that waits.
    pub fn take(&self, bond: &Bond) -> Option<Upstream> {
        let mut state = self.0.borrow_mut();
        let kept = state.http1.get_mut(&Key::of(bond))?;
        let (before, now) = (kept.len(), Moment::now());
        let mut taken = None;
        // The one that rested least: it is the least likely to be closed by its other end in this moment. Those behind it are
        // left to `expire`.
        for index in (0..kept.len()).rev() {
            if !kept[index].is_of(bond, now) {
                kept.remove(index);
            } else if kept[index].upstream.is_free() {
                taken = Some(kept.remove(index).upstream);
                break;
            }
        }
        let left = kept.len();
        state.count(before, left);
        taken
    }

    pub fn put(&self, upstream: Upstream) {
        let mut state = self.0.borrow_mut();
        let Some(key) = upstream.bond().map(Key::of) else { return };
        let kept = state.http1.entry(key).or_default();
        let before = kept.len();
        kept.push(Kept::now(upstream));
        if kept.len() > MOST_OF_ENDPOINT {
            kept.remove(0);
        }
        let now = kept.len();
        if state.count(before, now) > MOST {
            state.drop_oldest();
        }
    }

    /// One of HTTP/2 that has room for one more request.
    pub fn shared(&self, bond: &Bond) -> Option<Upstream> {
        let mut state = self.0.borrow_mut();
        let kept = state.http2.get_mut(&Key::of(bond))?;
        let (before, now) = (kept.len(), Moment::now());
        kept.retain(|kept| kept.is_of(bond, now));
        let free = kept.iter_mut().find(|kept| kept.upstream.is_free());
        let shared = free.and_then(|kept| {
            kept.since = now.instant;
            kept.upstream.share()
        });
        let left = kept.len();
        state.count(before, left);
        shared
    }

    pub fn put_shared(&self, upstream: Upstream) {
        let mut state = self.0.borrow_mut();
        let Some(key) = upstream.bond().map(Key::of) else { return };
        state.http2.entry(key).or_default().push(Kept::now(upstream));
        state.count(0, 1);
    }

    /// Whoever holds it may make a connection for all.
    pub fn turn(&self, bond: &Bond) -> Rc<Mutex<()>> {
        self.0.borrow_mut().turns.entry(Key::of(bond)).or_default().clone()
    }

    /// Closes what waits, and what is unused, of a pod that leaves. Requests under way go on.
    pub fn evict(&self, pod: &PodUid) {
        self.retain(|kept| {
            let bond = kept.upstream.bond();
            !bond.is_some_and(|b| b.source == *pod || b.destination.as_ref().is_some_and(|(uid, _)| uid == pod))
        });
    }

    /// Closes connections to a backend that no request is on: somebody waits for one.
    pub fn free(&self, guard: &Arc<Guard>) {
        self.retain(|kept| {
            let is_its = kept.upstream.guard().is_some_and(|known| Arc::ptr_eq(known, guard));
            !(is_its && kept.upstream.is_unused())
        });
    }

    pub fn evict_all(&self) {
        self.retain(|_| false);
    }

    /// Closes what has rested for long; called now and then.
    pub fn expire(&self) {
        let now = Moment::now();
        self.retain(|kept| kept.upstream.is_fit(now) && (!kept.upstream.is_unused() || kept.may_rest(now)));
        let mut state = self.0.borrow_mut();
        state.turns.retain(|_, turn| Rc::strong_count(turn) > 1);
    }

    fn retain(&self, keep: impl Fn(&Kept) -> bool) {
        let mut state = self.0.borrow_mut();
        let State { http1, http2, .. } = &mut *state;
        let (mut before, mut now) = (0, 0);
        for kept in [http1, http2] {
            kept.retain(|_, kept| {
                before += kept.len();
                kept.retain(&keep);
                now += kept.len();
                !kept.is_empty()
            });
        }
        state.count(before, now);
    }
}

impl Moment {
    pub fn now() -> Self {
        Self { instant: Instant::now(), wall: SystemTime::now() }
    }
}

impl State {
    /// So many more there are now, or fewer; how many that makes.
    fn count(&mut self, before: usize, now: usize) -> usize {
        if before != now {
            // Found once: a look-up by name for each request would cost more than counting.
            let gauge = self.gauge.get_or_insert_with(|| metrics::gauge!(POOLED));
            gauge.increment(now as f64 - before as f64);
            self.total = self.total + now - before;
        }
        self.total
    }

    fn drop_oldest(&mut self) {
        let oldest = self.http1.iter_mut().filter(|(_, kept)| !kept.is_empty()).min_by_key(|(_, kept)| kept[0].since);
        if let Some((_, kept)) = oldest {
            kept.remove(0);
            self.count(1, 0);
        }
    }
}

impl Kept {
    fn now(upstream: Upstream) -> Self {
        Self { upstream, since: Instant::now() }
    }

    fn is_of(&self, bond: &Bond, now: Moment) -> bool {
        self.upstream.bond() == Some(bond) && self.upstream.is_fit(now) && self.may_rest(now)
    }

    /// Whether it has not waited longer than it may.
    fn may_rest(&self, now: Moment) -> bool {
        now.instant.saturating_duration_since(self.since) < self.upstream.rest()
    }
}

impl Key {
    fn of(bond: &Bond) -> Self {
        Self { source: bond.source.clone(), source_ip: bond.source_ip, endpoint: bond.endpoint }
    }
}

/// Waiting for the next request to one endpoint.
const MOST_OF_ENDPOINT: usize = 64;
/// Of one thread, in all.
const MOST: usize = 1024;
