use super::super::Version;

/// What becomes of a client by its first bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Heard {
    Requests(Version),
    /// Bytes that are nobody's business.
    Bytes,
    /// What is no HTTP, where nothing else is served.
    Foreign,
    /// More of them are needed to tell.
    NotYet,
}

/// Tells whether a client makes requests. `only_http`: nothing else is served there, by what its port declares or what
/// policy asks; `is_over`: no more comes.
pub fn hear(said: &[u8], only_http: bool, is_over: bool) -> Heard {
    match sniff(said) {
        Guess::Http1 => Heard::Requests(Version::Http1),
        Guess::Http2 => Heard::Requests(Version::Http2),
        // Whoever sends half a request, or none, is told so in HTTP's own words.
        Guess::MaybeHttp1 if only_http => Heard::Requests(Version::Http1),
        Guess::More if only_http && is_over => Heard::Requests(Version::Http1),
        Guess::Other if only_http => Heard::Foreign,
        Guess::Other => Heard::Bytes,
        Guess::More | Guess::MaybeHttp1 if is_over => Heard::Bytes,
        Guess::More | Guess::MaybeHttp1 => Heard::NotYet,
    }
}

/// What the first bytes of a client are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Guess {
    /// Too few to tell.
    More,
    /// A line that begins as a request of HTTP/1 does, and may yet turn out to be another protocol's.
    MaybeHttp1,
    Http1,
    /// RFC 9113, section 3.4: the client's connection preface.
    Http2,
    Other,
}

/// Tells what a client speaks by the first bytes that it said.
fn sniff(bytes: &[u8]) -> Guess {
    if bytes.len() >= PREFACE.len() && bytes.starts_with(PREFACE) {
        return Guess::Http2;
    }
    if PREFACE.starts_with(bytes) {
        // "P" may still become POST, and "PRI * HTTP/2.0" nothing else.
        return Guess::More;
    }
    // RFC 9112, section 2.2: an empty line before the request line is passed over.
    let line = bytes.strip_prefix(b"\r\n").unwrap_or(bytes);
    let method = line.iter().take_while(|byte| is_token(**byte)).count();
    match line.get(method) {
        None if method <= LONGEST_METHOD => return Guess::More,
        Some(b' ') if (1..=LONGEST_METHOD).contains(&method) => {}
        _ => return Guess::Other,
    }
    let Some(end) = line.iter().position(|byte| *byte == b'\n') else {
        let text = line.iter().all(|byte| *byte == b'\r' || *byte >= b' ');
        return if text && line.len() <= LONGEST_LINE { Guess::MaybeHttp1 } else { Guess::Other };
    };
    let version = line[..end].strip_suffix(b"\r").unwrap_or(&line[..end]).rsplit(|byte| *byte == b' ').next();
    if version.is_some_and(|version| version.starts_with(b"HTTP/")) { Guess::Http1 } else { Guess::Other }
}

/// RFC 9110, section 5.6.2.
pub(super) fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const LONGEST_METHOD: usize = 32;
const LONGEST_LINE: usize = 32 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_told_from_what_others_say_first() {
        let cases: [(&[u8], Guess); 17] = [
            (b"", Guess::More),
            (b"G", Guess::More),
            (b"PRI * HT", Guess::More),
            (PREFACE, Guess::Http2),
            (b"PRI * HTTP/2.0\r\n\r\nXX", Guess::Http1),
            (b"GET / HTTP/1.1\r\n", Guess::Http1),
            (b"\r\nGET / HTTP/1.1\r\n", Guess::Http1),
            (b"PUT /x y HTTP/1.1\n", Guess::Http1),
            (b"BREW /pot HTTP/3.0\r\nx", Guess::Http1),
            (b"GET /half", Guess::MaybeHttp1),
            (b"EHLO example.com\r\n", Guess::Other),
            (b"get key\r\n", Guess::Other),
            (b"*1\r\n$4\r\nPING\r\n", Guess::Other),
            (b"\x16\x03\x01\x02\x00\x01\x00", Guess::Other),
            (b"\x00\x00\x00\x08\x04\xd2\x16\x2f", Guess::Other),
            (b"SSH-2.0-client\r\n", Guess::Other),
            (b"A-method-that-is-longer-than-any-that-there-is /", Guess::Other),
        ];
        for (bytes, wanted) in cases {
            assert_eq!(sniff(bytes), wanted, "{:?}", String::from_utf8_lossy(bytes));
        }
    }

    #[test]
    fn what_is_no_request_goes_on_as_bytes_unless_its_port_is_for_requests_alone() {
        let (first, second) = (Heard::Requests(Version::Http1), Heard::Requests(Version::Http2));
        let cases: [(&[u8], [Heard; 4]); 6] = [
            // In this order: any port, the same when no more comes, a port for requests alone, the same.
            (b"GET / HTTP/1.1\r\n", [first; 4]),
            (PREFACE, [second; 4]),
            (b"GET /half", [Heard::NotYet, Heard::Bytes, first, first]),
            (b"", [Heard::NotYet, Heard::Bytes, Heard::NotYet, first]),
            (b"PRI *", [Heard::NotYet, Heard::Bytes, Heard::NotYet, first]),
            (b"EHLO example.com\r\n", [Heard::Bytes, Heard::Bytes, Heard::Foreign, Heard::Foreign]),
        ];
        for (said, wanted) in cases {
            let told = [(false, false), (false, true), (true, false), (true, true)];
            let told = told.map(|(only_http, is_over)| hear(said, only_http, is_over));
            assert_eq!(told, wanted, "{:?}", String::from_utf8_lossy(said));
        }
    }

    #[test]
    fn bytes_that_come_one_by_one_are_judged_as_if_they_came_together() {
        let request = b"OPTIONS * HTTP/1.1\r\n";
        for end in 0..request.len() {
            assert!(matches!(sniff(&request[..end]), Guess::More | Guess::MaybeHttp1), "{end}");
        }
        assert_eq!(sniff(request), Guess::Http1);
        for end in 0..PREFACE.len() {
            assert_eq!(sniff(&PREFACE[..end]), Guess::More, "{end}");
        }
    }
}
