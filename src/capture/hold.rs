//! Holding a SYN: `connect()` waits in the kernel until the agent knows what to tell it.
//!
//! The rules send each new connection's SYN to a queue, outbound in `OUTPUT` before anything has been done to it, inbound
//! in `PREROUTING` where TPROXY would take it. The agent lets the SYN run through the chains again, with a mark, on into
//! capture; or it drops the SYN, and says why by a reset or by ICMP, or says nothing. Then it comes again, by the sender's
//! own clock, so that neither an overrun queue nor an agent that starts anew loses a connection. Where only the worker
//! starts anew, its parent keeps the queue, and the SYNs wait on.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::icmp::{Icmp, Unreachable};
use super::netns::NetNs;
pub use super::nfqueue::Room;
use super::nfqueue::{Hook, Queue, Tcp, Verdict, Waiting};
use super::reset::{Resets, Syn};
use super::rules::{IN, OUT, Table};

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
    resets: Resets,
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
        pod.enter(|| Self::over(Queue::open(HOLD_QUEUE, MOST_WAITING)?))
    }

    /// Goes on with a pod's queue that a worker before this one opened: the SYNs that wait in it go on waiting.
    pub fn adopt(pod: &NetNs, queue: OwnedFd) -> io::Result<Self> {
        pod.enter(|| Self::over(Queue::adopt(HOLD_QUEUE, queue)?))
    }

    /// In the pod's namespace.
    fn over(queue: Queue) -> io::Result<Self> {
        Ok(Self { queue, icmp: Icmp::open(), resets: Resets::open()?, failed: AtomicBool::new(false) })
    }

    /// Readable while SYNs wait unseen. Call within a runtime; several may watch at a time.
    pub fn watch(&self) -> io::Result<AsyncFd<OwnedFd>> {
        let descriptor = self.queue.as_fd().try_clone_to_owned()?;
        // SAFETY: the descriptor is owned by what watches it, which keeps it open and the same until it is dropped.
        unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }.map_err(io::Error::from)
    }

    /// The SYNs that came meanwhile. `WouldBlock` says that no more wait unseen, also behind the last ones.
    pub fn receive(&self, room: &mut Room, mut each: impl FnMut(WaitingSyn)) -> io::Result<()> {
        self.queue.receive(room, |packet| {
            let Some(Tcp { source: client, destination: dialled, .. }) = packet.tcp else {
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
        let told = match answer {
            Answer::Connect => {
                return self.queue.verdict(&syn.packet, Verdict::Repeat { mark: syn.packet.mark | CONNECT });
            }
            Answer::Refuse => self.reset(syn),
            // A client that cannot be told why hears at least that.
            Answer::Unreachable(what) => self.explain(syn, what).or_else(|_| self.reset(syn)),
            Answer::Ignore => Ok(()),
        };
        self.queue.verdict(&syn.packet, Verdict::Drop)?;
        told
    }

    fn explain(&self, syn: &WaitingSyn, what: Unreachable) -> io::Result<()> {
        let beginning = syn.packet.beginning().ok_or(io::ErrorKind::InvalidInput)?;
        self.icmp.send(syn.client.ip(), what, beginning)
    }

    fn reset(&self, syn: &WaitingSyn) -> io::Result<()> {
        let Tcp { source: from, destination: to, sequence } = syn.packet.tcp.ok_or(io::ErrorKind::InvalidInput)?;
        self.resets.send(&Syn { from, to, sequence, interface: syn.packet.interface })
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
        let tcp = Some(Tcp { source: client, destination: dialled, sequence: 0 });
        let packet = Waiting { id: u32::MAX, mark: 0, hook: Hook::Output, interface: 0, tcp, head: [0; 48] };
        Self { direction, client, dialled, packet }
    }
}

/// The rules of `mangle` for connections that the pod dials. They stand after all exceptions.
pub(super) fn outbound(table: &mut Table<'_>) {
    // No --queue-bypass here or below: without an agent the SYN would go on undecided. It is dropped, and comes again.
    table
        .rule(OUT, &format!("-p tcp --syn -m conntrack --ctstate NEW {UNDECIDED} -j NFQUEUE --queue-num {HOLD_QUEUE}"));
}

/// The rules of `mangle` for plaintext that arrives. They stand after all exceptions.
pub(super) fn inbound(table: &mut Table<'_>) {
    table.rule(IN, &format!("-p tcp --syn {UNDECIDED} -j NFQUEUE --queue-num {HOLD_QUEUE}"));
}

/// Queues have numbers of their own in each namespace; this one is named after the port that its SYNs go on to.
const HOLD_QUEUE: u16 = 15001;
/// How many SYNs may wait in the kernel; one more is dropped, and comes again.
const MOST_WAITING: u32 = 65_536;

// The bit of a mark that says that a SYN may go on: above those that say whose it is, and above those of probes.
const CONNECT: u32 = 0x4_0000;
const UNDECIDED: &str = "-m mark --mark 0x0/0x40000";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::rules::{MASK, PROBE_PROVEN, PROBE_REFUTED};

    #[test]
    fn an_answer_has_a_bit_of_its_own_in_the_mark() {
        assert_eq!(CONNECT & (MASK | PROBE_PROVEN | PROBE_REFUTED), 0);
        assert!(UNDECIDED.ends_with(&format!("0x0/{CONNECT:#x}")), "{UNDECIDED}");
    }
}
