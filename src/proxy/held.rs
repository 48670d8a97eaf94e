//! The SYNs that wait until the agent knows what to tell their senders, and the sockets that come of them.

use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::pods::ServedPod;
use crate::capture::{Answer, HoldDirection, HoldQueue, WaitingSyn};
use crate::mesh::PodUid;

/// Every SYN of this node that waits, by its four ends.
#[derive(Debug)]
pub struct HeldSyns {
    most: Bounds,
    table: Mutex<Table>,
}

/// How many may wait; beyond, connections are eager.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    pub in_all: usize,
    /// Of one pod's own connections.
    pub outbound: usize,
    /// Of plaintext to one pod. Fewer: each that policy lets in opens a connection to the application before its sender has
    /// shown that its address is its own, which a SYN cookie would have asked for.
    pub inbound: usize,
}

#[derive(Debug, Default)]
struct Table {
    pods: HashMap<(PodUid, HoldDirection), HashMap<Ends, Entry>>,
    total: usize,
}

/// Client and destination.
type Ends = (SocketAddr, SocketAddr);

#[derive(Debug)]
struct Entry {
    /// The client's newest SYN; none once the client has been answered.
    waits: Option<(Arc<HoldQueue>, WaitingSyn)>,
    accepted: oneshot::Sender<TcpStream>,
}

/// What a SYN turns out to be.
pub enum Arrival {
    /// The first of an attempt.
    First(HeldSyn),
    /// Of an attempt that is under way, or of a client that is connected already; it has been dealt with.
    Again,
    /// One too many: it has been let through, and what comes of it is eager.
    Overflow,
}

/// One client that waits. Dropped without an answer, its SYN is dropped, and comes again.
#[derive(Debug)]
pub struct HeldSyn {
    held: Arc<HeldSyns>,
    pod: PodUid,
    direction: HoldDirection,
    pub client: SocketAddr,
    pub dialled: SocketAddr,
    since: Instant,
    accepted: oneshot::Receiver<TcpStream>,
}

impl HeldSyns {
    pub fn new(most: Bounds) -> Arc<Self> {
        Arc::new(Self { most, table: Mutex::default() })
    }

    /// Takes in a SYN that came out of a pod's queue.
    pub fn arrive(self: &Arc<Self>, pod: &PodUid, queue: &Arc<HoldQueue>, syn: WaitingSyn) -> Arrival {
        let key = (pod.clone(), syn.direction);
        let ends = ends(syn.client, syn.dialled);
        let mut table = self.lock();
        if let Some(entry) = table.pods.get_mut(&key).and_then(|of_pod| of_pod.get_mut(&ends)) {
            let Some(waits) = &mut entry.waits else {
                drop(table);
                answer(queue, &syn, Answer::Connect);
                return Arrival::Again;
            };
            // Its newest SYN is the one that counts: an older one may be of a client that gave up and came again.
            let (queue, older) = std::mem::replace(waits, (queue.clone(), syn));
            drop(table);
            answer(&queue, &older, Answer::Ignore);
            return Arrival::Again;
        }
        let most = match syn.direction {
            HoldDirection::Outbound => self.most.outbound,
            HoldDirection::Inbound => self.most.inbound,
        };
        if table.total >= self.most.in_all || table.pods.get(&key).is_some_and(|of_pod| of_pod.len() >= most) {
            drop(table);
            answer(queue, &syn, Answer::Connect);
            return Arrival::Overflow;
        }
        let (sender, accepted) = oneshot::channel();
        let entry = Entry { waits: Some((queue.clone(), syn)), accepted: sender };
        table.pods.entry(key).or_default().insert(ends, entry);
        table.count(1);
        drop(table);
        Arrival::First(HeldSyn {
            held: self.clone(),
            pod: pod.clone(),
            direction: syn.direction,
            client: syn.client,
            dialled: syn.dialled,
            since: Instant::now(),
            accepted,
        })
    }

