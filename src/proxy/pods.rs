use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tracing::error;

use super::accept::accept_loop;
use super::downstream::Downstream;
use super::hold_loop::hold_loop;
use super::workers::Thread;
use super::{Proxy, outbound, plaintext, tunnel};
use crate::capture::sock_diag::SockDiag;
use crate::capture::{CapturedPod, Flows, HoldDirection, socket};
use crate::mesh::{PodUid, Reason};
use crate::waypoint::{ROOM_OF_POD, ROOM_OF_WAYPOINT, Room};

/// The captured pods that the agent serves.
#[derive(Default)]
pub struct Pods(Mutex<HashMap<PodUid, Arc<ServedPod>>>);

/// One captured pod, and what its connections share.
pub struct ServedPod {
    pub captured: Arc<CapturedPod>,
    stop: watch::Sender<bool>,
    /// The pod leaves the mesh or the node: what it has goes on, and nothing is kept for later.
    leaving: watch::Sender<bool>,
    /// Requests that are under way, the pod's own and those of others.
    requests: [AtomicUsize; 2],
    /// What they hold.
    rooms: [Arc<Room>; 2],
    sockets: Mutex<Option<SockDiag>>,
}

impl Proxy {
    /// Starts to accept what a captured pod's listeners bring. A pod captured anew replaces its former self.
    pub fn serve(self: &Arc<Self>, captured: Arc<CapturedPod>) {
        let room = if self.settings.gateway.is_some() { ROOM_OF_WAYPOINT } else { ROOM_OF_POD };
        let pod = Arc::new(ServedPod {
            stop: watch::Sender::new(false),
            leaving: watch::Sender::new(false),
            requests: <[AtomicUsize; 2]>::default(),
            rooms: [Room::new(room), Room::new(room)],
            sockets: Mutex::new(None),
            captured,
        });
        let replaced = self.pods.lock().insert(pod.uid().clone(), pod.clone());
        if let Some(replaced) = replaced {
            replaced.stop.send_replace(true);
        }
        self.limits.set_pods(self.pods.lock().len());
        let listeners = &pod.captured.listeners;
        let outbound = listeners.outbound.iter().map(|l| (l, Port::Outbound));
        let plaintext = listeners.plaintext.iter().map(|l| (l, Port::Plaintext));
        let tunnel = listeners.tunnel.iter().map(|l| (l, Port::Tunnel));
        // Pods begin at different threads, so that none accepts for all of them.
        let first = self.accepting.fetch_add(1, Ordering::Relaxed);
        for (index, (listener, port)) in outbound.chain(plaintext).chain(tunnel).enumerate() {
            let (proxy, pod) = (self.clone(), pod.clone());
            let listener = match listener.try_clone() {
                Ok(listener) => listener,
                Err(cause) => {
                    error!(%cause, pod = %pod.captured.workload.name(), "A listener could not be shared; its connections wait.");
                    continue;
                }
            };
            self.workers.spawn_on(first.wrapping_add(index), move |thread| async move {
                let stop = pod.stop.subscribe();
                accept_loop(listener, stop, |stream, peer| match port {
                    Port::Outbound => proxy.accepted(&thread, &pod, HoldDirection::Outbound, stream, peer),
                    Port::Plaintext => proxy.accepted(&thread, &pod, HoldDirection::Inbound, stream, peer),
                    Port::Tunnel => {
                        let (proxy, pod) = (proxy.clone(), pod.clone());
                        let workers = proxy.clone();
                        workers.workers.spawn_connection(&thread, move |thread, guard| {
                            tunnel::serve(proxy, thread, pod, stream, peer, guard)
                        });
                    }
                })
                .await;
            });
        }
        if let Some(queue) = &pod.captured.hold {
            let (proxy, pod, queue) = (self.clone(), pod.clone(), queue.clone());
            // Where the pod's own connections are accepted, for most of those are of its SYNs.
            self.workers.spawn_on(first, move |thread| hold_loop(proxy, thread, pod, queue));
        }
    }

    /// Accepts one connection that the pod itself dialled, if one waits, from an address of the client's family.
    ///
    /// A client in the pod completes its handshake within the very call that lets its SYN go on. Whoever called finds
    /// the client's socket here, and need not wait until a thread has been woken to accept it.
    pub(super) fn accept_own(self: &Arc<Self>, here: &Rc<Thread>, pod: &Arc<ServedPod>, client: SocketAddr) -> bool {
        let same_family =
            |listener: &&TcpListener| listener.local_addr().is_ok_and(|l| l.is_ipv4() == client.is_ipv4());
        let Some(listener) = pod.captured.listeners.outbound.iter().find(same_family) else { return false };
        // What the next agent of this node lets through is that agent's to accept. An error is the accept loop's to tell.
        let Some(Ok((stream, peer))) = (!*pod.stop.borrow()).then(|| socket::accept(listener)) else { return false };
        self.accepted(here, pod, HoldDirection::Outbound, stream, peer);
        true
    }

    /// A socket that came out of capture: of a client that waits for it, or of one that nothing is known of yet.
    fn accepted(
        self: &Arc<Self>,
        here: &Rc<Thread>,
        pod: &Arc<ServedPod>,
        direction: HoldDirection,
        stream: std::net::TcpStream,
        client: SocketAddr,
    ) {
        // The client may have gone already.
        let Ok(Downstream::Accepted { stream, client, dialled }) = Downstream::accepted(pod, stream, client) else {
            return;
        };
        if let Some(stream) = self.held.join(pod.uid(), direction, (client, dialled), stream) {
            self.begin(here, pod, direction, Downstream::Accepted { stream, client, dialled });
        }
    }

