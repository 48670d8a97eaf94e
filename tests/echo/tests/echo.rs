//! Server and client as the conformance suite runs them, read with the suite's own expressions.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Output, Stdio};
use std::thread;

use regex::{Captures, Regex};

#[test]
fn the_suite_reads_what_was_asked_and_what_was_answered() {
    let server = Server::start(&[]);
    let read = Answer::of(&client(&[
        &format!("http://localhost:{}/v2/example?animal=whale", server.port("http")),
        "--method=GET",
        "-H",
        "X-Header-Add:one",
        "-H",
        "X-Header-Add:two",
    ]));
    assert_eq!(read.field("StatusCode"), "200");
    assert_eq!(read.field("Hostname"), hostname());
    assert_eq!(read.field("URL"), "/v2/example?animal=whale");
    assert_eq!(read.field("Method"), "GET");
    assert_eq!(read.field("Proto"), "HTTP/1.1");
    assert_eq!(read.field("Host"), format!("localhost:{}", server.port("http")));
    assert_eq!(read.field("ServicePort"), server.port("http").to_string());
    assert!(["::1", "127.0.0.1"].contains(&&*read.field("IP")), "{}", read.0);
    assert_eq!(read.headers("RequestHeader", "x-header-add"), ["one", "two"]);
    assert_eq!(read.headers("ResponseHeader", "content-type"), ["text/plain"]);
}

#[test]
fn a_host_of_ones_own_leads_to_the_same_server() {
    let server = Server::start(&[]);
    for http2 in [&[][..], &["--http2"]] {
        let url = format!("http://127.0.0.1:{}", server.port("http"));
        let read = Answer::of(&client(&[&[&*url, "-H", "Host:echo-v1"], http2].concat()));
        assert_eq!((read.field("Host"), read.field("URL")), ("echo-v1".to_owned(), "/".to_owned()));
    }
}

#[test]
fn every_answer_of_many_ends_with_an_empty_line() {
    let server = Server::start(&[]);
    for url in
        [format!("http://127.0.0.1:{}/", server.port("http")), format!("grpc://127.0.0.1:{}", server.port("grpc"))]
    {
        let output = client(&[&url, "--count=100"]);
        let sections = output.split("\n\n").map(str::trim).filter(|section| !section.is_empty());
        let answers: Vec<Answer> = sections.map(|section| Answer(section.to_owned())).collect();
        assert_eq!(answers.len(), 100, "{output}");
        assert!(answers.iter().all(|answer| answer.field("Hostname") == hostname()), "{output}");
    }
}

#[test]
fn a_call_of_grpc_tells_the_same() {
    let server = Server::start(&[]);
    let url = format!("grpc://localhost:{}", server.port("grpc"));
    let read = Answer::of(&client(&[&url, "-H", "X-Header-Set:set"]));
    assert_eq!(read.field("StatusCode"), "200");
    assert_eq!(read.field("Hostname"), hostname());
    assert_eq!(read.field("Method"), "/gateway_api_conformance.echo_basic.grpcecho.GrpcEcho/Echo");
    assert_eq!(read.headers("RequestHeader", "x-header-set"), ["set"]);
    assert_eq!(read.headers("ResponseHeader", "grpc-status"), ["0"]);
}

#[test]
fn other_protocols_are_told_apart() {
    let server = Server::start(&[]);
    let read = Answer::of(&client(&[&format!("http://127.0.0.1:{}", server.port("http")), "--http2"]));
    assert_eq!(read.field("Proto"), "HTTP/2.0");
    let read = Answer::of(&client(&[&format!("tcp://127.0.0.1:{}", server.port("tcp"))]));
    assert_eq!((read.field("StatusCode"), read.field("Hostname")), ("200".to_owned(), hostname()));
}

#[test]
fn a_port_for_tls_needs_no_certificate_in_a_file() {
    let server = Server::start(&["--tls=0", "--crt=/nowhere/cert.crt", "--key=/nowhere/cert.key"]);
    for (more, alpn) in [(&[][..], "http/1.1"), (&["--http2"], "h2")] {
        let url = format!("https://localhost:{}/", server.port("http"));
        let read = Answer::of(&client(&[&[&*url], more].concat()));
        assert_eq!((read.field("StatusCode"), read.field("Alpn")), ("200".to_owned(), alpn.to_owned()));
    }
}

