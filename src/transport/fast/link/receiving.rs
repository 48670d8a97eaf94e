use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::ops::Range;

use nix::errno::Errno;
use tokio::io::{Interest, ReadBuf};
use tokio::net::TcpStream;

use super::super::ProtocolError;
use super::super::buffer::Buffer;
use super::super::frame::{Frame, Kind, frames};
use super::super::record::{ContentType, HEADER, MOST_RECORD, Opener, whole_record};

/// What came and nobody has taken: frames, decrypted where they lie, and behind them records that are not whole.
#[derive(Default)]
pub struct Receiving {
    buffer: Option<Buffer>,
    /// Ciphertext lies from here on, up to `filled`.
    parsed: usize,
    filled: usize,
    pub frames: VecDeque<Frame>,
    /// The peer has closed in order.
    pub ended: bool,
    /// The last read filled all the room there was.
    bulk: bool,
}

impl Receiving {
    /// Starts with what came together with the end of the handshake.
    pub fn begin(&mut self, plain: &[u8], cipher: &[u8]) -> Result<(), ProtocolError> {
        if plain.is_empty() && cipher.is_empty() {
            return Ok(());
        }
        let mut buffer = if plain.len() + cipher.len() > MOST_RECORD { Buffer::large() } else { Buffer::small() };
        let room = buffer.get_mut(..plain.len() + cipher.len()).ok_or(ProtocolError::Order)?;
        let (first, second) = room.split_at_mut(plain.len());
        first.copy_from_slice(plain);
        second.copy_from_slice(cipher);
        (self.parsed, self.filled) = (plain.len(), plain.len() + cipher.len());
        if !plain.is_empty() {
            frames(plain, 0, |frame| self.frames.push_back(frame))?;
        }
        self.buffer = Some(buffer);
        Ok(())
    }

    pub fn bytes(&self) -> &[u8] {
        self.buffer.as_deref().unwrap_or_default()
    }

    /// One read, as much as there is room for. All frames must have been taken.
    pub fn read(&mut self, tcp: &TcpStream) -> io::Result<usize> {
        let rest = self.parsed..self.filled;
        let mut buffer = match self.buffer.take() {
            Some(mut buffer) if !self.bulk || buffer.is_large() => {
                buffer.copy_within(rest.clone(), 0);
                buffer
            }
            before => {
                let mut buffer = if self.bulk { Buffer::large() } else { Buffer::small() };
                if let Some(before) = before {
                    buffer[..rest.len()].copy_from_slice(&before[rest.clone()]);
                }
                buffer
            }
        };
        (self.parsed, self.filled) = (0, rest.len());
        let room = &mut buffer[self.filled..];
        let read = read_into(tcp, room);
        if let Ok(read) = read {
            self.bulk = read == room.len();
            self.filled += read;
        }
        self.buffer = Some(buffer);
        read
    }

    /// Decrypts the next whole record. Frames join the queue; what else a record may hold is returned.
    pub fn open(&mut self, opener: &mut Opener) -> Result<Option<(ContentType, Range<usize>)>, ProtocolError> {
        let Some(buffer) = &mut self.buffer else { return Ok(None) };
        while !self.ended
            && let Some(length) = whole_record(&buffer[self.parsed..self.filled])?
            && length <= self.filled - self.parsed
        {
            let (content, carried) = opener.open(&mut buffer[self.parsed..self.parsed + length])?;
            let start = self.parsed + HEADER;
            self.parsed += length;
            let payload = start..start + carried;
            if content != ContentType::ApplicationData {
                return Ok(Some((content, payload)));
            }
            frames(&buffer[payload], start, |frame| self.frames.push_back(frame))?;
        }
        Ok(None)
    }

    /// Writes the DATA at the front of the queue, as much as the socket takes.
    pub fn deliver(&mut self, application: &TcpStream) -> io::Result<usize> {
        let Some(buffer) = &self.buffer else { return Ok(0) };
        let mut slices = [IoSlice::new(&[]); MOST_SLICES];
        let (mut count, mut total) = (0, 0);
        let data = self.frames.iter().take_while(|frame| frame.kind == Kind::Data);
        for (slice, frame) in slices.iter_mut().zip(data) {
            *slice = IoSlice::new(&buffer[frame.start..frame.start + frame.length]);
            count += 1;
            total += frame.length;
        }
        let mut written = 0;
        let outcome = application.try_io(Interest::WRITABLE, || {
            written = retried(|| nix::sys::uio::writev(application, &slices[..count]))?;
            // A short write filled the socket: saying so now saves the write that would find no room.
            if written < total { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
        });
        match outcome {
            Err(error) if written == 0 => return Err(error),
            _ => {}
        }
        self.consume(written);
        Ok(written)
    }

    /// Copies the DATA at the front of the queue, as much as there is room for.
    pub fn copy_out(&mut self, room: &mut ReadBuf<'_>) {
        let Some(buffer) = &self.buffer else { return };
        let before = room.filled().len();
        for frame in self.frames.iter().take_while(|frame| frame.kind == Kind::Data) {
            let length = frame.length.min(room.remaining());
            room.put_slice(&buffer[frame.start..frame.start + length]);
        }
        self.consume(room.filled().len() - before);
    }

    fn consume(&mut self, mut written: usize) {
        while written > 0
            && let Some(frame) = self.frames.front_mut()
        {
            if frame.length > written {
                frame.start += written;
                frame.length -= written;
                return;
            }
            written -= frame.length;
            self.frames.pop_front();
        }
    }

    pub fn is_empty(&self) -> bool {
        self.frames.is_empty() && self.parsed == self.filled && !self.ended
    }

    /// Nothing more comes for now: what is empty is given back.
    pub fn rest(&mut self) {
        if self.frames.is_empty() && self.parsed == self.filled {
            self.buffer = None;
            (self.parsed, self.filled, self.bulk) = (0, 0, false);
            self.frames.shrink_to(KEPT_FRAMES);
        }
    }

    /// Drops the frames that have come.
    pub fn forget(&mut self) {
        self.frames.clear();
    }
}

pub(super) fn read_into(tcp: &TcpStream, room: &mut [u8]) -> io::Result<usize> {
    let mut read = 0;
    let outcome = tcp.try_io(Interest::READABLE, || {
        read = retried(|| nix::unistd::read(tcp, room))?;
        // A short read emptied the socket: saying so now saves the read that would find nothing.
        if read > 0 && read < room.len() { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
    });
    match outcome {
        Err(error) if read == 0 => Err(error),
        _ => Ok(read),
    }
}

pub(super) fn retried<T>(mut call: impl FnMut() -> nix::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            other => return other.map_err(io::Error::from),
        }
    }
}

const MOST_SLICES: usize = 16;
const KEPT_FRAMES: usize = 8;
