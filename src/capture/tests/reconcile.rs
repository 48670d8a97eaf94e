//! Pods captured, mended and left, by a whole reconciler.

use super::*;
use crate::capture::HandedOver;

/// A pod's namespace, named in a directory as a runtime does, joined to the present namespace by a link.
struct PodNamespace {
    directory: tempfile::TempDir,
    netns: NetNs,
}

impl PodNamespace {
    /// Makes it from within the "node"'s namespace, which has 10.9.0.1; the pod has `ip`.
    fn new(ip: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cni-1");
        std::fs::write(&path, "").unwrap();
        let node = NetNs::current().unwrap();
        netns::in_scratch(|| {
            sh(&format!("mount --bind /proc/self/ns/net {}", path.display()));
            sh("ip link set lo up");
            Ok(())
        })
        .unwrap();
        let netns = NetNs::open(&path).unwrap();
        sh(
            "ip link add veth-pod type veth peer name eth0; ip addr add 10.9.0.1/24 dev veth-pod; ip link set veth-pod up",
        );
        move_link("eth0", &netns);
        netns
            .run(|| {
                // No link-local address, which the kernel would add in its own time.
                sh(&format!("ip link set eth0 addrgenmode none; ip addr add {ip}/24 dev eth0; ip link set eth0 up"));
                Ok(())
            })
            .unwrap();
        assert_eq!(node.id(), NetNs::current().unwrap().id());
        Self { directory, netns }
    }
}

impl Drop for PodNamespace {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.directory.path().join("cni-1")).status();
    }
}

fn move_link(link: &str, to: &NetNs) {
    let fd = to.as_fd().as_raw_fd();
    sh(&format!("ip link set {link} netns /proc/{}/fd/{fd}", std::process::id()));
}

#[derive(Default)]
struct CountedFlows {
    live: AtomicUsize,
    resets: AtomicUsize,
}

impl Flows for CountedFlows {
    fn live(&self, _: &PodUid) -> usize {
        self.live.load(Ordering::SeqCst)
    }

    fn reset(&self, _: &PodUid) {
        self.resets.fetch_add(1, Ordering::SeqCst);
        self.live.store(0, Ordering::SeqCst);
    }
}

fn pod(uid: &str, ip: &str, joined: bool, probes: &[u16]) -> Delta {
    Delta::Mesh(mesh::Delta::Apply(Object::Pod(Pod {
        uid: PodUid::new(uid),
        name: NamespacedName::new("shop", "cart"),
        node: Some("one".into()),
        ips: vec![ip.parse().unwrap()],
        labels: Default::default(),
        service_account: "cart".into(),
        phase: mesh::Phase::Running,
        host_network: false,
        host_users: true,
        deleting: false,
        settings: mesh::Settings {
            mesh: Some(if joined { mesh::MeshMode::Enabled } else { mesh::MeshMode::Disabled }),
            ..Default::default()
        },
        container_ports: Vec::new(),
        probes: probes.iter().map(|port| mesh::Probe { port: *port }).collect(),
        owner: mesh::Owner { kind: "Pod".into(), name: "cart".into() },
    })))
}

struct Agent {
    model: Arc<Model>,
    flows: Arc<CountedFlows>,
    events: UnboundedReceiver<Event>,
    status: CaptureStatus,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    task: tokio::task::JoinHandle<()>,
}

impl Agent {
    fn start(directory: &Path, on_exit: OnExit, first: Delta) -> Self {
        let trust_domain = "cluster.local".parse().unwrap();
        let model = Arc::new(Model::new(mesh::MeshSettings { trust_domain, cluster_cidrs: Vec::new() }));
        model.apply([first]);
        model.set_synced();
        let settings = CaptureSettings {
            node: "one".into(),
            mode: None,
            back_end: None,
            netns_dir: directory.to_owned(),
            node_netns: None,
            ports: Ports::default(),
            // Nobody answers what is held here.
            connect: Connect::Eager,
            interval: Duration::from_millis(100),
            linger: Duration::ZERO,
            drain: Duration::from_secs(60),
            on_exit,
            handed: HandedOver::default(),
            orders: None,
            inherited: Vec::new(),
        };
        let flows = Arc::new(CountedFlows::default());
        let (sender, events) = tokio::sync::mpsc::unbounded_channel();
        let keeper = Arc::new(Keeper::detached());
        let reconciler = Reconciler::new(settings, model.clone(), flows.clone(), keeper, sender).unwrap();
        let status = reconciler.status();
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let task = tokio::spawn(reconciler.run(async move { drop(stopped.await) }));
        Self { model, flows, events, status, stop: Some(stop), task }
    }

