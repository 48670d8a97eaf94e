//! Health, metrics, state dump, log level and drain, over HTTP/1.1 in the agent's own namespace.
//!
//! | server | default address | paths |
//! | --- | --- | --- |
//! | admin | loopback, 15000 | all |
//! | metrics | every address, 15020 | `/metrics` |
//! | readiness | every address, 15021 | `/ready`, `/live` |
//!
//! The admin server is for processes of this node alone: it answers loopback peers only, refuses a `Host` that is not
//! the loopback's (a web page whose name was rebound to 127.0.0.1), and changes nothing for a web page (`Origin`).

#![forbid(unsafe_code)]

mod routes;

#[cfg(test)]
mod tests;

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::telemetry::{LogControl, Metrics};

/// What `/dump` shows: the model, pods, policies, connections, certificates without keys, pools.
pub trait Dump: Send + Sync {
    fn dump(&self) -> serde_json::Value;
}

/// What the admin servers ask and tell the agent.
pub trait Control: Send + Sync {
    fn readiness(&self) -> Readiness;

    /// Starts to drain, as SIGTERM does. Returns at once; further calls change nothing.
    fn drain(&self);
}

/// Whether the agent serves: ready where nothing speaks against it.
#[derive(Clone, PartialEq, Eq, Debug, Default, serde::Serialize)]
pub struct Readiness {
    /// Sentences for people: "3 pods are pending", "the manifests have not been read yet".
    pub reasons: Vec<String>,
}

impl Readiness {
    pub fn is_ready(&self) -> bool {
        self.reasons.is_empty()
    }
}

/// Where to listen. An IPv6 address is left out where the machine has none and another address serves.
#[derive(Clone, Debug)]
pub struct AdminSettings {
    /// Loopback addresses only.
    pub admin: Vec<SocketAddr>,
    pub metrics: Vec<SocketAddr>,
    pub readiness: Vec<SocketAddr>,
}

impl AdminSettings {
    /// The admin server on loopback, the others on `bind`, else on every address.
    pub fn new(bind: Option<IpAddr>, admin: u16, metrics: u16, readiness: u16) -> Self {
        let loopback = [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()];
        Self {
            admin: loopback.map(|ip| SocketAddr::new(ip, admin)).to_vec(),
            metrics: on_port(bind, metrics),
            readiness: on_port(bind, readiness),
        }
    }
}

/// `bind`, else every address.
pub fn on_port(bind: Option<IpAddr>, port: u16) -> Vec<SocketAddr> {
    let everywhere = || vec![IpAddr::from(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()];
    let ips = bind.map_or_else(everywhere, |ip| vec![ip]);
    ips.into_iter().map(|ip| SocketAddr::new(ip, port)).collect()
}

/// What the servers answer from.
#[derive(Clone)]
pub struct Sources {
    pub metrics: Metrics,
    pub log: LogControl,
    pub dump: Arc<dyn Dump>,
    pub control: Arc<dyn Control>,
}

/// The servers, bound.
#[derive(Debug)]
pub struct Admin {
    listeners: Vec<(Server, TcpListener)>,
}

/// Which of the servers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Server {
    Admin,
    Metrics,
    Readiness,
}

impl Server {
    fn name(self) -> &'static str {
        match self {
            Self::Admin => "admin",
            Self::Metrics => "metrics",
            Self::Readiness => "readiness",
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    #[error(
        "the admin server would listen on {0}, which others can reach; give a loopback address such as 127.0.0.1:15000"
    )]
    NotLoopback(SocketAddr),
    #[error("the {server} server cannot listen on {address}: {cause}; free the port, or give another address")]
    Bind {
        server: &'static str,
        address: SocketAddr,
        #[source]
        cause: io::Error,
    },
}

