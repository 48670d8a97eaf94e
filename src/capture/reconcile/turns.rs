//! Several agents of one node: this one works or rests, as it is told.

use std::os::fd::OwnedFd;
use std::sync::PoisonError;

use super::{Event, Order, Reconciler};
use crate::handover::ListenerKey;
use crate::mesh::PodUid;

impl Reconciler {
    pub(super) async fn obey(&mut self, order: Order) {
        match order {
            Order::Work(listeners) => self.work(listeners),
            Order::Rest(answer) => {
                let listeners = self.rest().await;
                // Who asked may be gone; then the next order is to work.
                let _ = answer.send(listeners);
            }
            Order::Forget(pod) => self.let_go(&pod),
        }
    }

    fn work(&mut self, listeners: Vec<(ListenerKey, OwnedFd)>) {
        self.kernel.inherited.lock().unwrap_or_else(PoisonError::into_inner).extend(listeners);
        self.resting = false;
        self.status.set_resting(false);
        self.first_pass = true;
        self.evidence = None;
        // Whatever was captured before is looked at anew, and told to the proxy again, which had stopped to accept.
        for pod in self.pods.values_mut() {
            pod.missing = 0;
            pod.failure = Some("taken back from the next agent".to_owned());
            pod.capture.reopen_queue();
        }
    }

    /// Leaves rules and listeners as they are. A queue has one reader: SYNs that come before the next agent opens it
    /// are dropped, and come again.
    async fn rest(&mut self) -> Vec<(ListenerKey, OwnedFd)> {
        self.resting = true;
        self.status.set_resting(true);
        let mut listeners = Vec::new();
        for pod in self.pods.values_mut().filter(|pod| pod.leaving.is_none()) {
            pod.capture.close_queues().await;
            listeners.extend(pod.capture.listeners());
        }
        listeners
    }

    fn let_go(&mut self, uid: &PodUid) {
        if self.resting
            && let Some(pod) = self.pods.remove(uid)
        {
            pod.capture.forget_listeners(&self.kernel);
            // Its connections hold the listeners too, and there are no rules any more that could carry them.
            let _ = self.events.send(Event::Gone(uid.clone()));
        }
    }
}
