//! The framing of a chunked body: RFC 9112, section 7.1.

use super::head::{check_trailer, whole_line};
use super::inspect::Violation;

/// Where in a chunked body the next byte lies.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Chunked {
    /// In the line that tells a chunk's size.
    Size(Vec<u8>),
    /// In a chunk, of which so much is left.
    Data(u64),
    /// Behind a chunk: CR, or then LF.
    Gap {
        cr: bool,
    },
    /// In the trailer section: its line of now, and how much there was of it.
    Trailer(Vec<u8>, usize),
    Done,
}

impl Chunked {
    pub fn begin() -> Self {
        Self::Size(Vec::new())
    }

    /// Takes bytes of the body, up to its end; how many.
    pub fn take(&mut self, bytes: &[u8]) -> Result<usize, Violation> {
        let mut at = 0;
        while at < bytes.len() && *self != Self::Done {
            at += self.step(&bytes[at..])?;
        }
        Ok(at)
    }

    fn step(&mut self, bytes: &[u8]) -> Result<usize, Violation> {
        match self {
            Self::Data(left) => {
                let taken = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
                *left -= taken as u64;
                if *left == 0 {
                    *self = Self::Gap { cr: false };
                }
                Ok(taken)
            }
            Self::Gap { cr } => {
                match (*cr, bytes[0]) {
                    (false, b'\r') => *cr = true,
                    (true, b'\n') => *self = Self::begin(),
                    _ => return Err(Violation::Malformed("a chunk that is longer than its size")),
                }
                Ok(1)
            }
            Self::Size(line) => {
                let Some(taken) = read_line(line, bytes, MOST_SIZE_LINE)? else { return Ok(bytes.len()) };
                *self = match size(whole_line(line)?)? {
                    0 => Self::Trailer(Vec::new(), 0),
                    size => Self::Data(size),
                };
                Ok(taken)
            }
            Self::Trailer(line, total) => {
                let Some(taken) = read_line(line, bytes, MOST_TRAILER)? else { return Ok(bytes.len()) };
                *total += line.len();
                let text = whole_line(line)?;
                if text.is_empty() {
                    *self = Self::Done;
                    return Ok(taken);
                }
                check_trailer(text)?;
                if *total > MOST_TRAILER {
                    return Err(Violation::HeadTooLarge);
                }
                line.clear();
                Ok(taken)
            }
            Self::Done => Ok(0),
        }
    }
}

/// Adds to a line up to its LF, which is left out; how many bytes that took, and nothing if the line is not whole.
fn read_line(line: &mut Vec<u8>, bytes: &[u8], most: usize) -> Result<Option<usize>, Violation> {
    let end = bytes.iter().position(|byte| *byte == b'\n');
    line.extend_from_slice(&bytes[..end.unwrap_or(bytes.len())]);
    if line.len() > most {
        return Err(Violation::HeadTooLarge);
    }
    Ok(end.map(|end| end + 1))
}

fn size(line: &[u8]) -> Result<u64, Violation> {
    let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
    let (number, extension) = line.split_at(digits);
    let known = (1..=MOST_HEX_DIGITS).contains(&digits);
    // Extensions are passed over, and so are not handed on.
    let extension = extension.first().is_none_or(|first| *first == b';')
        && extension.iter().all(|byte| *byte == b'\t' || (*byte >= b' ' && *byte != 0x7f));
    let text = std::str::from_utf8(number).ok().filter(|_| known && extension);
    let size = text.and_then(|text| u64::from_str_radix(text, 16).ok());
    size.ok_or(Violation::Malformed("a chunk size that is no number"))
}

const MOST_HEX_DIGITS: usize = 15;
const MOST_SIZE_LINE: usize = 256;
const MOST_TRAILER: usize = 16 * 1024;
