//! A netfilter queue (`linux/netfilter/nfnetlink_queue.h`): packets that a rule sent to wait, and their verdicts.
//! Nonblocking, so that one runtime can hold the queues of all pods.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::ptr;

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr as NetlinkAddr};
use nix::sys::socket::sockopt;
use socket2::SockRef;

/// One queue of one network namespace.
#[derive(Debug)]
pub struct Queue {
    socket: Socket,
    number: u16,
}

/// Where packets are received.
pub struct Room(Box<[[u8; ROOM]; AT_ONCE]>);

/// A packet that waits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Waiting {
    pub id: u32,
    /// The packet's mark, which a verdict replaces.
    pub mark: u32,
    /// Where it waits.
    pub hook: Hook,
    /// The interface that it came by; zero for none.
    pub interface: u32,
    pub tcp: Option<Tcp>,
    /// How the packet begins: the IP header and eight bytes behind it, where there are no IP options.
    pub head: [u8; HEAD],
}

/// What a packet of TCP's begins with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tcp {
    pub source: SocketAddr,
    pub destination: SocketAddr,
    pub sequence: u32,
}

/// Where in its way through the kernel a packet waits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hook {
    /// It came in, and has not been routed.
    Prerouting,
    /// A socket of this namespace sent it.
    Output,
}

/// What becomes of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// It leaves the table that queued it, with this mark.
    Accept { mark: u32 },
    /// It goes through the chain again, with this mark.
    Repeat { mark: u32 },
    /// It never was.
    Drop,
}

impl Queue {
    /// Opens a queue in the thread's present namespace.
    /// `most_waiting` packets may wait; one more is dropped.
    pub fn open(number: u16, most_waiting: u32) -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.connect(&NetlinkAddr::new(0, 0))?;
        // A queue that overflows drops packets, and TCP sends them again; the error would tell nothing more.
        socket.set_no_enobufs(true)?;
        let queue = Self { socket, number };
        queue.configure(NFQA_CFG_CMD, &[NFQNL_CFG_CMD_BIND, 0, 0, 0])?;
        let mut params = SNAP_LENGTH.to_be_bytes().to_vec();
        params.push(NFQNL_COPY_PACKET);
        queue.configure(NFQA_CFG_PARAMS, &params)?;
        queue.configure(NFQA_CFG_QUEUE_MAXLEN, &most_waiting.to_be_bytes())?;
        queue.make_room();
        queue.socket.set_non_blocking(true)?;
        Ok(queue)
    }

    /// Takes over a queue that another process opened. The packets that wait in it are heard of anew.
    pub fn adopt(number: u16, descriptor: OwnedFd) -> io::Result<Self> {
        // SAFETY: the descriptor is owned, and given up here.
        let socket = unsafe { Socket::from_raw_fd(descriptor.into_raw_fd()) };
        socket.set_non_blocking(true)?;
        let queue = Self { socket, number };
        // What nobody has read yet would be heard of twice.
        let mut room = Room::default();
        while queue.receive(&mut room, |_| ()).is_ok() {}
        // A batch is of all up to a number, as numbers are compared that may wrap: one half after the other.
        for last in [u32::MAX / 2, u32::MAX] {
            let mut attributes = Vec::new();
            put(&mut attributes, NFQA_VERDICT_HDR, &[NF_REPEAT.to_be_bytes(), last.to_be_bytes()].concat());
            queue.send(NFQNL_MSG_VERDICT_BATCH, 0, &attributes)?;
        }
        Ok(queue)
    }

    /// The next packets that wait unseen. `WouldBlock` says that none does any more, also behind the last ones: saying so
    /// now saves the call that would find nothing.
    pub fn receive(&self, room: &mut Room, mut each: impl FnMut(Waiting)) -> io::Result<()> {
        let all = room.receive(self.as_fd())?;
        for datagram in &all {
            let packets = messages(datagram).filter(|(kind, _)| *kind == QUEUE | NFQNL_MSG_PACKET);
            packets.filter_map(|(_, body)| waiting(body)).for_each(&mut each);
        }
        if all.len() < AT_ONCE { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
    }

    pub fn verdict(&self, packet: &Waiting, verdict: Verdict) -> io::Result<()> {
        let (code, mark) = match verdict {
            Verdict::Accept { mark } => (NF_ACCEPT, mark),
            Verdict::Repeat { mark } => (NF_REPEAT, mark),
            Verdict::Drop => (NF_DROP, packet.mark),
        };
        let mut attributes = Vec::new();
        put(&mut attributes, NFQA_VERDICT_HDR, &[code.to_be_bytes(), packet.id.to_be_bytes()].concat());
        put(&mut attributes, NFQA_MARK, &mark.to_be_bytes());
        self.send(NFQNL_MSG_VERDICT, 0, &attributes)
    }

    /// Lets another take the queue; packets that wait are dropped.
    pub fn unbind(&self) -> io::Result<()> {
        let mut attributes = Vec::new();
        put(&mut attributes, NFQA_CFG_CMD, &[NFQNL_CFG_CMD_UNBIND, 0, 0, 0]);
        self.send(NFQNL_MSG_CONFIG, 0, &attributes)
    }

    /// Room for a burst of packets that nobody has read yet: beyond the system's bound where we may, else up to it.
    fn make_room(&self) {
        let socket = SockRef::from(self);
        let forced = nix::sys::socket::setsockopt(self, sockopt::RcvBufForce, &RECEIVE_BUFFER);
        if forced.is_err() && socket.set_recv_buffer_size(RECEIVE_BUFFER).is_err() {
            tracing::debug!("The receive buffer of a queue keeps its size; packets of a burst may have to come again.");
        }
    }

    fn configure(&self, attribute: u16, value: &[u8]) -> io::Result<()> {
        let mut attributes = Vec::new();
        put(&mut attributes, attribute, value);
        self.send(NFQNL_MSG_CONFIG, NLM_F_ACK, &attributes)?;
        let mut buffer = Vec::with_capacity(4096);
        self.socket.recv(&mut buffer, 0)?;
        for (kind, body) in messages(&buffer) {
            if kind == NLMSG_ERROR
                && let Some(code) = body.first_chunk().map(|code| i32::from_ne_bytes(*code))
            {
                return if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) };
            }
        }
        Err(io::Error::other("the kernel did not answer about a netfilter queue"))
    }

    fn send(&self, kind: u16, flags: u16, attributes: &[u8]) -> io::Result<()> {
        let length = HEADER + NFGENMSG + attributes.len();
        let mut message = Vec::with_capacity(length);
        message.extend((length as u32).to_ne_bytes());
        message.extend((QUEUE | kind).to_ne_bytes());
        message.extend((NLM_F_REQUEST | flags).to_ne_bytes());
        message.extend([0; 8]);
        message.extend([libc::AF_UNSPEC as u8, 0]);
        message.extend(self.number.to_be_bytes());
        message.extend(attributes);
        self.socket.send(&message, 0).map(drop)
    }
}

