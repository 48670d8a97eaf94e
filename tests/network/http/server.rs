//! An application that speaks HTTP of either version in the clear, and says what it heard.

use std::convert::Infallible;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::thread;
use std::time::Duration;

use anyhow::Result;
use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::BodyExt;
use http_body_util::combinators::BoxBody;
use hyper::body::{Body, Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use selvedge_lab::Pod;
use serde_json::json;
use tokio::io::copy_bidirectional;
use tokio::sync::watch;

/// Runs until it is dropped.
pub struct Application {
    peers: Arc<Mutex<Vec<SocketAddr>>>,
    /// What was asked, as `METHOD path`.
    heard: Arc<Mutex<Vec<String>>>,
    stop: watch::Sender<bool>,
    released: Arc<watch::Sender<bool>>,
}

impl Application {
    /// Answers what it heard as JSON, but for paths that ask for something else: `/sleep/MS`, `/bytes/COUNT`,
    /// `/hold` (once it has read all, and was [released](Self::release)), `/status/CODE`, `/trailers`; and says back what comes behind an upgrade. A call of
    /// gRPC ends with the status that its method is: `/shop.Cart/14`, at once where it says `now`: `/shop.Cart/now/14`.
    pub fn start(pod: &Pod, port: u16) -> Result<Self> {
        let listener = pod.listen(port)?;
        let application = Self {
            peers: Arc::default(),
            heard: Arc::default(),
            stop: watch::Sender::new(false),
            released: Arc::new(watch::Sender::new(false)),
        };
        let (peers, heard, stop) = (application.peers.clone(), application.heard.clone(), application.stop.subscribe());
        let (name, released) = (Arc::from(pod.name()), application.released.clone());
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.unwrap_or_else(|error| panic!("no runtime: {error}"));
            runtime.block_on(serve(listener, name, released, peers, heard, stop));
        });
        Ok(application)
    }

    /// Answers what was held.
    pub fn release(&self) {
        self.released.send_replace(true);
    }

    /// Who connected, in order.
    pub fn peers(&self) -> Vec<SocketAddr> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What was asked, in order.
    pub fn heard(&self) -> Vec<String> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Application {
    fn drop(&mut self) {
        self.stop.send_replace(true);
    }
}

async fn serve(
    listener: TcpListener,
    name: Arc<str>,
    released: Arc<watch::Sender<bool>>,
    peers: Arc<Mutex<Vec<SocketAddr>>>,
    heard: Arc<Mutex<Vec<String>>>,
    mut stop: watch::Receiver<bool>,
) {
    let prepared = listener.set_nonblocking(true).and_then(|()| tokio::net::TcpListener::from_std(listener));
    let listener = prepared.unwrap_or_else(|error| panic!("no listener: {error}"));
    let accepting = async {
        loop {
            let Ok((stream, peer)) = listener.accept().await else { return };
            let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
            peers.lock().unwrap_or_else(PoisonError::into_inner).push(peer);
            let (name, heard, released) = (name.clone(), heard.clone(), released.clone());
            tokio::spawn(async move {
                let service = service_fn(move |request| {
                    let (name, heard, released) = (name.clone(), heard.clone(), released.clone());
                    async move {
                        let asked = format!("{} {}", request.method(), request.uri().path());
                        heard.lock().unwrap_or_else(PoisonError::into_inner).push(asked);
                        Ok::<_, Infallible>(answer(request, peer, &name, &released).await)
                    }
                });
                let mut first = [0; 3];
                let is_http2 = matches!(peek(&stream, &mut first).await, Ok(3)) && &first == b"PRI";
                let io = TokioIo::new(stream);
                // A client that goes away ends the connection, which is all there is to say about it.
                if is_http2 {
                    let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                    let builder = builder.enable_connect_protocol().max_header_list_size(1 << 20);
                    drop(builder.serve_connection(io, service).await);
                } else {
                    let builder = hyper::server::conn::http1::Builder::new();
                    drop(builder.serve_connection(io, service).with_upgrades().await);
                }
            });
        }
    };
    tokio::select! {
        () = accepting => {}
        _ = stop.wait_for(|stop| *stop) => {}
    }
}

