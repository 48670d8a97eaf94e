//! The client: one request or many, each answer printed as the suite reads it.

use std::future::Future;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use clap::Args;
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, Uri, header};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::answer::text;
use crate::grpc::{self, EchoRequest};
use crate::tls;

/// What the client takes.
#[derive(Args)]
pub struct Options {
    /// Where to: http://, https://, grpc:// or tcp://, the last two with a port.
    #[arg(value_name = "URL")]
    url: Uri,
    /// The method of HTTP.
    #[arg(long, default_value = "GET")]
    method: Method,
    /// A header of the request; one called Host takes the place of the URL's.
    #[arg(short = 'H', long = "header", value_name = "NAME:VALUE", value_parser = parse_header)]
    headers: Vec<(HeaderName, HeaderValue)>,
    /// How many requests.
    #[arg(long, value_name = "N", default_value_t = 1)]
    count: usize,
    /// HTTP/2 without asking whether the server knows it.
    #[arg(long)]
    http2: bool,
    /// How long connecting and one request may take.
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    timeout: u64,
}

/// Sends one request after the other, prints every answer, and fails where one has none.
///
/// All go over one connection, as long as it holds: who chooses a backend must choose for each request, and who chooses
/// for each connection is found out.
pub async fn run(options: &Options) -> Result<()> {
    ensure!(options.count > 0, "--count: at least one request");
    let target = Target::of(options)?;
    let mut connection = None;
    let mut failures = Vec::new();
    for number in 0..options.count {
        match within(target.timeout, target.ask(&mut connection, number)).await {
            Ok(lines) => println!("[{number}] Url={}\n{lines}", options.url),
            Err(error) => failures.push(format!("[{number}] Error={error:#}")),
        }
    }
    ensure!(failures.is_empty(), "{} of {} have no answer:\n{}", failures.len(), options.count, failures.join("\n"));
    Ok(())
}

async fn within<T>(bound: Duration, future: impl Future<Output = Result<T>>) -> Result<T> {
    timeout(bound, future).await.with_context(|| format!("not within {bound:?}"))?
}

/// Whom to ask, and how.
struct Target {
    host: String,
    port: u16,
    tls: Option<TlsConnector>,
    protocol: Protocol,
    request: Request<Full<Bytes>>,
    timeout: Duration,
}

#[derive(Clone, Copy, PartialEq)]
enum Protocol {
    Http1,
    Http2,
    Grpc,
    Tcp,
}

enum Connection {
    Http1(http1::SendRequest<Full<Bytes>>),
    Http2(http2::SendRequest<Full<Bytes>>),
}

impl Target {
    fn of(options: &Options) -> Result<Self> {
        let url = &options.url;
        let (port, protocol) = match url.scheme_str() {
            Some("http" | "https") if options.http2 => (None, Protocol::Http2),
            Some("http") => (Some(80), Protocol::Http1),
            Some("https") => (Some(443), Protocol::Http1),
            Some("grpc") => (None, Protocol::Grpc),
            Some("tcp") => (None, Protocol::Tcp),
            _ => bail!("{url}: the scheme must be http, https, grpc or tcp"),
        };
        let host = url.host().with_context(|| format!("{url}: no host"))?;
        let port = url.port_u16().or(port).with_context(|| format!("{url}: no port"))?;
        let application = if protocol == Protocol::Http1 { "http/1.1" } else { "h2" };
        let tls = match url.scheme() == Some(&Scheme::HTTPS) {
            true => Some(TlsConnector::from(tls::client(application)?)),
            false => None,
        };
        Ok(Self {
            // An IPv6 address stands in brackets in a URL alone.
            host: host.trim_start_matches('[').trim_end_matches(']').to_owned(),
            port,
            tls,
            protocol,
            request: request(options, protocol)?,
            timeout: Duration::from_secs(options.timeout),
        })
    }

    /// One request and its answer, as lines.
    async fn ask(&self, connection: &mut Option<Connection>, number: usize) -> Result<String> {
        if self.protocol == Protocol::Tcp {
            return self.ask_line(number).await;
        }
        let mut open = match connection.take() {
            Some(open) if open.is_usable() => open,
            _ => self.connect().await?,
        };
        let response = open.send(self.request.clone()).await?;
        let lines = read(self.protocol, response, number).await?;
        *connection = Some(open);
        Ok(lines)
    }

    async fn connect(&self) -> Result<Connection> {
        let stream = self.dial().await?;
        let Some(tls) = &self.tls else { return self.shake_hands(stream).await };
        let name =
            ServerName::try_from(self.host.clone()).with_context(|| format!("{}: no name for TLS", self.host))?;
        self.shake_hands(tls.connect(name, stream).await.context("no TLS handshake")?).await
    }

