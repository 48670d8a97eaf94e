use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request as HttpRequest};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

use super::*;
use crate::identity::IdentitySettings;
use crate::mesh::{PodUid, Reason};
use crate::transport::relay::{Ended, Outcome, RelayControl, TcpEnd, relay};
use crate::transport::tls::tests::{Node, id, tcp_pair};
use crate::transport::tls::{Session, TlsSettings};

fn key(source: &str) -> PoolKey {
    PoolKey {
        source_pod: PodUid::new(source),
        source_ip: [10, 0, 0, 1].into(),
        source_identity: id("a"),
        destination_pod: PodUid::new("server"),
        destination_addr: "10.0.0.2:15008".parse().unwrap(),
        destination_identity: id("b"),
    }
}

fn head() -> ConnectHead {
    ConnectHead {
        authority: "10.0.0.2:8080".parse().unwrap(),
        forwarded: Some("10.0.0.1:4000".parse().unwrap()),
        baggage: "k8s.namespace.name=shop,service.name=a".to_owned(),
        traceparent: None,
        behalf: None,
    }
}

/// A server of ours behind each dial: what it is asked goes to `requests`.
#[derive(Clone)]
struct Served {
    node: Arc<Node>,
    requests: mpsc::UnboundedSender<Request>,
    dials: Arc<AtomicUsize>,
    ends: mpsc::UnboundedSender<Result<(), HboneError>>,
    settings: ServerSettings,
    drain: tokio::sync::watch::Sender<bool>,
}

type Observed = (mpsc::UnboundedReceiver<Request>, mpsc::UnboundedReceiver<Result<(), HboneError>>);

fn served_by(node: Node, settings: ServerSettings) -> (Served, Observed) {
    let ((requests, asked), (ends, ended)) = (mpsc::unbounded_channel(), mpsc::unbounded_channel());
    let drain = tokio::sync::watch::Sender::new(false);
    (Served { node: Arc::new(node), requests, dials: Arc::default(), ends, settings, drain }, (asked, ended))
}

fn served() -> (Served, Observed) {
    served_by(Node::new(), ServerSettings::default())
}

impl Served {
    fn serve(&self, session: Session) {
        let (requests, ends) = (self.requests.clone(), self.ends.clone());
        let (settings, mut drain) = (self.settings.clone(), self.drain.subscribe());
        tokio::spawn(async move {
            let drained = async move {
                let _ = drain.wait_for(|drain| *drain).await;
            };
            let on_request = |request| {
                let _ = requests.send(request);
            };
            let _ = ends.send(serve(session, settings, on_request, drained).await);
        });
    }

    async fn dial(self) -> Result<Session, OpenError> {
        self.dials.fetch_add(1, Ordering::SeqCst);
        let (client, server) = self.node.pair().await;
        self.serve(server);
        Ok(client)
    }

    async fn raw_client(&self) -> (h2::client::SendRequest<Bytes>, tokio::task::JoinHandle<Result<(), h2::Error>>) {
        let session = self.clone().dial().await.unwrap();
        let (send, connection) = h2::client::Builder::new().handshake(session.stream).await.unwrap();
        (send, tokio::spawn(connection))
    }
}

/// Answers every request with 200 and keeps the flows.
fn accept_all(mut asked: mpsc::UnboundedReceiver<Request>) -> Arc<Mutex<Vec<Flow>>> {
    let flows: Arc<Mutex<Vec<Flow>>> = Arc::default();
    let kept = flows.clone();
    tokio::spawn(async move {
        while let Some(request) = asked.recv().await {
            if let Ok(flow) = request.accept("service.name=b") {
                kept.lock().unwrap().push(flow);
            }
        }
    });
    flows
}

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    for _ in 0..2000 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("waited in vain until {what}");
}

/// A whole path: application, relay, tunnel, relay, application.
struct Path {
    client: TcpStream,
    server: TcpStream,
    near: tokio::task::JoinHandle<Ended>,
    far: tokio::task::JoinHandle<Ended>,
    control: Arc<RelayControl>,
}

