//! Has anybody touched the packet filter of a namespace? Asked every few seconds for every pod, so it costs a few
//! system calls and no child process: nftables counts its changes, and a legacy table is read as the kernel holds it.

use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::LazyLock;

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};

use super::iptables::legacy_tables;
use super::rules::IpVersion;

/// Differs whenever the rules may differ; equal only if nobody changed any.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Fingerprint {
    nft_generation: Option<u32>,
    /// Of each table a digest of its rules; none where it changed while it was read.
    legacy: Vec<(IpVersion, String, Option<u64>)>,
}

impl Fingerprint {
    /// Of the thread's present namespace.
    pub fn take() -> Self {
        let mut legacy = Vec::new();
        for version in [IpVersion::V4, IpVersion::V6] {
            for table in legacy_tables(version).lines() {
                let digest = read_table(version, table).ok().map(|rules| KEYS.hash_one(rules));
                legacy.push((version, table.to_owned(), digest));
            }
        }
        Self { nft_generation: nft_generation().ok(), legacy }
    }
}

/// A legacy table's rules as the kernel holds them, but for what traffic changes.
fn read_table(version: IpVersion, table: &str) -> io::Result<Vec<u8>> {
    let domain = match version {
        IpVersion::V4 => libc::AF_INET,
        IpVersion::V6 => libc::AF_INET6,
    };
    // SAFETY: makes a socket; the result is checked.
    let fd = unsafe { libc::socket(domain, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::IPPROTO_RAW) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call above succeeded, so this is a new descriptor of ours alone.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut info = [0_u8; TABLE_INFO];
    let name = table.as_bytes();
    let name = &name[..name.len().min(TABLE_NAME - 1)];
    info[..name.len()].copy_from_slice(name);
    ask(&socket, version, IPT_SO_GET_INFO, &mut info)?;
    let size = &info[TABLE_INFO - 4..];
    let mut rules = vec![0_u8; RULES_AT + u32::from_ne_bytes([size[0], size[1], size[2], size[3]]) as usize];
    rules[..name.len()].copy_from_slice(name);
    rules[TABLE_NAME..TABLE_NAME + 4].copy_from_slice(size);
    // EAGAIN: the table has another size by now.
    ask(&socket, version, IPT_SO_GET_ENTRIES, &mut rules)?;
    still_counters(&mut rules[RULES_AT..], version);
    // Where chains begin is told beside the rules.
    rules.extend(info);
    Ok(rules)
}

fn ask(socket: &OwnedFd, version: IpVersion, what: libc::c_int, about: &mut [u8]) -> io::Result<()> {
    let level = match version {
        IpVersion::V4 => libc::IPPROTO_IP,
        IpVersion::V6 => libc::IPPROTO_IPV6,
    };
    let mut length = libc::socklen_t::try_from(about.len()).map_err(io::Error::other)?;
    // SAFETY: the kernel reads the name at the start of `about`, which ends in a zero, and writes no more than its
    // length, which it is given.
    let result =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, what, about.as_mut_ptr().cast(), &raw mut length) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Sets to zero the packets and bytes that each rule has counted.
fn still_counters(rules: &mut [u8], version: IpVersion) {
    let entry = match version {
        IpVersion::V4 => IPT_ENTRY,
        IpVersion::V6 => IP6T_ENTRY,
    };
    let mut at = 0;
    while let Some(rule) = rules.get_mut(at..).filter(|rest| rest.len() >= entry.size) {
        rule[entry.counters..entry.counters + COUNTERS].fill(0);
        let next = usize::from(u16::from_ne_bytes([rule[entry.next_offset], rule[entry.next_offset + 1]]));
        if next < entry.size {
            return;
        }
        at += next;
    }
}

/// Where in a rule, as the kernel hands it out, its parts stand.
struct Entry {
    next_offset: usize,
    counters: usize,
    size: usize,
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
const IPT_SO_GET_ENTRIES: libc::c_int = 65;
/// `XT_TABLE_MAXNAMELEN`
const TABLE_NAME: usize = 32;
/// `struct ipt_getinfo` (`linux/netfilter_ipv4/ip_tables.h`), whose last word is the size of the rules; `struct
/// ip6t_getinfo` is the same.
const TABLE_INFO: usize = TABLE_NAME + 4 * (1 + 5 + 5 + 1 + 1);
/// `offsetof(struct ipt_get_entries, entrytable)`: the name, the size, and padding.
const RULES_AT: usize = TABLE_NAME + 8;
/// `struct xt_counters`
const COUNTERS: usize = 16;
/// `struct ipt_entry`
const IPT_ENTRY: Entry = Entry { next_offset: 90, counters: 96, size: 112 };
/// `struct ip6t_entry` (`linux/netfilter_ipv6/ip6_tables.h`)
const IP6T_ENTRY: Entry = Entry { next_offset: 142, counters: 152, size: 168 };
/// The same for as long as the agent runs, and known to nobody in a pod.
static KEYS: LazyLock<RandomState> = LazyLock::new(RandomState::new);
/// `NFNL_SUBSYS_NFTABLES << 8`.
const NFT: u16 = 10 << 8;
const NFT_MSG_NEWGEN: u16 = 15;
const NFT_MSG_GETGEN: u16 = 16;
const NLM_F_REQUEST: u16 = 1;