    /// Begins the life of one captured connection.
    pub(super) fn begin(
        self: &Arc<Self>,
        here: &Rc<Thread>,
        pod: &Arc<ServedPod>,
        direction: HoldDirection,
        downstream: Downstream,
    ) {
        let (proxy, pod) = (self.clone(), pod.clone());
        self.workers.spawn_connection(here, move |thread, guard| {
            let life: Pin<Box<dyn Future<Output = ()>>> = match direction {
                HoldDirection::Outbound => Box::pin(outbound::serve(proxy, thread, pod, downstream)),
                HoldDirection::Inbound => Box::pin(plaintext::serve(proxy, pod, downstream)),
            };
            async move {
                life.await;
                drop(guard);
            }
        });
    }

    /// Accepts nothing more: the next agent of this node does. Connections go on, tunnels without one close.
    pub fn rest(&self) {
        for pod in self.pods.lock().values() {
            pod.stop.send_replace(true);
            pod.leaving.send_replace(true);
        }
        self.workers.on_each(|thread| thread.http.evict_all());
    }

    /// The pod is gone from this node: nothing more is accepted, its connections reset, its tunnels close.
    pub fn forget(&self, uid: &PodUid) {
        let removed = self.pods.lock().remove(uid);
        if let Some(pod) = removed {
            pod.stop.send_replace(true);
        }
        self.limits.set_pods(self.pods.lock().len());
        self.reset(uid);
        self.evict(uid);
    }

    /// Closes what is pooled of a pod that leaves, whichever end of it that is.
    pub fn evict(&self, uid: &PodUid) {
        if let Some(pod) = self.pods.get(uid) {
            pod.leaving.send_replace(true);
        }
        let uid = uid.clone();
        self.workers.on_each(move |thread| {
            thread.http.evict(&uid);
            thread.pool.evict(&uid);
            thread.fast.evict(&uid);
        });
    }
}

impl Flows for Proxy {
    fn live(&self, pod: &PodUid) -> usize {
        self.connections.live(pod)
    }

    fn reset(&self, pod: &PodUid) {
        self.connections.reset_pod(pod, &Reason::Drain);
    }
}

impl Pods {
    pub fn get(&self, uid: &PodUid) -> Option<Arc<ServedPod>> {
        self.lock().get(uid).cloned()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<PodUid, Arc<ServedPod>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ServedPod {
    pub fn uid(&self) -> &PodUid {
        self.captured.workload.uid()
    }

    /// Whether a live connection in the pod's namespace has these two ends.
    pub fn tuple_in_use(&self, local: SocketAddr, remote: SocketAddr) -> io::Result<bool> {
        self.ask(|sockets| sockets.has_either_way(local, remote))
    }

    fn ask(&self, question: impl FnOnce(&mut SockDiag) -> io::Result<bool>) -> io::Result<bool> {
        let mut sockets = self.sockets.lock().unwrap_or_else(PoisonError::into_inner);
        let diag = match sockets.take() {
            Some(diag) => sockets.insert(diag),
            None => sockets.insert(SockDiag::open(&self.captured.netns)?),
        };
        // A socket whose answers got out of step is made anew next time.
        let found = question(diag);
        if found.is_err() {
            *sockets = None;
        }
        found
    }

    /// Whether a socket of the pod's namespace has these two ends, connected or about to be.
    pub fn has_socket(&self, local: SocketAddr, remote: SocketAddr) -> io::Result<bool> {
        self.ask(|sockets| sockets.has(local, remote))
    }

    /// Completes when no process of the pod holds the socket with these ends any more; never, where that cannot be told.
    pub async fn socket_closed(&self, local: SocketAddr, remote: SocketAddr) {
        let mut pause = SOONEST_LOOK;
        loop {
            tokio::time::sleep(pause).await;
            match self.ask(|sockets| sockets.is_held(local, remote)) {
                Ok(true) => pause = (pause * 2).min(LATEST_LOOK),
                Ok(false) => return,
                Err(_) => return std::future::pending().await,
            }
        }
    }

    /// Completes when the pod leaves, or another agent serves it.
    pub async fn leaving(&self) {
        let _ = self.leaving.subscribe().wait_for(|leaving| *leaving).await;
    }

    pub fn is_leaving(&self) -> bool {
        *self.leaving.borrow()
    }

    /// Counts one request more, and tells how many there are now.
    pub fn begin_request(&self, of: RequestsOf) -> usize {
        self.requests[of as usize].fetch_add(1, Ordering::Relaxed) + 1
    }

    /// What such requests may hold.
    pub fn room(&self, of: RequestsOf) -> &Arc<Room> {
        &self.rooms[of as usize]
    }

    pub fn end_request(&self, of: RequestsOf) {
        self.requests[of as usize].fetch_sub(1, Ordering::Relaxed);
    }

    /// Completes when the pod is no longer served.
    pub async fn stopped(&self) {
        // The sender is ours and lives.
        let _ = self.stop.subscribe().wait_for(|stop| *stop).await;
    }
}

/// Whose requests they are: the pod's own are not held back by those of others.
#[derive(Clone, Copy)]
pub enum RequestsOf {
    Own,
    Others,
}

#[derive(Clone, Copy)]
enum Port {
    Outbound,
    Plaintext,
    Tunnel,
}

/// How soon, and then how often, a socket is looked for.
const SOONEST_LOOK: Duration = Duration::from_millis(50);
const LATEST_LOOK: Duration = Duration::from_secs(5);
