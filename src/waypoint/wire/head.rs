//! The head of one request of HTTP/1, line by line.

use super::inspect::{Limits, Violation};
use super::sniff::is_token;

/// What a head says of what follows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Framing {
    pub body: Length,
    /// Another protocol may follow, should the server agree.
    pub upgrade: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Length {
    Known(u64),
    Chunked,
}

/// Checks a whole head, from its request line to its empty line, and says what follows it.
///
/// Whatever two parsers could read in two ways is refused: RFC 9112, sections 2.2, 3.2, 5 and 6.
pub fn check(head: &[u8], limits: Limits) -> Result<Framing, Violation> {
    let mut lines = Lines(head);
    let version = request_line(lines.next()?)?;
    let mut fields = Fields::default();
    loop {
        let line = lines.next()?;
        if line.is_empty() {
            break;
        }
        fields.count += 1;
        if fields.count > limits.fields {
            return Err(Violation::TooManyFields);
        }
        fields.take(line)?;
    }
    fields.framing(version)
}

/// Checks one line of a trailer section. What would change the framing of a message has no place there: RFC 9110,
/// section 6.5.1.
pub fn check_trailer(line: &[u8]) -> Result<(), Violation> {
    let (name, _) = field(line)?;
    match is_framing(name) {
        true => Err(Violation::Malformed("a trailer field that frames or routes messages")),
        false => Ok(()),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Version {
    Http10,
    Http11,
}

/// Lines that end with CRLF, and with nothing else.
struct Lines<'a>(&'a [u8]);

impl<'a> Lines<'a> {
    fn next(&mut self) -> Result<&'a [u8], Violation> {
        let end = self.0.iter().position(|byte| *byte == b'\n').ok_or(Violation::Malformed("a line without an end"))?;
        let (line, rest) = (&self.0[..end], &self.0[end + 1..]);
        self.0 = rest;
        whole_line(line)
    }
}

/// The line before its CR; `line` goes up to its LF.
pub fn whole_line(line: &[u8]) -> Result<&[u8], Violation> {
    let line = line.strip_suffix(b"\r").ok_or(Violation::Malformed("a line that ends with a bare LF"))?;
    match line.contains(&b'\r') {
        true => Err(Violation::Malformed("a bare CR")),
        false => Ok(line),
    }
}

fn request_line(line: &[u8]) -> Result<Version, Violation> {
    let mut words = line.split(|byte| *byte == b' ');
    let (Some(method), Some(target), Some(version), None) = (words.next(), words.next(), words.next(), words.next())
    else {
        return Err(Violation::Malformed("a request line that is not three words"));
    };
    if method.is_empty() || !method.iter().all(|byte| is_token(*byte)) {
        return Err(Violation::Malformed("a method that is no token"));
    }
    let version = match version {
        b"HTTP/1.1" => Version::Http11,
        b"HTTP/1.0" => Version::Http10,
        [b'H', b'T', b'T', b'P', b'/', major, b'.', minor] if major.is_ascii_digit() && minor.is_ascii_digit() => {
            return Err(Violation::Version);
        }
        _ => return Err(Violation::Malformed("a request line without a version")),
    };
    check_target(method, target)?;
    Ok(version)
}

// RFC 9112, section 3.2.
fn check_target(method: &[u8], target: &[u8]) -> Result<(), Violation> {
    if method == b"CONNECT" {
        return Err(Violation::Connect);
    }
    if !target.iter().all(|byte| byte.is_ascii_graphic()) || target.contains(&b'#') {
        return Err(Violation::Malformed("a request target with bytes that have no place there"));
    }
    let absolute = [&b"http://"[..], b"https://"].iter().any(|scheme| starts_with_ignore_case(target, scheme));
    match target {
        [b'/', ..] => Ok(()),
        b"*" if method == b"OPTIONS" => Ok(()),
        _ if absolute => Ok(()),
        _ => Err(Violation::Malformed("a request target of no known form")),
    }
}

#[derive(Default)]
struct Fields {
    count: usize,
    hosts: usize,
    content_length: Option<u64>,
    chunked: bool,
    upgrade: bool,
    connection_upgrade: bool,
}