    /// Gives an accepted socket to the attempt that waits for it. Returns the socket where none does.
    pub fn join(
        &self,
        pod: &PodUid,
        direction: HoldDirection,
        (client, dialled): (SocketAddr, SocketAddr),
        stream: TcpStream,
    ) -> Option<TcpStream> {
        let mut table = self.lock();
        let entry = table.take(pod, direction, &ends(client, dialled));
        drop(table);
        match entry {
            Some(entry) => entry.accepted.send(stream).err(),
            None => Some(stream),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn take(&mut self, pod: &PodUid, direction: HoldDirection, ends: &Ends) -> Option<Entry> {
        let key = (pod.clone(), direction);
        let of_pod = self.pods.get_mut(&key)?;
        let entry = of_pod.remove(ends)?;
        if of_pod.is_empty() {
            self.pods.remove(&key);
        }
        self.count(-1);
        Some(entry)
    }

    fn count(&mut self, change: isize) {
        self.total = self.total.saturating_add_signed(change);
        metrics::gauge!("selvedge_connect_held").set(self.total as f64);
    }
}

impl HeldSyn {
    /// Lets the client connect, and returns the socket that is accepted of it; none if it does not complete. `accept`
    /// accepts one of those that wait, if any does: the client's may be there at once.
    pub async fn connect(mut self, mut accept: impl FnMut() -> bool) -> io::Result<TcpStream> {
        self.answer(Answer::Connect);
        for _ in 0..ACCEPTS {
            let others = accept();
            match self.accepted.try_recv() {
                Ok(stream) => return Ok(stream),
                Err(_) if others => {}
                Err(_) => break,
            }
        }
        match tokio::time::timeout(COMPLETION, &mut self.accepted).await {
            Ok(Ok(stream)) => Ok(stream),
            _ => Err(io::Error::new(io::ErrorKind::TimedOut, "the client has gone")),
        }
    }

    /// Tells the client what came of it.
    pub fn refuse(self, with: Answer) {
        self.answer(with);
    }

    /// Completes when the client is there no more. One from outside the pod cannot be looked for: the time that dialling
    /// may take is its bound.
    pub async fn gone(&self, pod: &ServedPod) {
        if self.direction == HoldDirection::Inbound {
            return std::future::pending().await;
        }
        loop {
            tokio::time::sleep(LOOK).await;
            // Where the kernel cannot be asked, the client counts as there.
            if matches!(pod.has_socket(self.client, self.dialled), Ok(false)) {
                return;
            }
        }
    }

    fn answer(&self, with: Answer) {
        let waits = {
            let mut table = self.held.lock();
            let of_pod = table.pods.get_mut(&(self.pod.clone(), self.direction));
            let entry = of_pod.and_then(|of_pod| of_pod.get_mut(&ends(self.client, self.dialled)));
            entry.and_then(|entry| entry.waits.take())
        };
        let Some((queue, syn)) = waits else { return };
        let direction = name(self.direction);
        metrics::histogram!("selvedge_connect_held_duration_seconds", "direction" => direction)
            .record(self.since.elapsed().as_secs_f64());
        metrics::counter!("selvedge_connect_answers_total", "direction" => direction, "answer" => with.name())
            .increment(1);
        answer(&queue, &syn, with);
    }
}

impl Drop for HeldSyn {
    fn drop(&mut self) {
        self.answer(Answer::Ignore);
        let mut table = self.held.lock();
        drop(table.take(&self.pod, self.direction, &ends(self.client, self.dialled)));
    }
}

fn answer(queue: &HoldQueue, syn: &WaitingSyn, with: Answer) {
    if let Err(error) = queue.answer(syn, with) {
        tracing::warn!(%error, client = %syn.client, "A waiting SYN could not be answered; its sender will repeat it.");
    }
}

/// The ends without a scope, which packets do not carry.
fn ends(client: SocketAddr, dialled: SocketAddr) -> Ends {
    let plain = |addr: SocketAddr| SocketAddr::new(addr.ip().to_canonical(), addr.port());
    (plain(client), plain(dialled))
}

pub fn name(direction: HoldDirection) -> &'static str {
    match direction {
        HoldDirection::Outbound => "outbound",
        HoldDirection::Inbound => "inbound",
    }
}

impl Bounds {
    /// For an agent that carries at most so many connections: who waits takes the room of one.
    pub fn of(connections: usize) -> Self {
        Self {
            in_all: (connections - connections / 5).min(65_536),
            outbound: (connections / 2).min(16_384),
            inbound: (connections / 2).min(8_192),
        }
    }
}

/// How many sockets are accepted in search of the client's own: that of another is on its way to that one then.
const ACCEPTS: usize = 4;
/// How long a client that was let through may take to complete its handshake: some SYN-ACKs may be lost.
const COMPLETION: Duration = Duration::from_secs(10);
/// How often a client that waits long is looked for.
const LOOK: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::NetNs;
    use crate::capture::netns::in_scratch;

