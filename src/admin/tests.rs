use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::mutation::mutated_text;

#[derive(Default)]
struct Agent {
    reasons: Mutex<Vec<String>>,
    drains: AtomicUsize,
}

impl Dump for Agent {
    fn dump(&self) -> serde_json::Value {
        serde_json::json!({ "pods": ["shop/cart"] })
    }
}

impl Control for Agent {
    fn readiness(&self) -> Readiness {
        Readiness { reasons: self.reasons.lock().unwrap().clone() }
    }

    fn drain(&self) {
        self.drains.fetch_add(1, Ordering::Relaxed);
    }
}

fn sources() -> (Arc<Agent>, Sources) {
    let agent = Arc::new(Agent::default());
    let sources = Sources {
        metrics: Metrics::detached(),
        log: LogControl::detached(),
        dump: agent.clone(),
        control: agent.clone(),
    };
    (agent, sources)
}

/// Runs a test against servers on free ports, the addresses being admin, metrics, readiness.
fn with_servers<F: Future<Output = ()>>(test: impl FnOnce([SocketAddr; 3], Arc<Agent>) -> F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let any = vec!["127.0.0.1:0".parse().unwrap()];
        let settings = AdminSettings { admin: any.clone(), metrics: any.clone(), readiness: any };
        let admin = Admin::bind(&settings).await.unwrap();
        let addresses =
            [Server::Admin, Server::Metrics, Server::Readiness].map(|one| admin.addresses(one).next().unwrap());
        let (agent, sources) = sources();
        tokio::select! {
            () = admin.run(sources) => panic!("the servers ended"),
            done = tokio::time::timeout(Duration::from_secs(20), test(addresses, agent)) => done.unwrap(),
        }
    });
}

