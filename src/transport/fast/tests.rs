use std::future::{pending, poll_fn};
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::LocalSet;

use super::flow::{Progress, Side, carry};
use super::frame::Kind;
use super::pool::Dial;
use super::*;
use crate::mesh::{PodUid, Reason};
use crate::transport::hbone::{OpenError, PoolKey, Refusal};
use crate::transport::relay::{Ended, Outcome, RelayControl, TcpEnd};
use crate::transport::tls::tests::{Node, id, tcp_pair};
use crate::transport::tls::{Offer, Spoken};

const WAIT: Duration = Duration::from_secs(20);

/// A node whose pod `b` answers flows as its `answer` says.
#[derive(Clone)]
struct World {
    node: Arc<Node>,
    dials: Arc<AtomicUsize>,
    answer: Arc<dyn Fn(SocketAddr) -> Answer + Send + Sync>,
    drain: watch::Sender<bool>,
    served: watch::Sender<usize>,
    settings: ServerSettings,
}

/// What a server does with one flow.
enum Answer {
    Refuse(Refusal),
    /// Carries it to this application.
    Accept(TcpStream),
    /// Reads it as a stream, and says it back; or drops it behind its first word.
    SayBack,
    Drop,
    /// Breaks the connection without a word.
    Break,
    /// Closes the connection in order, without a word.
    Close,
    Never,
}

impl World {
    fn new(answer: impl Fn(SocketAddr) -> Answer + Send + Sync + 'static) -> Self {
        Self {
            node: Arc::new(Node::new()),
            dials: Arc::default(),
            answer: Arc::new(answer),
            drain: watch::Sender::new(false),
            served: watch::Sender::new(0),
            settings: ServerSettings::default(),
        }
    }

    fn pool() -> Pool {
        Pool::new(PoolSettings { most_per_key: 64, idle_per_key: 64, ..PoolSettings::default() })
    }

    fn dial(&self) -> Dial {
        let world = self.clone();
        Rc::new(move || {
            let world = world.clone();
            Box::pin(async move {
                world.dials.fetch_add(1, Ordering::Relaxed);
                let (client, server) = tcp_pair().await;
                tokio::task::spawn_local(world.clone().serve(server));
                world.node.tls.connect(client, &id("a"), &id("b"), Offer::Both).await.map_err(OpenError::from)
            })
        })
    }

    async fn serve(self, tcp: TcpStream) {
        let Ok(Spoken::Fast(session)) = self.node.tls.accept(tcp, &id("b"), Offer::Both).await else { return };
        let mut server = Server::new(session, self.settings);
        let mut draining = self.drain.subscribe();
        let mut drain = pin!(async move {
            let _ = draining.wait_for(|drain| *drain).await;
        });
        while let Ok(Some(request)) = server.next(drain.as_mut()).await {
            let destination = request.header().unwrap().destination;
            let after = match (self.answer)(destination) {
                Answer::Refuse(refusal) => request.refuse(refusal),
                Answer::Accept(application) => {
                    let control = RelayControl::default();
                    let (_, after) = request.accept(TcpEnd::new(application).unwrap(), &control).await;
                    self.served.send_modify(|served| *served += 1);
                    after
                }
                answer @ (Answer::SayBack | Answer::Drop) => {
                    let (mut stream, lent) = server.into_stream().unwrap();
                    if let Answer::SayBack = answer {
                        let mut said = Vec::new();
                        stream.read_to_end(&mut said).await.unwrap();
                        stream.write_all(&said).await.unwrap();
                        stream.shutdown().await.unwrap();
                    } else {
                        stream.read_exact(&mut [0]).await.unwrap();
                    }
                    drop(stream);
                    let Some(returned) = lent.returned().await else { return };
                    server = returned;
                    continue;
                }
                Answer::Break => return,
                Answer::Close => break,
                Answer::Never => pending().await,
            };
            if !server.settled(after).await {
                return;
            }
        }
        server.close().await;
    }

    fn dialled(&self) -> usize {
        self.dials.load(Ordering::Relaxed)
    }
}

