//! Does a TCP socket with exactly these two ends exist? (`sock_diag(7)`)

use std::io;
use std::net::{IpAddr, SocketAddr};

use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};
use netlink_sys::protocols::NETLINK_SOCK_DIAG;

use super::netlink::Netlink;
use super::netns::NetNs;

/// Asks about the sockets of one namespace, from anywhere.
#[derive(Debug)]
pub struct SockDiag {
    netlink: Netlink,
}

impl SockDiag {
    pub fn open(netns: &NetNs) -> io::Result<Self> {
        Ok(Self { netlink: netns.enter(|| Netlink::open(NETLINK_SOCK_DIAG))? })
    }

    /// Whether a live socket there has exactly these ends: one that neither listens nor only remembers (TIME_WAIT,
    /// which a new connection may follow: RFC 6191).
    pub fn has(&mut self, local: SocketAddr, remote: SocketAddr) -> io::Result<bool> {
        let answer = self.netlink.get(SockDiagMessage::InetRequest(request(local, remote)));
        is_live(answer, local, remote)
    }

    /// Whether a process still holds a socket with these ends. One that was closed lives on for a while, to hear the last of
    /// the other side.
    pub fn is_held(&mut self, local: SocketAddr, remote: SocketAddr) -> io::Result<bool> {
        let answer = self.netlink.get(SockDiagMessage::InetRequest(request(local, remote)));
        let inode = match &answer {
            Ok(SockDiagMessage::InetResponse(found)) => found.header.inode,
            _ => 0,
        };
        Ok(is_live(answer, local, remote)? && inode != 0)
    }

    /// Whether one has them, whichever of them it calls its own.
    pub fn has_either_way(&mut self, local: SocketAddr, remote: SocketAddr) -> io::Result<bool> {
        let questions = [request(local, remote), request(remote, local)].map(SockDiagMessage::InetRequest);
        let [one, other] = self.netlink.get_both(questions)?;
        Ok(is_live(one, local, remote)? || is_live(other, remote, local)?)
    }
}

fn request(local: SocketAddr, remote: SocketAddr) -> InetRequest {
    InetRequest {
        family: if local.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 } as u8,
        protocol: libc::IPPROTO_TCP as u8,
        extensions: ExtensionFlags::empty(),
        states: StateFlags::all(),
        socket_id: SocketId {
            source_port: local.port(),
            destination_port: remote.port(),
            source_address: local.ip(),
            destination_address: remote.ip(),
            interface_id: scope(local),
            // No cookie: any socket with these ends.
            cookie: [0xff; 8],
        },
    }
}

fn is_live(answer: io::Result<SockDiagMessage>, local: SocketAddr, remote: SocketAddr) -> io::Result<bool> {
    match answer {
        // The kernel answers with a listener where nothing closer matches.
        Ok(SockDiagMessage::InetResponse(found)) => {
            let id = &found.header.socket_id;
            Ok(![TCP_LISTEN, TCP_TIME_WAIT].contains(&found.header.state)
                && (id.source_port, id.destination_port) == (local.port(), remote.port())
                && plain(id.source_address) == local.ip()
                && plain(id.destination_address) == remote.ip())
        }
        Ok(_) => Ok(false),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether a live connection in the namespace has these two ends, whichever of them it calls its own. A new socket
/// with the same ends would kill it: both share one conntrack entry.
pub fn tuple_in_use(netns: &NetNs, local: SocketAddr, remote: SocketAddr) -> io::Result<bool> {
    SockDiag::open(netns)?.has_either_way(local, remote)
}

/// Whether a socket of the node itself has exactly these ends: what a probe's packet is known by.
pub fn is_local_socket(node: &NetNs, local: SocketAddr, remote: SocketAddr) -> io::Result<bool> {
    SockDiag::open(node)?.has(local, remote)
}

/// An IPv4 socket made as IPv6 (`::ffff:10.0.0.1`) is found by its IPv4 ends and may be shown by either form.
fn plain(ip: IpAddr) -> IpAddr {
    ip.to_canonical()
}

fn scope(addr: SocketAddr) -> u32 {
    match addr {
        SocketAddr::V6(addr) => addr.scope_id(),
        SocketAddr::V4(_) => 0,
    }
}

const TCP_TIME_WAIT: u8 = 6;
const TCP_LISTEN: u8 = 10;
