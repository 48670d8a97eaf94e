use tokio::net::TcpStream;

use super::connections::Connection;
use super::failure::Failure;
use crate::mesh::Reason;
use crate::transport::hbone::Flow;
use crate::transport::relay::{Outcome, TcpEnd, join, relay};

/// Joins two sockets, and records how it went.
pub async fn plain(connection: &Connection, downstream: TcpStream, upstream: TcpStream) {
    between(&[connection], downstream, upstream).await;
}

/// Joins the sockets of two pods of this node, and records how it went for either side.
pub async fn same_node(outbound: &Connection, inbound: &Connection, downstream: TcpStream, upstream: TcpStream) {
    between(&[outbound, inbound], downstream, upstream).await;
}

async fn between(sides: &[&Connection], downstream: TcpStream, upstream: TcpStream) {
    sides.iter().for_each(|side| side.connected());
    match (TcpEnd::new(downstream), TcpEnd::new(upstream)) {
        (Ok(downstream), Ok(upstream)) => {
            let controls: Vec<_> = sides.iter().map(|side| &side.control).collect();
            let ended = join(downstream, upstream, &controls).await;
            sides.iter().for_each(|side| side.ended(&ended));
        }
        (Err(cause), _) | (_, Err(cause)) => sides.iter().for_each(|side| side.failed(&broken(&cause))),
    }
}

/// Relays from an application into a tunnel. A reset that comes out of it carries no reason: `denial` says whether
/// policy is it.
pub async fn into_tunnel(
    connection: &Connection,
    downstream: TcpStream,
    upstream: Flow,
    denial: impl FnOnce() -> Option<Reason>,
) {
    connection.connected();
    let ended = match TcpEnd::new(downstream) {
        Ok(downstream) => relay(downstream, upstream, &connection.control).await,
        Err(cause) => return connection.failed(&broken(&cause)),
    };
    let denied = if ended.outcome == Outcome::ResetByUpstream { denial() } else { None };
    match denied {
        Some(reason) => {
            let text = "the destination's agent ended it: policy allows it no more";
            connection.telemetry.closed(ended.sent, ended.received, Some(reason), text);
        }
        None => connection.ended(&ended),
    }
}

/// Relays from a tunnel to an application.
pub async fn out_of_tunnel(connection: &Connection, downstream: Flow, upstream: TcpStream) {
    connection.connected();
    match TcpEnd::new(upstream) {
        Ok(upstream) => connection.ended(&relay(downstream, upstream, &connection.control).await),
        Err(cause) => connection.failed(&broken(&cause)),
    }
}

fn broken(cause: &std::io::Error) -> Failure {
    Failure::new(Reason::Reset, format!("a socket broke before a byte was moved: {cause}"))
}
