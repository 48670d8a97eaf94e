use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use super::*;
use crate::transport::tls::tests::tcp_pair;

async fn joined() -> (TcpStream, TcpStream, JoinHandle<Ended>, Arc<RelayControl>) {
    let ((client, near), (far, server)) = (tcp_pair().await, tcp_pair().await);
    let control = Arc::new(RelayControl::default());
    let watched = control.clone();
    let relayed =
        tokio::spawn(async move { relay(TcpEnd::new(near).unwrap(), TcpEnd::new(far).unwrap(), &watched).await });
    (client, server, relayed, control)
}

#[tokio::test]
async fn bytes_are_counted_while_the_relay_runs() {
    let (mut client, mut server, relayed, control) = joined().await;
    client.write_all(b"hello").await.unwrap();
    server.read_exact(&mut [0; 5]).await.unwrap();
    assert_eq!((control.sent(), control.received()), (5, 0));
    server.write_all(b"hi").await.unwrap();
    client.read_exact(&mut [0; 2]).await.unwrap();
    assert_eq!((control.sent(), control.received()), (5, 2));
    client.shutdown().await.unwrap();
    server.shutdown().await.unwrap();
    let ended = relayed.await.unwrap();
    assert_eq!((ended.sent, ended.received, ended.outcome), (5, 2, Outcome::Orderly));
    assert_eq!(client.read(&mut [0]).await.unwrap(), 0, "an orderly end must not look like a reset");
}

#[tokio::test]
async fn a_relay_that_is_dropped_halfway_never_looks_complete() {
    let (mut client, mut server, relayed, _) = joined().await;
    client.write_all(b"half").await.unwrap();
    server.read_exact(&mut [0; 4]).await.unwrap();
    relayed.abort();
    for side in [&mut client, &mut server] {
        assert_eq!(side.read(&mut [0]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
}

#[tokio::test]
async fn a_reset_behind_a_reader_who_stalls_is_carried_at_once() {
    let (mut client, mut server, relayed, _) = joined().await;
    // Fill everything on the way, until the relay itself is held back.
    while tokio::time::timeout(Duration::from_millis(100), client.write(&[1; 65536])).await.is_ok() {}
    SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
    drop(client);
    let ended = tokio::time::timeout(Duration::from_secs(5), relayed).await.expect("the reset got lost").unwrap();
    assert_eq!(ended.outcome, Outcome::ResetByDownstream);
    let mut got = Vec::new();
    assert_eq!(server.read_to_end(&mut got).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn the_first_reason_to_reset_is_the_one_that_is_told() {
    let (_client, _server, relayed, control) = joined().await;
    control.reset(Reason::Drain);
    control.reset(Reason::Limit);
    assert_eq!(relayed.await.unwrap().outcome, Outcome::ResetByUs(Reason::Drain));
}