async fn path(pool: &Pool, served: &Served, asked: &mut mpsc::UnboundedReceiver<Request>) -> Path {
    let (key, head) = (key("client"), head());
    let open = pool.open(&key, &head, served.clone().dial());
    let accept = async { asked.recv().await.unwrap().accept("service.name=b").unwrap() };
    let (opened, far_flow) = tokio::join!(open, accept);
    let (client, near_tcp) = tcp_pair().await;
    let (far_tcp, server) = tcp_pair().await;
    let control = Arc::new(RelayControl::default());
    let watched = control.clone();
    let near_flow = opened.unwrap().0;
    let near = tokio::spawn(async move { relay(TcpEnd::new(near_tcp).unwrap(), near_flow, &watched).await });
    let far =
        tokio::spawn(async move { relay(far_flow, TcpEnd::new(far_tcp).unwrap(), &RelayControl::default()).await });
    Path { client, server, near, far, control }
}

#[tokio::test]
async fn a_request_carries_only_method_and_authority_and_the_200_carries_baggage() {
    let node = Node::new();
    let (client, server) = node.pair().await;
    let raw_server = tokio::spawn(async move {
        let mut connection = h2::server::handshake(server.stream).await.unwrap();
        let (request, mut responder) = connection.accept().await.unwrap().unwrap();
        let response = http::Response::builder().header("baggage", "service.name=b").body(()).unwrap();
        let _send = responder.send_response(response, false).unwrap();
        let seen = (request.method().clone(), request.uri().to_string(), request.headers().clone());
        tokio::spawn(async move { while connection.accept().await.is_some() {} });
        seen
    });
    let pool = Pool::new(PoolSettings::default());
    let (flow, peer) = pool.open(&key("client"), &head(), async { Ok(client) }).await.unwrap();
    assert_eq!((flow.baggage(), &peer.identity), (Some("service.name=b"), &id("b")));
    // A scheme or a path would have been refused by the raw server: h2 takes neither in a CONNECT.
    let (method, uri, headers) = raw_server.await.unwrap();
    assert_eq!((method, uri.as_str()), (Method::CONNECT, "10.0.0.2:8080"));
    assert_eq!(headers["forwarded"], "for=\"10.0.0.1:4000\"");
    assert_eq!(headers["baggage"], "k8s.namespace.name=shop,service.name=a");
    assert_eq!(headers.len(), 2);
}

#[tokio::test]
async fn each_refusal_has_its_status_and_only_the_unreachable_may_be_tried_elsewhere() {
    let (served, (mut asked, _)) = served();
    let pool = Pool::new(PoolSettings::default());
    for (refusal, status, retry) in [
        (Refusal::Malformed, 400, false),
        (Refusal::Denied, 401, false),
        (Refusal::Unreachable, 503, true),
        (Refusal::Silent, 504, true),
    ] {
        let (key, head) = (key("client"), head());
        let open = pool.open(&key, &head, served.clone().dial());
        let (opened, ()) = tokio::join!(open, async { asked.recv().await.unwrap().refuse(refusal) });
        let error = opened.err().unwrap();
        assert!(matches!(error, OpenError::Refused { status: got } if got == status), "{error}");
        assert_eq!((error.retry(), error.refusal()), (retry, Some(refusal)));
    }
}

#[tokio::test]
async fn what_is_no_connect_is_answered_400_and_never_handed_on() {
    let (served, (mut asked, _)) = served();
    let (mut send, _driver) = served.raw_client().await;
    for (method, uri) in [(Method::GET, "https://10.0.0.2:8080/"), (Method::CONNECT, "cart.shop:80")] {
        let request = HttpRequest::builder().method(method).uri(uri).body(()).unwrap();
        let (answer, _body) = send.send_request(request, true).unwrap();
        assert_eq!(answer.await.unwrap().status(), 400);
    }
    assert!(asked.try_recv().is_err());
}

#[tokio::test]
async fn a_server_advertises_small_windows_and_its_stream_limit() {
    let (served, _observed) = served();
    let (mut send, _driver) = served.raw_client().await;
    let request = HttpRequest::builder().method(Method::CONNECT).uri("10.0.0.2:80").body(()).unwrap();
    let (_answer, mut body) = send.send_request(request, false).unwrap();
    until("the settings came", || send.current_max_send_streams() == 200).await;
    // The windows bound what a reader who never reads makes us hold.
    body.reserve_capacity(10 << 20);
    let mut capacity = 0;
    let _ = tokio::time::timeout(
        Duration::from_millis(100),
        std::future::poll_fn(|cx| {
            capacity = body.capacity();
            let _ = body.poll_capacity(cx);
            std::task::Poll::<()>::Pending
        }),
    )
    .await;
    assert!((65_535..=128 * 1024).contains(&capacity), "{capacity}");
}

