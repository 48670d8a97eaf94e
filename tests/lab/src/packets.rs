//! What crosses an interface: an AF_PACKET reader, and the search for readable bytes in what it kept.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

use anyhow::{Context, Result, bail};
use memchr::memmem;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Protocol, Socket, Type};

use crate::namespace::Namespace;

/// A running capture of one interface, both directions, in memory. Everything sent before a question is asked is in
/// the answer. It ends when dropped.
#[derive(Debug)]
pub struct Capture {
    shared: Arc<Shared>,
}

impl Capture {
    pub(crate) fn start(namespace: &Namespace, interface: &str) -> Result<Self> {
        let socket = namespace
            .run(|| packet_socket(interface))
            .with_context(|| format!("cannot capture on {interface} in {}", namespace.path().display()))?;
        let shared = Arc::new(Shared { socket, done: AtomicBool::new(false), kept: Mutex::default() });
        let reader = shared.clone();
        thread::spawn(move || {
            while !reader.done.load(Ordering::Relaxed) {
                let mut ready = [PollFd::new(reader.socket.as_fd(), PollFlags::POLLIN)];
                if poll(&mut ready, PollTimeout::from(100_u8)).is_ok_and(|count| count > 0) && reader.drain().is_err() {
                    return;
                }
            }
        });
        Ok(Self { shared })
    }

    /// Looks for bytes in every packet, and in every TCP stream put together again, where they may span packets.
    /// Fails where the capture is not complete, for then nothing found would prove nothing.
    pub fn find(&self, needle: &[u8]) -> Result<Found> {
        let kept = self.shared.drain()?;
        if kept.overflowed || kept.dropped > 0 {
            bail!("the capture is not complete: {} packets dropped by the kernel", kept.dropped);
        }
        let finder = memmem::Finder::new(needle);
        let packets = kept.packets.iter().filter(|packet| finder.find(packet).is_some()).count();
        let flows: BTreeSet<Flow> = kept
            .streams()
            .into_iter()
            .filter(|(_, bytes)| finder.find(bytes).is_some())
            .map(|(flow, _)| flow)
            .collect();
        Ok(Found {
            packets,
            flows: flows.into_iter().collect(),
            searched_packets: kept.packets.len(),
            searched_bytes: kept.bytes,
        })
    }

    /// How many TCP packets had a port, as source or destination.
    pub fn tcp_packets(&self, port: u16) -> Result<usize> {
        let kept = self.shared.drain()?;
        let mut count = 0;
        for packet in &kept.packets {
            count += usize::from(Segment::parse(packet).is_some_and(|segment| segment.has_port(port)));
        }
        Ok(count)
    }

    /// TCP packets by the lower of their two ports, which is the server's for all but odd clients.
    pub fn tcp_ports(&self) -> Result<BTreeMap<u16, usize>> {
        let kept = self.shared.drain()?;
        let mut ports = BTreeMap::new();
        for segment in kept.packets.iter().filter_map(|packet| Segment::parse(packet)) {
            *ports.entry(segment.flow.0.port().min(segment.flow.1.port())).or_default() += 1;
        }
        Ok(ports)
    }

    /// The TCP streams that were seen, put together: one entry a flow and direction.
    pub fn streams(&self) -> Result<BTreeMap<(SocketAddr, SocketAddr), Vec<u8>>> {
        Ok(self.shared.drain()?.streams().into_iter().map(|(Flow(from, to), bytes)| ((from, to), bytes)).collect())
    }

    /// Every packet kept, from its Ethernet header on.
    pub fn packets(&self) -> Result<Vec<Vec<u8>>> {
        Ok(self.shared.drain()?.packets.clone())
    }

    /// Forgets what was kept.
    pub fn clear(&self) -> Result<()> {
        let mut kept = self.shared.drain()?;
        kept.packets.clear();
        kept.bytes = 0;
        Ok(())
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.shared.done.store(true, Ordering::Relaxed);
    }
}

/// What a search found, and in how much.
#[derive(Clone, Debug)]
pub struct Found {
    /// Packets that hold it whole.
    pub packets: usize,
    /// TCP flows (from, to) that hold it, whole or across packets.
    pub flows: Vec<Flow>,
    pub searched_packets: usize,
    pub searched_bytes: usize,
}

