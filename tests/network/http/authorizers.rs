//! External authorizers, on real traffic: by HTTP and by gRPC, from a policy and from a route.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use http::{Request as Asked, Response as Said, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use libtest_mimic::Trial;
use selvedge::authorizer::wire::{
    CheckRequest, CheckResponse, DeniedHttpResponse, HeaderValue, HeaderValueOption, HttpResponse, HttpStatus,
    OkHttpResponse, Peer, PortSpecifier, Status,
};
use selvedge_lab::{AgentOptions, BOUND, Lab, Pod, PodSpec, Request, Response, authorization, eventually, trial_with};
use serde_json::{Value, json};
use tokio::sync::watch;

use super::tokens::document;
use super::{Shop, service};
use crate::lab;

pub fn trials() -> Vec<Trial> {
    vec![
        trial_with("authorizers::are_asked_by_http", lab(), by_http),
        trial_with("authorizers::are_asked_by_grpc_with_the_body", lab(), by_grpc),
        trial_with("authorizers::that_cannot_be_asked_let_nobody_pass", lab(), fails_closed),
        trial_with("authorizers::are_asked_by_a_route", lab(), by_route),
    ]
}

/// Says what the header `x-allow` asks for: yes, no, slow, broken.
pub struct Gate {
    heard: Arc<Mutex<Vec<String>>>,
    stop: watch::Sender<bool>,
    _pod: Pod,
}

impl Gate {
    /// At 8080 by HTTP, at 9000 by gRPC, as Service `auth/gate` at 80 and 90.
    pub fn open(lab: &Lab) -> Result<Self> {
        let pod = lab.pod(PodSpec::new("auth/gate", "node-b"))?;
        lab.service(&service("auth/gate", 2).port("http", 80, 8080).port("grpc", 90, 9000).endpoint(&pod))?;
        let (heard, stop) = (Arc::<Mutex<Vec<String>>>::default(), watch::Sender::new(false));
        let listeners = [pod.listen(8080)?, pod.listen(9000)?];
        let (hearing, mut stopped) = (heard.clone(), stop.subscribe());
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.unwrap_or_else(|error| panic!("no runtime: {error}"));
            runtime.block_on(async move {
                let [http, grpc] = listeners.map(|listener| {
                    let prepared =
                        listener.set_nonblocking(true).and_then(|()| tokio::net::TcpListener::from_std(listener));
                    prepared.unwrap_or_else(|error| panic!("no listener: {error}"))
                });
                tokio::select! {
                    () = serve(http, false, hearing.clone()) => {}
                    () = serve(grpc, true, hearing) => {}
                    _ = stopped.wait_for(|stop| *stop) => {}
                }
            });
        });
        Ok(Self { heard, stop, _pod: pod })
    }

    pub fn heard(&self) -> Vec<String> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.stop.send_replace(true);
    }
}

async fn serve(listener: tokio::net::TcpListener, is_grpc: bool, heard: Arc<Mutex<Vec<String>>>) {
    loop {
        let Ok((stream, peer)) = listener.accept().await else { return };
        let heard = heard.clone();
        tokio::spawn(async move {
            let io = TokioIo::new(stream);
            let note = move |text: String| heard.lock().unwrap_or_else(PoisonError::into_inner).push(text);
            if is_grpc {
                let service = service_fn(move |request: Asked<Incoming>| {
                    let check = Check(Arc::new(note.clone()));
                    async move {
                        let mut grpc = tonic::server::Grpc::new(tonic_prost::ProstCodec::default());
                        Ok::<_, Infallible>(grpc.unary(check, request).await)
                    }
                });
                let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                drop(builder.serve_connection(io, service).await);
            } else {
                let service = service_fn(move |request: Asked<Incoming>| {
                    note(format!("{} {} from {}", request.method(), request.uri(), peer.ip().to_canonical()));
                    async move { Ok::<_, Infallible>(answer(request).await) }
                });
                drop(hyper::server::conn::http1::Builder::new().serve_connection(io, service).await);
            }
        });
    }
}

async fn answer(request: Asked<Incoming>) -> Said<Full<Bytes>> {
    let wish = request.headers().get("x-allow").and_then(|wish| wish.to_str().ok()).unwrap_or("no").to_owned();
    let said = Said::builder();
    let said = match wish.as_str() {
        "yes" => said.status(202).header("x-user", "alice").header("set-cookie", "session=1").header("x-else", "1"),
        "slow" => {
            tokio::time::sleep(Duration::from_secs(30)).await;
            said
        }
        "broken" => said.status(500),
        _ => said.status(302).header("location", "https://login.example/"),
    };
    let body = if wish == "no" { "please log in" } else { "" };
    said.body(Full::from(body)).unwrap_or_default()
}