    async fn dial(&self) -> Result<TcpStream> {
        let dialled = TcpStream::connect((self.host.as_str(), self.port)).await;
        let stream = dialled.with_context(|| format!("cannot connect to {}:{}", self.host, self.port))?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    async fn shake_hands(&self, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Result<Connection> {
        let io = TokioIo::new(stream);
        if self.protocol == Protocol::Http1 {
            let (sender, driver) = http1::handshake(io).await?;
            tokio::spawn(driver);
            return Ok(Connection::Http1(sender));
        }
        let (sender, driver) = http2::handshake(TokioExecutor::new(), io).await?;
        tokio::spawn(driver);
        Ok(Connection::Http2(sender))
    }

    /// Sends a line on a connection of its own, and reads until that line has come back.
    async fn ask_line(&self, number: usize) -> Result<String> {
        let (reader, mut writer) = self.dial().await?.into_split();
        writer.write_all(format!("{LINE}\n").as_bytes()).await?;
        let mut lines = BufReader::new(reader).lines();
        let mut told = String::new();
        loop {
            let line = lines.next_line().await?.context("closed before the line came back")?;
            if line == LINE {
                return Ok(told);
            }
            told.push_str(&format!("[{number} body] {line}\n"));
        }
    }
}

impl Connection {
    fn is_usable(&self) -> bool {
        match self {
            Self::Http1(sender) => !sender.is_closed(),
            Self::Http2(sender) => !sender.is_closed(),
        }
    }

    async fn send(&mut self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>> {
        let sent = match self {
            Self::Http1(sender) => {
                sender.ready().await?;
                sender.send_request(request).await
            }
            Self::Http2(sender) => {
                sender.ready().await?;
                sender.send_request(request).await
            }
        };
        sent.context("no answer")
    }
}

fn request(options: &Options, protocol: Protocol) -> Result<Request<Full<Bytes>>> {
    let mut headers = HeaderMap::from_iter(options.headers.iter().cloned());
    let host = match headers.remove(header::HOST) {
        Some(host) => Authority::try_from(host.as_bytes()).context("Host")?,
        None => options.url.authority().context("no host")?.clone(),
    };
    let path = options.url.path_and_query().filter(|path| !path.as_str().is_empty());
    let path = path.cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
    let mut request = Request::new(Full::default());
    *request.method_mut() = options.method.clone();
    match protocol {
        Protocol::Http1 | Protocol::Tcp => {
            headers.insert(header::HOST, HeaderValue::from_str(host.as_str())?);
            *request.uri_mut() = Uri::from(path);
        }
        Protocol::Http2 => {
            let scheme = options.url.scheme().cloned().unwrap_or(Scheme::HTTP);
            *request.uri_mut() = absolute(scheme, host, path)?;
        }
        Protocol::Grpc => {
            *request.method_mut() = Method::POST;
            *request.uri_mut() = absolute(Scheme::HTTP, host, PathAndQuery::from_static(grpc::ECHO))?;
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(grpc::CONTENT_TYPE));
            headers.insert(header::TE, HeaderValue::from_static("trailers"));
            *request.body_mut() = Full::new(grpc::frame(&EchoRequest {}));
        }
    }
    *request.headers_mut() = headers;
    Ok(request)
}

fn absolute(scheme: Scheme, authority: Authority, path: PathAndQuery) -> Result<Uri> {
    Ok(Uri::builder().scheme(scheme).authority(authority).path_and_query(path).build()?)
}

/// The answer as lines: what the response's head says, then what its body does. None of them is empty, since an empty
/// line ends an answer.
async fn read(protocol: Protocol, response: Response<Incoming>, number: usize) -> Result<String> {
    let (head, body) = response.into_parts();
    let body = body.collect().await.context("the answer breaks off")?;
    let trailers = body.trailers().cloned();
    let body = body.to_bytes();
    let mut lines = format!("[{number}] StatusCode={}\n", head.status.as_u16());
    for (name, value) in head.headers.iter().chain(trailers.iter().flatten()) {
        lines.push_str(&format!("[{number}] ResponseHeader={name}:{}\n", text(value)));
    }
    let told = match protocol {
        Protocol::Grpc if head.status.is_success() => tell(grpc::read(&head.headers, trailers.as_ref(), body)?),
        _ => String::from_utf8_lossy(&body).into_owned(),
    };
    let told = told.lines().map(|line| line.trim_end_matches('\r')).filter(|line| !line.is_empty());
    told.for_each(|line| lines.push_str(&format!("[{number} body] {line}\n")));
    Ok(lines)
}

/// What a server tells over gRPC, in the words that it has for HTTP.
fn tell(assertions: grpc::Assertions) -> String {
    let mut told = format!(
        "Hostname={}\nHost={}\nMethod={}\n",
        assertions.context.unwrap_or_default().pod,
        assertions.authority,
        assertions.fully_qualified_method
    );
    for header in assertions.headers {
        told.push_str(&format!("RequestHeader={}:{}\n", header.key, header.value));
    }
    told
}

fn parse_header(given: &str) -> Result<(HeaderName, HeaderValue)> {
    let (name, value) = given.split_once(':').context("a header is NAME:VALUE")?;
    Ok((name.parse()?, value.trim_start().parse()?))
}

const LINE: &str = "over TCP";
