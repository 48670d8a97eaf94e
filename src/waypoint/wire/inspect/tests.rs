use proptest::prelude::*;

use super::*;

/// How many bytes go on when they come in pieces of one size, and the violation that ends it.
fn fed(bytes: &[u8], piece: usize) -> (usize, Option<Violation>) {
    let mut inspector = Inspector::default();
    let (mut passed, mut there) = (0, 0);
    loop {
        match inspector.next(&bytes[passed..there]) {
            Ok(Next::Pass(count)) => passed += count,
            Ok(_) if there == bytes.len() => return (passed, None),
            Ok(_) => there = bytes.len().min(there + piece),
            Err(violation) => return (passed, Some(violation)),
        }
    }
}

fn verdict(bytes: &[u8]) -> Option<Violation> {
    let whole = fed(bytes, bytes.len());
    for piece in [1, 2, 3, 7] {
        assert_eq!(fed(bytes, piece).1, whole.1, "in pieces of {piece}: {:?}", String::from_utf8_lossy(bytes));
    }
    whole.1
}

#[test]
fn whole_requests_go_on_one_behind_the_other() {
    let cases: [&[u8]; 9] = [
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"\r\nGET / HTTP/1.0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost:a\r\ntransfer-encoding:chunked\r\n\r\n00a;x=\"y\"\r\n0123456789\r\n0\r\nDigest: z\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: a:8080\r\n\r\n",
        b"GET http://a/x HTTP/1.1\r\nHost: [fd00::1]:80\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost:\r\nX-Text: \xe4\xf6 \t\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\nGET /next HTTP/1.1\r\nHost: a\r\n\r\n",
    ];
    for case in cases {
        let twice = [case, case].concat();
        for piece in [1, 5, twice.len()] {
            assert_eq!(fed(&twice, piece), (twice.len(), None), "{:?}", String::from_utf8_lossy(case));
        }
    }
}

#[test]
fn what_two_parsers_could_read_in_two_ways_is_refused() {
    let cases: [&[u8]; 31] = [
        b"GET / HTTP/1.1\nHost: a\n\n",
        b"GET / HTTP/1.1\r\nHost: a\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n\n",
        b"GET / HTTP/1.1\r\nHost: a\rX: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n\rX\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx",
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxy",
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1, 1\r\n\r\nx",
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\nx",
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 0x1\r\n\r\nx",
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length:\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: b\r\n\tc\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nTransfer\x00-Encoding: chunked\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: \x00\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nnothing\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: user@a\r\n\r\n",
        b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / \r\nHost: a\r\n\r\n",
        b"GET x HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET * HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n",
    ];
    for case in cases {
        let violation = verdict(case);
        assert!(
            matches!(violation, Some(Violation::Malformed(_))),
            "{violation:?}: {:?}",
            String::from_utf8_lossy(case)
        );
        assert_eq!(fed(case, case.len()).0, 0, "a part of it went on: {:?}", String::from_utf8_lossy(case));
    }
}

#[test]
fn a_body_that_breaks_its_framing_is_cut_where_it_does() {
    let head = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
    let bodies = [
        "x\r\n",
        "-1\r\n",
        "+1\r\n",
        " 1\r\n",
        "1 \r\n",
        "1\n",
        "1\rx\n",
        "0x1\r\n",
        "fffffffffffffffff\r\n",
        "1;\x00\r\n",
        "1\r\nab",
        "1\r\na\n",
        "0\r\nContent-Length: 1\r\n\r\n",
        "0\r\nno colon\r\n\r\n",
        "0\r\n x: y\r\n\r\n",
        "0\r\n\n",
    ];
    for body in bodies {
        let violation = verdict(&[head, body].concat().into_bytes());
        assert!(matches!(violation, Some(Violation::Malformed(_))), "{violation:?}: {body:?}");
    }
}

#[test]
fn other_refusals_say_what_is_the_matter() {
    let large = |name: &str, size: usize| format!("GET / HTTP/1.1\r\nHost: a\r\n{name}: {}\r\n\r\n", "x".repeat(size));
    let many = format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "x: y\r\n".repeat(100));
    let cases = [
        ("CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), 405),
        ("GET / HTTP/2.0\r\nHost: a\r\n\r\n".to_owned(), 505),
        ("GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n".to_owned(), 501),
        (large("x", 70_000), 431),
        (many, 431),
        (format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "x".repeat(40_000)), 414),
        (format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "x".repeat(80_000)), 414),
    ];
    for (text, status) in cases {
        let violation = fed(text.as_bytes(), 1000).1.expect("it is refused");
        assert_eq!(violation.status().as_u16(), status, "{violation}");
    }
    assert_eq!(verdict(large("x", 40_000).as_bytes()), None);
}

#[test]
fn what_follows_a_request_for_another_protocol_waits_until_it_is_known_which_it_is() {
    let request = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n\r\n";
    let mut inspector = Inspector::default();
    assert_eq!(inspector.next(&[&request[..], b"\x81\x05"].concat()), Ok(Next::Pass(request.len())));
    assert_eq!(inspector.next(b"\x81\x05"), Ok(Next::Wait));
    inspector.upgraded();
    assert_eq!(inspector.next(b"\x81\x05"), Ok(Next::Pass(2)));

    let mut inspector = Inspector::default();
    inspector.next(request).unwrap();
    inspector.stayed();
    assert!(inspector.next(b"\x81\x05\n\n").is_err(), "it is HTTP, and this is none");
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic_and_pieces_change_nothing(bytes in proptest::collection::vec(prop_oneof![
        Just(b'\r'), Just(b'\n'), Just(b' '), Just(b':'), Just(b'0'), any::<u8>()
    ], 0..200)) {
        let head = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
        for bytes in [bytes.clone(), [&head[..], &bytes].concat()] {
            let whole = fed(&bytes, bytes.len().max(1));
            prop_assert_eq!(fed(&bytes, 1).1.is_some(), whole.1.is_some());
        }
    }
}
