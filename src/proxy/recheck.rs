use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::broadcast::error::RecvError;
use tracing::info;

use super::failure::Failure;
use super::inbound::{Decided, READ_NOW, allowed, decide};
use super::same_node::NO_LONGER;
use super::{Connection, Connections, Proxy};
use crate::mesh::{Mesh, PodUid, Reason};
use crate::model::Step;
use crate::policy::Reads;
use crate::telemetry::Direction;

/// Follows the model for as long as the agent lives: live connections that policy no longer allows are reset, and
/// so is what belongs to pods that are gone.
pub async fn follow(proxy: Arc<Proxy>) {
    let mut steps = proxy.model.steps();
    loop {
        match steps.recv().await {
            Ok(step) => {
                step.change.pods.iter().for_each(|uid| end_if_gone(&proxy, uid));
                let connections = affected(&proxy.connections, &proxy.model.read().mesh, &step);
                decide_again(&proxy, &connections).await;
            }
            Err(RecvError::Lagged(_)) => {
                let connections = proxy.connections.all();
                connections.iter().for_each(|connection| end_if_gone(&proxy, &connection.pod));
                decide_again(&proxy, &connections).await;
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

/// The live connections that a step may have another decision for: those to a pod that changed, to an endpoint whose
/// Services are others now, and to pods that a changed policy stands over. Who connects has no part in it: what a
/// source proved holds for as long as its connection does.
fn affected(connections: &Connections, mesh: &Mesh, step: &Step) -> Vec<Arc<Connection>> {
    let mut found: BTreeMap<u64, Arc<Connection>> = BTreeMap::new();
    let mut add = |connection: Arc<Connection>| drop(found.insert(connection.id, connection));
    for connection in step.change.pods.iter().flat_map(|uid| connections.of(uid)) {
        // What stands between two pods that are joined without a tunnel may have changed at either.
        connection.onward().into_iter().for_each(&mut add);
        add(connection);
    }
    for endpoint in &step.change.endpoints {
        let to_pods = mesh.claimants(endpoint.ip()).flat_map(|uid| connections.of(uid));
        let at = |connection: &Connection| (connection.dialled.ip().to_canonical(), connection.dialled.port());
        to_pods.filter(|connection| at(connection) == (endpoint.ip(), endpoint.port())).for_each(&mut add);
    }
    if !step.policies.is_empty() {
        let stands = |uid: &PodUid| {
            // A pod that the model lacks is for `end_if_gone`.
            let Some(workload) = mesh.workload(uid) else { return false };
            step.policies.len() > MANY || step.policies.iter().any(|scope| scope.may_select(&workload.pod))
        };
        connections.pods().iter().filter(|uid| stands(uid)).flat_map(|uid| connections.of(uid)).for_each(&mut add);
    }
    found.into_values().collect()
}

/// A few at a time, so that what else runs here waits for a few.
async fn decide_again(proxy: &Proxy, connections: &[Arc<Connection>]) {
    for some in connections.chunks(AT_A_TIME) {
        some.iter().for_each(|connection| decide_one_again(proxy, connection));
        tokio::task::yield_now().await;
    }
}

fn decide_one_again(proxy: &Proxy, connection: &Connection) {
    if connection.direction != Direction::Inbound || connection.is_exempt() {
        return;
    }
    let Some(pod) = proxy.pods.get(&connection.pod) else { return };
    let who = (connection.source, connection.peer.as_ref(), connection.via.as_ref());
    let decided = decide(proxy, &pod, who, connection.dialled);
    let verdict = decided.and_then(|Decided { workload, decision, reads }| {
        allowed(&decision)?;
        if reads == Reads::ToDecide && !connection.is_read() {
            return Err(Failure::new(Reason::Drain, READ_NOW));
        }
        let joins = |source| proxy.model.read().mesh.may_join(source, &workload, connection.dialled);
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

/// More policies than this in one step, and every connection is decided again rather than held against each.
const MANY: usize = 64;
const AT_A_TIME: usize = 32;

#[cfg(test)]
mod tests;
