//! Resetting a connection before it is one: what a client is told by a host where nobody listens (RFC 9293, 3.10.7.1).
//!
//! `REJECT` could, from the `filter` table alone: there every packet of every connection would have to pass by a rule.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::icmp::checksum;

/// Raw sockets of one network namespace, which only send.
#[derive(Debug)]
pub struct Resets {
    v4: Socket,
    v6: Option<Socket>,
}

/// A SYN to answer.
#[derive(Clone, Copy, Debug)]
pub struct Syn {
    pub from: SocketAddr,
    pub to: SocketAddr,
    pub sequence: u32,
    /// The interface that it came by; zero for none.
    pub interface: u32,
}

impl Resets {
    /// Opens what the thread's present namespace has. It needs CAP_NET_RAW.
    pub fn open() -> io::Result<Self> {
        // IPPROTO_RAW: the IP header is ours to write, and nothing is received (raw(7)).
        let open = |domain| {
            let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))?;
            socket.set_nonblocking(true)?;
            Ok::<_, io::Error>(socket)
        };
        Ok(Self { v4: open(Domain::IPV4)?, v6: open(Domain::IPV6).ok() })
    }

    /// Refuses in the name of the host that the SYN was sent to.
    pub fn send(&self, syn: &Syn) -> io::Result<()> {
        let segment = segment(syn);
        match (syn.to.ip(), syn.from.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                // The kernel fills in length and checksum.
                let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0x40, 0, HOPS, TCP, 0, 0];
                packet.extend(from.octets().into_iter().chain(to.octets()));
                packet.extend(segment);
                self.v4.send_to(&packet, &SocketAddr::new(to.into(), 0).into())?;
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                let mut packet = vec![0x60, 0, 0, 0, 0, segment.len() as u8, TCP, HOPS];
                packet.extend(from.octets().into_iter().chain(to.octets()));
                packet.extend(segment);
                let socket = self.v6.as_ref().ok_or(io::ErrorKind::Unsupported)?;
                socket.send_to(&packet, &on_link(to, syn.interface))?;
            }
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        }
        Ok(())
    }
}

/// The TCP part.
fn segment(syn: &Syn) -> Vec<u8> {
    let mut segment = Vec::with_capacity(HEADER);
    segment.extend(syn.to.port().to_be_bytes());
    segment.extend(syn.from.port().to_be_bytes());
    segment.extend([0; 4]);
    // Of data in the SYN nothing is acknowledged, which a reset need not do.
    segment.extend(syn.sequence.wrapping_add(1).to_be_bytes());
    segment.extend([(HEADER as u8 / 4) << 4, RST | ACK, 0, 0, 0, 0, 0, 0]);
    let mut summed = Vec::with_capacity(64);
    for ip in [syn.to.ip(), syn.from.ip()] {
        match ip {
            IpAddr::V4(ip) => summed.extend(ip.octets()),
            IpAddr::V6(ip) => summed.extend(ip.octets()),
        }
    }
    summed.extend([0, TCP, 0, HEADER as u8]);
    summed.extend(&segment);
    segment[16..18].copy_from_slice(&checksum(&summed).to_be_bytes());
    segment
}

fn on_link(ip: Ipv6Addr, interface: u32) -> SockAddr {
    let scope = if ip.is_unicast_link_local() { interface } else { 0 };
    SocketAddrV6::new(ip, 0, 0, scope).into()
}

const HEADER: usize = 20;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;
const TCP: u8 = 6;
const HOPS: u8 = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reset_acknowledges_the_syn_and_comes_from_where_it_was_sent_to() {
        for (from, to) in [("10.0.0.1:40000", "10.0.0.2:80"), ("[fd00::1]:40000", "[fd00::2]:80")] {
            let syn = Syn { from: from.parse().unwrap(), to: to.parse().unwrap(), sequence: u32::MAX, interface: 0 };
            let segment = segment(&syn);
            assert_eq!(segment[..4], [0, 80, 0x9c, 0x40]);
            assert_eq!(segment[8..12], [0; 4], "one more, around the end");
            assert_eq!(segment[13], RST | ACK);
        }
    }
}
