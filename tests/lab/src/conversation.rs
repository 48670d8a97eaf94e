//! One connection that a test talks over for a while.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};

/// A connection whose far end sends back what it hears.
///
/// One that `connect()` was refused counts as reset before its first byte: where the mesh connects first and finds out
/// later, it is.
#[derive(Debug)]
pub struct Conversation(io::Result<TcpStream>);

/// How a connection ended, as an application sees it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum End {
    /// In order, after these bytes.
    Closed(Vec<u8>),
    /// By a reset, after so many bytes.
    Reset(usize),
}

impl Conversation {
    /// Takes over a connected stream.
    pub fn over(stream: TcpStream) -> Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(BOUND))?;
        stream.set_write_timeout(Some(BOUND))?;
        Ok(Self(Ok(stream)))
    }

    /// One that did not come about, if somebody said so.
    pub fn refused(error: io::Error) -> Result<Self> {
        match error.kind() {
            ErrorKind::ConnectionRefused
            | ErrorKind::HostUnreachable
            | ErrorKind::NetworkUnreachable
            | ErrorKind::PermissionDenied => Ok(Self(Err(error))),
            _ => Err(error.into()),
        }
    }

    /// Says something, and hears it back.
    pub fn exchange(&mut self, text: &str) -> Result<()> {
        self.say(text)?;
        self.hear(text)
    }

    pub fn say(&mut self, text: &str) -> Result<()> {
        let Ok(stream) = &mut self.0 else { return Ok(()) };
        stream.write_all(text.as_bytes()).with_context(|| format!("{text:?} could not be sent"))
    }

    /// Waits for exactly this.
    pub fn hear(&mut self, text: &str) -> Result<()> {
        let mut heard = vec![0; text.len()];
        self.stream()?.read_exact(&mut heard).with_context(|| format!("{text:?} was not heard"))?;
        if heard != text.as_bytes() {
            bail!("heard {:?} instead of {text:?}", String::from_utf8_lossy(&heard));
        }
        Ok(())
    }

    /// Closes the sending direction.
    pub fn finish_speaking(&self) -> Result<()> {
        Ok(self.stream()?.shutdown(Shutdown::Write)?)
    }

    /// Says something and waits for the end. The reset may come before the words, and is told but once.
    pub fn end_after(&mut self, text: &str) -> Result<End> {
        let Ok(stream) = &mut self.0 else { return Ok(End::Reset(0)) };
        match stream.write_all(text.as_bytes()) {
            Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(End::Reset(0)),
            Err(error) => Err(error).context("neither sent nor reset"),
            Ok(()) => self.end(),
        }
    }

    /// Waits for the end.
    pub fn end(&mut self) -> Result<End> {
        let Ok(stream) = &mut self.0 else { return Ok(End::Reset(0)) };
        let mut heard = Vec::new();
        loop {
            let mut buffer = [0; 4096];
            match stream.read(&mut buffer) {
                Ok(0) => return Ok(End::Closed(heard)),
                Ok(count) => heard.extend(&buffer[..count]),
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(End::Reset(heard.len())),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("neither closed nor reset"),
            }
        }
    }

    /// Whether nothing comes, not even an end, for as long as this.
    pub fn is_silent_for(&mut self, time: Duration) -> Result<bool> {
        let stream = self.stream()?;
        stream.set_read_timeout(Some(time))?;
        let peeked = stream.peek(&mut [0]);
        stream.set_read_timeout(Some(BOUND))?;
        Ok(matches!(peeked, Err(error) if is_timeout(&error)))
    }

    pub fn stream(&self) -> Result<&TcpStream> {
        self.0.as_ref().map_err(|error| anyhow!("it was never connected: {error}"))
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

const BOUND: Duration = Duration::from_secs(20);
