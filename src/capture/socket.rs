//! Sockets inside a pod's namespace. Each is made by a thread that enters it, creates, and leaves.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::sys::socket::sockopt;
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, TcpKeepalive, Type};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::netns::NetNs;
use super::rules::{IpVersion, Mode};

/// How a connection out of a pod's namespace is made.
#[derive(Clone, Copy, Debug)]
pub struct ConnectOptions {
    /// `SO_MARK`: the pod's own mark, so that nothing of ours is captured again. 0 where nothing is captured: then the
    /// address to come from is the pod's own too, and neither needs a privilege.
    pub mark: u32,
    /// The address to come from, which need not be this host's: the client's, with a port that no live connection
    /// of that client holds ([`super::tuple_in_use`]).
    pub bind: Option<SocketAddr>,
    /// Reset, never a clean end, when the socket is closed before both directions have ended in order.
    pub reset_on_close: bool,
    pub user_timeout: Option<Duration>,
    pub keepalive: Option<Keepalive>,
}

/// TCP keepalive.
#[derive(Clone, Copy, Debug)]
pub struct Keepalive {
    pub idle: Duration,
    pub interval: Duration,
    pub probes: u32,
}

/// A socket of the namespace, nonblocking and not yet connected.
pub fn connect_socket(netns: &NetNs, to: SocketAddr, options: &ConnectOptions) -> io::Result<Socket> {
    netns.enter(|| {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
        if options.mark != 0 {
            socket.set_mark(options.mark)?;
        }
        apply(&socket, options)?;
        if let Some(from) = options.bind {
            if options.mark != 0 {
                set_transparent(&socket, from.ip())?;
            }
            socket.set_reuse_address(true)?;
            socket.bind(&from.into())?;
        }
        Ok(socket)
    })
}

/// Sets on an accepted connection what connections of ours have.
pub fn prepare_accepted(stream: &impl AsFd, options: &ConnectOptions) -> io::Result<()> {
    apply(&SockRef::from(stream), options)
}

/// Undoes `reset_on_close`, once both directions have closed in order.
pub fn closed_in_order(stream: &impl AsFd) -> io::Result<()> {
    SockRef::from(stream).set_linger(None)
}

/// A listener in the thread's present namespace, nonblocking. `mark` goes over to the connections it accepts.
pub fn listener(version: IpVersion, addr: ListenAddr, port: u16, mark: u32) -> io::Result<TcpListener> {
    let ip: IpAddr = match (version, addr) {
        (IpVersion::V4, ListenAddr::Any) => Ipv4Addr::UNSPECIFIED.into(),
        (IpVersion::V4, ListenAddr::Loopback) => Ipv4Addr::LOCALHOST.into(),
        (IpVersion::V6, ListenAddr::Any) => Ipv6Addr::UNSPECIFIED.into(),
        (IpVersion::V6, ListenAddr::Loopback) => Ipv6Addr::LOCALHOST.into(),
    };
    let addr = SocketAddr::new(ip, port);
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    socket.set_reuse_address(true)?;
    if version == IpVersion::V6 {
        socket.set_only_v6(true)?;
    }
    set_transparent(&socket, ip)?;
    socket.set_mark(mark)?;
    socket.bind(&addr.into()).map_err(|error| {
        let holder = if error.kind() == io::ErrorKind::AddrInUse { "; a program in the pod listens there" } else { "" };
        io::Error::new(error.kind(), format!("cannot listen on {addr}: {error}{holder}"))
    })?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Makes a listener ours, whichever process made it: nonblocking, and with our mark.
///
/// `reset_on_close` goes over to what it accepts, and so holds from the first moment on: an agent that is killed
/// between accepting a connection and preparing it must not end it in order.
pub fn adopt_listener(listener: &TcpListener, mark: u32, reset_on_close: bool) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let socket = SockRef::from(listener);
    socket.set_linger(reset_on_close.then_some(Duration::ZERO))?;
    socket.set_mark(mark)
}

