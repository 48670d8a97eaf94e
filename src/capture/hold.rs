//! Holding a SYN: `connect()` waits in the kernel until the agent knows what to tell it.
//!
//! The rules send each new connection's SYN to a queue, outbound in `OUTPUT` before anything has been done to it, inbound
//! in `PREROUTING` where TPROXY would take it. The agent lets the SYN run through the chains again with an answer in its
//! mark, on into capture or to a rule that resets it; or it drops the SYN, with or without a word by ICMP. A SYN that is
//! dropped without one comes again, by the sender's own clock, so that neither an overrun queue nor an agent that starts
//! anew loses a connection. Where only the worker starts anew, its parent keeps the queue, and the SYNs wait on.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::icmp::{Icmp, Unreachable};
use super::netns::NetNs;
use super::nfqueue::{Hook, Queue, Verdict, Waiting};
use super::rules::{IN, InPlace, OUT, Table};

/// What becomes of a SYN that waits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Answer {
    /// It goes on into capture: the client is connected.
    Connect,
    /// A reset: ECONNREFUSED.
    Refuse,
    /// ICMP. Prohibited is EHOSTUNREACH, with IPv6 EACCES; a host is EHOSTUNREACH, a network ENETUNREACH.
    Unreachable(Unreachable),
    /// None. The client sends its SYN again, until its own time is up.
    Ignore,
}

/// The SYNs of one pod that wait.
#[derive(Debug)]
pub struct HoldQueue {
    queue: Queue,
    icmp: Icmp,
    failed: AtomicBool,
}

/// A SYN that waits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WaitingSyn {
    pub direction: HoldDirection,
    pub client: SocketAddr,
    /// Where the client meant to connect to.
    pub dialled: SocketAddr,
    packet: Waiting,
}

/// Which way a held connection goes, seen from the pod.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum HoldDirection {
    Outbound,
    Inbound,
}

impl Answer {
    /// As a metric's label.
    pub fn name(self) -> &'static str {
        match self {
            Self::Connect => "connected",
            Self::Refuse => "refused",
            Self::Unreachable(Unreachable::Prohibited) => "prohibited",
            Self::Unreachable(Unreachable::Host) => "host-unreachable",
            Self::Unreachable(Unreachable::Network) => "net-unreachable",
            Self::Ignore => "silent",
        }
    }
}

impl HoldQueue {
    /// Begins a pod's queue.
    pub fn open(pod: &NetNs) -> io::Result<Self> {
        let (queue, icmp) = pod.enter(|| Ok((Queue::open(HOLD_QUEUE, MOST_WAITING)?, Icmp::open())))?;
        Ok(Self { queue, icmp, failed: AtomicBool::new(false) })
    }

    /// Goes on with a pod's queue that a worker before this one opened: the SYNs that wait in it go on waiting.
    pub fn adopt(pod: &NetNs, queue: OwnedFd) -> io::Result<Self> {
        let icmp = pod.enter(|| Ok(Icmp::open()))?;
        Ok(Self { queue: Queue::adopt(HOLD_QUEUE, queue)?, icmp, failed: AtomicBool::new(false) })
    }

    /// Readable while SYNs wait unseen. Call within a runtime; several may watch at a time.
    pub fn watch(&self) -> io::Result<AsyncFd<OwnedFd>> {
        let descriptor = self.queue.as_fd().try_clone_to_owned()?;
        // SAFETY: the descriptor is owned by what watches it, which keeps it open and the same until it is dropped.
        unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }.map_err(io::Error::from)
    }

    /// The SYNs that came meanwhile; `WouldBlock` when none did. `buffer` is only room.
    pub fn receive(&self, buffer: &mut Vec<u8>, mut each: impl FnMut(WaitingSyn)) -> io::Result<()> {
        self.queue.receive(buffer, |packet| {
            let Some((client, dialled)) = packet.ends else {
                // No rule of ours sends such a packet here.
                return drop(self.queue.verdict(&packet, Verdict::Drop));
            };
            let direction = match packet.hook {
                Hook::Output => HoldDirection::Outbound,
                Hook::Prerouting => HoldDirection::Inbound,
            };
            each(WaitingSyn { direction, client, dialled, packet });
        })
    }

    /// Ends a SYN's wait. One that the queue does not know any more comes again by itself.
    pub fn answer(&self, syn: &WaitingSyn, answer: Answer) -> io::Result<()> {
        let marked = |answer| Verdict::Repeat { mark: syn.packet.mark & !ANSWER | answer };
        let verdict = match answer {
            Answer::Connect => marked(CONNECT),
            Answer::Refuse => marked(REJECT),
            Answer::Unreachable(what) => match self.explain(syn, what) {
                Ok(()) => Verdict::Drop,
                // A client that cannot be told why hears at least that.
                Err(_) => marked(REJECT),
            },
            Answer::Ignore => Verdict::Drop,
        };
        self.queue.verdict(&syn.packet, verdict)
    }

    fn explain(&self, syn: &WaitingSyn, what: Unreachable) -> io::Result<()> {
        let beginning = syn.packet.beginning().ok_or(io::ErrorKind::InvalidInput)?;
        self.icmp.send(syn.client.ip(), what, beginning)
    }

    /// Gives the queue's number back, so that it can be opened anew; SYNs that wait are dropped, and come again.
    pub fn close(&self) -> io::Result<()> {
        self.queue.unbind()
    }

    /// Says that nobody can serve the queue any more: it is to be opened anew.
    pub fn fail(&self) {
        self.failed.store(true, Ordering::Relaxed);
    }

    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }
}

