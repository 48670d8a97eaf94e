//! One pod attacks the tunnel port of another, in every way that costs it little; everybody else goes on.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use libtest_mimic::Trial;
use selvedge_lab::{Agent, AgentOptions, BOUND, Lab, Pod, PodSpec, eventually, trial_with};
use tokio::io::AsyncWriteExt;

use crate::lab;
use crate::raw_peer::{self, Credential, Offer, converse};

pub fn trials() -> Vec<Trial> {
    vec![
        trial_with("floods::handshakes_that_stall_are_bounded_and_hinder_nobody", lab(), stalled_handshakes),
        trial_with("floods::frames_without_end_are_bounded_and_hinder_nobody", lab(), frames_without_end),
        trial_with("floods::resets_in_rapid_succession_end_their_tunnel_alone", lab(), rapid_resets),
        trial_with("floods::readers_who_stall_bound_their_writers_and_hinder_nobody", lab(), stalled_readers),
    ]
}

/// A joined server, a joined client of it on the other node, and an attacker outside who has a certificate.
struct Siege {
    web: Pod,
    attacker: Pod,
    agents: Vec<Agent>,
    tunnel: SocketAddr,
    application: SocketAddr,
    cart: Pod,
    _server: selvedge_lab::Server,
}

impl Siege {
    fn lay(lab: &Lab) -> Result<Self> {
        let web = lab.pod(PodSpec::new("shop/web", "node-a").service_account("web"))?;
        let cart = lab.pod(PodSpec::new("shop/cart", "node-b").service_account("cart"))?;
        let attacker = lab.pod(PodSpec::new("shop/attacker", "node-a").outside())?;
        let agents = lab.start_agents(&AgentOptions::default())?;
        let server = cart.serve_echo(8080)?;
        let (tunnel, application) = ((cart.ip(), 15008).into(), (cart.ip(), 8080).into());
        Ok(Self { web, attacker, agents, tunnel, application, cart, _server: server })
    }

    fn offer(&self, lab: &Lab) -> Result<Offer> {
        Ok(Offer::new(Credential::of(&lab.ca(), "shop/attacker")?))
    }

    /// New connections of others, one after the other, while `attack` goes on; and afterwards.
    fn hold(&self, attack: impl FnOnce() -> Result<()>) -> Result<()> {
        self.others_go_on()?;
        let before = self.resident()?;
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| -> Result<()> {
            let others = scope.spawn(|| -> Result<()> {
                while !over.load(Ordering::Relaxed) {
                    self.others_go_on()?;
                }
                Ok(())
            });
            let attacked = attack();
            over.store(true, Ordering::Relaxed);
            others.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            attacked
        })?;
        self.others_go_on()?;
        let grown = self.resident()?.saturating_sub(before);
        ensure!(grown < MOST_MEMORY, "the agent grew by {} MiB", grown >> 20);
        ensure!(self.agents[1].metrics()?.sum("selvedge_worker_restarts_total", &[]) == 0.0, "the worker died");
        Ok(())
    }

    fn others_go_on(&self) -> Result<()> {
        let started = Instant::now();
        echo(&mut self.web.connect(self.application)?).context("another client was disturbed")?;
        ensure!(started.elapsed() < Duration::from_secs(5), "another client waited {:?}", started.elapsed());
        Ok(())
    }

    /// Bytes of memory that the server's agent holds.
    fn resident(&self) -> Result<usize> {
        let worker = self.agents[1].worker().context("no worker")?;
        let statm = std::fs::read_to_string(format!("/proc/{worker}/statm"))?;
        Ok(statm.split(' ').nth(1).context("statm")?.parse::<usize>()? * 4096)
    }
}

fn stalled_handshakes(lab: &Lab) -> Result<()> {
    let siege = Siege::lay(lab)?;
    let connect = |count: usize| -> Result<Vec<TcpStream>> {
        (0..count).map(|_| Ok(siege.attacker.connect(siege.tunnel)?)).collect()
    };
    siege.hold(|| {
        // Some say nothing, some a part of a ClientHello, some a byte now and then.
        let mut silent = connect(400)?;
        for stream in &mut silent[..100] {
            let _ = stream.write_all(&[22, 3, 1, 2, 0, 1, 0]);
        }
        let limited = |result| -> Result<f64> {
            let labels = [("role", "server"), ("result", result)];
            Ok(siege.agents[1].metrics()?.sum("selvedge_tls_handshakes_total", &labels))
        };
        eventually("those beyond the attacker's share are refused", BOUND, || {
            (limited("limit").ok()? >= 100.0).then_some(())
        })?;
        let started = Instant::now();
        // A byte at a time extends nothing.
        eventually("the others are given up", BOUND, || {
            for stream in &mut silent[..10] {
                let _ = stream.write_all(&[0]);
            }
            (limited("timeout").ok()? >= 200.0).then_some(())
        })?;
        ensure!(started.elapsed() < Duration::from_secs(20), "that took {:?}", started.elapsed());
        for mut stream in silent {
            stream.set_read_timeout(Some(BOUND))?;
            ensure!(!matches!(stream.read(&mut [0]), Ok(1..)), "a stalled handshake was answered");
        }
        Ok(())
    })
}

