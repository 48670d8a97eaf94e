use futures_util::FutureExt;
use tokio::net::TcpStream;

use super::connections::Connection;
use super::failure::Failure;
use crate::mesh::Reason;
use crate::transport::relay::{Ended, Outcome, TcpEnd, join, relay};
use crate::transport::{fast, hbone};

/// Joins two sockets, and records how it went.
pub async fn plain(connection: &Connection, downstream: TcpEnd, upstream: TcpStream) {
    between(&[connection], downstream, upstream).await;
}

/// Joins the sockets of two pods of this node, and records how it went for either side.
pub async fn same_node(outbound: &Connection, inbound: &Connection, downstream: TcpEnd, upstream: TcpStream) {
    between(&[outbound, inbound], downstream, upstream).await;
}

async fn between(sides: &[&Connection], downstream: TcpEnd, upstream: TcpStream) {
    sides.iter().for_each(|side| side.connected());
    match TcpEnd::new(upstream) {
        Ok(upstream) => {
            let controls: Vec<_> = sides.iter().map(|side| &side.control).collect();
            let ended = join(downstream, upstream, &controls).await;
            sides.iter().for_each(|side| side.ended(&ended));
        }
        Err(cause) => sides.iter().for_each(|side| side.failed(&broken(&cause))),
    }
}

/// Relays from an application into a tunnel. A reset that comes out of it carries no reason: `denial` says whether
/// policy is it.
pub fn into_tunnel(
    connection: &Connection,
    downstream: TcpEnd,
    upstream: hbone::Flow,
    denial: impl FnOnce() -> Option<Reason>,
) -> impl Future<Output = ()> {
    connection.connected();
    relay(downstream, upstream, &connection.control).map(|ended| tunnelled(connection, &ended, denial))
}

/// As [`into_tunnel`], of the fast kind.
pub fn into_fast_tunnel(
    connection: &Connection,
    downstream: TcpEnd,
    upstream: fast::Flow,
    denial: impl FnOnce() -> Option<Reason>,
) -> impl Future<Output = ()> {
    connection.connected();
    upstream.carry(downstream, &connection.control).map(|ended| tunnelled(connection, &ended, denial))
}

fn tunnelled(connection: &Connection, ended: &Ended, denial: impl FnOnce() -> Option<Reason>) {
    let denied = if ended.outcome == Outcome::ResetByUpstream { denial() } else { None };
    match denied {
        Some(reason) => {
            let text = "the destination's agent ended it: policy allows it no more";
            connection.telemetry.closed(ended.sent, ended.received, Some(reason), text);
        }
        None => connection.ended(ended),
    }
}

/// Relays from a tunnel to an application.
pub fn out_of_tunnel(connection: &Connection, downstream: hbone::Flow, upstream: TcpEnd) -> impl Future<Output = ()> {
    connection.connected();
    relay(downstream, upstream, &connection.control).map(|ended| connection.ended(&ended))
}

/// As [`out_of_tunnel`], of the fast kind. What is left of the tunnel is returned.
pub fn out_of_fast_tunnel<'a>(
    connection: &'a Connection,
    request: fast::Request<'a>,
    upstream: TcpEnd,
) -> impl Future<Output = fast::After> {
    connection.connected();
    request.accept(upstream, &connection.control).map(|(ended, after)| {
        connection.ended(&ended);
        after
    })
}

pub fn broken(cause: &std::io::Error) -> Failure {
    Failure::new(Reason::Reset, format!("a socket broke before a byte was moved: {cause}"))
}
