//! Has anybody touched the packet filter of a namespace? Asked every few seconds for every pod, so it costs a few
//! system calls and no child process: nftables counts its changes, and a legacy table tells its size.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};

use super::iptables::legacy_tables;
use super::rules::IpVersion;

/// Differs whenever the rules may differ; equal only if nobody changed any, but for a legacy rule replaced by one of
/// equal size.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Fingerprint {
    nft_generation: Option<u32>,
    legacy: Vec<(IpVersion, String, TableInfo)>,
}

impl Fingerprint {
    /// Of the thread's present namespace.
    pub fn take() -> Self {
        let mut legacy = Vec::new();
        for version in [IpVersion::V4, IpVersion::V6] {
            for table in legacy_tables(version).lines() {
                let info = table_info(version, table).unwrap_or_default();
                legacy.push((version, table.to_owned(), info));
            }
        }
        Self { nft_generation: nft_generation().ok(), legacy }
    }
}

/// `struct ipt_getinfo` (`linux/netfilter_ipv4/ip_tables.h`); `struct ip6t_getinfo` is the same.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct TableInfo {
    name: [u8; 32],
    valid_hooks: u32,
    hook_entry: [u32; 5],
    underflow: [u32; 5],
    num_entries: u32,
    size: u32,
}

fn table_info(version: IpVersion, table: &str) -> io::Result<TableInfo> {
    let (domain, level) = match version {
        IpVersion::V4 => (libc::AF_INET, libc::IPPROTO_IP),
        IpVersion::V6 => (libc::AF_INET6, libc::IPPROTO_IPV6),
    };
    // SAFETY: makes a socket; the result is checked.
    let fd = unsafe { libc::socket(domain, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::IPPROTO_RAW) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call above succeeded, so this is a new descriptor of ours alone.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut info = TableInfo::default();
    for (to, from) in info.name[..31].iter_mut().zip(table.bytes()) {
        *to = from;
    }
    let mut length = size_of::<TableInfo>() as libc::socklen_t;
    // SAFETY: the kernel reads the name from `info`, which ends in a zero, and writes no more than its size.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, IPT_SO_GET_INFO, (&raw mut info).cast(), &raw mut length)
    };
    if result == 0 { Ok(info) } else { Err(io::Error::last_os_error()) }
}

/// How often the ruleset was changed (`NFT_MSG_GETGEN`).
fn nft_generation() -> io::Result<u32> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut request = Vec::with_capacity(20);
    request.extend(20_u32.to_ne_bytes());
    request.extend((NFT | NFT_MSG_GETGEN).to_ne_bytes());
    request.extend(NLM_F_REQUEST.to_ne_bytes());
    request.extend([0; 12]);
    socket.send(&request, 0)?;
    let mut answer = Vec::with_capacity(4096);
    socket.recv(&mut answer, 0)?;
    let kind = answer.get(4..6).map(|kind| u16::from_ne_bytes([kind[0], kind[1]]));
    // Header, nfgenmsg, then the generation as the first attribute.
    match answer.get(24..).and_then(|value| value.first_chunk()) {
        Some(generation) if kind == Some(NFT | NFT_MSG_NEWGEN) => Ok(u32::from_be_bytes(*generation)),
        _ => Err(io::Error::other("the kernel has no nf_tables")),
    }
}

const IPT_SO_GET_INFO: libc::c_int = 64;
/// `NFNL_SUBSYS_NFTABLES << 8`.
const NFT: u16 = 10 << 8;
const NFT_MSG_NEWGEN: u16 = 15;
const NFT_MSG_GETGEN: u16 = 16;
const NLM_F_REQUEST: u16 = 1;