impl AsFd for HoldQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.queue.as_fd()
    }
}

#[cfg(test)]
impl WaitingSyn {
    /// One that no kernel knows.
    pub fn unknown(direction: HoldDirection, client: SocketAddr, dialled: SocketAddr) -> Self {
        let ends = Some((client, dialled));
        let packet = Waiting { id: u32::MAX, mark: 0, hook: Hook::Output, ends, head: [0; 48] };
        Self { direction, client, dialled, packet }
    }
}

/// The rules of `mangle` for connections that the pod dials. They stand after all exceptions.
pub(super) fn outbound(table: &mut Table<'_>) {
    // A rejected connection is not marked as captured: if its SYN comes again it is a question again.
    table.rule(OUT, &format!("-p tcp --syn {REJECTED} -j RETURN"));
    // No --queue-bypass here or below: without an agent the SYN would go on undecided. It is dropped, and comes again.
    table
        .rule(OUT, &format!("-p tcp --syn -m conntrack --ctstate NEW {UNDECIDED} -j NFQUEUE --queue-num {HOLD_QUEUE}"));
}

/// The rules of `mangle` for plaintext that arrives. They stand after all exceptions.
pub(super) fn inbound(table: &mut Table<'_>) {
    table.rule(IN, &format!("-p tcp --syn {REJECTED} -j RETURN"));
    table.rule(IN, &format!("-p tcp --syn {UNDECIDED} -j NFQUEUE --queue-num {HOLD_QUEUE}"));
}

/// The rule of `nat` that keeps rejected SYNs from being redirected.
pub(super) fn not_redirected(table: &mut Table<'_>, chain: &str) {
    table.rule(chain, &format!("{REJECTED} -j RETURN"));
}

/// The table that resets SYNs which are to be rejected.
pub(super) fn filter(in_place: &InPlace, text: &mut String) {
    let mut table = Table::begin_at("filter", "INPUT", in_place, text);
    for chain in [OUT, IN] {
        table.rule(chain, &format!("-p tcp --syn {REJECTED} -j REJECT --reject-with tcp-reset"));
    }
    table.end();
}

/// Queues have numbers of their own in each namespace; this one is named after the port that its SYNs go on to.
const HOLD_QUEUE: u16 = 15001;
/// How many SYNs may wait in the kernel; one more is dropped, and comes again.
const MOST_WAITING: u32 = 65_536;

// The bits of a mark that hold an answer: above those that say whose it is, and above those of probes.
const CONNECT: u32 = 0x4_0000;
const REJECT: u32 = 0x8_0000;
const ANSWER: u32 = CONNECT | REJECT;
const UNDECIDED: &str = "-m mark --mark 0x0/0xc0000";
const REJECTED: &str = "-m mark --mark 0x80000/0x80000";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::rules::{MASK, PROBE_PROVEN, PROBE_REFUTED};

    #[test]
    fn an_answer_has_bits_of_its_own_in_the_mark() {
        assert_eq!(ANSWER & (MASK | PROBE_PROVEN | PROBE_REFUTED), 0);
        assert!(UNDECIDED.ends_with(&format!("0x0/{ANSWER:#x}")), "{UNDECIDED}");
        assert!(REJECTED.ends_with(&format!("{REJECT:#x}/{REJECT:#x}")), "{REJECTED}");
    }
}
