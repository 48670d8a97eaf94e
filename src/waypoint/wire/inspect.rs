use http::StatusCode;

use super::body::Chunked;
use super::head::{Length, check};

/// Follows the bytes of one HTTP/1 client from request to request, and lets through what is beyond doubt.
///
/// A head is let through whole or not at all, so that nothing of a request that is refused reaches anybody. Behind a
/// request that asks for another protocol everything waits until it is known what it is.
#[derive(Debug)]
pub struct Inspector {
    limits: Limits,
    state: State,
    /// Bytes of the head of now that were looked at already.
    looked: usize,
    /// Found behind bytes that may go on.
    refused: Option<Violation>,
}

/// What a head may have.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub head: usize,
    pub target: usize,
    pub fields: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { head: 64 * 1024, target: 32 * 1024, fields: 100 }
    }
}

/// What may be done with the bytes at hand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Next {
    /// So many may go on.
    Pass(usize),
    /// More are needed to tell. True in the midst of a head: somebody owes us the rest of it.
    More(bool),
    /// They wait for [`Inspector::upgraded`] or [`Inspector::stayed`].
    Wait,
}

/// Why a client's bytes are refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Violation {
    #[error("{0}")]
    Malformed(&'static str),
    #[error("a version of HTTP that is not served here")]
    Version,
    #[error("CONNECT, which only proxies serve")]
    Connect,
    #[error("a transfer coding other than chunked")]
    Coding,
    #[error("a head that is larger than 64 KiB")]
    HeadTooLarge,
    #[error("more than 100 fields")]
    TooManyFields,
    #[error("a request target that is longer than 32 KiB")]
    TargetTooLong,
    #[error("a head that was not whole in time")]
    Slow,
    #[error("a head for which there is no room: the pod's requests hold as many bytes as they may")]
    Crowded,
}