    /// Bounds of 3 in all, 2 outbound and 1 inbound, and a queue that knows none of the SYNs.
    fn held() -> (Arc<HeldSyns>, Arc<HoldQueue>) {
        let netns = in_scratch(NetNs::current).expect("a network namespace can be made");
        let queue = HoldQueue::open(&netns).expect("the kernel has NFQUEUE");
        (HeldSyns::new(Bounds { in_all: 3, outbound: 2, inbound: 1 }), Arc::new(queue))
    }

    fn syn(direction: HoldDirection, port: u16) -> WaitingSyn {
        WaitingSyn::unknown(direction, ([10, 0, 0, 1], port).into(), ([10, 0, 0, 2], 80).into())
    }

    fn first(arrival: Arrival) -> HeldSyn {
        match arrival {
            Arrival::First(first) => first,
            Arrival::Again => panic!("it came before"),
            Arrival::Overflow => panic!("there is room"),
        }
    }

    #[test]
    fn beyond_the_bounds_of_a_pod_and_of_all_a_client_is_let_through() {
        let (held, queue) = held();
        let (one, other, third) = (PodUid::new("one"), PodUid::new("other"), PodUid::new("third"));
        let arrive = |pod, direction, port| held.arrive(pod, &queue, syn(direction, port));
        let waiting =
            [first(arrive(&one, HoldDirection::Outbound, 1)), first(arrive(&one, HoldDirection::Outbound, 2))];
        assert!(matches!(arrive(&one, HoldDirection::Outbound, 3), Arrival::Overflow), "of one pod");
        let inbound = first(arrive(&other, HoldDirection::Inbound, 1));
        assert!(matches!(arrive(&other, HoldDirection::Inbound, 2), Arrival::Overflow), "inbound");
        assert!(matches!(arrive(&third, HoldDirection::Outbound, 1), Arrival::Overflow), "in all");
        assert!(matches!(arrive(&one, HoldDirection::Outbound, 1), Arrival::Again), "it is there already");
        drop((waiting, inbound));
        first(arrive(&third, HoldDirection::Outbound, 1));
        let table = held.lock();
        assert!(table.total == 0 && table.pods.is_empty(), "{table:?}");
    }

    #[tokio::test]
    async fn an_accepted_socket_goes_to_the_client_that_waits_for_it_and_to_no_other() {
        let (held, queue) = held();
        let pod = PodUid::new("one");
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = || TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let waiting = first(held.arrive(&pod, &queue, syn(HoldDirection::Outbound, 1)));
        let ends = (waiting.client, waiting.dialled);
        let join = |direction, ends, stream| held.join(&pod, direction, ends, stream);
        assert!(join(HoldDirection::Inbound, ends, socket()).is_some(), "the other way");
        assert!(join(HoldDirection::Outbound, (ends.1, ends.0), socket()).is_some(), "other ends");
        let accepted = socket();
        let local = accepted.local_addr().unwrap();
        assert!(join(HoldDirection::Outbound, ends, accepted).is_none());
        assert_eq!(waiting.connect(|| false).await.unwrap().local_addr().unwrap(), local);
        assert!(join(HoldDirection::Outbound, ends, socket()).is_some(), "nobody waits any more");
    }
}
