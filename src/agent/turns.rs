//! Whose turn it is: of the agents of one node, at an upgrade, one programs rules and accepts, and hands both on.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot, watch};
use tracing::{info, warn};

use crate::capture::Order;
use crate::cni::{CniServer, ServerSettings};
use crate::handover::{Inheritance, Keeper, Progress, Succession, Successor, Turn};
use crate::mesh::PodUid;
use crate::proxy::Proxy;

/// Where this agent stands among those of its node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Standing {
    /// Another one has the turn and has not handed it over yet.
    Waits,
    /// It programs rules and accepts.
    Works,
    /// The next one does; this one serves what it has.
    Succeeded,
}

/// What the turns are taken with.
pub(super) struct Turns {
    pub succession: Succession,
    pub cni: ServerSettings,
    pub keeper: Arc<Keeper>,
    pub proxy: Arc<Proxy>,
    pub orders: mpsc::UnboundedSender<Order>,
    /// Pods of which nothing is left.
    pub gone: mpsc::UnboundedReceiver<PodUid>,
    pub standing: watch::Sender<Standing>,
    /// Completes once every joined pod of the node is captured, or named as failed.
    pub all_captured: Arc<dyn Fn() -> bool + Send + Sync>,
}

impl Turns {
    /// Takes the turn when it comes and gives it on when asked. Comes back only if it cannot go on.
    pub async fn run(mut self) -> io::Result<()> {
        self.cni.model.synced().await;
        let mut inheritance = self.succession.ask().await?;
        loop {
            self.standing.send_replace(Standing::Works);
            let successor = self.work(&mut inheritance).await?;
            if self.give_on(&successor, inheritance.turn).await {
                self.rest(&successor).await;
            }
            warn!("The next agent of this node has ended; this one goes on as soon as no other does.");
            let turn = self.succession.take_back().await?;
            inheritance = Inheritance { turn, listeners: Vec::new(), predecessor: None };
        }
    }

    /// Programs rules until the next agent asks.
    async fn work(&mut self, inheritance: &mut Inheritance) -> io::Result<Successor> {
        let listeners = std::mem::take(&mut inheritance.listeners);
        for (key, fd) in &listeners {
            if let Err(error) = self.keeper.keep(key, fd.as_fd()) {
                warn!(%error, "A listener of the agent before this one would not outlive this worker.");
            }
        }
        let before = inheritance.predecessor.take();
        info!(listeners = listeners.len(), after_another = before.is_some(), "This agent programs the node's rules.");
        let _ = self.orders.send(Order::Work(listeners));
        let server = CniServer::open(self.cni.clone())?;
        let told = async {
            let mut looks = self.cni.status.subscribe();
            let Some(before) = before else { return std::future::pending().await };
            // The first look is of what was before.
            let _ = looks.wait_for(|looks| !looks.resting).await;
            let begun = looks.borrow_and_update().count;
            let _ = looks.wait_for(|looks| looks.count > begun).await;
            while !(self.all_captured)() {
                let _ = looks.changed().await;
            }
            info!("Every joined pod is captured; the agent before this one stops to accept.");
            before.tell(Progress::Taken).await;
            while let Some(pod) = self.gone.recv().await {
                before.tell(Progress::Forget { pod: pod.as_str().to_owned() }).await;
            }
        };
        tokio::select! {
            successor = inheritance.turn.successor() => Ok(successor),
            () = told => Err(io::Error::other("what serves the pods has ended")),
            () = server.run() => Err(io::Error::other("what listens for the CNI plugin has ended")),
        }
    }

    /// Stops to program rules and gives listeners and turn to the next agent. Says whether it got them.
    async fn give_on(&self, successor: &Successor, turn: Turn) -> bool {
        let (answer, listeners) = oneshot::channel();
        let _ = self.orders.send(Order::Rest(answer));
        let listeners = listeners.await.unwrap_or_default();
        info!(listeners = listeners.len(), "The next agent of this node takes over.");
        match successor.inherit(&listeners, turn).await {
            Ok(()) => true,
            Err(error) => {
                warn!(%error, "The next agent could not be given the listeners.");
                false
            }
        }
    }

    /// Goes on accepting until the next agent has everything, then serves what there is. Comes back when it is gone.
    async fn rest(&self, successor: &Successor) {
        while let Some(progress) = successor.next().await {
            match progress {
                Progress::Taken => {
                    info!("The next agent of this node has taken over; what this one carries goes on.");
                    self.standing.send_replace(Standing::Succeeded);
                    self.proxy.rest();
                }
                Progress::Forget { pod } => drop(self.orders.send(Order::Forget(PodUid::new(pod)))),
                Progress::Succeed => {}
            }
        }
    }
}
