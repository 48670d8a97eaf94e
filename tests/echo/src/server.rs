//! The server: HTTP/1.1, HTTP/2 and gRPC on every port but those of TCP, in TLS where that was asked for.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::Args;
use http::Request;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio_rustls::TlsAcceptor;

use crate::answer::Arrival;
use crate::tls;

/// What the server takes. Port 0 is one that is free; every port is printed once it listens.
#[derive(Args)]
pub struct Options {
    /// A port for HTTP/1.1 and HTTP/2.
    #[arg(long = "port", value_name = "PORT", default_values_t = [8080])]
    http: Vec<u16>,
    /// A port for gRPC.
    #[arg(long, value_name = "PORT", default_values_t = [7070])]
    grpc: Vec<u16>,
    /// A port for TCP: each line comes back.
    #[arg(long, value_name = "PORT", default_values_t = [9090])]
    tcp: Vec<u16>,
    /// One of the ports for HTTP or gRPC that is to speak TLS.
    #[arg(long, value_name = "PORT")]
    tls: Vec<u16>,
    /// The certificate for TLS in PEM; where no such file is, the server makes a certificate of its own.
    #[arg(long, value_name = "FILE", default_value = "/cert.crt")]
    crt: PathBuf,
    /// The certificate's key.
    #[arg(long, value_name = "FILE", default_value = "/cert.key")]
    key: PathBuf,
}

/// Serves until it is told to end.
pub async fn run(options: &Options) -> Result<()> {
    let acceptor = match options.tls.is_empty() {
        true => None,
        false => Some(TlsAcceptor::from(tls::server(&options.crt, &options.key)?)),
    };
    let hostname: Arc<str> = nix::unistd::gethostname()?.to_string_lossy().into();
    for (kind, ports) in [("http", &options.http), ("grpc", &options.grpc), ("tcp", &options.tcp)] {
        for port in ports {
            let acceptor = acceptor.clone().filter(|_| kind != "tcp" && options.tls.contains(port));
            let listener = listen(*port).await.with_context(|| format!("cannot listen on port {port}"))?;
            let port = listener.local_addr()?.port();
            println!("{kind} {port}");
            tokio::spawn(accept(listener, Port { tcp: kind == "tcp", acceptor, port, hostname: hostname.clone() }));
        }
    }
    // The first process of a container has no default action for signals.
    signal(SignalKind::terminate())?.recv().await;
    Ok(())
}

/// One port, and how it is served.
#[derive(Clone)]
struct Port {
    tcp: bool,
    acceptor: Option<TlsAcceptor>,
    port: u16,
    hostname: Arc<str>,
}

/// On every address of both families, where there are both.
async fn listen(port: u16) -> io::Result<TcpListener> {
    match TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).await {
        Err(error) if error.kind() != io::ErrorKind::AddrInUse => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).await
        }
        bound => bound,
    }
}

async fn accept(listener: TcpListener, port: Port) {
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                let port = port.clone();
                tokio::spawn(async move {
                    if let Err(error) = port.serve(stream, peer).await {
                        eprintln!("{} {peer}: {error:#}", port.port);
                    }
                });
            }
            Err(error) => eprintln!("{}: cannot accept: {error}", port.port),
        }
    }
}

impl Port {
    async fn serve(&self, stream: TcpStream, peer: SocketAddr) -> Result<()> {
        // Head, message and trailers of gRPC are written one by one: none waits until the one before is acknowledged.
        stream.set_nodelay(true)?;
        if self.tcp {
            return self.serve_lines(stream, peer).await;
        }
        let peer = peer.ip().to_canonical();
        let mut arrival = Arrival { peer, port: self.port, alpn: None, hostname: self.hostname.clone() };
        match &self.acceptor {
            None => serve_http(stream, arrival).await,
            Some(acceptor) => {
                let stream = acceptor.accept(stream).await.context("no TLS handshake")?;
                let agreed = stream.get_ref().1.alpn_protocol().unwrap_or_default();
                arrival.alpn = Some(String::from_utf8_lossy(agreed).into_owned());
                serve_http(stream, arrival).await
            }
        }
    }

    /// Tells of itself for the first line, then gives every line back.
    async fn serve_lines(&self, mut stream: TcpStream, peer: SocketAddr) -> Result<()> {
        let (reader, mut writer) = stream.split();
        let mut lines = BufReader::new(reader).lines();
        let mut about = format!(
            "StatusCode=200\nHostname={}\nServicePort={}\nIP={}\n",
            self.hostname,
            self.port,
            peer.ip().to_canonical()
        );
        while let Some(line) = lines.next_line().await? {
            writer.write_all(format!("{}{line}\n", std::mem::take(&mut about)).as_bytes()).await?;
        }
        Ok(())
    }
}

async fn serve_http(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, arrival: Arrival) -> Result<()> {
    let service = service_fn(|mut request: Request<Incoming>| {
        let answer = arrival.answer(&request);
        async move {
            // To its end, or the connection could not be used again.
            while let Some(frame) = request.body_mut().frame().await {
                frame?;
            }
            Ok::<_, hyper::Error>(answer)
        }
    });
    let served = auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await;
    served.map_err(|error| anyhow::anyhow!(error))
}
