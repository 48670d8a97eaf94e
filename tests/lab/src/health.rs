//! Just enough HTTP/2 (RFC 9113) to answer `grpc.health.v1.Health/Check`, as probes of the kind `grpc` ask it. Whatever
//! is asked, the server is well.

use std::io::{Read, Write};
use std::net::TcpStream;

use anyhow::{Result, ensure};

/// Answers every call on a connection until the client is done.
pub(crate) fn answer(mut stream: TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut preface = [0; PREFACE.len()];
    stream.read_exact(&mut preface)?;
    ensure!(preface == *PREFACE, "not HTTP/2");
    stream.write_all(&frame(SETTINGS, 0, [0; 4], &[]))?;
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head)?;
        let [high, middle, low, kind, flags, id @ ..] = head;
        let mut payload = vec![0; u32::from_be_bytes([0, high, middle, low]) as usize];
        stream.read_exact(&mut payload)?;
        match kind {
            SETTINGS if flags & ACK == 0 => stream.write_all(&frame(SETTINGS, ACK, [0; 4], &[]))?,
            PING if flags & ACK == 0 => stream.write_all(&frame(PING, ACK, [0; 4], &payload))?,
            // The call is complete.
            DATA if flags & END_STREAM != 0 => {
                let head = frame(HEADERS, END_HEADERS, id, HEAD);
                let trailers = frame(HEADERS, END_HEADERS | END_STREAM, id, TRAILERS);
                stream.write_all(&[head, frame(DATA, 0, id, SERVING), trailers].concat())?;
            }
            _ => {}
        }
    }
}

fn frame(kind: u8, flags: u8, id: [u8; 4], payload: &[u8]) -> Vec<u8> {
    // None of ours is as long as 256 bytes.
    let mut frame = vec![0, 0, payload.len() as u8, kind, flags];
    frame.extend(id);
    frame.extend(payload);
    frame
}

const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const ACK: u8 = 1;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
/// `:status: 200` and `content-type: application/grpc`, by RFC 7541: names of the static table, a literal value.
const HEAD: &[u8] = b"\x88\x0f\x10\x10application/grpc";
/// `grpc-status: 0`, literal.
const TRAILERS: &[u8] = b"\x00\x0bgrpc-status\x010";
/// Not compressed, two bytes long: `status: SERVING`.
const SERVING: &[u8] = &[0, 0, 0, 0, 2, 0x08, 0x01];
