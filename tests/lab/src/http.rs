//! Just enough HTTP/1.1 to ask and to answer.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// One request to send.
#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    pub path: String,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Request {
    pub fn get(path: &str) -> Self {
        Self { method: "GET".into(), path: path.into(), headers: Vec::new(), body: Vec::new() }
    }

    pub fn post(path: &str, body: impl Into<Vec<u8>>) -> Self {
        Self { method: "POST".into(), body: body.into(), ..Self::get(path) }
    }

    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }
}

/// One whole answer.
#[derive(Clone, Debug)]
pub struct Response {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Response {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(have, _)| have.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn json(&self) -> Result<Value> {
        serde_json::from_slice(&self.body).with_context(|| format!("not JSON: {}", self.text()))
    }
}

/// Sends one request over a connection that stays open, and reads the whole answer.
pub fn exchange(stream: &mut TcpStream, host: &str, request: &Request) -> Result<Response> {
    let mut head = format!("{} {} HTTP/1.1\r\nhost: {host}\r\n", request.method, request.path);
    for (name, value) in &request.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str(&format!("content-length: {}\r\n\r\n", request.body.len()));
    stream.write_all(&[head.as_bytes(), &request.body].concat())?;
    let mut reader = BufReader::new(stream);
    let Some(message) = read_message(&mut reader)? else { bail!("closed without an answer") };
    let status = message.start.split(' ').nth(1).and_then(|status| status.parse().ok());
    let status = status.with_context(|| format!("no status in {:?}", message.start))?;
    Ok(Response { status, headers: message.headers, body: message.body })
}

/// Answers requests on one connection until the client is done, with this status: who asked, and what, as JSON.
pub(crate) fn answer(stream: TcpStream, name: &str, status: &str) -> Result<()> {
    let (peer, local) = (stream.peer_addr()?, stream.local_addr()?);
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut writer = stream;
    while let Some(message) = read_message(&mut reader)? {
        let mut words = message.start.split(' ');
        let headers: serde_json::Map<_, _> =
            message.headers.iter().map(|(name, value)| (name.clone(), value.clone().into())).collect();
        let body = json!({
            "pod": name,
            "peer": peer.ip().to_canonical().to_string(),
            "peerPort": peer.port(),
            "local": local.ip().to_canonical().to_string(),
            "method": words.next(),
            "path": words.next(),
            "headers": headers,
            "body": String::from_utf8_lossy(&message.body),
        })
        .to_string();
        let head = format!(
            "HTTP/1.1 {status}\r\ncontent-type: application/json\r\nx-pod: {name}\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        writer.write_all(&[head.as_bytes(), body.as_bytes()].concat())?;
        if message.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close")) {
            break;
        }
    }
    Ok(())
}

/// Answers the first request on a connection with a file of a folder, which holds for a second.
pub(crate) fn answer_file(stream: impl Read + Write, folder: &Path) -> Result<()> {
    let mut stream = BufReader::new(stream);
    let Some(message) = read_message(&mut stream)? else { return Ok(()) };
    let path = message.start.split(' ').nth(1).unwrap_or_default().trim_start_matches('/');
    // No folder of it has folders in it.
    let found = (!path.contains('/')).then(|| fs::read(folder.join(path)).ok()).flatten();
    let (status, body) = found.map_or(("404 Not Found", Vec::new()), |body| ("200 OK", body));
    let head = format!(
        "HTTP/1.1 {status}\r\ncache-control: max-age=1\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.get_mut().write_all(&[head.as_bytes(), &body].concat())?;
    Ok(stream.get_mut().flush()?)
}

struct Message {
    start: String,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Message {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(have, _)| have == name).map(|(_, value)| value.as_str())
    }
}

/// One message, header names in lower case; none where the stream ended in order before one.
fn read_message(reader: &mut impl BufRead) -> Result<Option<Message>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut message = Message { start: line.trim_end().to_owned(), headers: Vec::new(), body: Vec::new() };
    loop {
        line.clear();
        if reader.read_line(&mut line)? == 0 {
            bail!("ended within the header");
        }
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        message.headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    if message.header("transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked")) {
        read_chunks(reader, &mut message.body)?;
        return Ok(Some(message));
    }
    match message.header("content-length").map(str::parse::<usize>).transpose().context("bad content-length")? {
        Some(length) => {
            message.body.resize(length, 0);
            reader.read_exact(&mut message.body).context("ended within the body")?;
        }
        // An answer without a length lasts until the end; a request without one has no body.
        None if message.start.starts_with("HTTP/") => drop(reader.read_to_end(&mut message.body)?),
        None => {}
    }
    Ok(Some(message))
}

fn read_chunks(reader: &mut impl BufRead, body: &mut Vec<u8>) -> Result<()> {
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let length = usize::from_str_radix(line.trim(), 16).with_context(|| format!("bad chunk length {line:?}"))?;
        let start = body.len();
        body.resize(start + length, 0);
        reader.read_exact(&mut body[start..])?;
        line.clear();
        reader.read_line(&mut line)?;
        if length == 0 {
            return Ok(());
        }
    }
}
