use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::task::AtomicWaker;
use h2::{Ping, PingPong};
use metrics::gauge;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};

use super::window::{WindowBudget, Windows};
use crate::transport::metrics::{CONNECTIONS, STREAMS};
use crate::transport::tls::TlsStream;

/// What the flows of one connection share with the task that drives it.
pub(super) struct Shared {
    pub role: &'static str,
    streams: AtomicUsize,
    /// When its last stream ended, or it began.
    emptied: Mutex<Instant>,
    /// Delivered since the driver last looked.
    delivered: AtomicU64,
    /// So much delivered makes the driver look at once.
    wake_at: AtomicU64,
    moved: AtomicBool,
    driver: AtomicWaker,
}

impl Shared {
    pub fn new(role: &'static str) -> Arc<Self> {
        gauge!(CONNECTIONS, "role" => role).increment(1.0);
        Arc::new(Self {
            role,
            streams: AtomicUsize::new(0),
            emptied: Mutex::new(Instant::now()),
            delivered: AtomicU64::new(0),
            wake_at: AtomicU64::new(u64::MAX),
            moved: AtomicBool::new(false),
            driver: AtomicWaker::new(),
        })
    }

    pub fn streams(&self) -> usize {
        self.streams.load(Ordering::Relaxed)
    }

    /// Since when it carries nothing; `None` while it carries a stream.
    pub fn idle_since(&self) -> Option<Instant> {
        let emptied = *self.emptied.lock().unwrap_or_else(PoisonError::into_inner);
        (self.streams() == 0).then_some(emptied)
    }

    pub fn enter(self: &Arc<Self>) -> StreamGuard {
        self.streams.fetch_add(1, Ordering::Relaxed);
        gauge!(STREAMS, "role" => self.role).increment(1.0);
        StreamGuard { shared: self.clone() }
    }

    pub fn delivered(&self, bytes: usize) {
        let before = self.delivered.fetch_add(bytes as u64, Ordering::Relaxed);
        let at = self.wake_at.load(Ordering::Relaxed);
        if before < at && before + bytes as u64 >= at {
            self.driver.wake();
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        gauge!(CONNECTIONS, "role" => self.role).decrement(1.0);
    }
}

/// One stream of a connection, counted for as long as it lives.
pub(super) struct StreamGuard {
    pub shared: Arc<Shared>,
}

impl Drop for StreamGuard {
    fn drop(&mut self) {
        *self.shared.emptied.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        self.shared.streams.fetch_sub(1, Ordering::Relaxed);
        self.shared.moved.store(true, Ordering::Relaxed);
        gauge!(STREAMS, "role" => self.shared.role).decrement(1.0);
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) struct PingSettings {
    pub every: Duration,
    pub dead_after: Duration,
}

impl Default for PingSettings {
    fn default() -> Self {
        Self { every: Duration::from_secs(10), dead_after: Duration::from_secs(20) }
    }
}

/// What keeps a connection in order while it is driven: PINGs, and windows that fit what it carries.
pub(super) struct Upkeep {
    shared: Arc<Shared>,
    ping_pong: Option<PingPong>,
    pinged: Option<Instant>,
    settings: PingSettings,
    ticks: Interval,
    windows: Windows,
}

pub(super) enum Event {
    /// A tick has passed: time to look whether the connection is still wanted.
    Tick,
    Dead,
}

impl Upkeep {
    pub fn new(shared: Arc<Shared>, budget: WindowBudget, settings: PingSettings) -> Self {
        let mut ticks = interval_at(Instant::now() + settings.every, settings.every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let windows = Windows::new(budget);
        shared.wake_at.store(growth_at(&windows), Ordering::Relaxed);
        Self { shared, ping_pong: None, pinged: None, settings, ticks, windows }
    }

    pub fn windows(&self) -> (u32, u32) {
        (self.windows.stream(), self.windows.connection())
    }

    pub fn poll(&mut self, cx: &mut Context<'_>, connection: &mut impl Driven) -> Poll<Event> {
        self.shared.driver.register(cx.waker());
        if self.shared.delivered.load(Ordering::Relaxed) >= growth_at(&self.windows) {
            self.shared.delivered.store(0, Ordering::Relaxed);
            self.shared.moved.store(true, Ordering::Relaxed);
            if self.windows.grow() {
                self.apply(connection);
            }
        }
        let ping_pong = match &mut self.ping_pong {
            Some(ping_pong) => ping_pong,
            None => match connection.ping_pong() {
                Some(ping_pong) => self.ping_pong.insert(ping_pong),
                None => return Poll::Pending,
            },
        };
        if self.pinged.is_some() && matches!(ping_pong.poll_pong(cx), Poll::Ready(Ok(_))) {
            self.pinged = None;
        }
        if self.ticks.poll_tick(cx).is_pending() {
            return Poll::Pending;
        }
        match self.pinged {
            // A tick early by less than its own length is the one that was meant.
            Some(at) if at.elapsed() + self.settings.every / 2 >= self.settings.dead_after => {
                return Poll::Ready(Event::Dead);
            }
            Some(_) => {}
            None => {
                if ping_pong.send_ping(Ping::opaque()).is_ok() {
                    self.pinged = Some(Instant::now());
                }
            }
        }
        let silent = self.shared.delivered.swap(0, Ordering::Relaxed) == 0;
        if silent && !self.shared.moved.swap(false, Ordering::Relaxed) && self.windows.shrink() {
            self.apply(connection);
        }
        cx.waker().wake_by_ref();
        Poll::Ready(Event::Tick)
    }

    fn apply(&self, connection: &mut impl Driven) {
        connection.set_windows(self.windows.stream(), self.windows.connection());
        self.shared.wake_at.store(growth_at(&self.windows), Ordering::Relaxed);
    }
}

/// The two sides' connections, as far as they need the same care.
pub(super) trait Driven {
    fn ping_pong(&mut self) -> Option<PingPong>;
    fn set_windows(&mut self, stream: u32, connection: u32);
}

impl Driven for h2::client::Connection<TlsStream, Bytes> {
    fn ping_pong(&mut self) -> Option<PingPong> {
        self.ping_pong()
    }

    fn set_windows(&mut self, stream: u32, connection: u32) {
        self.set_target_window_size(connection);
        // Refused while an earlier change waits for its answer: the next growth brings it.
        let _ = self.set_initial_window_size(stream);
    }
}

impl Driven for h2::server::Connection<TlsStream, Bytes> {
    fn ping_pong(&mut self) -> Option<PingPong> {
        self.ping_pong()
    }

    fn set_windows(&mut self, stream: u32, connection: u32) {
        self.set_target_window_size(connection);
        let _ = self.set_initial_window_size(stream);
    }
}

fn growth_at(windows: &Windows) -> u64 {
    u64::from(windows.connection()) * 2
}

/// RFC 9113, section 6.5.2: what a peer may send in one frame; each connection may hold one unfinished frame.
pub(super) const MAX_FRAME: u32 = 64 * 1024;
/// What a request's head may take, continuation frames included.
pub(super) const MAX_HEADERS: u32 = 16 * 1024;
/// What one stream may have accepted from its writer and not sent.
pub(super) const SEND_BUFFER: usize = 128 * 1024;