/// Applications at the far end, in the order in which they are asked for.
fn accepting() -> (World, tokio::sync::mpsc::UnboundedReceiver<TcpStream>) {
    let (sender, receiver) = tokio::sync::mpsc::unbounded_channel();
    let world = World::new(move |_| {
        let (near, far) = std_pair();
        let _ = sender.send(far);
        Answer::Accept(near)
    });
    (world, receiver)
}

fn std_pair() -> (TcpStream, TcpStream) {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let one = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (other, _) = listener.accept().unwrap();
    for stream in [&one, &other] {
        stream.set_nonblocking(true).unwrap();
    }
    (TcpStream::from_std(one).unwrap(), TcpStream::from_std(other).unwrap())
}

fn key() -> PoolKey {
    PoolKey {
        source_pod: PodUid::new("a"),
        source_ip: [10, 0, 0, 1].into(),
        source_identity: id("a"),
        destination_pod: PodUid::new("b"),
        destination_addr: "10.0.0.2:15008".parse().unwrap(),
        destination_identity: id("b"),
    }
}

fn header(port: u16) -> Header {
    Header { destination: SocketAddr::from(([10, 0, 0, 2], port)), traceparent: None, behalf: None }
}

/// An application at the near end, and what the agent has of it.
struct Client {
    application: TcpStream,
    end: TcpEnd,
    early: Early,
}

impl Client {
    async fn new() -> Self {
        let (application, near) = tcp_pair().await;
        let end = TcpEnd::new(near).unwrap();
        Self { application, early: Early::of(&end), end }
    }

    async fn open(&mut self, pool: &Pool, world: &World, port: u16) -> Result<Flow, OpenError> {
        match pool.open(&key(), &header(port), &mut self.early, world.dial()).await? {
            Opened::Fast(flow, _) => Ok(flow),
            Opened::Hbone(_) => panic!("the peer speaks HBONE"),
        }
    }

    /// Opens a flow and has it carried; the application is left.
    async fn carried(mut self, pool: &Pool, world: &World) -> (TcpStream, tokio::task::JoinHandle<Ended>) {
        let flow = self.open(pool, world, 80).await.unwrap();
        let Self { application, end, early } = self;
        drop(early);
        let ended = tokio::task::spawn_local(async move { flow.carry(end, &RelayControl::default()).await });
        (application, ended)
    }
}

async fn local<F: Future<Output = ()>>(test: F) {
    tokio::time::timeout(WAIT, LocalSet::new().run_until(test)).await.expect("the test hangs");
}