impl Found {
    pub fn is_found(&self) -> bool {
        self.packets > 0 || !self.flows.is_empty()
    }
}

/// One direction of a TCP connection: from, to.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Flow(pub SocketAddr, pub SocketAddr);

#[derive(Debug)]
struct Shared {
    socket: Socket,
    done: AtomicBool,
    kept: Mutex<Kept>,
}

impl Shared {
    /// Takes over what the kernel holds at this moment.
    fn drain(&self) -> Result<MutexGuard<'_, Kept>> {
        let mut kept = self.kept.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut buffer = vec![0; LARGEST_PACKET];
        loop {
            match nix::sys::socket::recv(self.socket.as_raw_fd(), &mut buffer, nix::sys::socket::MsgFlags::MSG_DONTWAIT)
            {
                Ok(length) => kept.keep(&buffer[..length]),
                Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => {}
                // The interface went away; what was kept stays.
                Err(Errno::ENETDOWN) => {}
                Err(error) => bail!("cannot read packets: {error}"),
            }
        }
        kept.dropped += dropped(&self.socket)?;
        Ok(kept)
    }
}

#[derive(Debug, Default)]
struct Kept {
    packets: Vec<Vec<u8>>,
    bytes: usize,
    dropped: u32,
    overflowed: bool,
}

impl Kept {
    fn keep(&mut self, packet: &[u8]) {
        if self.bytes + packet.len() > MOST_BYTES {
            self.overflowed = true;
            return;
        }
        self.bytes += packet.len();
        self.packets.push(packet.to_vec());
    }

    /// Payload by flow, in the order of sequence numbers. A connection that reuses both ports makes a stream of its own
    /// text after the first's; gaps close up, which can only make a search find more.
    fn streams(&self) -> BTreeMap<Flow, Vec<u8>> {
        let mut flows: BTreeMap<Flow, Vec<Connection>> = BTreeMap::new();
        for segment in self.packets.iter().filter_map(|packet| Segment::parse(packet)) {
            let connections = flows.entry(segment.flow).or_default();
            let fresh = connections.last().is_none_or(|last| segment.syn && segment.sequence != last.first);
            if fresh {
                connections.push(Connection { first: segment.sequence, payload: BTreeMap::new() });
            }
            let Some(connection) = connections.last_mut() else { continue };
            if !segment.payload.is_empty() {
                let offset = i64::from(segment.sequence.wrapping_sub(connection.first) as i32);
                let held = connection.payload.entry(offset).or_insert(&[]);
                if held.len() < segment.payload.len() {
                    *held = segment.payload;
                }
            }
        }
        flows.into_iter().map(|(flow, all)| (flow, all.iter().flat_map(Connection::text).collect())).collect()
    }
}

struct Connection<'a> {
    first: u32,
    payload: BTreeMap<i64, &'a [u8]>,
}

impl Connection<'_> {
    fn text(&self) -> Vec<u8> {
        let mut text = Vec::new();
        let mut end = i64::MIN;
        for (&offset, &payload) in &self.payload {
            let known = usize::try_from(end.saturating_sub(offset)).unwrap_or(0).min(payload.len());
            text.extend_from_slice(&payload[known..]);
            end = end.max(offset + payload.len() as i64);
        }
        text
    }
}

struct Segment<'a> {
    flow: Flow,
    sequence: u32,
    syn: bool,
    payload: &'a [u8],
}

impl<'a> Segment<'a> {
    /// A TCP segment in an Ethernet frame; none where it is something else or cut short.
    fn parse(frame: &'a [u8]) -> Option<Self> {
        let (header, packet) = frame.split_at_checked(14)?;
        let (from, to, segment): (IpAddr, IpAddr, &[u8]) = match header[12..] {
            [0x08, 0x00] => {
                let length = usize::from(u16::from_be_bytes([*packet.get(2)?, *packet.get(3)?]));
                let ip = packet.get(..length)?;
                let start = usize::from(ip[0] & 0xf) * 4;
                (*ip.get(9)? == 6).then_some(())?;
                (octets::<4>(ip, 12)?.into(), octets::<4>(ip, 16)?.into(), ip.get(start..)?)
            }
            [0x86, 0xdd] => {
                let length = usize::from(u16::from_be_bytes([*packet.get(4)?, *packet.get(5)?]));
                (*packet.get(6)? == 6).then_some(())?;
                (octets::<16>(packet, 8)?.into(), octets::<16>(packet, 24)?.into(), packet.get(40..40 + length)?)
            }
            _ => return None,
        };
        let port = |at: usize| Some(u16::from_be_bytes(octets::<2>(segment, at)?));
        let start = usize::from(*segment.get(12)? >> 4) * 4;
        Some(Self {
            flow: Flow(SocketAddr::new(from, port(0)?), SocketAddr::new(to, port(2)?)),
            sequence: u32::from_be_bytes(octets::<4>(segment, 4)?),
            syn: segment.get(13)? & 2 != 0,
            payload: segment.get(start..)?,
        })
    }