    async fn event(&mut self) -> Event {
        let event = tokio::time::timeout(Duration::from_secs(20), self.events.recv()).await;
        event.unwrap_or_else(|_| panic!("no event came: {}", self.status.snapshot())).expect("the reconciler runs")
    }

    async fn captured(&mut self) -> Arc<CapturedPod> {
        match self.event().await {
            Event::Captured(captured) => captured,
            other => panic!("{other:?}"),
        }
    }

    async fn stop(mut self) {
        drop(self.stop.take());
        self.task.await.unwrap();
    }
}

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    for _ in 0..200 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("never: {what}");
}

fn with_runtime<F: Future>(f: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(f)
}

#[test]
fn a_pod_is_captured_mended_and_left_without_a_trace() {
    in_namespace(|| {
        with_runtime(async {
            let pod_ns = PodNamespace::new("10.9.0.2");
            let before = pod_ns.netns.run(|| Ok(sh(ROUTING))).unwrap();
            let mut agent = Agent::start(pod_ns.directory.path(), OnExit::Keep, pod("u1", "10.9.0.2", true, &[8080]));
            let mut captured = agent.captured().await;
            assert_eq!(captured.netns.id(), pod_ns.netns.id());
            assert_eq!(captured.listeners.iter().count(), 6);

            let rules = |actual: &Actual| actual.rules.places.len();
            let whole = Actual::read(&pod_ns.netns).unwrap();
            assert_eq!((rules(&whole), whole.routing_v4.routes), (2, 1));
            let flush = "iptables -w -t mangle -F; iptables -w -t mangle -X; ip -6 rule del lookup 15001; \
                         ip route flush table 15001";
            pod_ns.netns.run(|| Ok(sh(flush))).unwrap();
            until("the drift is mended", || {
                let actual = Actual::read(&pod_ns.netns).unwrap();
                actual.rules == whole.rules
                    && actual.routing_v4 == whole.routing_v4
                    && actual.routing_v6 == whole.routing_v6
            })
            .await;

            // A listener that somebody shuts is made anew, and the others go on.
            nix::sys::socket::shutdown(captured.listeners.tunnel[0].as_raw_fd(), nix::sys::socket::Shutdown::Both)
                .unwrap();
            captured = agent.captured().await;
            assert!(captured.listeners.iter().all(|(_, listener)| socket::is_listening(listener)));

            // Leaving waits for the last flow, with nothing new captured, and joining again meanwhile is one set.
            agent.flows.live.store(1, Ordering::SeqCst);
            agent.model.apply([pod("u1", "10.9.0.2", false, &[8080])]);
            assert!(matches!(agent.event().await, Event::Leaving(_)));
            until("only restoration is left", || {
                let text = Actual::read(&pod_ns.netns).unwrap().rules.to_string();
                !text.contains("--ctstate NEW") && !text.contains("15006") && text.contains("-j MARK")
            })
            .await;
            agent.model.apply([pod("u1", "10.9.0.2", true, &[8080])]);
            assert_eq!(agent.captured().await.marks, captured.marks);
            until("it is whole again", || Actual::read(&pod_ns.netns).unwrap().rules == whole.rules).await;

            // An agent that ends and starts again takes over what it finds.
            agent.stop().await;
            assert_eq!(Actual::read(&pod_ns.netns).unwrap().rules, whole.rules);
            drop(captured);
            let mut agent = Agent::start(pod_ns.directory.path(), OnExit::Remove, pod("u1", "10.9.0.2", true, &[8080]));
            let marks = agent.captured().await.marks;
            let again = Actual::read(&pod_ns.netns).unwrap();
            assert_eq!(again.rules, whole.rules);
            assert_eq!(again.routing_v4, whole.routing_v4);
            assert_eq!(again.rules.marks(), Some(marks));
            agent.stop().await;
            let after = Actual::read(&pod_ns.netns).unwrap();
            assert!(after.rules.is_empty(), "{after}");
            assert_eq!(after.timeouts, Some(Timeouts::DEFAULT));
            assert_eq!(pod_ns.netns.run(|| Ok(sh(ROUTING))).unwrap(), before);
        });
    });
}

#[test]
fn a_pod_whose_loopback_is_taken_down_first_is_ending_and_has_not_failed() {
    in_namespace(|| {
        with_runtime(async {
            let pod_ns = PodNamespace::new("10.9.0.2");
            let mut agent = Agent::start(pod_ns.directory.path(), OnExit::Remove, pod("u1", "10.9.0.2", true, &[]));
            agent.captured().await;
            let mut published = agent.status.subscribe();
            pod_ns.netns.run(|| Ok(sh("ip link set lo down"))).unwrap();
            for _ in 0..4 {
                published.changed().await.unwrap();
                let states: Vec<_> = agent.status.snapshot().pods.iter().map(|pod| pod.state).collect();
                assert_eq!(states, [PodState::Captured]);
            }
            let routes = || Actual::read(&pod_ns.netns).unwrap().routing_v6.routes;
            assert_eq!(routes(), 0, "the route of IPv6 went with the loopback");
            pod_ns.netns.run(|| Ok(sh("ip link set lo up"))).unwrap();
            until("the route is back", || routes() == 1).await;
            agent.stop().await;
        });
    });
}