async fn quiet(pool: &Pool, busy: usize) {
    while pool.snapshot().iter().filter(|status| status.streams == 1).count() != busy {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_flow_that_the_server_reads_as_a_stream_gives_its_connection_back() {
    local(async {
        let world = World::new(|to| if to.port() == 80 { Answer::SayBack } else { Answer::Drop });
        let pool = World::pool();
        for _ in 0..5 {
            let (mut client, ended) = Client::new().await.carried(&pool, &world).await;
            client.write_all(b"question").await.unwrap();
            client.shutdown().await.unwrap();
            let mut got = Vec::new();
            client.read_to_end(&mut got).await.unwrap();
            assert_eq!(got, b"question");
            assert_eq!(ended.await.unwrap().outcome, Outcome::Orderly);
            quiet(&pool, 0).await;
            // What is dropped halfway is reset, and no end.
            let mut client = Client::new().await;
            let mut stream = client.open(&pool, &world, 81).await.unwrap().into_stream();
            stream.write_all(b"half a question").await.unwrap();
            let error = stream.read(&mut [0]).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionReset);
            drop(stream);
            quiet(&pool, 0).await;
        }
        assert!(world.dialled() <= 2, "{} connections", world.dialled());
    })
    .await;
}

#[tokio::test]
async fn a_flow_carries_bytes_both_ways_and_its_connection_carries_the_next() {
    local(async {
        let ((world, mut applications), pool) = (accepting(), World::pool());
        for round in 0..5 {
            let (mut client, ended) = Client::new().await.carried(&pool, &world).await;
            let mut server = applications.recv().await.unwrap();
            client.write_all(b"question").await.unwrap();
            client.shutdown().await.unwrap();
            let mut got = Vec::new();
            server.read_to_end(&mut got).await.unwrap();
            assert_eq!(got, b"question");
            server.write_all(b"the answer").await.unwrap();
            drop(server);
            got.clear();
            client.read_to_end(&mut got).await.unwrap();
            assert_eq!(got, b"the answer");
            let ended = ended.await.unwrap();
            assert_eq!((ended.sent, ended.received, ended.outcome), (8, 10, Outcome::Orderly));
            quiet(&pool, 0).await;
            // One for the first flow, and one ahead of those that follow.
            assert!(world.dialled() <= 2, "round {round} made connection {}", world.dialled());
        }
    })
    .await;
}

#[tokio::test]
async fn megabytes_go_both_ways_at_once() {
    local(async {
        let ((world, mut applications), pool) = (accepting(), World::pool());
        let (client, ended) = Client::new().await.carried(&pool, &world).await;
        let server = applications.recv().await.unwrap();
        const SIZE: usize = 20 << 20;
        let exchange = |stream: TcpStream, seed: usize, theirs: usize| async move {
            let (mut reader, mut writer) = stream.into_split();
            let sending = async move {
                let data: Vec<u8> = (0..SIZE).map(|at| ((at + seed) % 251) as u8).collect();
                writer.write_all(&data).await.unwrap();
                writer.shutdown().await.unwrap();
            };
            let reading = async move {
                let mut got = Vec::new();
                reader.read_to_end(&mut got).await.unwrap();
                got.len() == SIZE && got.iter().enumerate().all(|(at, byte)| *byte == ((at + theirs) % 251) as u8)
            };
            tokio::join!(sending, reading).1
        };
        let (client, server) = tokio::join!(exchange(client, 1, 2), exchange(server, 2, 1));
        assert!(client && server, "bytes came otherwise than they were sent");
        let ended = ended.await.unwrap();
        assert_eq!((ended.sent, ended.received, ended.outcome), (SIZE as u64, SIZE as u64, Outcome::Orderly));
    })
    .await;
}

#[tokio::test]
async fn a_refusal_gives_back_what_was_said_early_and_the_next_endpoint_gets_it() {
    local(async {
        let (sender, mut applications) = tokio::sync::mpsc::unbounded_channel();
        let world = World::new(move |destination| {
            if destination.port() == 1 {
                return Answer::Refuse(Refusal::Unreachable);
            }
            let (near, far) = std_pair();
            sender.send(far).unwrap();
            Answer::Accept(near)
        });
        let pool = World::pool();
        let mut client = Client::new().await;
        client.application.write_all(b"said early").await.unwrap();
        client.application.shutdown().await.unwrap();
        let refused = client.open(&pool, &world, 1).await.err().unwrap();
        assert!(matches!(refused, OpenError::Refused { status: 503 }) && refused.retry(), "{refused}");
        let flow = client.open(&pool, &world, 2).await.unwrap();
        assert_eq!(world.dialled(), 1, "a refusal cost the connection");
        let mut server = applications.recv().await.unwrap();
        let Client { end, early, mut application } = client;
        drop(early);
        let carried = tokio::task::spawn_local(async move { flow.carry(end, &RelayControl::default()).await });
        let mut got = Vec::new();
        server.read_to_end(&mut got).await.unwrap();
        assert_eq!(got, b"said early", "once, and whole");
        drop(server);
        assert_eq!(application.read(&mut [0]).await.unwrap(), 0);
        assert_eq!(carried.await.unwrap().outcome, Outcome::Orderly);
    })
    .await;
}

#[tokio::test]
async fn what_may_be_said_early_is_bounded() {
    local(async {
        let (world, pool) = (World::new(|_| Answer::Never), World::pool());
        let mut client = Client::new().await;
        let mut application = std::mem::replace(&mut client.application, tcp_pair().await.0);
        let writing = tokio::task::spawn_local(async move {
            let _ = application.write_all(&vec![7; 32 << 20]).await;
        });
        // Each try goes on where the one before was given up; the last begins with all that may be kept.
        let mut full = false;
        while !full {
            full = client.early.kept().len() >= 64 * 1024;
            let opening = client.open(&pool, &world, 1);
            assert!(tokio::time::timeout(Duration::from_millis(100), opening).await.is_err());
        }
        assert_eq!(client.early.kept().len(), 64 * 1024);
        writing.abort();
    })
    .await;
}

#[tokio::test]
async fn a_break_without_an_answer_is_tried_again_only_while_nothing_was_said() {
    local(async {
        let (world, pool) = (World::new(|_| Answer::Break), World::pool());
        let silent = Client::new().await.open(&pool, &world, 1).await.err().unwrap();
        assert!(silent.is_passing() && silent.retry(), "{silent}");
        let mut talkative = Client::new().await;
        talkative.application.write_all(b"said early").await.unwrap();
        let lost = talkative.open(&pool, &world, 1).await.err().unwrap();
        assert!(matches!(lost, OpenError::Lost(_)) && !lost.is_passing() && !lost.retry(), "{lost}");
    })
    .await;
}

#[tokio::test]
async fn a_close_in_order_instead_of_an_answer_costs_no_flow() {
    local(async {
        let turns = AtomicUsize::new(0);
        let (sender, mut applications) = tokio::sync::mpsc::unbounded_channel();
        let world = World::new(move |_| {
            if turns.fetch_add(1, Ordering::Relaxed) < 2 {
                return Answer::Close;
            }
            let (near, far) = std_pair();
            sender.send(far).unwrap();
            Answer::Accept(near)
        });
        let pool = World::pool();
        let mut client = Client::new().await;
        client.application.write_all(b"said early").await.unwrap();
        client.open(&pool, &world, 1).await.unwrap();
        let mut got = [0; 10];
        applications.recv().await.unwrap().read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"said early");
    })
    .await;
}

