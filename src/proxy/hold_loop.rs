use std::io;
use std::rc::Rc;
use std::sync::Arc;

use tracing::warn;

use super::Proxy;
use super::downstream::Downstream;
use super::held::{self, Arrival};
use super::pods::ServedPod;
use super::workers::Thread;
use crate::capture::{HoldQueue, Room};

/// Takes one pod's SYNs out of their queue and begins an attempt for each new client, until the pod is no longer served.
pub async fn hold_loop(proxy: Arc<Proxy>, thread: Rc<Thread>, pod: Arc<ServedPod>, queue: Arc<HoldQueue>) {
    tokio::select! {
        Err(cause) = receive(&proxy, &thread, &pod, &queue) => {
            warn!(%cause, pod = %pod.captured.workload.name(), "The queue for new connections failed; it is opened again.");
            queue.fail();
        }
        () = pod.stopped() => {}
    }
}

async fn receive(
    proxy: &Arc<Proxy>,
    thread: &Rc<Thread>,
    pod: &Arc<ServedPod>,
    queue: &Arc<HoldQueue>,
) -> io::Result<()> {
    let readiness = queue.watch()?;
    let mut room = Room::default();
    loop {
        let mut ready = readiness.readable().await?;
        // A few at a time, so that the thread's connections go on.
        for _ in 0..BATCH {
            let received = ready.try_io(|_| {
                queue.receive(&mut room, |syn| match proxy.held.arrive(pod.uid(), queue, syn) {
                    Arrival::First(first) => proxy.begin(thread, pod, syn.direction, Downstream::Held(first)),
                    Arrival::Again => {}
                    Arrival::Overflow => {
                        let direction = held::name(syn.direction);
                        metrics::counter!("selvedge_connect_answers_total", "direction" => direction, "answer" => "eager")
                            .increment(1);
                    }
                })
            });
            match received {
                Ok(Ok(())) => {}
                Ok(Err(cause)) if cause.raw_os_error() == Some(libc::ENOBUFS) => {}
                Ok(Err(cause)) => return Err(cause),
                Err(_would_block) => break,
            }
        }
        tokio::task::yield_now().await;
    }
}

const BATCH: usize = 4;
