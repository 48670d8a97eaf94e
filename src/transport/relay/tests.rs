use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use super::*;
use crate::transport::tls::tests::tcp_pair;

/// The two ways to carry between sockets: what holds of one holds of the other.
#[derive(Clone, Copy, Debug)]
enum Way {
    Relay,
    Join,
}

async fn joined(way: Way) -> (TcpStream, TcpStream, JoinHandle<Ended>, Arc<RelayControl>) {
    let ((client, near), (far, server)) = (tcp_pair().await, tcp_pair().await);
    let control = Arc::new(RelayControl::default());
    let watched = control.clone();
    let (near, far) = (TcpEnd::new(near).unwrap(), TcpEnd::new(far).unwrap());
    let relayed = tokio::spawn(async move {
        match way {
            Way::Relay => relay(near, far, &watched).await,
            Way::Join => join(near, far, &[&watched]).await,
        }
    });
    (client, server, relayed, control)
}

macro_rules! both_ways {
    ($($name:ident),+ $(,)?) => {
        mod copied {
            $(#[tokio::test] async fn $name() { super::$name(super::Way::Relay).await })+
        }
        mod joined_in_the_kernel {
            $(#[tokio::test] async fn $name() { super::$name(super::Way::Join).await })+
        }
    };
}

both_ways!(
    bytes_are_counted_while_the_relay_runs,
    a_relay_that_is_dropped_halfway_never_looks_complete,
    a_reset_behind_a_reader_who_stalls_is_carried_at_once,
    bytes_in_bulk_arrive_as_they_were_sent,
    the_first_reason_to_reset_is_the_one_that_is_told,
);

async fn bytes_are_counted_while_the_relay_runs(way: Way) {
    let (mut client, mut server, relayed, control) = joined(way).await;
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

async fn a_relay_that_is_dropped_halfway_never_looks_complete(way: Way) {
    let (mut client, mut server, relayed, _) = joined(way).await;
    client.write_all(b"half").await.unwrap();
    server.read_exact(&mut [0; 4]).await.unwrap();
    relayed.abort();
    for side in [&mut client, &mut server] {
        assert_eq!(side.read(&mut [0]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
}

async fn a_reset_behind_a_reader_who_stalls_is_carried_at_once(way: Way) {
    let (mut client, mut server, relayed, _) = joined(way).await;
    // Fill everything on the way, until the relay itself is held back.
    while tokio::time::timeout(Duration::from_millis(100), client.write(&[1; 65536])).await.is_ok() {}
    SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
    drop(client);
    let ended = tokio::time::timeout(Duration::from_secs(5), relayed).await.expect("the reset got lost").unwrap();
    assert_eq!(ended.outcome, Outcome::ResetByDownstream);
    let mut got = Vec::new();
    assert_eq!(server.read_to_end(&mut got).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
}

async fn the_first_reason_to_reset_is_the_one_that_is_told(way: Way) {
    let (_client, _server, relayed, control) = joined(way).await;
    control.reset(Reason::Drain);
    control.reset(Reason::Limit);
    assert_eq!(relayed.await.unwrap().outcome, Outcome::ResetByUs(Reason::Drain));
}

async fn bytes_in_bulk_arrive_as_they_were_sent(way: Way) {
    let (client, server, relayed, _) = joined(way).await;
    let (mut at_client, to_server) = client.into_split();
    let (mut at_server, to_client) = server.into_split();
    // Large and small ones in turn, so that a join goes back and forth between its two ways.
    let chunks = [1, 300_000, 7, 65_536, 65_537, 4_000_000, 3, 131_072, 1_000];
    let send = |mut to: tokio::net::tcp::OwnedWriteHalf| async move {
        let mut next = 0_u8;
        for chunk in chunks {
            let data: Vec<u8> = (0..chunk).map(|at| next.wrapping_add((at % 251) as u8)).collect();
            next = next.wrapping_add(1);
            to.write_all(&data).await.unwrap();
            tokio::task::yield_now().await;
        }
        to.shutdown().await.unwrap();
    };
    let wanted: Vec<u8> = (0_u8..)
        .zip(chunks)
        .flat_map(|(next, chunk)| (0..chunk).map(move |at| next.wrapping_add((at % 251) as u8)))
        .collect();
    let sending = [tokio::spawn(send(to_server)), tokio::spawn(send(to_client))];
    let read = async |from: &mut tokio::net::tcp::OwnedReadHalf| {
        let mut got = Vec::new();
        from.read_to_end(&mut got).await.unwrap();
        assert!(got == wanted, "{} bytes of {} arrived, or others than were sent", got.len(), wanted.len());
    };
    tokio::join!(read(&mut at_client), read(&mut at_server));
    for sending in sending {
        sending.await.unwrap();
    }
    let ended = relayed.await.unwrap();
    assert_eq!((ended.sent, ended.received), (wanted.len() as u64, wanted.len() as u64));
    assert_eq!(ended.outcome, Outcome::Orderly);
}
