//! Honest probes: a SYN from the node to a probed port waits while we ask whether it is the node's own.
//!
//! An address proves nothing, for NodePort traffic is masqueraded to the node's. A probe is a connection whose exact
//! four ends are a socket in the node's network namespace; it reaches the application untouched, so that a live port
//! answers and a dead one refuses. Everything else goes on to policy as ordinary plaintext.
//!
//! While nobody serves the queue (the worker is being replaced) such SYNs are dropped; the prober sends them again
//! after a second.

use std::io;
use std::time::Instant;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;

use super::netns::NetNs;
use super::nfqueue::{Queue, Room, Verdict};
use super::rules::{PROBE_PROVEN, PROBE_REFUTED};
use super::sock_diag::SockDiag;
use crate::telemetry::Seldom;

/// Answers one pod's queue until it is dropped.
#[derive(Debug)]
pub struct ProbeQueue(JoinHandle<()>);

impl ProbeQueue {
    /// Takes the pod's queue over. Call within a runtime; the queue itself is opened by a thread of its own.
    pub fn serve(pod: &NetNs, node: &NetNs, number: u16, runtime: &tokio::runtime::Handle) -> io::Result<Self> {
        let queue = pod.enter(|| Queue::open(number, MOST_WAITING))?;
        let diag = SockDiag::open(node)?;
        let _runtime = runtime.enter();
        // SAFETY: the queue owns its one descriptor and keeps it open and the same until it is dropped.
        let queue = unsafe { AsyncFd::register_with_interest(queue, Interest::READABLE) }.map_err(io::Error::from)?;
        Ok(Self(runtime.spawn(answer(queue, diag))))
    }

    /// Gives the queue's number back.
    pub async fn close(mut self) {
        self.0.abort();
        // Ended by the line above, and with it the queue is closed.
        let _ = (&mut self.0).await;
    }

    /// Whether the queue is still answered.
    pub fn is_alive(&self) -> bool {
        !self.0.is_finished()
    }
}

impl Drop for ProbeQueue {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn answer(queue: AsyncFd<Queue>, mut diag: SockDiag) {
    let mut room = Room::default();
    let mut waiting = Vec::new();
    loop {
        let Ok(mut ready) = queue.readable().await else { return };
        match ready.try_io(|queue| queue.get_ref().receive(&mut room, |packet| waiting.push(packet))) {
            Ok(Ok(())) => {}
            Ok(Err(error)) if error.raw_os_error() == Some(libc::ENOBUFS) => continue,
            Ok(Err(error)) => {
                tracing::warn!(%error, "The queue for probes failed; it is opened again.");
                return;
            }
            // Behind those that came.
            Err(_would_block) => {}
        }
        for packet in waiting.drain(..) {
            let proven = packet.tcp.is_some_and(|tcp| {
                diag.has(tcp.source, tcp.destination).unwrap_or_else(|error| {
                    static WARNINGS: Seldom = Seldom::new();
                    if let Some(left_out) = WARNINGS.speaks(Instant::now()) {
                        tracing::warn!(
                            %error, left_out, "sock_diag in the node's network namespace failed; a probe goes to policy."
                        );
                    }
                    false
                })
            });
            let verdict = match proven {
                true => Verdict::Accept { mark: packet.mark | PROBE_PROVEN },
                false => Verdict::Repeat { mark: packet.mark | PROBE_REFUTED },
            };
            let word = if proven { "probe" } else { "plaintext" };
            metrics::counter!("selvedge_capture_probes_total", "verdict" => word).increment(1);
            if let Err(error) = queue.get_ref().verdict(&packet, verdict) {
                static WARNINGS: Seldom = Seldom::new();
                if let Some(left_out) = WARNINGS.speaks(Instant::now()) {
                    tracing::warn!(
                        %error, left_out, "A verdict on a waiting SYN could not be given; its sender will repeat it."
                    );
                }
            }
        }
    }
}

const MOST_WAITING: u32 = 1024;