    fn has_port(&self, port: u16) -> bool {
        self.flow.0.port() == port || self.flow.1.port() == port
    }
}

fn octets<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

fn packet_socket(interface: &str) -> Result<Socket> {
    let index = nix::net::if_::if_nametoindex(interface).with_context(|| format!("no interface {interface}"))?;
    // Protocol 0: nothing arrives before the bind below names the interface.
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(0)))?;
    enlarge(&socket);
    // SAFETY: sockaddr_ll is plain data for which all zeroes are a value; bind reads it whole, within its length.
    let bound = unsafe {
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        address.sll_ifindex = index as i32;
        libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size_of::<libc::sockaddr_ll>() as libc::socklen_t)
    };
    Errno::result(bound).map_err(io::Error::from)?;
    Ok(socket)
}

/// As large a receive buffer as is to be had: beyond the system's limit for the machine's root only.
fn enlarge(socket: &Socket) {
    let forced = nix::sys::socket::setsockopt(socket, nix::sys::socket::sockopt::RcvBufForce, &RECEIVE_BUFFER);
    if forced.is_err() {
        // Less is fine; what a small buffer loses is counted as dropped.
        let _ = socket.set_recv_buffer_size(RECEIVE_BUFFER);
    }
}

/// Packets the kernel had no room for since last asked.
fn dropped(socket: &Socket) -> Result<u32> {
    // SAFETY: tpacket_stats is plain data for which all zeroes are a value; the length given is its own.
    let (result, stats) = unsafe {
        let mut stats: libc::tpacket_stats = std::mem::zeroed();
        let mut length = size_of::<libc::tpacket_stats>() as libc::socklen_t;
        let result = libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            (&raw mut stats).cast(),
            &raw mut length,
        );
        (result, stats)
    };
    Errno::result(result).context("cannot read how many packets were dropped")?;
    Ok(stats.tp_drops)
}

const LARGEST_PACKET: usize = 256 * 1024;
const RECEIVE_BUFFER: usize = 64 * 1024 * 1024;
const MOST_BYTES: usize = 512 * 1024 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(sequence: u32, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 14];
        frame[12..14].copy_from_slice(&[0x08, 0x00]);
        let length = (40 + payload.len()) as u16;
        let mut ip = vec![0x45, 0];
        ip.extend(length.to_be_bytes());
        ip.extend([0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        let mut tcp = vec![0x30, 0x39, 0x1f, 0x90];
        tcp.extend(sequence.to_be_bytes());
        tcp.extend([0, 0, 0, 0, 0x50, 0x10, 0, 0, 0, 0, 0, 0]);
        [frame, ip, tcp, payload.to_vec()].concat()
    }

    #[test]
    fn a_stream_is_put_together_from_segments_out_of_order_twice_sent_and_overlapping() {
        let mut kept = Kept::default();
        let first = u32::MAX - 1;
        kept.keep(&frame(first, b"abc"));
        kept.keep(&frame(first.wrapping_add(6), b"ghi"));
        kept.keep(&frame(first, b"abc"));
        kept.keep(&frame(first.wrapping_add(2), b"cdef"));
        let streams = kept.streams();
        assert_eq!(streams.values().next().map(Vec::as_slice), Some(b"abcdefghi".as_slice()));
    }

    #[test]
    fn what_is_cut_short_is_no_segment() {
        let whole = frame(1, b"abc");
        assert!(Segment::parse(&whole).is_some());
        for length in 0..54 {
            assert!(Segment::parse(&whole[..length]).is_none(), "{length}");
        }
    }
}