#[derive(Clone)]
struct Check(Arc<dyn Fn(String) + Send + Sync>);

impl tonic::server::UnaryService<CheckRequest> for Check {
    type Response = CheckResponse;
    type Future = Pin<Box<dyn Future<Output = Result<tonic::Response<CheckResponse>, tonic::Status>> + Send>>;

    fn call(&mut self, request: tonic::Request<CheckRequest>) -> Self::Future {
        let note = self.0.clone();
        Box::pin(async move {
            let attributes = request.into_inner().attributes.unwrap_or_default();
            let [source, destination] = [attributes.source, attributes.destination].map(Option::unwrap_or_default);
            let http = attributes.request.unwrap_or_default().http.unwrap_or_default();
            let (from, to) = (source.principal, address(destination));
            note(format!("{} {} {:?} of {from} to {to}", http.method, http.path, http.body));
            let option = |key: &str, value: &str| HeaderValueOption {
                header: Some(HeaderValue { key: key.into(), value: value.into(), raw_value: Bytes::new() }),
                append: None,
                append_action: 0,
            };
            let response = match http.headers.get("x-allow").map(String::as_str) {
                Some("yes") => CheckResponse {
                    status: Some(Status::default()),
                    http_response: Some(HttpResponse::Ok(OkHttpResponse {
                        headers: vec![option("x-user", "alice")],
                        headers_to_remove: vec!["x-allow".into()],
                        response_headers_to_add: vec![option("x-checked", "1")],
                        ..OkHttpResponse::default()
                    })),
                },
                Some("broken") => return Err(tonic::Status::unavailable("not now")),
                _ => CheckResponse {
                    status: Some(Status { code: 7, message: String::new() }),
                    http_response: Some(HttpResponse::Denied(DeniedHttpResponse {
                        status: Some(HttpStatus { code: 401 }),
                        headers: vec![option("www-authenticate", "Basic")],
                        body: "who are you?".into(),
                    })),
                },
            };
            Ok(tonic::Response::new(response))
        })
    }
}

fn address(peer: Peer) -> String {
    let socket = peer.address.and_then(|address| address.socket_address).unwrap_or_default();
    let Some(PortSpecifier::Value(port)) = socket.port else { return socket.address };
    format!("{}:{port}", socket.address)
}

fn ask(shop: &Shop, path: &str, wish: &str) -> Result<Response> {
    let request =
        Request::post(path, "hello").header("x-allow", wish).header("x-user", "root").header("x_user", "root");
    shop.web.http(shop.vip(), &request)
}

fn by_http(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    let gate = Gate::open(lab)?;
    lab.write("example.yaml", &document("external-authorization.md")?)?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    for pod in ["near", "far"] {
        eventually(&format!("an answer of {pod}"), BOUND, || {
            let answer = ask(&shop, "/x?q=1", "yes").ok().filter(|answer| answer.status == 200)?;
            let heard = answer.json().ok()?;
            let edited = heard["headers"]["x-user"] == "alice" && heard["headers"]["x_user"].is_null();
            let told = answer.header("set-cookie") == Some("session=1") && answer.header("x-else").is_none();
            (heard["pod"] == pod && heard["length"] == 5 && edited && told).then_some(())
        })?;
    }
    let [near, far] = &shop._pods;
    for pod in [near, far] {
        let wanted = format!("POST /check/x?q=1 from {}", pod.ip());
        ensure!(gate.heard().contains(&wanted), "{wanted}: {:?}", gate.heard());
    }
    let denied = ask(&shop, "/x", "no")?;
    ensure!(denied.status == 302 && denied.header("location") == Some("https://login.example/"), "{denied:?}");
    ensure!(denied.body == b"please log in", "{denied:?}");
    ensure!(denied.header("selvedge-reason") == Some("authorizer"), "{denied:?}");
    let before = gate.heard().len();
    ensure!(ask(&shop, "/healthz", "no")?.status == 200 && gate.heard().len() == before, "{:?}", gate.heard());
    for wish in ["broken", "slow"] {
        let failed = ask(&shop, "/x", wish)?;
        ensure!(failed.status == 403 && failed.header("selvedge-reason") == Some("authorizer"), "{wish}: {failed:?}");
    }
    eventually("a line of it", BOUND, || {
        let said = |line: &serde_json::Value| line["reason"] == "authorizer:shop/login" && line["status"] == 302;
        agents.iter().any(|agent| agent.access_log().is_ok_and(|lines| lines.iter().any(said))).then_some(())
    })
}

