//! What an application says before its answer, and answers that come before the request is whole.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::{AgentOptions, BOUND, Lab, Pod, PodSpec, authorization, eventually, trial_with};
use serde_json::json;

use super::protocols::hear_until;
use super::{Keeping, curl, service, vip};
use crate::lab;

pub fn trials() -> Vec<Trial> {
    vec![
        trial_with("http::early::hints_reach_the_client_before_the_answer_does", lab(), hints),
        trial_with("http::early::a_body_is_sent_when_the_application_asks_for_it", lab(), asked_for),
        trial_with("http::early::a_body_that_the_application_refuses_is_not_sent", lab(), refused),
        trial_with("http::early::an_answer_ahead_of_a_large_body_is_heard", lab(), ahead_of_a_large_body),
    ]
}

/// 103 is a word of the application's own, and comes through at once, however many agents read the request.
fn hints(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab)?;
    let read_there = authorization("shop/callers", json!({"rules": [{"to": [{"operation": {"methods": ["GET"]}}]}]}));
    let agents = lab.start_agents(&AgentOptions::default())?;
    for what in ["the client's agent alone", "both agents"] {
        shop.application.go.set(false);
        let mut stream = shop.web.connect((vip(1), 80))?;
        stream.set_read_timeout(Some(BOUND))?;
        stream.write_all(b"GET /hints HTTP/1.1\r\nHost: a\r\n\r\n")?;
        let early = hear_until(&mut stream, "HTTP/1.1 103 Early Hints\r\nlink: </b.css>\r\n\r\n").context(what)?;
        ensure!(early.starts_with("HTTP/1.1 103 Early Hints\r\nlink: </a.css>; rel=preload\r\n\r\n"), "{early}");
        ensure!(!early.contains("x-own") && !early.contains("200 OK"), "{early}");
        shop.application.go.set(true);
        let answer = hear_until(&mut stream, "done")?;
        ensure!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        // The next one on the same connection, where hint and answer come as one.
        stream.write_all(b"GET /hints HTTP/1.1\r\nHost: a\r\n\r\n")?;
        let all = hear_until(&mut stream, "done")?;
        let [first, second, last] = ["</a.css>", "</b.css>", "HTTP/1.1 200 OK"].map(|text| all.find(text));
        ensure!(first.is_some() && first < second && second < last, "{what}: {all}");
        // RFC 9110, section 15.2: nobody of HTTP/1.0 is told.
        let mut old = shop.web.connect((vip(1), 80))?;
        old.set_read_timeout(Some(BOUND))?;
        old.write_all(b"GET /hints HTTP/1.0\r\nHost: a\r\n\r\n")?;
        let all = hear_until(&mut old, "done")?;
        ensure!(!all.contains("103"), "{what}: {all}");
        // HTTP/2 can do without.
        let all = curl(&shop.web, &["--http2-prior-knowledge", "-i", &format!("http://{}:81/hints", vip(1))])?;
        ensure!(all.starts_with("HTTP/2 200") && all.ends_with("done"), "{what}: {all}");
        lab.put(&read_there)?;
        lab.settle(&agents)?;
    }
    Ok(())
}

fn asked_for(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab)?;
    let _agents = lab.start_agents(&AgentOptions::default())?;
    let said = shop.expecting("/continue", "a body")?;
    ensure!(said == "200 6", "{said}");
    let bodies = shop.application.bodies();
    ensure!(bodies == ["a body"], "{bodies:?}");
    Ok(())
}

fn refused(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab)?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    for status in ["417", "413", "200"] {
        let said = shop.expecting(&format!("/refuse/{status}"), "a body that nobody wants")?;
        ensure!(said == format!("{status} 0"), "{said}");
    }
    let bodies = eventually("each connection has ended", BOUND, || {
        Some(shop.application.bodies()).filter(|bodies| bodies.len() == 3)
    })?;
    ensure!(bodies == ["", "", ""], "{bodies:?}");
    let line = agents[0].access_line("the refusal", |line| line["status"] == 417)?;
    ensure!(line["reason"].is_null() && line["bytes_sent"] == 0, "{line}");
    // A client that keeps its connection is told that it ends.
    let mut stream = shop.web.connect((vip(1), 80))?;
    stream.set_read_timeout(Some(BOUND))?;
    stream.write_all(b"POST /refuse/417 HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")?;
    let mut heard = String::new();
    stream.read_to_string(&mut heard)?;
    ensure!(heard.starts_with("HTTP/1.1 417 ") && heard.to_lowercase().contains("connection: close"), "{heard}");
    ensure!(!heard.contains("100 Continue") && heard.ends_with("no thanks"), "{heard}");
    Keeping::connect(&shop.web, (vip(1), 80))?.ask("/plain")?;
    Ok(())
}