/// The first bytes, once they are there.
async fn peek(stream: &tokio::net::TcpStream, first: &mut [u8]) -> io::Result<usize> {
    loop {
        let count = stream.peek(first).await?;
        if count == 0 || count == first.len() {
            return Ok(count);
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

type Answer = Response<BoxBody<Bytes, hyper::Error>>;

async fn answer(
    mut request: Request<Incoming>,
    peer: SocketAddr,
    name: &str,
    released: &watch::Sender<bool>,
) -> Answer {
    let path = request.uri().path().to_owned();
    let (what, amount) = path[1..].split_once('/').unwrap_or((&path[1..], ""));
    let amount: u64 = amount.parse().unwrap_or_default();
    let grpc =
        request.headers().get("content-type").is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"));
    if request.method() == Method::CONNECT || request.headers().contains_key("upgrade") {
        return upgraded(&mut request);
    }
    if request.method() == Method::HEAD {
        // hyper's server of HTTP/2 would send a body that nobody asked for.
        return Response::new(BodyExt::boxed(http_body_util::Empty::new().map_err(|never| match never {})));
    }
    match what {
        _ if grpc => {
            drop(request.into_body().collect().await);
            let code: u16 = path.rsplit('/').next().and_then(|method| method.parse().ok()).unwrap_or(0);
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-status", code.into());
            let mut answer = if path.contains("/now/") {
                let mut answer = plain(StatusCode::OK, "");
                answer.headers_mut().extend(trailers);
                answer
            } else {
                with_trailers(vec![0; 5], trailers)
            };
            answer.headers_mut().insert("content-type", http::HeaderValue::from_static("application/grpc"));
            answer
        }
        "sleep" => {
            tokio::time::sleep(Duration::from_millis(amount)).await;
            plain(StatusCode::OK, "slept")
        }
        "hold" => {
            swallow(request.into_body()).await;
            drop(released.subscribe().wait_for(|released| *released).await);
            plain(StatusCode::OK, "released")
        }
        "status" => plain(StatusCode::from_u16(amount as u16).unwrap_or_default(), "as asked"),
        "bytes" => Response::new(BodyExt::boxed(Zeroes { left: amount })),
        "trailers" => {
            let mut trailers = HeaderMap::new();
            trailers.insert("x-sum", http::HeaderValue::from_static("42"));
            let mut answer = with_trailers(b"behind it".to_vec(), trailers);
            answer.headers_mut().insert("trailer", http::HeaderValue::from_static("x-sum"));
            answer
        }
        _ => {
            let (head, body) = request.into_parts();
            let (length, trailers) = swallow(body).await;
            let headers: serde_json::Map<_, _> = head
                .headers
                .iter()
                .map(|(name, value)| (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into()))
                .collect();
            let text = json!({
                "pod": name, "peer": peer.ip().to_string(), "method": head.method.as_str(),
                "version": format!("{:?}", head.version), "path": head.uri.path_and_query().map(ToString::to_string),
                "authority": head.uri.authority().map(ToString::to_string), "headers": headers, "length": length,
                "trailers": trailers,
            });
            plain(StatusCode::OK, &text.to_string())
        }
    }
}

/// Reads a body to its end; how long it was, and how many trailers it had.
async fn swallow(mut body: Incoming) -> (u64, usize) {
    let (mut length, mut trailers) = (0, 0);
    while let Some(Ok(frame)) = body.frame().await {
        length += frame.data_ref().map_or(0, |data| data.len() as u64);
        trailers += frame.trailers_ref().map_or(0, HeaderMap::len);
    }
    (length, trailers)
}

fn upgraded(request: &mut Request<Incoming>) -> Answer {
    let is_http2 = request.method() == Method::CONNECT;
    let upgrade = hyper::upgrade::on(&mut *request);
    tokio::spawn(async move {
        let Ok(stream) = upgrade.await else { return };
        let (mut near, mut far) = tokio::io::duplex(1024);
        tokio::spawn(async move {
            let (mut reader, mut writer) = tokio::io::split(&mut far);
            drop(tokio::io::copy(&mut reader, &mut writer).await);
        });
        drop(copy_bidirectional(&mut TokioIo::new(stream), &mut near).await);
    });
    if is_http2 {
        return plain(StatusCode::OK, "");
    }
    let mut answer = plain(StatusCode::SWITCHING_PROTOCOLS, "");
    let headers = answer.headers_mut();
    headers.insert("connection", http::HeaderValue::from_static("Upgrade"));
    headers.insert("upgrade", request.headers()["upgrade"].clone());
    answer
}

fn plain(status: StatusCode, text: &str) -> Answer {
    let body = http_body_util::Full::new(Bytes::copy_from_slice(text.as_bytes())).map_err(|never| match never {});
    let mut answer = Response::new(BodyExt::boxed(body));
    *answer.status_mut() = status;
    answer
}

fn with_trailers(data: Vec<u8>, trailers: HeaderMap) -> Answer {
    // Of no length that is known ahead: HTTP/1 has trailers only in chunks.
    let frames = [Ok(Frame::data(Bytes::from(data))), Ok(Frame::trailers(trailers))];
    Response::new(BodyExt::boxed(http_body_util::StreamBody::new(futures_util::stream::iter(frames))))
}

/// So many bytes, made as they are read.
struct Zeroes {
    left: u64,
}

impl Body for Zeroes {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        static CHUNK: [u8; 16 * 1024] = [0; 16 * 1024];
        let count = self.left.min(CHUNK.len() as u64);
        self.left -= count;
        Poll::Ready((count > 0).then(|| Ok(Frame::data(Bytes::from_static(&CHUNK[..count as usize])))))
    }
}
