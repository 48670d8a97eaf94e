use super::ProtocolError;

/// What one frame is. A record holds whole frames, one or more: no frame spans two.
///
/// | octets | |
/// | --- | --- |
/// | 0 | kind |
/// | 1 | zero |
/// | 2, 3 | length of the payload, network byte order |
/// | 4.. | payload |
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// A flow begins: from the client, with a [`Header`](super::header::Header).
    Open,
    /// The application has accepted.
    Ok,
    /// Nothing of the flow was delivered, and nothing will be: a status.
    Refused,
    Data,
    /// No more DATA follows.
    End,
    /// All DATA of the peer has been written to the application, and its END too.
    Done,
    /// The flow ends abruptly, in both directions.
    Reset,
    /// Behind it nothing of the flow that was reset follows.
    ResetAck,
}

/// One frame in a buffer: where its payload lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Frame {
    pub kind: Kind,
    pub start: usize,
    pub length: usize,
}

impl Kind {
    fn code(self) -> u8 {
        match self {
            Self::Open => 1,
            Self::Ok => 2,
            Self::Refused => 3,
            Self::Data => 4,
            Self::End => 5,
            Self::Done => 6,
            Self::Reset => 7,
            Self::ResetAck => 8,
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        let all = [Self::Open, Self::Ok, Self::Refused, Self::Data, Self::End, Self::Done, Self::Reset, Self::ResetAck];
        all.into_iter().find(|kind| kind.code() == code)
    }

    fn allows(self, length: usize) -> bool {
        match self {
            Self::Open => length > 0,
            Self::Ok | Self::End | Self::Done | Self::Reset | Self::ResetAck => length == 0,
            Self::Refused => length == 2,
            Self::Data => length > 0,
        }
    }

    /// The four octets before a payload of this length.
    pub fn head(self, length: usize) -> [u8; HEAD] {
        let [.., high, low] = length.to_be_bytes();
        [self.code(), 0, high, low]
    }
}

/// The frames of one record's content, which lies at `start` in some buffer.
pub fn frames(content: &[u8], start: usize, mut each: impl FnMut(Frame)) -> Result<(), ProtocolError> {
    if content.is_empty() {
        return Err(ProtocolError::Frame);
    }
    let mut at = 0;
    while at < content.len() {
        let Some(&[code, zero, high, low]) = content[at..].first_chunk::<HEAD>() else {
            return Err(ProtocolError::Frame);
        };
        let length = usize::from(u16::from_be_bytes([high, low]));
        let kind = Kind::from_code(code).filter(|kind| zero == 0 && kind.allows(length));
        let kind = kind.ok_or(ProtocolError::Frame)?;
        at += HEAD;
        if content.len() - at < length {
            return Err(ProtocolError::Frame);
        }
        each(Frame { kind, start: start + at, length });
        at += length;
    }
    Ok(())
}

pub const HEAD: usize = 4;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::mutation::mutated;

    fn content(frames: &[(Kind, &[u8])]) -> Vec<u8> {
        frames.iter().flat_map(|(kind, payload)| [&kind.head(payload.len())[..], payload].concat()).collect()
    }

    #[test]
    fn frames_read_back_as_they_were_written() {
        let written = content(&[(Kind::Data, b"hello"), (Kind::End, b""), (Kind::Done, b"")]);
        let mut read = Vec::new();
        frames(&written, 100, |frame| read.push(frame)).unwrap();
        let frame = |kind, start, length| Frame { kind, start, length };
        assert_eq!(read, [frame(Kind::Data, 104, 5), frame(Kind::End, 113, 0), frame(Kind::Done, 117, 0)]);
    }

    #[test]
    fn what_is_no_whole_frame_is_refused() {
        for wrong in [
            &[][..],
            &[4, 0, 0],
            &[4, 0, 0, 2, 1],
            &[4, 0, 0, 0],
            &[4, 1, 0, 1, 1],
            &[5, 0, 0, 1, 1],
            &[0, 0, 0, 0],
            &[9, 0, 0, 0],
            &[3, 0, 0, 1, 1],
        ] {
            assert!(frames(wrong, 0, |_| ()).is_err(), "{wrong:?}");
        }
    }

    proptest! {
        #[test]
        fn any_content_is_read_without_a_panic_and_within_its_bounds(
            content in mutated(vec![
                content(&[(Kind::Open, b"\x01\x04\x1f\x90\x0a\x01\x02\x03"), (Kind::Data, b"GET / HTTP/1.1\r\n\r\n")]),
                content(&[(Kind::Ok, b"")]),
                content(&[(Kind::Refused, &[1, 145])]),
                content(&[(Kind::Data, &[7; 300]), (Kind::End, b""), (Kind::Done, b"")]),
                content(&[(Kind::Reset, b""), (Kind::ResetAck, b"")]),
            ]),
        ) {
            let mut end = 0;
            let mut ordered = true;
            let read = frames(&content, 0, |frame| {
                ordered &= frame.start == end + HEAD && frame.kind.allows(frame.length);
                end = frame.start + frame.length;
            });
            prop_assert!(ordered && end <= content.len());
            prop_assert!(read.is_err() || end == content.len());
        }
    }
}