#[tokio::test]
async fn connections_that_the_server_closed_while_they_waited_are_passed_over() {
    local(async {
        let ((world, mut applications), pool) = (accepting(), World::pool());
        let (client, ended) = Client::new().await.carried(&pool, &world).await;
        drop((client, applications.recv().await.unwrap()));
        ended.await.unwrap();
        quiet(&pool, 0).await;
        assert_eq!(pool.snapshot().len(), 1);
        world.drain.send_replace(true);
        // The server's close is on its way, or here: either way the flow comes about.
        let (world, mut applications) = accepting();
        for _ in 0..3 {
            let (client, _ended) = Client::new().await.carried(&pool, &world).await;
            drop((client, applications.recv().await.unwrap()));
        }
    })
    .await;
}

#[tokio::test]
async fn a_reset_is_carried_both_ways_behind_the_last_words_and_the_connection_lives() {
    local(async {
        let ((world, mut applications), pool) = (accepting(), World::pool());
        for (from_client, early) in [(true, false), (false, false), (true, true), (true, false)] {
            let mut client = Client::new().await;
            if early {
                // Before anybody has accepted.
                client.application.write_all(b"last words").await.unwrap();
                SockRef::from(&client.application).set_linger(Some(Duration::ZERO)).unwrap();
                drop(std::mem::replace(&mut client.application, tcp_pair().await.0));
                let (_, ended) = client.carried(&pool, &world).await;
                let mut got = Vec::new();
                let mut server = applications.recv().await.unwrap();
                assert_eq!(server.read_to_end(&mut got).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
                assert_eq!(got, b"last words");
                assert_eq!(ended.await.unwrap().outcome, Outcome::ResetByDownstream);
                quiet(&pool, 0).await;
                continue;
            }
            let (client, ended) = client.carried(&pool, &world).await;
            let server = applications.recv().await.unwrap();
            let (mut one, mut other) = if from_client { (client, server) } else { (server, client) };
            one.write_all(b"last words").await.unwrap();
            SockRef::from(&one).set_linger(Some(Duration::ZERO)).unwrap();
            drop(one);
            let mut got = Vec::new();
            assert_eq!(other.read_to_end(&mut got).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
            assert_eq!(got, b"last words");
            let wanted = if from_client { Outcome::ResetByDownstream } else { Outcome::ResetByUpstream };
            assert_eq!(ended.await.unwrap().outcome, wanted);
            quiet(&pool, 0).await;
        }
        assert!(world.dialled() <= 2, "a reset cost the connection: {} were made", world.dialled());
    })
    .await;
}

#[tokio::test]
async fn a_reset_with_megabytes_under_way_ends_both_sides() {
    local(async {
        let ((world, mut applications), pool) = (accepting(), World::pool());
        let (mut client, ended) = Client::new().await.carried(&pool, &world).await;
        let mut server = applications.recv().await.unwrap();
        // Nobody reads: everything on the way is full.
        while tokio::time::timeout(Duration::from_millis(100), client.write(&[1; 65536])).await.is_ok() {}
        SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
        drop(client);
        assert_eq!(ended.await.unwrap().outcome, Outcome::ResetByDownstream);
        // Also to a server that never reads.
        poll_fn(|cx| {
            let _ = server.poll_write_ready(cx);
            cx.waker().wake_by_ref();
            match server.take_error() {
                Ok(Some(_)) | Err(_) => std::task::Poll::Ready(()),
                Ok(None) => std::task::Poll::Pending,
            }
        })
        .await;
        let _ = server.shutdown().await;
    })
    .await;
}

#[tokio::test]
async fn a_slow_reader_holds_no_more_than_its_buffers() {
    local(async {
        let ((world, mut applications), pool) = (accepting(), World::pool());
        let (mut client, _ended) = Client::new().await.carried(&pool, &world).await;
        let server = applications.recv().await.unwrap();
        SockRef::from(&server).set_recv_buffer_size(4096).unwrap();
        let mut sent = 0_usize;
        while let Ok(written) = tokio::time::timeout(Duration::from_millis(200), client.write(&[1; 65536])).await {
            sent += written.unwrap();
        }
        // What the kernel holds on six sockets, and two buffers of ours.
        assert!(sent < 64 << 20, "{sent} bytes were taken for somebody who reads nothing");
        drop(server);
    })
    .await;
}

#[tokio::test]
async fn frames_out_of_their_order_end_the_connection() {
    for wrong in [Kind::Open, Kind::Ok, Kind::Refused, Kind::Done, Kind::ResetAck] {
        let node = Node::new();
        let (mut client, mut server) = node.fast_pair().await;
        let payload: &[u8] = match wrong {
            Kind::Open => &[1, 4, 0, 80, 10, 0, 0, 1],
            Kind::Refused => &[1, 145],
            _ => &[],
        };
        client.stream.push(wrong, payload).unwrap();
        poll_fn(|cx| client.stream.poll_flush(cx)).await.unwrap();
        let (application, _other) = tcp_pair().await;
        let end = TcpEnd::new(application).unwrap();
        let control = RelayControl::default();
        let (ended, after) = carry(end, &mut server.stream, Progress::default(), None, Side::Server, &control).await;
        assert_eq!((ended.outcome, after), (Outcome::ResetByDownstream, After::Spent), "{wrong:?}");
    }
}

#[tokio::test]
async fn an_end_without_a_close_is_a_reset() {
    for in_order in [true, false] {
        let node = Node::new();
        let (mut client, mut server) = node.fast_pair().await;
        client.stream.push(Kind::Data, b"half of").unwrap();
        poll_fn(|cx| client.stream.poll_flush(cx)).await.unwrap();
        let (application, mut other) = tcp_pair().await;
        let carried = async {
            let end = TcpEnd::new(application).unwrap();
            let control = RelayControl::default();
            carry(end, &mut server.stream, Progress::default(), None, Side::Server, &control).await
        };
        let leaving = async {
            let mut got = [0; 7];
            other.read_exact(&mut got).await.unwrap();
            if in_order {
                client.stream.close().await;
            } else {
                drop(client);
            }
            other.read(&mut [0]).await.unwrap_err().kind()
        };
        let ((ended, after), seen) = tokio::join!(carried, leaving);
        assert_eq!((ended.outcome, after), (Outcome::ResetByDownstream, After::Spent));
        assert_eq!(seen, ErrorKind::ConnectionReset);
    }
}

#[tokio::test]
async fn the_agent_ends_a_flow_with_its_reason() {
    local(async {
        let ((world, mut applications), pool) = (accepting(), World::pool());
        let mut client = Client::new().await;
        let flow = client.open(&pool, &world, 80).await.unwrap();
        let mut server = applications.recv().await.unwrap();
        let control = RelayControl::default();
        control.reset(Reason::Drain);
        let ended = flow.carry(client.end, &control).await;
        assert_eq!(ended.outcome, Outcome::ResetByUs(Reason::Drain));
        assert_eq!(server.read(&mut [0]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    })
    .await;
}

#[tokio::test]
async fn a_pod_that_leaves_takes_its_connections_along() {
    local(async {
        let ((world, mut applications), pool) = (accepting(), World::pool());
        let (client, ended) = Client::new().await.carried(&pool, &world).await;
        let server = applications.recv().await.unwrap();
        pool.evict(&PodUid::new("somebody else"));
        assert_eq!(pool.snapshot().len(), 1);
        pool.evict(&PodUid::new("b"));
        // The flow goes on to its end, and its connection takes no other.
        drop((client, server));
        assert_eq!(ended.await.unwrap().outcome, Outcome::Orderly);
        pool.close().await;
        assert_eq!(pool.snapshot().len(), 0);
    })
    .await;
}

#[tokio::test]
async fn a_flow_too_many_shares_a_connection_and_none_is_made_ahead_for_it() {
    local(async {
        let (world, mut applications) = accepting();
        let pool = Pool::new(PoolSettings { most_per_key: 3, ..PoolSettings::default() });
        // The pool sees that the key is asked for again.
        for _ in 0..2 {
            let (client, ended) = Client::new().await.carried(&pool, &world).await;
            drop((client, applications.recv().await.unwrap()));
            ended.await.unwrap();
            quiet(&pool, 0).await;
        }
        let mut flows = Vec::new();
        for number in 1..=3 {
            flows.push((Client::new().await.carried(&pool, &world).await, applications.recv().await.unwrap()));
            // The next flow finds the one that is made ahead.
            while pool.snapshot().len() < 3.min(number + 1) {
                tokio::task::yield_now().await;
            }
        }
        let mut client = Client::new().await;
        let shared = pool.open(&key(), &header(80), &mut client.early, world.dial()).await.unwrap();
        assert!(matches!(shared, Opened::Hbone(None)));
        assert_eq!((pool.snapshot().len(), world.dialled()), (3, 3));
    })
    .await;
}

#[tokio::test]
async fn no_flow_begins_under_a_trust_bundle_of_yesterday() {
    local(async {
        let ((world, mut applications), pool) = (accepting(), World::pool());
        let (client, ended) = Client::new().await.carried(&pool, &world).await;
        drop((client, applications.recv().await.unwrap()));
        ended.await.unwrap();
        quiet(&pool, 0).await;
        let before = world.dialled();
        let another = Node::new();
        let both =
            [&*world.node, &another].map(|node| std::fs::read_to_string(node.dir.path().join("ca.crt")).unwrap());
        std::fs::write(world.node.dir.path().join("ca.crt"), both.concat()).unwrap();
        world.node.ca.reload().unwrap();
        let (client, _ended) = Client::new().await.carried(&pool, &world).await;
        drop((client, applications.recv().await.unwrap()));
        assert!(world.dialled() > before, "the old connection took a new flow");
    })
    .await;
}

#[tokio::test]
async fn many_flows_at_once_leave_nothing_behind() {
    local(async {
        let ((world, mut applications), pool) = (accepting(), World::pool());
        let echo = tokio::task::spawn_local(async move {
            while let Some(mut server) = applications.recv().await {
                tokio::task::spawn_local(async move {
                    let (mut reader, mut writer) = server.split();
                    let _ = tokio::io::copy(&mut reader, &mut writer).await;
                });
            }
        });
        let mut flows = tokio::task::JoinSet::new();
        for number in 0..60_usize {
            let (pool, world) = (pool.clone(), world.clone());
            flows.spawn_local(async move {
                let (mut client, ended) = Client::new().await.carried(&pool, &world).await;
                let data = vec![number as u8; 1 + number * 997];
                let (mut reader, mut writer) = client.split();
                let mut got = Vec::new();
                let sending = async {
                    writer.write_all(&data).await.unwrap();
                    writer.shutdown().await.unwrap();
                };
                let (read, ()) = tokio::join!(reader.read_to_end(&mut got), sending);
                read.unwrap();
                assert!(got == data);
                assert_eq!(ended.await.unwrap().outcome, Outcome::Orderly);
            });
        }
        while let Some(flow) = flows.join_next().await {
            flow.unwrap();
        }
        quiet(&pool, 0).await;
        pool.close().await;
        echo.abort();
    })
    .await;
}
