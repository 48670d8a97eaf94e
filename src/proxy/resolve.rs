use std::net::SocketAddr;
use std::time::Duration;

use crate::mesh::Destination;
use crate::model::Model;

/// What the model makes of a dialled address. One that lies inside the cluster's ranges and that no object has is
/// held for a moment: the object may be on its way. It is never taken for an outside address.
pub async fn resolve(model: &Model, addr: SocketAddr) -> Destination {
    let look = || model.read().mesh.destination(addr);
    if !model.is_synced() {
        model.synced().await;
    }
    match look() {
        Destination::Unknown => {}
        known => return known,
    }
    let mut moves = model.subscribe();
    let waiting = async {
        loop {
            moves.borrow_and_update();
            match look() {
                Destination::Unknown => drop(moves.changed().await),
                known => return known,
            }
        }
    };
    tokio::time::timeout(UNKNOWN_WAIT, waiting).await.unwrap_or(Destination::Unknown)
}

const UNKNOWN_WAIT: Duration = Duration::from_secs(1);