/// As a limit of the application's own is told of: it says 413, and closes its direction with most of the body unread.
fn ahead_of_a_large_body(lab: &Lab) -> Result<()> {
    let shop = Shop::open(lab)?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    for _ in 0..5 {
        let script = format!(
            "head -c 50000000 /dev/zero | curl -sS --max-time 60 -H 'Expect:' -w ' %{{http_code}}' -T - http://{}/refuse/413",
            vip(1)
        );
        let said = shop.web.sh(&script)?;
        ensure!(said == "no thanks 413", "{said}");
    }
    let bodies = shop.application.bodies();
    ensure!(bodies.iter().all(|body| body.len() < 20_000_000), "all of it was sent on");
    eventually("nothing is left under way", BOUND, || {
        let open = agents[0].metrics().ok()?.sum("selvedge_connections_open", &[]);
        (open == 0.0).then_some(())
    })
}

struct Shop {
    web: Pod,
    application: Scripted,
    _pod: Pod,
}

impl Shop {
    fn open(lab: &Lab) -> Result<Self> {
        let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
        let far = lab.pod(PodSpec::new("shop/far", "node-b"))?;
        lab.service(&service("shop/cart", 1).port("http", 80, 8080).port("ws", 81, 8080).endpoint(&far))?;
        Ok(Self { web, application: Scripted::start(&far, 8080)?, _pod: far })
    }

    /// Posts with curl, which waits for leave to send the body; the status, and how much of the body was sent.
    fn expecting(&self, path: &str, body: &str) -> Result<String> {
        let url = format!("http://{}{path}", vip(1));
        let wait = ["--expect100-timeout", "30", "-H", "Expect: 100-continue"];
        let show = ["-o", "/dev/null", "-w", "%{http_code} %{size_upload}", "-d", body, &url];
        curl(&self.web, &[&wait[..], &show].concat())
    }
}

/// An application that says what no library would.
struct Scripted {
    /// What it heard of bodies, one for each request that had one.
    bodies: Arc<Mutex<Vec<String>>>,
    /// Whether it answers behind its hints.
    go: Arc<Leave>,
}

/// What a test gives, and an application waits for.
struct Leave {
    given: Mutex<bool>,
    told: Condvar,
}

impl Leave {
    fn set(&self, given: bool) {
        *self.given.lock().unwrap_or_else(PoisonError::into_inner) = given;
        self.told.notify_all();
    }

    fn wait(&self) {
        let given = self.given.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.told.wait_while(given, |given| !*given));
    }
}

impl Scripted {
    fn start(pod: &Pod, port: u16) -> Result<Self> {
        let listener = pod.listen(port)?;
        let application =
            Self { bodies: Arc::default(), go: Arc::new(Leave { given: Mutex::new(true), told: Condvar::new() }) };
        let (bodies, go) = (application.bodies.clone(), application.go.clone());
        thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(stream) = stream else { return };
                let (bodies, go) = (bodies.clone(), go.clone());
                // A client that goes away ends it.
                thread::spawn(move || drop(converse(stream, &bodies, &go)));
            }
        });
        Ok(application)
    }

    fn bodies(&self) -> Vec<String> {
        self.bodies.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn converse(mut stream: TcpStream, bodies: &Mutex<Vec<String>>, go: &Leave) -> std::io::Result<()> {
    let note = |body: &[u8]| {
        let body = String::from_utf8_lossy(body).into_owned();
        bodies.lock().unwrap_or_else(PoisonError::into_inner).push(body);
    };
    let mut heard = Vec::new();
    loop {
        let Some(end) = heard.windows(4).position(|bytes| bytes == b"\r\n\r\n").map(|at| at + 4) else {
            let mut room = [0; 4096];
            match stream.read(&mut room)? {
                0 => return Ok(()),
                count => heard.extend_from_slice(&room[..count]),
            }
            continue;
        };
        let head = String::from_utf8_lossy(&heard[..end]).to_lowercase();
        heard.drain(..end);
        let length = head.split("content-length: ").nth(1).and_then(|rest| rest.split("\r\n").next()?.parse().ok());
        let path = head.split(' ').nth(1).unwrap_or_default();
        match path.strip_prefix("/refuse/") {
            Some(status) => {
                write!(stream, "HTTP/1.1 {status} Said\r\ncontent-length: 9\r\n\r\nno thanks")?;
                // RFC 9112, section 9.6: a reset could overtake what was said.
                let _ = stream.shutdown(Shutdown::Write);
                let mut rest = heard;
                let broken = stream.read_to_end(&mut rest).err();
                note(&rest);
                return broken.filter(|error| error.kind() != ErrorKind::ConnectionReset).map_or(Ok(()), Err);
            }
            None if path == "/hints" => {
                let first = "link: </a.css>; rel=preload\r\nconnection: x-own\r\nx-own: 1\r\n";
                write!(stream, "HTTP/1.1 103 Early Hints\r\n{first}\r\n")?;
                write!(stream, "HTTP/1.1 103 Early Hints\r\nlink: </b.css>\r\n\r\n")?;
                go.wait();
                write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ndone")?;
            }
            None if path == "/continue" => {
                write!(stream, "HTTP/1.1 100 Continue\r\n\r\n")?;
                let mut body = vec![0; length.unwrap_or(0)];
                stream.read_exact(&mut body)?;
                note(&body);
                write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")?;
            }
            None => write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")?,
        }
    }
}
