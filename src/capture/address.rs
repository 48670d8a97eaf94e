//! The addresses that a network namespace holds, and whether IPv6 lives there.

use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_sys::protocols::NETLINK_ROUTE;

use super::netlink::Netlink;
use super::netns::NetNs;

/// Every address of a namespace but loopback's own.
pub fn addresses_in(netns: &NetNs) -> io::Result<HashSet<IpAddr>> {
    netns.enter(addresses)
}

/// The addresses of the thread's present namespace, loopback's own left out.
pub fn addresses() -> io::Result<HashSet<IpAddr>> {
    let dumped = Netlink::open(NETLINK_ROUTE)?.dump(RouteNetlinkMessage::GetAddress(AddressMessage::default()))?;
    let mut found = HashSet::new();
    for message in dumped {
        let RouteNetlinkMessage::NewAddress(message) = message else { continue };
        // IFA_LOCAL is the interface's own address; on a point-to-point link IFA_ADDRESS is the peer's.
        let local = message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Local(ip) => Some(*ip),
            _ => None,
        });
        let address = message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Address(ip) => Some(*ip),
            _ => None,
        });
        found.extend(local.or(address).filter(|ip| !ip.is_loopback()));
    }
    Ok(found)
}

/// Whether IPv6 can carry traffic in the thread's present namespace: the kernel has it and `lo` does not disable it.
pub fn ipv6_usable() -> bool {
    std::fs::read_to_string("/proc/sys/net/ipv6/conf/lo/disable_ipv6").is_ok_and(|value| value.trim() == "0")
}

/// The number that the kernel gives the thread's present namespace and never gives again (`SO_NETNS_COOKIE`, Linux
/// 5.14); none before that.
pub fn namespace_cookie() -> Option<u64> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    let mut cookie: u64 = 0;
    let mut length = size_of_val(&cookie) as libc::socklen_t;
    // SAFETY: the descriptor is open, and the option writes a u64 into the space whose size is given.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    (result == 0).then_some(cookie)
}

/// `asm-generic/socket.h`.
const SO_NETNS_COOKIE: libc::c_int = 71;