#[tokio::test]
async fn streams_share_a_connection_and_open_another_when_it_is_full() {
    let (served, (asked, _)) = served();
    let flows = accept_all(asked);
    let pool = Pool::new(PoolSettings { max_streams: 4, ..PoolSettings::default() });
    let (key, head) = (key("client"), head());
    let opened = futures_util::future::join_all((0..4).map(|_| pool.open(&key, &head, served.clone().dial()))).await;
    let mut opened: Vec<_> = opened.into_iter().map(Result::unwrap).collect();
    assert_eq!(served.dials.load(Ordering::SeqCst), 1, "concurrent opens did not share a handshake");
    opened.push(pool.open(&key, &head, served.clone().dial()).await.unwrap());
    assert_eq!(served.dials.load(Ordering::SeqCst), 2);
    opened.push(pool.open(&super::tests::key("other"), &head, served.clone().dial()).await.unwrap());
    assert_eq!(served.dials.load(Ordering::SeqCst), 3, "two pods shared a connection");
    assert_eq!(flows.lock().unwrap().len(), 6);
    pool.evict(&PodUid::new("client"));
    assert_eq!(pool.snapshot().len(), 1);
    opened.push(pool.open(&key, &head, served.clone().dial()).await.unwrap());
    assert_eq!(served.dials.load(Ordering::SeqCst), 4, "an evicted connection took a new stream");
}

#[tokio::test]
async fn a_connection_whose_pod_left_while_it_was_dialled_is_not_kept() {
    let (served, (asked, _)) = served();
    let _flows = accept_all(asked);
    let pool = Pool::new(PoolSettings::default());
    let dial = {
        let (pool, served) = (pool.clone(), served.clone());
        async move {
            let session = served.dial().await;
            pool.evict(&PodUid::new("client"));
            session
        }
    };
    let _opened = pool.open(&key("client"), &head(), dial).await.unwrap();
    assert!(pool.snapshot().is_empty());
}

#[tokio::test]
async fn a_failed_dial_fails_its_waiters_and_they_may_try_again() {
    let (served, (asked, _)) = served();
    let _flows = accept_all(asked);
    let pool = Pool::new(PoolSettings::default());
    let (key, head) = (key("client"), head());
    let failing = || async {
        tokio::task::yield_now().await;
        Err(OpenError::from(std::io::Error::from(std::io::ErrorKind::ConnectionRefused)))
    };
    let (a, b) = tokio::join!(pool.open(&key, &head, failing()), pool.open(&key, &head, failing()));
    assert!([a, b].into_iter().all(|outcome| outcome.err().unwrap().retry()));
    pool.open(&key, &head, served.clone().dial()).await.unwrap();
    let other = super::tests::key("x");
    let given_up = pool.open(&other, &head, std::future::pending());
    assert!(tokio::time::timeout(Duration::from_millis(10), given_up).await.is_err());
    pool.open(&other, &head, served.clone().dial()).await.unwrap();
}

#[tokio::test]
async fn an_idle_connection_is_released_and_one_with_a_stream_is_not() {
    let (served, (asked, mut ended)) = served();
    let _flows = accept_all(asked);
    let settings = PoolSettings {
        idle: Duration::from_millis(50),
        ping_every: Duration::from_millis(20),
        ..PoolSettings::default()
    };
    let pool = Pool::new(settings);
    let (flow, _) = pool.open(&key("client"), &head(), served.clone().dial()).await.unwrap();
    assert!(tokio::time::timeout(Duration::from_millis(300), ended.recv()).await.is_err());
    assert_eq!(pool.snapshot().len(), 1);
    drop(flow);
    until("the pool is empty", || pool.snapshot().is_empty()).await;
    ended.recv().await.unwrap().unwrap();
}