fn frames_without_end(lab: &Lab) -> Result<()> {
    let siege = Siege::lay(lab)?;
    let open = frame(0x1, 0x0, 1, &[0x42, 0x07]);
    let continuation = frame(0x9, 0x0, 1, &[0; 4096]);
    let settings = frame(0x4, 0x0, 0, &[0, 4, 0, 1, 0, 0]);
    let ping = frame(0x6, 0x0, 0, &[1; 8]);
    let window = frame(0x8, 0x0, 0, &[0, 0, 0, 1]);
    let empty_data = frame(0x0, 0x0, 1, &[]);
    let priority = frame(0x2, 0x0, 1, &[0, 0, 0, 0, 1]);
    // RFC 7541: a literal that is indexed and then repeated: little on the wire, much when decoded.
    let mut bomb = vec![0x40, 1, b'x', 0x7f, 0x81, 0x1e];
    bomb.extend([b'y'; 4000]);
    bomb.extend([0xbe; 12_000]);
    let bomb = frame(0x1, 0x4, 1, &bomb);
    let unknown = frame(0xfe, 0x0, 0, &[7; 1024]);
    let floods: [(&str, &[u8], Vec<u8>); 9] = [
        ("continuation", &open, continuation),
        ("settings", &[], settings),
        ("ping", &[], ping),
        ("window updates", &[], window),
        ("empty data", &[], empty_data),
        ("priority", &[], priority),
        ("headers that swell", &[], bomb),
        ("headers of a stream already used", &open, open.clone()),
        ("frames of no known kind", &[], unknown),
    ];
    siege.hold(|| {
        for (name, first, frame) in floods {
            converse(async {
                let mut tls = raw_peer::dial(&siege.attacker, siege.tunnel, siege.offer(lab)?).await?;
                tls.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await?;
                tls.write_all(first).await?;
                let batch = frame.repeat((256 << 10) / frame.len() + 1);
                // It never reads; it ends when it is thrown out, stops being read, or has sent 64 MiB.
                let flooding = async {
                    for _ in 0..256 {
                        if tls.write_all(&batch).await.is_err() {
                            return;
                        }
                    }
                };
                let _ = tokio::time::timeout(Duration::from_millis(1500), flooding).await;
                anyhow::Ok(())
            })
            .with_context(|| name.to_owned())?;
        }
        Ok(())
    })
}

/// RFC 9113, section 4.1.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

fn rapid_resets(lab: &Lab) -> Result<()> {
    let siege = Siege::lay(lab)?;
    let authority = siege.application.to_string();
    siege.hold(|| {
        for round in 0..3 {
            converse(async {
                let tls = raw_peer::dial(&siege.attacker, siege.tunnel, siege.offer(lab)?).await?;
                let mut h2 = raw_peer::speak_h2(tls).await?;
                let mut opened = 0;
                loop {
                    if std::future::poll_fn(|cx| h2.poll_ready(cx)).await.is_err() {
                        break;
                    }
                    let request = http::Request::builder().method("CONNECT").uri(&authority).body(())?;
                    let Ok((_, mut stream)) = h2.send_request(request, false) else { break };
                    stream.send_reset(h2::Reason::CANCEL);
                    opened += 1;
                    tokio::task::yield_now().await;
                    ensure!(opened < 1_000_000, "round {round}: a million resets were taken");
                }
                Ok(())
            })?;
        }
        Ok(())
    })
}

fn stalled_readers(lab: &Lab) -> Result<()> {
    let siege = Siege::lay(lab)?;
    let flood = siege.cart.listen(9000)?;
    // An application that writes as fast as it can, to readers who never read.
    let _flood = selvedge_lab::Server::start(flood, |mut stream| while stream.write_all(&[7; 1 << 16]).is_ok() {});
    let authority = SocketAddr::new(siege.application.ip(), 9000).to_string();
    siege.hold(|| {
        converse(async {
            let mut held = Vec::new();
            for _ in 0..10 {
                let tls = raw_peer::dial(&siege.attacker, siege.tunnel, siege.offer(lab)?).await?;
                let mut h2 = raw_peer::speak_h2(tls).await?;
                for _ in 0..10 {
                    let (status, _, send, body) = raw_peer::ask(&mut h2, &authority, &[]).await?;
                    ensure!(status == 200, "{status}");
                    held.push((send, body));
                }
            }
            // And one that does not even read its socket.
            let mut tls = raw_peer::dial(&siege.attacker, siege.tunnel, siege.offer(lab)?).await?;
            tls.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await?;
            // A stalled application holds its writer: what is sent stops at the windows.
            let mut writer =
                raw_peer::speak_h2(raw_peer::dial(&siege.attacker, siege.tunnel, siege.offer(lab)?).await?).await?;
            let (status, _, mut send, _body) = raw_peer::ask(&mut writer, &authority, &[]).await?;
            ensure!(status == 200, "{status}");
            let sending = async {
                for _ in 0..4096 {
                    send.reserve_capacity(1 << 16);
                    let room = std::future::poll_fn(|cx| send.poll_capacity(cx)).await.context("closed")??;
                    send.send_data(Bytes::from(vec![7; room]), false)?;
                }
                anyhow::Ok(())
            };
            let finished = tokio::time::timeout(Duration::from_secs(3), sending).await;
            ensure!(finished.is_err(), "256 MiB went to a reader who never read: {finished:?}");
            siege.others_go_on()
        })
    })
}

fn echo(stream: &mut TcpStream) -> Result<()> {
    stream.set_read_timeout(Some(BOUND))?;
    stream.write_all(b"hello")?;
    let mut got = [0; 5];
    stream.read_exact(&mut got)?;
    ensure!(&got == b"hello");
    Ok(())
}

/// What an attack may make the agent hold, allocator and windows and all.
const MOST_MEMORY: usize = 192 << 20;