#[test]
fn rules_of_another_mesh_are_refused_and_told() {
    in_namespace(|| {
        with_runtime(async {
            let pod_ns = PodNamespace::new("10.9.0.2");
            pod_ns.netns.run(|| Ok(sh("iptables -w -t nat -N ISTIO_OUTPUT"))).unwrap();
            let agent = Agent::start(pod_ns.directory.path(), OnExit::Remove, pod("u1", "10.9.0.2", true, &[]));
            until("it is refused", || agent.status.snapshot().to_string().contains("rules of Istio are in the pod"))
                .await;
            assert!(Actual::read(&pod_ns.netns).unwrap().rules.is_empty());
        });
    });
}

#[test]
fn a_namespace_that_an_unprivileged_process_made_gets_nothing_and_is_told() {
    in_namespace(|| {
        with_runtime(async {
            let impostor = "ip link set lo up; ip addr add 10.9.0.3/32 dev lo; echo ready; exec sleep 60";
            let mut child = Command::new("setpriv")
                .args(["--reuid=65534", "--regid=65534", "--clear-groups", "unshare", "-Urn", "sh", "-ec", impostor])
                .stdout(std::process::Stdio::piped())
                .spawn()
                .unwrap();
            let mut ready = [0; 6];
            child.stdout.as_mut().unwrap().read_exact(&mut ready).unwrap();
            let directory = tempfile::tempdir().unwrap();
            let mut agent = Agent::start(directory.path(), OnExit::Remove, pod("u1", "10.9.0.3", true, &[]));
            until("it is told", || {
                agent
                    .status
                    .snapshot()
                    .pods
                    .iter()
                    .any(|pod| pod.state == PodState::Pending && pod.impostors.len() == 1)
            })
            .await;
            assert!(agent.events.try_recv().is_err(), "an impostor was captured");
            drop(agent);

            // The pod itself is captured beside it, and the impostor still told.
            let pod_ns = PodNamespace::new("10.9.0.3");
            let mut agent = Agent::start(pod_ns.directory.path(), OnExit::Remove, pod("u1", "10.9.0.3", true, &[]));
            assert_eq!(agent.captured().await.netns.id(), pod_ns.netns.id());
            until("it is told", || agent.status.snapshot().pods.iter().any(|pod| pod.impostors.len() == 1)).await;
            child.kill().unwrap();
            child.wait().unwrap();
        });
    });
}

#[test]
fn a_namespace_of_an_earlier_pod_is_not_given_to_the_next_holder_of_its_address() {
    in_namespace(|| {
        with_runtime(async {
            let pod_ns = PodNamespace::new("10.9.0.4");
            let mut agent = Agent::start(pod_ns.directory.path(), OnExit::Remove, pod("u1", "10.9.0.4", true, &[]));
            agent.captured().await;
            agent.model.apply([pod("u2", "10.9.0.4", true, &[])]);
            assert!(matches!(agent.event().await, Event::Leaving(uid) if uid.as_str() == "u1"));
            assert!(matches!(agent.event().await, Event::Gone(uid) if uid.as_str() == "u1"));
            until("it waits", || agent.status.snapshot().to_string().contains("namespace of an earlier pod")).await;
            pod_ns.netns.run(|| Ok(sh("ip addr del 10.9.0.4/24 dev eth0"))).unwrap();
            until("the address has moved", || agent.status.snapshot().to_string().contains("holds its address yet"))
                .await;
            pod_ns.netns.run(|| Ok(sh("ip addr add 10.9.0.4/24 dev eth0"))).unwrap();
            assert_eq!(agent.captured().await.workload.uid().as_str(), "u2");
        });
    });
}

