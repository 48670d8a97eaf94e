use std::io::{self, IoSliceMut};

use tokio::io::Interest;
use tokio::net::TcpStream;

use super::super::ProtocolError;
use super::super::buffer::Buffer;
use super::super::frame::{HEAD, Kind};
use super::super::record::{ContentType, HEADER, MOST_CONTENT, Sealer, TRAILER};
use super::receiving::retried;

/// Records that wait for the socket. An application's bytes are read to where they are encrypted.
#[derive(Default)]
pub struct Sending {
    buffer: Option<Buffer>,
    start: usize,
    end: usize,
    /// The last read filled all the room there was.
    bulk: bool,
    /// Of the present flow's DATA.
    taken: usize,
    /// The peer asked for new keys.
    pub rekey: bool,
}

impl Sending {
    pub fn has_unsent(&self) -> bool {
        self.start < self.end
    }

    /// Whether the last read filled all the room there was, so that more is likely to be there.
    pub fn took_in_bulk(&self) -> bool {
        self.bulk
    }

    /// Whether a full record of DATA fits, and behind it what a flow may have to say at its end.
    pub fn has_room(&self) -> bool {
        self.buffer.as_ref().is_none_or(|buffer| slots(buffer.len(), self.end, MOST_DATA) > 0)
    }

    /// One read of an application, into as many records as there is room for.
    pub fn take(&mut self, application: &TcpStream, sealer: &mut Sealer) -> io::Result<usize> {
        let bulk = self.bulk;
        let mut buffer = self.buffer.take().unwrap_or_else(|| if bulk { Buffer::large() } else { Buffer::small() });
        // A record can be read once it is there to its end: at first in a packet of its own each, in bulk as few as can be.
        let size = if self.taken < FIRST { FIRST_DATA } else { MOST_DATA };
        let most = slots(buffer.len(), self.end, size);
        let read = read_records(application, &mut buffer[self.end..self.end + most * slot(size)], size);
        self.buffer = Some(buffer);
        let read = match read {
            Ok(read) if read > 0 => read,
            other => {
                self.rest();
                return other;
            }
        };
        self.bulk = read == most * size;
        self.taken = self.taken.saturating_add(read);
        let mut left = read;
        while left > 0 {
            let length = left.min(size);
            left -= length;
            let room = self.grow(HEAD + length)?;
            room[HEADER..HEADER + HEAD].copy_from_slice(&Kind::Data.head(length));
            sealer.seal(ContentType::ApplicationData, room).map_err(ProtocolError::from)?;
        }
        Ok(read)
    }

    /// One frame in a record of its own.
    pub fn push(&mut self, kind: Kind, payload: &[u8], sealer: &mut Sealer) -> io::Result<()> {
        let room = self.grow(HEAD + payload.len())?;
        room[HEADER..HEADER + HEAD].copy_from_slice(&kind.head(payload.len()));
        room[HEADER + HEAD..HEADER + HEAD + payload.len()].copy_from_slice(payload);
        Ok(sealer.seal(ContentType::ApplicationData, room).map_err(ProtocolError::from)?)
    }

    /// A message of TLS itself.
    pub fn message(&mut self, content: ContentType, payload: &[u8], sealer: &mut Sealer) -> io::Result<()> {
        let room = self.grow(payload.len())?;
        room[HEADER..HEADER + payload.len()].copy_from_slice(payload);
        Ok(sealer.seal(content, room).map_err(ProtocolError::from)?)
    }

    /// Room for one more record, behind the others.
    fn grow(&mut self, content: usize) -> io::Result<&mut [u8]> {
        let buffer = self.buffer.get_or_insert_with(Buffer::small);
        let record = HEADER + content + TRAILER;
        if self.end + record > buffer.len() && self.start > 0 {
            buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let room = buffer.get_mut(self.end..self.end + record);
        let room = room.ok_or_else(|| io::Error::other("there is no room for a frame to be sent"))?;
        self.end += record;
        Ok(room)
    }

    pub fn write(&mut self, tcp: &TcpStream) -> io::Result<()> {
        let Some(buffer) = &self.buffer else { return Ok(()) };
        let unsent = &buffer[self.start..self.end];
        let mut written = 0;
        let outcome = tcp.try_io(Interest::WRITABLE, || {
            written = retried(|| nix::unistd::write(tcp, unsent))?;
            // A short write filled the socket: saying so now saves the write that would find no room.
            if written < unsent.len() { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
        });
        self.start += written;
        self.rest();
        if written > 0 { Ok(()) } else { outcome }
    }

    #[cfg(test)]
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.buffer.as_deref_mut().unwrap_or_default()
    }

    /// What comes next is of another flow.
    pub fn begin_flow(&mut self) {
        (self.bulk, self.taken) = (false, 0);
    }

    fn rest(&mut self) {
        if self.start == self.end {
            self.buffer = None;
            (self.start, self.end) = (0, 0);
        }
    }
}

/// Reads to where the payloads of consecutive records of DATA of this size will lie.
fn read_records(application: &TcpStream, room: &mut [u8], size: usize) -> io::Result<usize> {
    let mut rooms: [IoSliceMut<'_>; MOST_SLOTS] = std::array::from_fn(|_| IoSliceMut::new(&mut []));
    let mut count = 0;
    for (room, slot) in rooms.iter_mut().zip(room.chunks_exact_mut(slot(size))) {
        *room = IoSliceMut::new(&mut slot[HEADER + HEAD..HEADER + HEAD + size]);
        count += 1;
    }
    let mut read = 0;
    let outcome = application.try_io(Interest::READABLE, || {
        read = retried(|| nix::sys::uio::readv(application, &mut rooms[..count]))?;
        // A short read emptied the socket: saying so now saves the read that would find nothing.
        if read > 0 && read < count * size { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
    });
    match outcome {
        Err(error) if read == 0 => Err(error),
        _ => Ok(read),
    }
}

/// How many records with so much DATA fit.
fn slots(length: usize, end: usize, size: usize) -> usize {
    (length.saturating_sub(end + CONTROL) / slot(size)).min(MOST_SLOTS)
}

/// A record with so much DATA.
const fn slot(size: usize) -> usize {
    HEADER + HEAD + size + TRAILER
}

/// The payload of a DATA frame that fills its record.
const MOST_DATA: usize = MOST_CONTENT - HEAD;
/// One whose record fits a packet, also of an overlay network.
const FIRST_DATA: usize = 1300;
/// So much of a flow goes in such records: what the kernel sends before it has heard of the peer.
const FIRST: usize = 10 * FIRST_DATA;
const MOST_SLOTS: usize = 12;
/// Kept free behind DATA: END, DONE, RESET, RESET-ACK, new keys and a close, of under 32 bytes each.
const CONTROL: usize = 512;