impl Admin {
    /// Binds every server. An address that is taken is waited for a moment: a predecessor may just be ending.
    pub async fn bind(settings: &AdminSettings) -> Result<Self, AdminError> {
        if let Some(open) = settings.admin.iter().find(|address| !address.ip().is_loopback()) {
            return Err(AdminError::NotLoopback(*open));
        }
        let mut listeners = Vec::new();
        for (server, addresses) in [
            (Server::Admin, &settings.admin),
            (Server::Metrics, &settings.metrics),
            (Server::Readiness, &settings.readiness),
        ] {
            let mut serves = false;
            for address in addresses {
                match listen_soon(*address).await {
                    Ok(listener) => {
                        serves = true;
                        listeners.push((server, listener));
                    }
                    Err(error) if serves && lacks_ipv6(*address, &error) => {
                        tracing::debug!(%address, %error, "The {} server goes without IPv6.", server.name());
                    }
                    Err(cause) => return Err(AdminError::Bind { server: server.name(), address: *address, cause }),
                }
            }
        }
        Ok(Self { listeners })
    }

    /// Where a server listens: with port 0 asked for, the port that it got.
    pub fn addresses(&self, server: Server) -> impl Iterator<Item = SocketAddr> {
        self.listeners.iter().filter(move |(one, _)| *one == server).filter_map(|(_, l)| l.local_addr().ok())
    }

    /// Serves until dropped. To be kept up while draining, so that people can watch.
    pub async fn run(self, sources: Sources) {
        let mut servers = JoinSet::new();
        for (server, listener) in self.listeners {
            servers.spawn(serve(server, listener, sources.clone()));
        }
        while servers.join_next().await.is_some() {}
    }
}

async fn serve(server: Server, listener: TcpListener, sources: Sources) {
    let room = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        // The semaphore is never closed. Further clients wait in the backlog.
        let Ok(permit) = room.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, peer)) if server == Server::Admin && !peer.ip().to_canonical().is_loopback() => drop(stream),
            Ok((stream, _)) => {
                let sources = sources.clone();
                connections.spawn(async move {
                    attend(server, stream, sources).await;
                    drop(permit);
                });
            }
            Err(error) => {
                // Out of descriptors, or a client that left: neither ends the server.
                tracing::debug!(%error, "The {} server could not accept a connection.", server.name());
                tokio::time::sleep(AFTER_FAILED_ACCEPT).await;
            }
        }
        while connections.try_join_next().is_some() {}
    }
}

async fn attend(server: Server, stream: TcpStream, sources: Sources) {
    let service = service_fn(move |request| {
        let sources = sources.clone();
        async move { Ok::<_, Infallible>(routes::answer(server, &sources, request).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_LIMIT)
        .max_buf_size(MOST_HEADER_BYTES)
        .serve_connection(TokioIo::new(stream), service);
    // How a client of these pages ends concerns nobody.
    let _ = tokio::time::timeout(CONNECTION_LIMIT, connection).await;
}

pub(crate) async fn listen_soon(address: SocketAddr) -> io::Result<TcpListener> {
    let deadline = tokio::time::Instant::now() + PREDECESSOR_ENDS;
    loop {
        match listen(address) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && tokio::time::Instant::now() < deadline => {
                tokio::time::sleep(AFTER_TAKEN).await;
            }
            other => return other,
        }
    }
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = socket2::Socket::new(socket2::Domain::for_address(address), socket2::Type::STREAM, None)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(128)?;
    TcpListener::from_std(socket.into())
}

pub(crate) fn lacks_ipv6(address: SocketAddr, error: &io::Error) -> bool {
    use nix::libc::{EADDRNOTAVAIL, EAFNOSUPPORT};
    address.is_ipv6() && matches!(error.raw_os_error(), Some(EADDRNOTAVAIL | EAFNOSUPPORT))
}

const MOST_CONNECTIONS: usize = 64;
const MOST_HEADER_BYTES: usize = 16 * 1024;
const HEADER_LIMIT: Duration = Duration::from_secs(5);
/// Long enough for a scraper that keeps its connection; it opens another.
const CONNECTION_LIMIT: Duration = Duration::from_secs(120);
const AFTER_FAILED_ACCEPT: Duration = Duration::from_millis(100);
const PREDECESSOR_ENDS: Duration = Duration::from_secs(3);
const AFTER_TAKEN: Duration = Duration::from_millis(50);