impl Room {
    /// Several datagrams by one call.
    fn receive(&mut self, socket: BorrowedFd<'_>) -> io::Result<Vec<&[u8]>> {
        let mut parts =
            self.0.each_mut().map(|room| libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: room.len() });
        let mut headers = parts.each_mut().map(|part| {
            // SAFETY: all of it are numbers and pointers, for which zero stands for nothing.
            let mut header: libc::mmsghdr = unsafe { std::mem::zeroed() };
            header.msg_hdr.msg_iov = part;
            header.msg_hdr.msg_iovlen = 1;
            header
        });
        // SAFETY: the descriptor is open; each header has one part, which is room of ours of the length that it says.
        let count = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                headers.as_mut_ptr(),
                AT_ONCE as u32,
                libc::MSG_DONTWAIT,
                ptr::null_mut(),
            )
        };
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        let filled = self.0.iter().zip(&headers).take(count);
        Ok(filled.filter_map(|(room, header)| room.get(..header.msg_len as usize)).collect())
    }
}

impl Default for Room {
    fn default() -> Self {
        Self(Box::new([[0; ROOM]; AT_ONCE]))
    }
}

impl Waiting {
    /// The IP header and eight bytes behind it, as ICMP repeats them; none where the header has options.
    pub fn beginning(&self) -> Option<&[u8]> {
        match self.head[0] {
            0x45 => self.head.get(..28),
            first if first >> 4 == 6 => Some(&self.head),
            _ => None,
        }
    }
}

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Queue {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

/// Type and body of each message of a datagram.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
        let message = bytes.get(..length)?;
        let kind = u16::from_ne_bytes([*message.get(4)?, *message.get(5)?]);
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, message.get(HEADER..)?))
    })
}

