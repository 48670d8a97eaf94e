use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::pods::ServedPod;
use super::source_ports::Held;
use super::{Proxy, workers};
use crate::capture::socket::{self, ConnectOptions, Keepalive};

/// Dials from inside a pod's namespace, from the pod's own address, past the pod's own capture.
pub async fn from_pod(pod: &ServedPod, from: Option<IpAddr>, to: SocketAddr) -> io::Result<TcpStream> {
    connect(pod, to, &ConnectOptions { bind: from.map(|ip| SocketAddr::new(ip, 0)), ..application_options(pod) }).await
}

/// Dials a peer's tunnel port from inside a pod's namespace.
pub async fn tunnel(pod: &ServedPod, from: Option<IpAddr>, to: SocketAddr) -> io::Result<TcpStream> {
    let options = ConnectOptions {
        bind: from.map(|ip| SocketAddr::new(ip, 0)),
        // TLS tells an orderly end from a cut by itself, and its last record must arrive.
        reset_on_close: false,
        ..application_options(pod)
    };
    connect(pod, to, &options).await
}

/// Dials the application of a pod with the client's own address as the source, so that the application sees it.
///
/// The port is ours to choose: never one of a 4-tuple that lives. The tuple is held until the connection is gone.
pub async fn application(
    proxy: &Proxy,
    pod: &ServedPod,
    client: IpAddr,
    to: SocketAddr,
) -> io::Result<(TcpStream, Held)> {
    let mut last = io::Error::from(io::ErrorKind::AddrInUse);
    for _ in 0..PORT_TRIES {
        // Where the kernel cannot be asked, the port counts as held: a live connection is worth more than a new one.
        let in_use = |source| pod.tuple_in_use(to, source).unwrap_or(true);
        let held = workers::with_random(|random| proxy.source_ports.take(client, to, random, in_use));
        let Some(held) = held else {
            let text = format!("every source port for {client} is held; widen --source-ports");
            return Err(io::Error::new(io::ErrorKind::AddrInUse, text));
        };
        let options = ConnectOptions { bind: Some(held.source()), ..application_options(pod) };
        match connect(pod, to, &options).await {
            Ok(stream) => return Ok((stream, held)),
            // The kernel knows a holder that we do not: a socket bound without a connection, or one in TIME_WAIT.
            Err(cause) if matches!(cause.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable) => {
                last = cause;
            }
            Err(cause) => return Err(cause),
        }
    }
    Err(last)
}

/// What the sockets have that an application is at the other end of.
pub fn application_options(pod: &ServedPod) -> ConnectOptions {
    ConnectOptions {
        mark: pod.captured.marks.own,
        bind: None,
        reset_on_close: true,
        user_timeout: None,
        keepalive: Some(KEEPALIVE),
    }
}

async fn connect(pod: &ServedPod, to: SocketAddr, options: &ConnectOptions) -> io::Result<TcpStream> {
    let socket = socket::connect_socket(&pod.captured.netns, to, options)?;
    match socket.connect(&to.into()) {
        Err(cause) if cause.raw_os_error() != Some(libc::EINPROGRESS) => return Err(cause),
        _ => {}
    }
    let stream = TcpStream::from_std(socket.into())?;
    match tokio::time::timeout(CONNECT_TIMEOUT, established(&stream)).await {
        Ok(outcome) => outcome.map(|()| stream),
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "no answer within 10 s")),
    }
}

async fn established(stream: &TcpStream) -> io::Result<()> {
    loop {
        stream.writable().await?;
        // Asking for SO_ERROR would take a server that spoke and reset at once for one that refused, and lose its words.
        match SockRef::from(stream).peek(&mut [MaybeUninit::uninit()]) {
            Err(cause) if cause.kind() != io::ErrorKind::WouldBlock => return Err(cause),
            // An ICMP error came that the kernel does not count yet: it wakes the socket, which goes on connecting.
            Err(_) if stream.peer_addr().is_err() => {
                drop(stream.try_io(Interest::WRITABLE, || Err::<(), _>(io::ErrorKind::WouldBlock.into())))
            }
            _ => return Ok(()),
        }
    }
}

const PORT_TRIES: usize = 16;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
// What the field's node proxies use.
const KEEPALIVE: Keepalive =
    Keepalive { idle: Duration::from_secs(180), interval: Duration::from_secs(180), probes: 9 };