#[test]
fn a_certificate_in_a_file_is_served() {
    let folder = tempfile::tempdir().unwrap();
    let made = rcgen::generate_simple_self_signed(["here".to_owned()]).unwrap();
    let (crt, key) = (folder.path().join("crt"), folder.path().join("key"));
    std::fs::write(&crt, made.cert.pem()).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let server = Server::start(&["--tls=0", &format!("--crt={}", crt.display()), &format!("--key={}", key.display())]);
    let read = Answer::of(&client(&[&format!("https://127.0.0.1:{}/", server.port("http"))]));
    assert_eq!(read.field("StatusCode"), "200");
}

#[test]
fn a_redirect_is_told_and_not_followed() {
    let to = answer_once("HTTP/1.1 302 Found\r\nlocation: http://example.org:8083/\r\ncontent-length: 0\r\n\r\n");
    let read = Answer::of(&client(&[&format!("http://{to}/port")]));
    assert_eq!(read.field("StatusCode"), "302");
    assert_eq!(read.headers("ResponseHeader", "location"), ["http://example.org:8083/"]);
}

#[test]
fn who_gets_no_answer_fails_and_says_why() {
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let output = run("client", &[&format!("http://{nobody}/")]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("cannot connect to 127.0.0.1"), "{said}");
    assert!(output.stdout.is_empty());
}

/// A server on ports that are free, which goes with the test.
struct Server {
    child: Child,
    ports: Vec<(String, u16)>,
}

impl Server {
    fn start(more: &[&str]) -> Self {
        let mut command = program("server");
        command.args(["--port=0", "--grpc=0", "--tcp=0"]).args(more).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let ports = lines.take(3).map(|line| {
            let line = line.unwrap();
            let (kind, port) = line.split_once(' ').unwrap();
            (kind.to_owned(), port.parse().unwrap())
        });
        Self { ports: ports.collect(), child }
    }

    fn port(&self, kind: &str) -> u16 {
        self.ports.iter().find(|(of, _)| of == kind).unwrap().1
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// A server of a single answer, whatever it is asked.
fn answer_once(answer: &'static str) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let head = BufReader::new(stream.try_clone().unwrap()).lines();
        head.map(Result::unwrap).take_while(|line| !line.is_empty()).for_each(drop);
        stream.write_all(answer.as_bytes()).unwrap();
    });
    address
}

fn client(arguments: &[&str]) -> String {
    let output = run("client", arguments);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn run(name: &str, arguments: &[&str]) -> Output {
    program(name).args(arguments).output().unwrap()
}

/// The program under one of its names.
fn program(name: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_selvedge-echo"));
    command.arg0(name);
    command
}

fn hostname() -> String {
    nix::unistd::gethostname().unwrap().into_string().unwrap()
}

/// One answer, read as `ParseResponse` of the suite does: the first match of a field's name, `=` and the rest of a line.
struct Answer(String);

impl Answer {
    fn of(output: &str) -> Self {
        Self(output.to_owned())
    }

    fn field(&self, name: &str) -> String {
        let field = Regex::new(&format!("{name}=(.*)")).unwrap();
        field.captures(&self.0).unwrap_or_else(|| panic!("no {name} in {}", self.0))[1].to_owned()
    }

    /// Every value of a header, whose name counts in any case.
    fn headers(&self, kind: &str, name: &str) -> Vec<String> {
        let field = Regex::new(&format!("{kind}=(.*)")).unwrap();
        let split = |line: Captures| line[1].split_once(':').map(|(name, value)| (name.to_owned(), value.to_owned()));
        let headers = field.captures_iter(&self.0).filter_map(split);
        headers.filter(|(of, _)| of.eq_ignore_ascii_case(name)).map(|(_, value)| value).collect()
    }
}