fn waiting(body: &[u8]) -> Option<Waiting> {
    let mut rest = body.get(NFGENMSG..)?;
    let (mut id, mut hook, mut mark, mut interface) = (None, Hook::Prerouting, 0, 0);
    let (mut tcp, mut head) = (None, [0; HEAD]);
    while let Some(length) = rest.first_chunk().map(|length| usize::from(u16::from_ne_bytes(*length))) {
        let attribute = rest.get(..length).filter(|attribute| attribute.len() >= 4)?;
        let kind = u16::from_ne_bytes([attribute[2], attribute[3]]) & NLA_TYPE_MASK;
        let value = &attribute[4..];
        match kind {
            NFQA_PACKET_HDR => {
                id = value.first_chunk().map(|id| u32::from_be_bytes(*id));
                if value.get(HOOK_AT) == Some(&NF_INET_LOCAL_OUT) {
                    hook = Hook::Output;
                }
            }
            NFQA_MARK => mark = u32::from_be_bytes(*value.first_chunk()?),
            NFQA_IFINDEX_INDEV => interface = u32::from_be_bytes(*value.first_chunk()?),
            NFQA_PAYLOAD => {
                tcp = tcp_beginning(value);
                head.iter_mut().zip(value).for_each(|(to, from)| *to = *from);
            }
            _ => {}
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(Waiting { id: id?, hook, mark, interface, tcp, head })
}

/// Reads a TCP packet that begins with its IP header (RFC 791, RFC 8200, RFC 9293). IPv6 extension headers are not
/// followed: no SYN of a probe has any.
fn tcp_beginning(packet: &[u8]) -> Option<Tcp> {
    let (source, destination, tcp): (IpAddr, IpAddr, &[u8]) = match packet.first()? >> 4 {
        4 if *packet.get(9)? == TCP => {
            let header = usize::from(packet[0] & 0xf) * 4;
            let ip = |at: usize| Some(Ipv4Addr::from(*packet.get(at..)?.first_chunk::<4>()?));
            (ip(12)?.into(), ip(16)?.into(), packet.get(header..)?)
        }
        6 if *packet.get(6)? == TCP => {
            let ip = |at: usize| Some(Ipv6Addr::from(*packet.get(at..)?.first_chunk::<16>()?));
            (ip(8)?.into(), ip(24)?.into(), packet.get(40..)?)
        }
        _ => return None,
    };
    let port = |at: usize| Some(u16::from_be_bytes(*tcp.get(at..)?.first_chunk::<2>()?));
    Some(Tcp {
        source: SocketAddr::new(source, port(0)?),
        destination: SocketAddr::new(destination, port(2)?),
        sequence: u32::from_be_bytes(*tcp.get(4..)?.first_chunk()?),
    })
}

fn put(into: &mut Vec<u8>, kind: u16, value: &[u8]) {
    into.extend((4 + value.len() as u16).to_ne_bytes());
    into.extend(kind.to_ne_bytes());
    into.extend(value);
    into.resize(into.len().next_multiple_of(4), 0);
}

/// An IPv6 header and eight bytes.
const HEAD: usize = 48;
const HEADER: usize = 16;
const NFGENMSG: usize = 4;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLA_TYPE_MASK: u16 = 0x3fff;
/// `NFNL_SUBSYS_QUEUE << 8`.
const QUEUE: u16 = 3 << 8;
const NFQNL_MSG_PACKET: u16 = 0;
const NFQNL_MSG_VERDICT: u16 = 1;
const NFQNL_MSG_CONFIG: u16 = 2;
const NFQNL_MSG_VERDICT_BATCH: u16 = 3;
const NFQA_CFG_CMD: u16 = 1;
const NFQA_CFG_PARAMS: u16 = 2;
const NFQA_CFG_QUEUE_MAXLEN: u16 = 3;
const NFQNL_CFG_CMD_BIND: u8 = 1;
const NFQNL_CFG_CMD_UNBIND: u8 = 2;
const NFQNL_COPY_PACKET: u8 = 2;
const NFQA_PACKET_HDR: u16 = 1;
const NFQA_VERDICT_HDR: u16 = 2;
const NFQA_MARK: u16 = 3;
const NFQA_IFINDEX_INDEV: u16 = 5;
const NFQA_PAYLOAD: u16 = 10;
const NF_DROP: u32 = 0;
const NF_ACCEPT: u32 = 1;
const NF_REPEAT: u32 = 4;
/// In `struct nfqnl_msg_packet_hdr`, after the id and the protocol.
const HOOK_AT: usize = 6;
const NF_INET_LOCAL_OUT: u8 = 3;
const TCP: u8 = 6;
/// Enough for an IP header with options and the ports.
const SNAP_LENGTH: u32 = 128;
/// More than any one datagram of the kernel's: the beginning of a packet, and what is told of it.
const ROOM: usize = 1024;
/// How many are received by one call.
const AT_ONCE: usize = 16;
/// Some thousand packets.
const RECEIVE_BUFFER: usize = 4 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_beginning_of_a_packet_is_read_and_garbage_is_not() {
        let mut v4 = vec![0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
        v4.extend([0x30, 0x39, 0x00, 0x50, 1, 2, 3, 4]);
        let (source, destination) = ("10.0.0.1:12345".parse().unwrap(), "10.0.0.2:80".parse().unwrap());
        assert_eq!(tcp_beginning(&v4), Some(Tcp { source, destination, sequence: 0x0102_0304 }));
        for length in 0..v4.len() {
            assert_eq!(tcp_beginning(&v4[..length]), None, "cut at {length}");
        }
        v4[9] = 17;
        assert_eq!(tcp_beginning(&v4), None, "UDP");
        let mut v6 = vec![0; 40];
        v6[0] = 0x60;
        v6[6] = 6;
        v6[23] = 1;
        v6[39] = 2;
        v6.extend([0, 1, 0, 2, 0, 0, 0, 3]);
        let (source, destination) = ("[::1]:1".parse().unwrap(), "[::2]:2".parse().unwrap());
        assert_eq!(tcp_beginning(&v6), Some(Tcp { source, destination, sequence: 3 }));
    }
}
