//! Telling a client by ICMP why it is not connected (RFC 792, RFC 4443).
//!
//! `REJECT` could, but the kernel sends one such message a second to each client, so that the next would hear nothing. A
//! SYN gets one answer at most here, as it would by a reset.

use std::io;
use std::net::{IpAddr, SocketAddr};

use socket2::{Domain, Protocol, SockFilter, Socket, Type};

/// Raw sockets of one network namespace, of the families that live there.
#[derive(Debug)]
pub struct Icmp {
    v4: Option<Socket>,
    v6: Option<Socket>,
}

/// What "destination unreachable" says more closely.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Unreachable {
    /// Administratively prohibited.
    Prohibited,
    /// The host, or the address.
    Host,
    /// The network: no route.
    Network,
}

impl Icmp {
    /// Opens what the thread's present namespace has.
    pub fn open() -> Self {
        let open = |domain, protocol| {
            let socket = Socket::new(domain, Type::RAW, Some(protocol))?;
            socket.set_nonblocking(true)?;
            // It only sends: nothing that arrives is kept for it.
            socket.attach_filter(&[SockFilter::new(RETURN, 0, 0, 0)])?;
            Ok::<_, io::Error>(socket)
        };
        let told = |family: &str, opened: io::Result<Socket>| {
            opened.inspect_err(|error| tracing::debug!(%error, family, "No ICMP; clients hear a reset instead.")).ok()
        };
        Self {
            v4: told("IPv4", open(Domain::IPV4, Protocol::ICMPV4)),
            v6: told("IPv6", open(Domain::IPV6, Protocol::ICMPV6)),
        }
    }

    /// Answers a packet, given its beginning: the IP header and eight bytes behind it.
    pub fn send(&self, to: IpAddr, what: Unreachable, packet: &[u8]) -> io::Result<()> {
        let (socket, kind, code) = match to {
            IpAddr::V4(_) => (&self.v4, 3, what.code_v4()),
            IpAddr::V6(_) => (&self.v6, 1, what.code_v6()),
        };
        let socket = socket.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        let mut message = vec![kind, code, 0, 0, 0, 0, 0, 0];
        message.extend(packet);
        if to.is_ipv4() {
            // The kernel does it for IPv6.
            let sum = checksum(&message).to_be_bytes();
            message[2..4].copy_from_slice(&sum);
        }
        socket.send_to(&message, &SocketAddr::new(to, 0).into()).map(drop)
    }
}

impl Unreachable {
    fn code_v4(self) -> u8 {
        match self {
            Self::Network => 0,
            Self::Host => 1,
            Self::Prohibited => 13,
        }
    }

    fn code_v6(self) -> u8 {
        match self {
            Self::Network => 0,
            Self::Prohibited => 1,
            Self::Host => 3,
        }
    }
}

/// RFC 1071.
pub(super) fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u32::from(*low)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// `BPF_RET | BPF_K`, with 0: keep nothing.
const RETURN: u16 = 0x06;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_with_its_checksum_sums_up_to_nothing() {
        for length in [8, 27, 28] {
            let mut message: Vec<u8> = (0..length).map(|byte| byte * 7 + 3).collect();
            message[2..4].fill(0);
            let sum = checksum(&message).to_be_bytes();
            message[2..4].copy_from_slice(&sum);
            assert_eq!(checksum(&message), 0, "{length} bytes");
        }
    }
}