impl Fields {
    fn take(&mut self, line: &[u8]) -> Result<(), Violation> {
        let (name, value) = field(line)?;
        if name.eq_ignore_ascii_case(b"host") {
            self.hosts += 1;
            check_host(value)?;
        } else if name.eq_ignore_ascii_case(b"content-length") {
            // Also where both say the same: who takes the one may not be who takes the other.
            if self.content_length.is_some() {
                return Err(Violation::Malformed("more than one Content-Length"));
            }
            self.content_length = Some(length(value)?);
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            if self.chunked {
                return Err(Violation::Malformed("more than one Transfer-Encoding"));
            }
            if !value.eq_ignore_ascii_case(b"chunked") {
                return Err(Violation::Coding);
            }
            self.chunked = true;
        } else if name.eq_ignore_ascii_case(b"upgrade") {
            self.upgrade = true;
        } else if name.eq_ignore_ascii_case(b"connection") {
            let mut options = value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii);
            self.connection_upgrade |= options.any(|option| option.eq_ignore_ascii_case(b"upgrade"));
        }
        Ok(())
    }

    fn framing(self, version: Version) -> Result<Framing, Violation> {
        match (self.hosts, version) {
            (1, _) | (0, Version::Http10) => {}
            (0, Version::Http11) => return Err(Violation::Malformed("a request without Host")),
            _ => return Err(Violation::Malformed("more than one Host")),
        }
        let body = match (self.chunked, self.content_length) {
            (true, Some(_)) => return Err(Violation::Malformed("Content-Length beside Transfer-Encoding")),
            // RFC 9112, section 6.1: the framing of such a message is faulty.
            (true, None) if version == Version::Http10 => {
                return Err(Violation::Malformed("Transfer-Encoding in a request of HTTP/1.0"));
            }
            (true, None) => Length::Chunked,
            (false, length) => Length::Known(length.unwrap_or(0)),
        };
        Ok(Framing { body, upgrade: self.upgrade && self.connection_upgrade })
    }
}

/// Name and value of one field line.
fn field(line: &[u8]) -> Result<(&[u8], &[u8]), Violation> {
    if matches!(line.first(), Some(b' ' | b'\t')) {
        return Err(Violation::Malformed("a folded field line"));
    }
    let colon =
        line.iter().position(|byte| *byte == b':').ok_or(Violation::Malformed("a field line without a colon"))?;
    let (name, value) = (&line[..colon], &line[colon + 1..]);
    // Also a space before the colon: RFC 9112, section 5.1.
    if name.is_empty() || !name.iter().all(|byte| is_token(*byte)) {
        return Err(Violation::Malformed("a field name that is no token"));
    }
    let allowed = |byte: &u8| *byte == b'\t' || (*byte >= b' ' && *byte != 0x7f);
    if !value.iter().all(allowed) {
        return Err(Violation::Malformed("a control character in a field value"));
    }
    Ok((name, value.trim_ascii()))
}

// RFC 9110, section 8.6: digits alone.
fn length(value: &[u8]) -> Result<u64, Violation> {
    let digits = (1..=MOST_DIGITS).contains(&value.len()) && value.iter().all(u8::is_ascii_digit);
    let text = std::str::from_utf8(value).ok().filter(|_| digits);
    text.and_then(|text| text.parse().ok()).ok_or(Violation::Malformed("a Content-Length that is no number"))
}

// RFC 9110, section 7.2: a host and a port, neither user nor path.
fn check_host(value: &[u8]) -> Result<(), Violation> {
    let allowed = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~%!$&'()*+;=:[]".contains(byte);
    match value.iter().all(allowed) {
        true => Ok(()),
        false => Err(Violation::Malformed("a Host that is none")),
    }
}

fn is_framing(name: &[u8]) -> bool {
    let names: [&[u8]; 5] = [b"content-length", b"transfer-encoding", b"host", b"connection", b"te"];
    names.iter().any(|framing| name.eq_ignore_ascii_case(framing))
}

fn starts_with_ignore_case(bytes: &[u8], prefix: &[u8]) -> bool {
    bytes.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix))
}

/// As many as any length has that a disk could hold.
const MOST_DIGITS: usize = 18;
