use std::future::poll_fn;

use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::{Builder, Runtime};

use super::*;
use crate::transport::tls::tests::{Node, tcp_pair};

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

async fn sent(link: &mut Link, data: &[u8]) {
    link.push(Kind::Data, data).unwrap();
    poll_fn(|cx| link.poll_flush(cx)).await.unwrap();
}

async fn got(link: &mut Link) -> io::Result<Vec<u8>> {
    poll_fn(|cx| link.poll_fill(cx)).await?;
    let frame = link.front().expect("a frame");
    let payload = link.payload(frame).to_vec();
    link.pop();
    Ok(payload)
}

#[tokio::test]
async fn keys_change_as_often_as_either_side_wants() {
    let node = Node::new();
    let (client, server) = node.fast_pair().await;
    let (mut client, mut server) = (client.stream, server.stream);
    for round in 0..5_u8 {
        client.sending.rekey = true;
        sent(&mut client, &[round]).await;
        assert_eq!(got(&mut server).await.unwrap(), [round]);
        // Asked for by the peer: the answer goes with the next frame.
        let asks = [KEY_UPDATE, 0, 0, 1, 1];
        client.sending.message(ContentType::Handshake, &asks, &mut client.ciphers.sealer).unwrap();
        client.ciphers.sealer = Sealer::new(client.ciphers.rekey.sending().unwrap()).unwrap();
        sent(&mut client, b"in new keys").await;
        assert_eq!(got(&mut server).await.unwrap(), b"in new keys");
        assert!(server.sending.rekey);
        sent(&mut server, b"so is the answer").await;
        assert_eq!(got(&mut client).await.unwrap(), b"so is the answer");
    }
    assert!(client.is_quiet() && server.is_quiet());
}

#[tokio::test]
async fn a_record_that_was_changed_on_its_way_is_no_word_of_the_peer() {
    let node = Node::new();
    for at in [0, 1, 3, 4, 5, 9, 20, 30] {
        let (client, server) = node.fast_pair().await;
        let (mut client, mut server) = (client.stream, server.stream);
        client.push(Kind::Data, b"hello").unwrap();
        client.sending.bytes_mut()[at] ^= 1;
        poll_fn(|cx| client.poll_flush(cx)).await.unwrap();
        drop(client);
        assert!(got(&mut server).await.is_err(), "octet {at}");
    }
}

#[tokio::test]
async fn tls_messages_that_have_no_place_here_end_the_connection() {
    let node = Node::new();
    for (content, message) in [
        (ContentType::Handshake, &[4, 0, 0, 1, 0][..]),
        (ContentType::Handshake, &[KEY_UPDATE, 0, 0, 1, 2]),
        (ContentType::Handshake, &[KEY_UPDATE, 0, 0, 1]),
        (ContentType::Handshake, &[]),
        (ContentType::Alert, &[2, 40]),
        (ContentType::Alert, &[1]),
        (ContentType::ApplicationData, &[]),
    ] {
        let (client, server) = node.fast_pair().await;
        let (mut client, mut server) = (client.stream, server.stream);
        client.sending.message(content, message, &mut client.ciphers.sealer).unwrap();
        poll_fn(|cx| client.poll_flush(cx)).await.unwrap();
        let error = got(&mut server).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{content:?} {message:?}: {error}");
    }
}

#[tokio::test]
async fn a_quiet_connection_holds_no_buffer() {
    let node = Node::new();
    let (client, server) = node.fast_pair().await;
    let (mut client, mut server) = (client.stream, server.stream);
    sent(&mut client, &[1; 16_000]).await;
    assert_eq!(got(&mut server).await.unwrap().len(), 16_000);
    let more = poll_fn(|cx| Poll::Ready(server.poll_fill(cx).is_ready())).await;
    assert!(!more && server.receiving.bytes().is_empty() && !client.has_unsent());
    assert!(client.is_quiet() && server.is_quiet());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn what_an_application_writes_in_any_sizes_reaches_the_other_whole(
        sizes in prop::collection::vec(prop_oneof![1_usize..64, 1_usize..40_000, 100_000_usize..400_000], 1..8),
    ) {
        let total: usize = sizes.iter().sum();
        let data: Vec<u8> = (0..total).map(|at| (at % 251) as u8).collect();
        let received = runtime().block_on(async {
            let node = Node::new();
            let (client, server) = node.fast_pair().await;
            let (mut client, mut server) = (client.stream, server.stream);
            let ((mut writer, from), (to, mut reader)) = (tcp_pair().await, tcp_pair().await);
            let writing = async {
                let mut rest = &data[..];
                for size in sizes {
                    let (now, later) = rest.split_at(size);
                    writer.write_all(now).await.unwrap();
                    rest = later;
                    tokio::task::yield_now().await;
                }
                drop(writer);
            };
            let sending = async {
                while poll_fn(|cx| client.poll_take(cx, &from)).await.unwrap() > 0 {
                    poll_fn(|cx| client.poll_flush(cx)).await.unwrap();
                }
                client.push(Kind::End, &[]).unwrap();
                poll_fn(|cx| client.poll_flush(cx)).await.unwrap();
            };
            let delivering = async {
                loop {
                    poll_fn(|cx| server.poll_fill(cx)).await.unwrap();
                    match server.front().unwrap().kind {
                        Kind::Data => drop(poll_fn(|cx| server.poll_deliver(cx, &to)).await.unwrap()),
                        _ => break,
                    }
                }
                drop(to);
            };
            let reading = async {
                let mut received = Vec::new();
                reader.read_to_end(&mut received).await.unwrap();
                received
            };
            tokio::join!(writing, sending, delivering, reading).3
        });
        prop_assert!(received == data, "{} of {} bytes", received.len(), data.len());
    }
}