impl Violation {
    pub fn status(self) -> StatusCode {
        match self {
            Self::Malformed(_) => StatusCode::BAD_REQUEST,
            Self::Version => StatusCode::HTTP_VERSION_NOT_SUPPORTED,
            Self::Connect => StatusCode::METHOD_NOT_ALLOWED,
            Self::Coding => StatusCode::NOT_IMPLEMENTED,
            Self::HeadTooLarge | Self::TooManyFields => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Self::TargetTooLong => StatusCode::URI_TOO_LONG,
            Self::Slow => StatusCode::REQUEST_TIMEOUT,
            Self::Crowded => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

#[derive(Debug)]
enum State {
    Head,
    Body {
        left: u64,
        upgrade: bool,
    },
    Chunks {
        body: Chunked,
        upgrade: bool,
    },
    /// A request asked for another protocol.
    Asked,
    /// No longer HTTP.
    Upgraded,
}

impl Default for Inspector {
    fn default() -> Self {
        Self::new(Limits::default())
    }
}

impl Inspector {
    pub fn new(limits: Limits) -> Self {
        Self { limits, state: State::Head, looked: 0, refused: None }
    }

    /// What may be done with `bytes`, which begin behind those that were let through last.
    pub fn next(&mut self, bytes: &[u8]) -> Result<Next, Violation> {
        if let Some(violation) = self.refused {
            return Err(violation);
        }
        let mut passed = 0;
        while passed < bytes.len() {
            match self.step(&bytes[passed..]) {
                Ok(Next::Pass(count)) => passed += count,
                Ok(other) if passed == 0 => return Ok(other),
                // What was let through goes first.
                Ok(_) => break,
                Err(violation) => {
                    self.refused = Some(violation);
                    if passed == 0 {
                        return Err(violation);
                    }
                    break;
                }
            }
        }
        Ok(if passed > 0 { Next::Pass(passed) } else { Next::More(false) })
    }

    /// The server speaks the other protocol now.
    pub fn upgraded(&mut self) {
        self.state = State::Upgraded;
    }

    /// The server stays with HTTP.
    pub fn stayed(&mut self) {
        if matches!(self.state, State::Asked) {
            self.state = State::Head;
        }
    }

    /// Whether a body is under way, so that somebody has its head already.
    pub fn is_in_body(&self) -> bool {
        matches!(self.state, State::Body { .. } | State::Chunks { .. })
    }

    /// Whether it is open what is spoken from here on.
    pub fn is_asked(&self) -> bool {
        matches!(self.state, State::Asked)
    }

    /// Whether it is no longer HTTP.
    pub fn is_upgraded(&self) -> bool {
        matches!(self.state, State::Upgraded)
    }

    fn step(&mut self, bytes: &[u8]) -> Result<Next, Violation> {
        match &mut self.state {
            State::Upgraded => Ok(Next::Pass(bytes.len())),
            State::Asked => Ok(Next::Wait),
            State::Body { left, upgrade } => {
                let taken = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
                *left -= taken as u64;
                if *left == 0 {
                    self.state = after(*upgrade);
                }
                Ok(Next::Pass(taken))
            }
            State::Chunks { body, upgrade } => {
                let taken = body.take(bytes)?;
                if *body == Chunked::Done {
                    self.state = after(*upgrade);
                }
                Ok(Next::Pass(taken))
            }
            State::Head => self.head(bytes),
        }
    }

    fn head(&mut self, bytes: &[u8]) -> Result<Next, Violation> {
        // RFC 9112, section 2.2: one empty line before a request line is passed over.
        if self.looked < 2 && bytes.starts_with(b"\r\n") {
            self.looked = 0;
            return Ok(Next::Pass(2));
        }
        let Some(length) = self.head_length(bytes) else {
            return self.unfinished(bytes).map(|()| Next::More(true));
        };
        self.looked = 0;
        if length > self.limits.head {
            return Err(Violation::HeadTooLarge);
        }
        self.check_line(&bytes[..length])?;
        let framing = check(&bytes[..length], self.limits)?;
        self.state = match framing.body {
            Length::Known(0) => after(framing.upgrade),
            Length::Known(left) => State::Body { left, upgrade: framing.upgrade },
            Length::Chunked => State::Chunks { body: Chunked::begin(), upgrade: framing.upgrade },
        };
        Ok(Next::Pass(length))
    }

    /// The length of the head with its empty line, once that is there. A line that ends with a bare LF counts as a line
    /// here, so that it is refused rather than waited on.
    fn head_length(&mut self, bytes: &[u8]) -> Option<usize> {
        let start = self.looked.saturating_sub(3);
        let found = bytes[start..].windows(2).position(|pair| pair == b"\n\n" || pair == b"\n\r");
        let Some(at) = found.map(|at| start + at) else {
            self.looked = bytes.len();
            return None;
        };
        match (bytes[at + 1], bytes.get(at + 2)) {
            (b'\n', _) => Some(at + 2),
            (_, Some(_)) => Some(at + 3),
            (_, None) => {
                self.looked = bytes.len();
                None
            }
        }
    }

    /// What can be refused before the head is there to its end.
    fn unfinished(&self, bytes: &[u8]) -> Result<(), Violation> {
        if bytes.len() > self.limits.head {
            self.check_line(bytes)?;
            return Err(Violation::HeadTooLarge);
        }
        let line = bytes.iter().position(|byte| *byte == b'\n');
        match line {
            None if bytes.len() > self.limits.target + SPARE => Err(Violation::TargetTooLong),
            _ => Ok(()),
        }
    }

    fn check_line(&self, bytes: &[u8]) -> Result<(), Violation> {
        let line = bytes.iter().position(|byte| *byte == b'\n').unwrap_or(bytes.len());
        if line > self.limits.target + SPARE { Err(Violation::TargetTooLong) } else { Ok(()) }
    }
}

fn after(upgrade: bool) -> State {
    if upgrade { State::Asked } else { State::Head }
}

/// Of a request line beside its target.
const SPARE: usize = 64;

#[cfg(test)]
mod tests;