#[test]
fn probes_reach_the_application_and_everything_else_reaches_us() {
    in_namespace(|| {
        with_runtime(async {
            let pod_ns = PodNamespace::new("10.9.0.2");
            let mut agent =
                Agent::start(pod_ns.directory.path(), OnExit::Remove, pod("u1", "10.9.0.2", true, &[8080, 9090]));
            // Inbound at first, then the node's addresses are known and rules for probes go in.
            let captured = agent.captured().await;
            let app = pod_ns.netns.enter(|| std::net::TcpListener::bind("10.9.0.2:8080")).unwrap();
            let probed = |port: u16| async move { tokio::net::TcpStream::connect(("10.9.0.2", port)).await };
            probed(8080).await.expect("a live port answers");
            app.accept().expect("the application has the probe");
            let dead = probed(9090).await.expect_err("nothing listens");
            assert_eq!(dead.kind(), io::ErrorKind::ConnectionRefused);

            // A port that is not probed, and one that is but from another's socket, are ordinary plaintext.
            probed(7070).await.expect("we accept");
            let (accepted, client) = captured.listeners.plaintext[0].accept().expect("it came to us");
            let meant = socket::original_destination(&accepted, captured.mode).unwrap();
            assert_eq!((meant, client.ip()), ("10.9.0.2:7070".parse().unwrap(), "10.9.0.1".parse().unwrap()));
            let masqueraded = netns::in_scratch(NetNs::current).unwrap();
            sh("sysctl -qw net.ipv4.ip_forward=1");
            sh(
                "ip link add veth-out type veth peer name out0; ip addr add 10.8.0.1/24 dev veth-out; ip link set veth-out up",
            );
            move_link("out0", &masqueraded);
            sh("iptables -w -t nat -A POSTROUTING -s 10.8.0.2 -j MASQUERADE");
            let setup = "ip link set lo up; ip addr add 10.8.0.2/24 dev out0; ip link set out0 up; ip route add default via 10.8.0.1";
            masqueraded.run(|| Ok(sh(setup))).unwrap();
            let from = masqueraded.clone();
            let connect = move || from.run(|| std::net::TcpStream::connect("10.9.0.2:8080"));
            let stream = tokio::task::spawn_blocking(connect).await.unwrap().expect("we accept");
            let (accepted, client) = captured.listeners.plaintext[0].accept().expect("it came to us");
            assert_eq!(client.ip().to_string(), "10.9.0.1");
            assert_eq!(socket::original_destination(&accepted, captured.mode).unwrap().port(), 8080);

            // Whose ends those are is known in either direction, and no others.
            let (server, away) = ("10.9.0.2:8080".parse().unwrap(), "10.9.0.1:1".parse().unwrap());
            assert!(sock_diag::tuple_in_use(&pod_ns.netns, server, client).unwrap());
            assert!(sock_diag::tuple_in_use(&pod_ns.netns, client, server).unwrap());
            assert!(!sock_diag::tuple_in_use(&pod_ns.netns, away, server).unwrap());
            assert!(sock_diag::is_local_socket(&masqueraded, stream.local_addr().unwrap(), server).unwrap());
            agent.stop().await;
        });
    });
}

#[test]
fn outbound_is_captured_and_the_application_sees_the_clients_address() {
    in_namespace(|| {
        with_runtime(async {
            let pod_ns = PodNamespace::new("10.9.0.2");
            let mut agent = Agent::start(pod_ns.directory.path(), OnExit::Remove, pod("u1", "10.9.0.2", true, &[]));
            let captured = agent.captured().await;
            pod_ns.netns.run(|| Ok(sh("ip route add default via 10.9.0.1"))).unwrap();
            let stream = pod_ns.netns.run(|| std::net::TcpStream::connect("192.0.2.7:443")).expect("we accept");
            let (accepted, client) = captured.listeners.outbound[0].accept().expect("it came to us");
            assert_eq!(client, stream.local_addr().unwrap());
            let meant = socket::original_destination(&accepted, captured.mode).unwrap();
            assert_eq!(meant, "192.0.2.7:443".parse().unwrap());

            let app = pod_ns.netns.enter(|| std::net::TcpListener::bind("10.9.0.2:8080")).unwrap();
            let options = socket::ConnectOptions {
                mark: captured.marks.own,
                bind: Some("192.0.2.9:40001".parse().unwrap()),
                reset_on_close: true,
                user_timeout: None,
                keepalive: None,
            };
            let server: std::net::SocketAddr = "10.9.0.2:8080".parse().unwrap();
            let ours = socket::connect_socket(&captured.netns, server, &options).unwrap();
            let connecting = ours.connect(&server.into());
            assert!(connecting.is_ok() || connecting.is_err_and(|e| e.raw_os_error() == Some(libc::EINPROGRESS)));
            let (mut at_app, seen) = app.accept().unwrap();
            assert_eq!(seen, "192.0.2.9:40001".parse().unwrap());
            at_app.write_all(b"hello").unwrap();
            ours.set_nonblocking(false).unwrap();
            let mut read = [0; 5];
            std::net::TcpStream::from(ours).read_exact(&mut read).unwrap();
            assert_eq!(&read, b"hello");
            agent.stop().await;
        });
    });
}

/// All but what the kernel adds by itself, some time after a link came up.
const ROUTING: &str = "ip rule; ip route show table all | grep -vE 'fe80::|ff00::'; ip -6 rule";
