use std::sync::Arc;

use tokio::sync::broadcast::error::RecvError;
use tracing::info;

use super::Proxy;
use super::failure::Failure;
use super::inbound::{allowed, decide};
use super::same_node::{NO_LONGER, may_join};
use crate::mesh::{PodUid, Reason};
use crate::telemetry::Direction;

/// Follows the model for as long as the agent lives: live connections that policy no longer allows are reset, and
/// so is what belongs to pods that are gone.
pub async fn follow(proxy: Arc<Proxy>) {
    let mut steps = proxy.model.steps();
    loop {
        match steps.recv().await {
            Ok(step) => {
                step.change.pods.iter().for_each(|uid| end_if_gone(&proxy, uid));
                if step.policies || !step.change.is_empty() {
                    decide_again(&proxy);
                }
            }
            Err(RecvError::Lagged(_)) => {
                proxy.connections.all().iter().for_each(|connection| end_if_gone(&proxy, &connection.pod));
                decide_again(&proxy);
            }
            Err(RecvError::Closed) => return,
        }
    }
}

/// Closes the pooled tunnels of a pod that the model has no more, wherever it ran, and resets what it still carries.
fn end_if_gone(proxy: &Proxy, uid: &PodUid) {
    let live = proxy.model.read().mesh.workload(uid).is_some_and(|workload| workload.pod.is_live());
    if !live {
        proxy.evict(uid);
        proxy.connections.reset_pod(uid, &Reason::Drain);
    }
}

fn decide_again(proxy: &Proxy) {
    for connection in proxy.connections.all() {
        if connection.direction != Direction::Inbound || connection.is_exempt() {
            continue;
        }
        let Some(pod) = proxy.pods.get(&connection.pod) else { continue };
        let decided = decide(proxy, &pod, connection.source, connection.peer.as_ref(), connection.dialled);
        let verdict = decided.and_then(|(workload, decision)| {
            allowed(&decision)?;
            let joins = |source| may_join(&proxy.model.read().mesh, source, &workload, connection.dialled);
            if connection.neighbour().is_none_or(joins) {
                return Ok(());
            }
            Err(Failure::new(Reason::Drain, NO_LONGER))
        });
        if let Err(failure) = verdict {
            info!(source = %connection.source, destination = %connection.dialled, reason = %failure.reason,
                  detail = %failure.detail, "A live connection is no longer allowed and is reset.");
            connection.reset(failure.reason);
        }
    }
}