/// A policy over all of `shop` that asks, and the authorizer `selvedge-system/gate`.
pub fn put(lab: &Lab, asked: serde_json::Value, provider: &str) -> Result<()> {
    let version = "selvedge.dev/v1alpha1";
    lab.put(&json!({
        "apiVersion": version, "kind": "ExternalAuthorizer",
        "metadata": {"namespace": "selvedge-system", "name": "gate"}, "spec": asked,
    }))?;
    lab.put(&authorization("shop/ask", json!({"action": "CUSTOM", "provider": {"name": provider}, "rules": [{}]})))
}

fn by_grpc(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    let gate = Gate::open(lab)?;
    let service = json!({"name": "gate", "namespace": "auth", "port": 90});
    put(lab, json!({"service": service, "grpc": {}, "includeRequestBodyInCheck": {"maxRequestBytes": 5}}), "gate")?;
    let _agents = lab.start_agents(&AgentOptions::default())?;
    let passed = ask(&shop, "/x?q=1", "yes")?;
    let heard = passed.json().with_context(|| format!("{passed:?}"))?;
    ensure!(passed.status == 200 && passed.header("x-checked") == Some("1"), "{passed:?}");
    ensure!(
        heard["headers"]["x-user"] == "alice" && heard["headers"]["x-allow"].is_null() && heard["length"] == 5,
        "{heard}"
    );
    let pod = shop._pods.iter().find(|pod| heard["pod"] == pod.name()).context("an answer of nobody")?;
    let wanted = format!("POST /x?q=1 \"hello\" of spiffe://cluster.local/ns/shop/sa/default to {}:8080", pod.ip());
    ensure!(gate.heard().contains(&wanted), "{wanted}: {:?}", gate.heard());
    let denied = ask(&shop, "/x", "no")?;
    ensure!(denied.status == 401 && denied.header("www-authenticate") == Some("Basic"), "{denied:?}");
    ensure!(denied.body == b"who are you?", "{denied:?}");
    let failed = ask(&shop, "/x", "broken")?;
    ensure!(failed.status == 403, "{failed:?}");
    let large = shop.web.http(shop.vip(), &Request::post("/x", "larger").header("x-allow", "yes"))?;
    ensure!(large.status == 413, "{large:?}");
    Ok(())
}

fn fails_closed(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    let nobody = lab.pod(PodSpec::new("auth/gate", "node-b"))?;
    lab.service(&service("auth/gate", 2).port("http", 80, 8080).endpoint(&nobody))?;
    let service = |name: &str| json!({"name": name, "namespace": "auth", "port": 80});
    put(lab, json!({"service": service("gate"), "http": {}, "statusOnError": 503}), "gate")?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let down = ask(&shop, "/x", "yes")?;
    ensure!(down.status == 503 && down.header("selvedge-reason") == Some("authorizer"), "{down:?}");
    put(lab, json!({"service": service("missing"), "http": {}}), "gate")?;
    lab.settle(&agents)?;
    eventually("no such Service", BOUND, || (ask(&shop, "/x", "yes").ok()?.status == 403).then_some(()))?;
    put(lab, json!({"service": service("gate"), "http": {}, "statusOnError": 503}), "other")?;
    lab.settle(&agents)?;
    eventually("no such authorizer", BOUND, || (ask(&shop, "/x", "yes").ok()?.status == 403).then_some(()))?;
    ensure!(shop.near.heard().is_empty() && shop.far.heard().is_empty(), "an application was asked");
    Ok(())
}

/// A route of `shop/cart` whose requests the gate is asked about.
pub fn asking_route() -> Value {
    let filter = json!({"type": "ExternalAuth", "externalAuth": {
        "protocol": "GRPC", "backendRef": {"name": "gate", "namespace": "auth", "port": 90},
    }});
    json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
        "metadata": {"namespace": "shop", "name": "cart"},
        "spec": {
            "parentRefs": [{"group": "", "kind": "Service", "name": "cart", "port": 80}],
            "rules": [{"filters": [filter]}],
        },
    })
}

fn by_route(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab, "http")?;
    let gate = Gate::open(lab)?;
    lab.put(&asking_route())?;
    let _agents = lab.start_agents(&AgentOptions::default())?;
    let passed = ask(&shop, "/x", "yes")?;
    ensure!(passed.status == 200 && passed.json()?["headers"]["x-user"] == "alice", "{passed:?}");
    ensure!(passed.header("x-checked") == Some("1"), "{passed:?}");
    let wanted = "POST /x \"\" of spiffe://cluster.local/ns/shop/sa/default to 10.96.0.1:80";
    ensure!(gate.heard() == [wanted], "{:?}", gate.heard());
    let denied = ask(&shop, "/x", "no")?;
    ensure!(denied.status == StatusCode::UNAUTHORIZED.as_u16() && denied.body == b"who are you?", "{denied:?}");
    Ok(())
}
