//! One netlink conversation at a time, synchronous: a request, its answers, its errno.

use std::io;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage, NetlinkPayload,
    NetlinkSerializable,
};
use netlink_sys::{Socket, SocketAddr};

/// A netlink socket. It belongs to the network namespace in which it was opened, whoever uses it later.
#[derive(Debug)]
pub struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// Opens a socket of one protocol (`netlink_sys::protocols`) in the thread's present namespace.
    pub fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Asks for everything of a kind.
    pub fn dump<M>(&mut self, message: M) -> io::Result<Vec<M>>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
        NetlinkPayload<M>: From<M>,
    {
        self.send(message, NLM_F_REQUEST | NLM_F_DUMP)?;
        let mut answers = Vec::new();
        loop {
            for payload in self.receive()? {
                match payload {
                    NetlinkPayload::Done(_) => return Ok(answers),
                    NetlinkPayload::InnerMessage(message) => answers.push(message),
                    NetlinkPayload::Error(error) => return Err(error.to_io()),
                    _ => {}
                }
            }
        }
    }

    /// Changes something and waits for the kernel's word. `flags` are beside request and ack.
    pub fn change<M>(&mut self, message: M, flags: u16) -> io::Result<()>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
        NetlinkPayload<M>: From<M>,
    {
        self.send(message, NLM_F_REQUEST | NLM_F_ACK | flags)?;
        loop {
            for payload in self.receive::<M>()? {
                if let NetlinkPayload::Error(error) = payload {
                    return if error.code.is_none() { Ok(()) } else { Err(error.to_io()) };
                }
            }
        }
    }

    /// Asks for one thing: its answer, or the errno.
    pub fn get<M>(&mut self, message: M) -> io::Result<M>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
        NetlinkPayload<M>: From<M>,
    {
        self.send(message, NLM_F_REQUEST)?;
        loop {
            for payload in self.receive::<M>()? {
                match payload {
                    NetlinkPayload::InnerMessage(message) => return Ok(message),
                    NetlinkPayload::Error(error) => return Err(error.to_io()),
                    _ => {}
                }
            }
        }
    }

    /// As [`Netlink::get`], two questions in one packet: of two it is asked this often.
    pub fn get_both<M>(&mut self, messages: [M; 2]) -> io::Result<[io::Result<M>; 2]>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
        NetlinkPayload<M>: From<M>,
    {
        let mut bytes = Vec::with_capacity(ROOM);
        for message in messages {
            self.write(message, NLM_F_REQUEST, &mut bytes);
        }
        self.socket.send(&bytes, 0)?;
        let sequences = [self.sequence.wrapping_sub(1), self.sequence];
        let mut answers = [None, None];
        loop {
            if let [Some(first), Some(second)] = answers {
                return Ok([first, second]);
            }
            bytes.clear();
            // An answer about one socket is a tenth of that.
            self.socket.recv(&mut bytes, 0)?;
            each_message(&bytes, |message: NetlinkMessage<M>| {
                let of = sequences.iter().position(|sequence| *sequence == message.header.sequence_number);
                let answer = of.map(|of| &mut answers[of]).filter(|answer| answer.is_none());
                match (message.payload, answer) {
                    (NetlinkPayload::InnerMessage(message), Some(answer)) => *answer = Some(Ok(message)),
                    (NetlinkPayload::Error(error), Some(answer)) => *answer = Some(Err(error.to_io())),
                    _ => {}
                }
            });
        }
    }

    fn send<M>(&mut self, message: M, flags: u16) -> io::Result<()>
    where
        M: NetlinkSerializable,
        NetlinkPayload<M>: From<M>,
    {
        let mut bytes = Vec::new();
        self.write(message, flags, &mut bytes);
        self.socket.send(&bytes, 0).map(drop)
    }

    /// Appends a request under the next number.
    fn write<M>(&mut self, message: M, flags: u16, bytes: &mut Vec<u8>)
    where
        M: NetlinkSerializable,
        NetlinkPayload<M>: From<M>,
    {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut request = NetlinkMessage::new(header, NetlinkPayload::from(message));
        request.finalize();
        let start = bytes.len();
        bytes.resize(start + request.buffer_len().next_multiple_of(4), 0);
        request.serialize(&mut bytes[start..]);
    }

    /// One datagram's messages that answer the present request.
    fn receive<M: NetlinkDeserializable>(&self) -> io::Result<Vec<NetlinkPayload<M>>> {
        let (bytes, _) = self.socket.recv_from_full()?;
        let mut payloads = Vec::new();
        each_message(&bytes, |message: NetlinkMessage<M>| {
            if message.header.sequence_number == self.sequence {
                payloads.push(message.payload);
            }
        });
        Ok(payloads)
    }
}

/// Reads one datagram. A message that this library cannot read (an attribute of a newer kernel) is not one that we asked
/// about.
fn each_message<M: NetlinkDeserializable>(bytes: &[u8], mut each: impl FnMut(NetlinkMessage<M>)) {
    let mut rest = bytes;
    while rest.len() >= HEADER {
        let length = u32::from_ne_bytes([rest[0], rest[1], rest[2], rest[3]]) as usize;
        if length < HEADER || length > rest.len() {
            return;
        }
        if let Ok(message) = NetlinkMessage::<M>::deserialize(&rest[..length]) {
            each(message);
        }
        rest = &rest[length.next_multiple_of(4).min(rest.len())..];
    }
}

const ROOM: usize = 4096;
const HEADER: usize = 16;