async fn ask(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

async fn call(address: SocketAddr, method: &str, path: &str, headers: &str) -> String {
    ask(address, &format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{headers}\r\n")).await
}

fn status(answer: &str) -> u16 {
    answer.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or_else(|| panic!("{answer:?} is no answer"))
}

#[test]
fn ready_says_what_speaks_against_it() {
    with_servers(async |[admin, _, readiness], agent| {
        assert_eq!(status(&call(readiness, "GET", "/ready", "").await), 200);
        agent.reasons.lock().unwrap().push("1 pod is pending".to_owned());
        for address in [admin, readiness] {
            let answer = call(address, "GET", "/ready", "").await;
            assert_eq!(status(&answer), 503);
            assert!(answer.ends_with("{\"ready\":false,\"reasons\":[\"1 pod is pending\"]}\n"), "{answer}");
        }
        assert_eq!(status(&call(readiness, "GET", "/live", "").await), 200);
    });
}

#[test]
fn metrics_and_the_dump_are_shown_where_they_belong() {
    with_servers(async |[admin, metrics, readiness], _| {
        for address in [admin, metrics] {
            let answer = call(address, "GET", "/metrics", "").await;
            assert!(answer.contains("selvedge_build_info"), "{answer}");
            assert!(answer.contains("content-type: text/plain; version=0.0.4"), "{answer}");
        }
        assert!(call(admin, "GET", "/dump", "").await.contains("shop/cart"));
        for address in [metrics, readiness] {
            for path in ["/dump", "/log", "/drain"] {
                assert_eq!(status(&call(address, "GET", path, "").await), 404, "{path}");
            }
        }
    });
}

#[test]
fn what_is_not_there_is_answered_with_what_is() {
    with_servers(async |[admin, ..], _| {
        let answer = call(admin, "GET", "/config", "").await;
        assert_eq!(status(&answer), 404);
        assert!(answer.contains("/dump") && answer.contains("/log"), "{answer}");
        let answer = call(admin, "DELETE", "/log", "").await;
        assert_eq!(status(&answer), 405);
        assert!(answer.contains("allow: GET, HEAD, POST, PUT"), "{answer}");
        assert_eq!(status(&call(admin, "GET", "/drain", "").await), 405);
        let head = call(admin, "HEAD", "/dump", "").await;
        assert_eq!(status(&head), 200);
        assert!(head.ends_with("\r\n\r\n"), "HEAD was answered with a body: {head}");
    });
}

#[test]
fn the_log_level_changes_by_query_and_by_body_and_nonsense_changes_nothing() {
    with_servers(async |[admin, ..], _| {
        assert!(call(admin, "PUT", "/log?level=debug", "").await.contains("{\"level\":\"debug\"}"));
        let body = "Content-Length: 5\r\n\r\ntrace";
        let request = format!("POST /log HTTP/1.1\r\nHost: [::1]:15000\r\nConnection: close\r\n{body}");
        assert_eq!(status(&ask(admin, &request).await), 200);
        let refused = call(admin, "PUT", "/log?level=loud", "").await;
        assert_eq!(status(&refused), 400);
        assert!(refused.contains("\"loud\""), "{refused}");
        assert!(call(admin, "GET", "/log", "").await.contains("{\"level\":\"trace\"}"));
    });
}

#[test]
fn a_body_that_is_too_long_is_refused() {
    with_servers(async |[admin, ..], _| {
        let body = "x".repeat(5000);
        let request =
            format!("PUT /log HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 5000\r\n\r\n{body}");
        assert_eq!(status(&ask(admin, &request).await), 413);
    });
}

#[test]
fn a_host_that_is_not_the_loopback_is_refused_on_the_admin_port_alone() {
    with_servers(async |[admin, metrics, _], _| {
        let request = |host: &str| format!("GET /metrics HTTP/1.1\r\n{host}Connection: close\r\n\r\n");
        for host in [
            "Host: evil.example\r\n",
            "Host: evil.example:15000\r\n",
            "Host: 127.0.0.1.evil.example\r\n",
            "Host:\r\n",
            "",
        ] {
            assert_eq!(status(&ask(admin, &request(host)).await), 403, "{host:?}");
        }
        for host in ["Host: localhost:15000\r\n", "Host: 127.0.0.1\r\n", "Host: [::1]:15000\r\n"] {
            assert_eq!(status(&ask(admin, &request(host)).await), 200, "{host:?}");
        }
        assert_eq!(status(&ask(metrics, &request("Host: node-1:15020\r\n")).await), 200);
    });
}

#[test]
fn drain_is_for_a_post_that_comes_from_no_web_page() {
    with_servers(async |[admin, ..], agent| {
        assert_eq!(status(&call(admin, "POST", "/drain", "Origin: http://localhost\r\n").await), 403);
        assert_eq!(agent.drains.load(Ordering::Relaxed), 0);
        assert_eq!(status(&call(admin, "POST", "/drain", "").await), 202);
        assert_eq!(agent.drains.load(Ordering::Relaxed), 1);
    });
}

#[test]
fn silent_clients_hold_no_more_than_their_share_and_are_sent_away() {
    with_servers(async |[_, metrics, readiness], _| {
        let mut silent = Vec::new();
        for _ in 0..MOST_CONNECTIONS {
            silent.push(TcpStream::connect(metrics).await.unwrap());
        }
        assert_eq!(status(&call(readiness, "GET", "/live", "").await), 200);
        // Waits until the silent ones have had their five seconds.
        assert_eq!(status(&call(metrics, "GET", "/metrics", "").await), 200);
    });
}

#[tokio::test]
async fn an_admin_address_that_others_can_reach_is_refused() {
    let settings =
        AdminSettings { admin: vec!["0.0.0.0:0".parse().unwrap()], ..AdminSettings::new(None, 15000, 15020, 15021) };
    assert!(matches!(Admin::bind(&settings).await, Err(AdminError::NotLoopback(_))));
}

#[tokio::test]
async fn a_port_that_is_taken_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let settings = AdminSettings { admin: vec![address], metrics: Vec::new(), readiness: Vec::new() };
    let error = Admin::bind(&settings).await.unwrap_err().to_string();
    assert!(error.contains(&address.to_string()), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn whatever_is_asked_is_answered_shortly_and_only_a_post_of_this_node_drains(
        server in prop::sample::select(vec![Server::Admin, Server::Metrics, Server::Readiness]),
        method in prop::sample::select(vec!["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "X"]),
        target in mutated_text(&[
            "/live", "/ready", "/metrics", "/log", "/log?level=warn%2Cselvedge=debug", "/drain?", "/drain", "//drain",
            "http://localhost:15000/drain", "*", "/log?level=%zz&level=",
        ]),
        host in prop::option::of(mutated_text(&["localhost", "127.0.0.1:15000", "[::1]:15000", "evil.example"])),
        body in prop::collection::vec(any::<u8>(), 0..64),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (agent, sources) = sources();
        let mut request = http::Request::builder().method(method).uri(target.as_str());
        if let Some(host) = &host {
            request = request.header("host", host.as_str());
        }
        let Ok(request) = request.body(http_body_util::Full::new(bytes::Bytes::from(body))) else { return Ok(()) };
        let path = request.uri().path().to_owned();
        let answer = runtime.block_on(routes::answer(server, &sources, request));
        prop_assert!(hyper::body::Body::size_hint(answer.body()).exact().unwrap() < 4_096 + 10 * target.len() as u64);
        if agent.drains.load(Ordering::Relaxed) > 0 {
            let own = ["localhost", "127.0.0.1", "[::1]"].iter().any(|own| {
                host.as_ref().is_some_and(|host| host.to_ascii_lowercase().starts_with(own))
            });
            prop_assert!(server == Server::Admin && matches!(method, "POST" | "PUT") && path == "/drain" && own);
        }
    }
}