/// Ties a listener to the reactor of this thread, within a tokio runtime.
pub fn watch_listener(listener: TcpListener) -> io::Result<AsyncFd<TcpListener>> {
    // SAFETY: a listener owns its one descriptor and keeps it open and the same until it is dropped.
    unsafe { AsyncFd::register_with_interest(listener, Interest::READABLE) }.map_err(io::Error::from)
}

/// Accepts one connection, nonblocking, and known to no reactor yet.
pub fn accept(listener: &TcpListener) -> io::Result<(TcpStream, SocketAddr)> {
    let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: the descriptor is open; storage and length are the ones that the kernel is to write, and the length that
    // it leaves is the address's.
    let (fd, peer) = unsafe {
        SockAddr::try_init(|storage, length| {
            match libc::accept4(listener.as_raw_fd(), storage.cast(), length, flags) {
                ..0 => Err(io::Error::last_os_error()),
                fd => Ok(fd),
            }
        })?
    };
    // SAFETY: the call above succeeded, so this is a descriptor of ours alone.
    let stream = TcpStream::from(unsafe { OwnedFd::from_raw_fd(fd) });
    let peer = peer.as_socket().ok_or_else(|| io::Error::other("a connection came from no IP address"))?;
    Ok((stream, peer))
}

/// Where a listener listens.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ListenAddr {
    Any,
    /// Reached by TPROXY alone, and by the pod itself.
    Loopback,
}

/// Whether a listener of ours still listens: another program with the right may have destroyed it.
pub fn is_listening(listener: &TcpListener) -> bool {
    SockRef::from(listener).is_listener().unwrap_or(false)
}

/// What the client meant to connect to.
pub fn original_destination(stream: &TcpStream, mode: Mode) -> io::Result<SocketAddr> {
    original_destination_of(&stream.as_fd(), stream.local_addr()?, mode)
}

/// The same for any stream, whose local address is known.
pub fn original_destination_of(stream: &impl AsFd, local: SocketAddr, mode: Mode) -> io::Result<SocketAddr> {
    let found = match (mode, local) {
        (Mode::Tproxy, _) => local,
        (Mode::Redirect, SocketAddr::V4(_)) => {
            let addr = nix::sys::socket::getsockopt(&stream.as_fd(), sockopt::OriginalDst)?;
            SocketAddr::new(Ipv4Addr::from(u32::from_be(addr.sin_addr.s_addr)).into(), u16::from_be(addr.sin_port))
        }
        (Mode::Redirect, SocketAddr::V6(_)) => {
            let addr = nix::sys::socket::getsockopt(&stream.as_fd(), sockopt::Ip6tOriginalDst)?;
            SocketAddr::new(Ipv6Addr::from(addr.sin6_addr.s6_addr).into(), u16::from_be(addr.sin6_port))
        }
    };
    Ok(SocketAddr::new(found.ip().to_canonical(), found.port()))
}

fn apply(socket: &Socket, options: &ConnectOptions) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    if options.reset_on_close {
        socket.set_linger(Some(Duration::ZERO))?;
    }
    if options.user_timeout.is_some() {
        socket.set_tcp_user_timeout(options.user_timeout)?;
    }
    if let Some(keepalive) = options.keepalive {
        let keepalive = TcpKeepalive::new()
            .with_time(keepalive.idle)
            .with_interval(keepalive.interval)
            .with_retries(keepalive.probes);
        socket.set_tcp_keepalive(&keepalive)?;
    }
    Ok(())
}

/// Lets a socket have an address that is not this host's, and take packets that are routed to it by mark.
fn set_transparent(socket: &Socket, ip: IpAddr) -> io::Result<()> {
    if ip.is_ipv4() {
        return socket.set_ip_transparent_v4(true);
    }
    let on: libc::c_int = 1;
    // SAFETY: the descriptor is open, and the option takes an int, whose address and size are given.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_IPV6,
            libc::IPV6_TRANSPARENT,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Bounded by `net.core.somaxconn`.
const BACKLOG: i32 = 4096;