#[tokio::test]
async fn a_server_lets_a_connection_go_that_carries_nothing_for_long() {
    let settings = ServerSettings { idle: Duration::from_millis(100), ..ServerSettings::default() };
    let (served, (asked, mut ended)) = served_by(Node::new(), settings);
    let flows = accept_all(asked);
    let (mut send, driven) = served.raw_client().await;
    let (_, stream) = send.send_request(head().request().unwrap(), false).unwrap();
    until("the stream is accepted", || flows.lock().unwrap().len() == 1).await;
    assert!(
        tokio::time::timeout(Duration::from_millis(300), ended.recv()).await.is_err(),
        "one with a stream was ended"
    );
    flows.lock().unwrap().clear();
    // The client would keep it for ever: it still holds its end, and answers every PING. Who closes first is a race.
    let ended = tokio::time::timeout(Duration::from_secs(5), ended.recv()).await;
    assert!(ended.expect("an idle tunnel stayed").is_some());
    drop((send, stream));
    driven.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_draining_server_takes_no_new_stream_and_finishes_the_old_ones() {
    let (served, (mut asked, mut ended)) = served();
    let pool = Pool::new(PoolSettings::default());
    let mut path = path(&pool, &served, &mut asked).await;
    served.drain.send_replace(true);
    let (second, (second_asked, _second_ended)) = self::served();
    let _flows = [accept_all(asked), accept_all(second_asked)];
    let opening = async {
        while second.dials.load(Ordering::SeqCst) == 0 {
            pool.open(&key("client"), &head(), second.clone().dial()).await.unwrap();
        }
    };
    tokio::time::timeout(Duration::from_secs(5), opening).await.expect("GOAWAY was not heeded");
    assert_eq!(served.dials.load(Ordering::SeqCst), 1);
    path.client.write_all(b"still there").await.unwrap();
    path.client.shutdown().await.unwrap();
    let mut got = Vec::new();
    path.server.read_to_end(&mut got).await.unwrap();
    assert_eq!(got, b"still there");
    drop(path.server);
    assert_eq!(path.near.await.unwrap().outcome, Outcome::Orderly);
    drop(pool);
    ended.recv().await.unwrap().unwrap();
}

#[tokio::test]
async fn a_peer_that_answers_no_ping_is_dead_within_bounds() {
    let node = Node::new();
    let (client, raw_h2_stall_server) = node.pair().await;
    let pool = Pool::new(PoolSettings {
        ping_every: Duration::from_millis(30),
        dead_after: Duration::from_millis(60),
        ..PoolSettings::default()
    });
    let error = pool.open(&key("client"), &head(), async { Ok(client) }).await.err().unwrap();
    assert!(matches!(error, OpenError::Broken(_)) && error.retry(), "{error}");
    drop(raw_h2_stall_server);
}

#[tokio::test]
async fn a_stream_refused_unprocessed_goes_to_a_new_connection_at_once() {
    let (served, (asked, _)) = served();
    let _flows = accept_all(asked);
    let (client, server) = served.node.pair().await;
    // Accepts one stream, refuses every other.
    tokio::spawn(async move {
        let mut connection = h2::server::handshake(server.stream).await.unwrap();
        let mut held = Vec::new();
        while let Some(Ok((_, mut responder))) = connection.accept().await {
            if held.is_empty() {
                held.push(responder.send_response(http::Response::new(()), false).unwrap());
            } else {
                responder.send_reset(h2::Reason::REFUSED_STREAM);
            }
        }
    });
    let pool = Pool::new(PoolSettings::default());
    let _first = pool.open(&key("client"), &head(), async { Ok(client) }).await.unwrap();
    pool.open(&key("client"), &head(), served.clone().dial()).await.unwrap();
    assert_eq!(served.dials.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_client_that_sends_no_request_is_let_go() {
    let settings = ServerSettings { first_request: Duration::from_millis(50), ..ServerSettings::default() };
    let (served, (_, mut ended)) = served_by(Node::new(), settings);
    let (_raw_h2_silent_client, server) = served.node.pair().await;
    served.serve(server);
    assert!(matches!(ended.recv().await.unwrap(), Err(HboneError::FirstRequest(_))));
}

#[tokio::test]
async fn resets_in_rapid_succession_end_the_connection_and_no_other() {
    let (served, (mut asked, mut ended)) = served();
    let pool = Pool::new(PoolSettings::default());
    let mut path = path(&pool, &served, &mut asked).await;
    tokio::spawn(async move {
        while let Some(mut request) = asked.recv().await {
            request.abandoned().await;
        }
    });
    let (mut send, driver) = served.raw_client().await;
    let mut opened = 0;
    while opened < 20_000 {
        let request = HttpRequest::builder().method(Method::CONNECT).uri("10.0.0.2:80").body(()).unwrap();
        if std::future::poll_fn(|cx| send.poll_ready(cx)).await.is_err() {
            break;
        }
        let Ok((_answer, mut body)) = send.send_request(request, false) else { break };
        tokio::task::yield_now().await;
        body.send_reset(h2::Reason::CANCEL);
        opened += 1;
    }
    assert!(opened < 20_000, "the flood was never stopped");
    assert!(driver.await.unwrap().is_err());
    assert!(ended.recv().await.unwrap().is_err());
    path.client.write_all(b"undisturbed").await.unwrap();
    let mut got = [0; 11];
    path.server.read_exact(&mut got).await.unwrap();
}

#[tokio::test]
async fn floods_of_frames_are_bounded() {
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    // Headers whose block never ends; resets of what was never opened; headers beyond every limit.
    let endless = [&[0, 0, 0, 1, 0, 0, 0, 0, 1][..], &[0, 0, 1, 9, 0, 0, 0, 0, 1, 0x40].repeat(20_000)].concat();
    let resets = [0, 0, 4, 3, 0, 0, 0, 0, 9, 0, 0, 0, 8].repeat(10);
    let vast = [&[0, 0xff, 0xff, 1, 0, 0, 0, 0, 1][..], &[b'x'; 0xffff]].concat();
    for flood in [endless, resets, vast] {
        let (served, (_, mut ended)) = served();
        let (mut client, server) = served.node.pair().await;
        served.serve(server);
        tokio::spawn(async move {
            let _ = client.stream.write_all(PREFACE).await;
            let _ = client.stream.write_all(&flood).await;
            let _ = client.stream.flush().await;
            let mut sink = Vec::new();
            let _ = client.stream.read_to_end(&mut sink).await;
        });
        let end = tokio::time::timeout(Duration::from_secs(5), ended.recv()).await.expect("the flood went on");
        assert!(end.unwrap().is_err());
    }
}

#[tokio::test]
async fn floods_of_pings_and_settings_from_one_who_never_reads_hold_back_nobody_else() {
    for frame in [&[0, 0, 8, 6, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8][..], &[0, 0, 0, 4, 0, 0, 0, 0, 0][..]] {
        let (served, (mut asked, _)) = served();
        let (mut client, server) = served.node.pair().await;
        served.serve(server);
        let flood = frame.repeat(4096);
        let flooding = tokio::spawn(async move {
            client.stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
            while client.stream.write_all(&flood).await.is_ok() {}
        });
        let pool = Pool::new(PoolSettings::default());
        let mut path = path(&pool, &served, &mut asked).await;
        path.client.write_all(b"undisturbed").await.unwrap();
        let mut got = [0; 11];
        tokio::time::timeout(Duration::from_secs(5), path.server.read_exact(&mut got)).await.unwrap().unwrap();
        flooding.abort();
    }
}

#[tokio::test]
async fn half_close_goes_through_and_the_other_direction_lives_on() {
    let (served, (mut asked, _)) = served();
    let pool = Pool::new(PoolSettings::default());
    let mut path = path(&pool, &served, &mut asked).await;
    path.client.write_all(b"question").await.unwrap();
    path.client.shutdown().await.unwrap();
    let mut got = Vec::new();
    path.server.read_to_end(&mut got).await.unwrap();
    assert_eq!(got, b"question");
    path.server.write_all(b"answer").await.unwrap();
    path.server.shutdown().await.unwrap();
    got.clear();
    path.client.read_to_end(&mut got).await.unwrap();
    assert_eq!(got, b"answer");
    let (near, far) = (path.near.await.unwrap(), path.far.await.unwrap());
    assert_eq!((near.outcome, near.sent, near.received), (Outcome::Orderly, 8, 6));
    assert_eq!(far.outcome, Outcome::Orderly);
}

#[tokio::test]
async fn a_reset_on_either_side_becomes_a_reset_on_the_other() {
    let (served, (mut asked, _)) = served();
    let pool = Pool::new(PoolSettings::default());
    for (client_resets, half_closed) in [(true, false), (false, false), (true, true), (false, true)] {
        let mut path = path(&pool, &served, &mut asked).await;
        let (breaking, other) =
            if client_resets { (&mut path.client, &mut path.server) } else { (&mut path.server, &mut path.client) };
        if half_closed {
            breaking.shutdown().await.unwrap();
            assert_eq!(other.read(&mut [0; 9]).await.unwrap(), 0);
        }
        socket2::SockRef::from(&*breaking).set_linger(Some(Duration::ZERO)).unwrap();
        let mut other = if client_resets {
            drop(path.client);
            path.server
        } else {
            drop(path.server);
            path.client
        };
        let expected = if client_resets { Outcome::ResetByDownstream } else { Outcome::ResetByUpstream };
        let near = tokio::time::timeout(Duration::from_secs(5), path.near).await.expect("the reset got lost").unwrap();
        assert_eq!(near.outcome, expected);
        path.far.await.unwrap();
        let felt = match other.read(&mut [0; 9]).await {
            Err(error) => Some(error),
            Ok(_) => other.take_error().unwrap(),
        };
        // What Linux calls a reset that comes after the end of stream.
        let word = if half_closed { std::io::ErrorKind::BrokenPipe } else { std::io::ErrorKind::ConnectionReset };
        assert_eq!(felt.unwrap().kind(), word);
    }
}

#[tokio::test]
async fn a_relay_that_is_told_to_reset_resets_both_ends() {
    let (served, (mut asked, _)) = served();
    let pool = Pool::new(PoolSettings::default());
    let mut path = path(&pool, &served, &mut asked).await;
    path.control.reset(Reason::Drain);
    assert_eq!(path.near.await.unwrap().outcome, Outcome::ResetByUs(Reason::Drain));
    for side in [&mut path.client, &mut path.server] {
        assert_eq!(side.read(&mut [0; 9]).await.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    }
}

#[tokio::test]
async fn a_tls_end_without_close_notify_is_a_reset() {
    let (served, (mut asked, _)) = served();
    let pool = Pool::new(PoolSettings::default());
    let (client, server) = served.node.pair().await;
    // The far agent is killed: its socket closes, and TLS says no goodbye.
    let killed = tokio::spawn(async move {
        let mut connection = h2::server::handshake(server.stream).await.unwrap();
        let (_, mut responder) = connection.accept().await.unwrap().unwrap();
        let mut send = responder.send_response(http::Response::new(()), false).unwrap();
        send.send_data(Bytes::from_static(b"half an ans"), false).unwrap();
        let _ = tokio::time::timeout(Duration::from_millis(100), connection.accept()).await;
    });
    let (flow, _) = pool.open(&key("client"), &head(), async { Ok(client) }).await.unwrap();
    let (mut app, near) = tcp_pair().await;
    let relayed = tokio::spawn(async move { relay(TcpEnd::new(near).unwrap(), flow, &RelayControl::default()).await });
    killed.await.unwrap();
    assert_eq!(relayed.await.unwrap().outcome, Outcome::ResetByUpstream);
    let mut got = Vec::new();
    let error = app.read_to_end(&mut got).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    asked.close();
}

#[tokio::test]
async fn big_transfers_in_chunks_of_any_size_arrive_whole_both_ways() {
    let (served, (mut asked, _)) = served();
    let pool = Pool::new(PoolSettings::default());
    for seed in 0..4u64 {
        let path = path(&pool, &served, &mut asked).await;
        let mut rng = StdRng::seed_from_u64(seed);
        let data: Arc<Vec<u8>> = Arc::new((0..3_000_000).map(|_| rng.random()).collect());
        let mut sides = Vec::new();
        for (number, side) in [path.client, path.server].into_iter().enumerate() {
            let (mut read, mut write) = side.into_split();
            let (sent, expected) = (data.clone(), data.clone());
            let mut rng = StdRng::seed_from_u64(seed * 2 + number as u64);
            sides.push(tokio::spawn(async move {
                let mut rest = &sent[..];
                while !rest.is_empty() {
                    let size = rng.random_range(1..=100_000).min(rest.len());
                    write.write_all(&rest[..size]).await.unwrap();
                    rest = &rest[size..];
                }
                write.shutdown().await.unwrap();
            }));
            sides.push(tokio::spawn(async move {
                let mut got = Vec::new();
                read.read_to_end(&mut got).await.unwrap();
                assert!(got == *expected, "seed {seed}: bytes changed on the way");
            }));
        }
        for side in sides {
            side.await.unwrap();
        }
        assert_eq!(path.near.await.unwrap().outcome, Outcome::Orderly, "seed {seed}");
    }
}

#[tokio::test]
async fn a_reader_who_stalls_bounds_its_writer_and_hinders_no_other_stream() {
    let (served, (mut asked, _)) = served();
    let pool = Pool::new(PoolSettings::default());
    let stalled = path(&pool, &served, &mut asked).await;
    let mut other = path(&pool, &served, &mut asked).await;
    assert_eq!(served.dials.load(Ordering::SeqCst), 1);
    let mut client = stalled.client;
    let written = Arc::new(AtomicUsize::new(0));
    let count = written.clone();
    let writing = tokio::spawn(async move {
        while let Ok(more) = client.write(&[7; 65536]).await {
            count.fetch_add(more, Ordering::SeqCst);
        }
    });
    let mut before = usize::MAX;
    until("the writer is held back", || {
        std::mem::replace(&mut before, written.load(Ordering::SeqCst)) == before && before > 0
    })
    .await;
    // Socket buffers on both sides, and a window between: nothing grows with what is written.
    assert!(written.load(Ordering::SeqCst) < 32 << 20);
    other.client.write_all(b"undisturbed").await.unwrap();
    let mut got = [0; 11];
    tokio::time::timeout(Duration::from_secs(5), other.server.read_exact(&mut got)).await.unwrap().unwrap();
    writing.abort();
}

#[tokio::test]
async fn a_server_that_does_not_believe_the_client_says_so_before_anything_is_sent() {
    let (served, _observed) = served();
    let stranger = Node::new();
    let both = [&served.node.dir, &stranger.dir].map(|dir| std::fs::read_to_string(dir.path().join("ca.crt")).unwrap());
    std::fs::write(stranger.dir.path().join("ca.crt"), both.concat()).unwrap();
    stranger.ca.reload().unwrap();
    let (client, server) = tcp_pair().await;
    let (tls, a, b) = (served.node.tls.clone(), id("a"), id("b"));
    let accepted = tokio::spawn(async move { tls.accept_hbone(server, &id("b")).await.err().unwrap() });
    let pool = Pool::new(PoolSettings::default());
    let dial = async { Ok(stranger.tls.connect_hbone(client, &a, &b).await?) };
    let error = pool.open(&key("client"), &head(), dial).await.err().unwrap();
    assert!(error.retry(), "{error}");
    assert_eq!(accepted.await.unwrap().code(), "unknown-issuer");
}

#[tokio::test]
async fn certificates_of_seconds_rotate_under_live_traffic_and_nothing_is_dropped() {
    let identity = IdentitySettings { validity: Duration::from_secs(2), ..IdentitySettings::default() };
    let node = Node::with(Arc::new(tempfile::tempdir().unwrap()), identity, TlsSettings::default());
    let identities = node.identities.clone();
    tokio::spawn(identities.clone().run());
    identities.retain([id("a"), id("b")].into());
    let (served, (mut asked, _)) = served_by(node, ServerSettings::default());
    let pool = Pool::new(PoolSettings::default());
    let mut long = path(&pool, &served, &mut asked).await;
    let _flows = accept_all(asked);
    let mut rotations = identities.subscribe();
    let seen = *rotations.borrow_and_update();
    while *rotations.borrow() < seen + 4 {
        pool.open(&key("client"), &head(), served.clone().dial()).await.unwrap();
        long.client.write_all(b"x").await.unwrap();
        long.server.read_exact(&mut [0]).await.unwrap();
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(served.dials.load(Ordering::SeqCst) >= 2, "a connection under an old certificate took new streams");
    assert!(served.dials.load(Ordering::SeqCst) < 20, "the pool did not pool");
}

#[tokio::test]
async fn thousands_of_streams_opened_and_closed_leave_nothing_behind() {
    let (served, (mut asked, _ended)) = served();
    let pool = Pool::new(PoolSettings::default());
    let (key, head) = (key("client"), head());
    let answering = tokio::spawn(async move {
        while let Some(request) = asked.recv().await {
            drop(request.accept(""));
        }
    });
    for _ in 0..50 {
        let opens = (0..60).map(|_| pool.open(&key, &head, served.clone().dial()));
        for opened in futures_util::future::join_all(opens).await {
            opened.unwrap();
        }
    }
    until("every stream has gone", || pool.snapshot().iter().all(|connection| connection.streams == 0)).await;
    assert_eq!(served.dials.load(Ordering::SeqCst), 1);
    answering.abort();
}
