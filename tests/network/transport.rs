//! What applications see of a connection once it is made: with the mesh what they see without it.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::{Agent, AgentOptions, BOUND, Lab, Pod, PodSpec, eventually, trial_with};
use socket2::SockRef;

use crate::lab;

pub fn trials() -> Vec<Trial> {
    vec![
        trial_with(
            "transport::ends_of_every_kind_look_as_they_do_without_a_mesh",
            lab(),
            ends_of_every_kind_look_as_they_do_without_a_mesh,
        ),
        trial_with(
            "transport::so_they_do_on_one_node_through_the_tunnel",
            lab(),
            so_they_do_on_one_node_through_the_tunnel,
        ),
        trial_with("transport::silent_connections_live_for_long", lab(), silent_connections_live_for_long),
    ]
}

fn ends_of_every_kind_look_as_they_do_without_a_mesh(lab: &Lab) -> Result<()> {
    lab.namespace("bare", false)?;
    let bare = [lab.pod(PodSpec::new("bare/web", "node-a"))?, lab.pod(PodSpec::new("bare/cart", "node-b"))?];
    let joined = [
        lab.pod(PodSpec::new("shop/web", "node-a").service_account("web"))?,
        lab.pod(PodSpec::new("shop/cart", "node-b").service_account("cart"))?,
    ];
    let neighbour = lab.pod(PodSpec::new("shop/neighbour", "node-b"))?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let [web, cart] = &joined;
    let mut places = Vec::new();
    for at in 0..cart.ips().len() {
        places.extend([
            ("two nodes", web, cart, cart.ips()[at]),
            ("one node", &neighbour, cart, cart.ips()[at]),
            ("to outside the mesh", web, &bare[1], bare[1].ips()[at]),
            ("from outside the mesh", &bare[0], cart, cart.ips()[at]),
        ]);
    }
    look_alike(&bare, &places)?;
    let joined_directly =
        agents[1].metrics()?.sum("selvedge_tcp_connections_opened_total", &[("transport", "same-node")]);
    ensure!(joined_directly > 0.0, "nothing was joined directly");
    Ok(())
}

fn so_they_do_on_one_node_through_the_tunnel(lab: &Lab) -> Result<()> {
    lab.namespace("bare", false)?;
    let bare = [lab.pod(PodSpec::new("bare/web", "node-a"))?, lab.pod(PodSpec::new("bare/cart", "node-b"))?];
    let [web, cart] = [lab.pod(PodSpec::new("shop/web", "node-b"))?, lab.pod(PodSpec::new("shop/cart", "node-b"))?];
    let agents = lab.start_agents(&AgentOptions::default().arg("--same-node").arg("tunnel"))?;
    let places: Vec<_> = cart.ips().iter().map(|ip| ("one node", &web, &cart, *ip)).collect();
    look_alike(&bare, &places)?;
    let joined_directly =
        agents[1].metrics()?.sum("selvedge_tcp_connections_opened_total", &[("transport", "same-node")]);
    ensure!(joined_directly == 0.0, "{joined_directly} were joined directly");
    Ok(())
}

/// Plays every scenario without a mesh, then at each place: where, the client, the server, and its address.
fn look_alike(bare: &[Pod; 2], places: &[(&str, &Pod, &Pod, IpAddr)]) -> Result<()> {
    let mut differences = BTreeMap::new();
    for scenario in SCENARIOS {
        let wanted = scenario.play(&bare[0], &bare[1], bare[1].ip())?;
        for (place, client, server, ip) in places {
            let seen = scenario.play(client, server, *ip)?;
            if seen != wanted {
                let text = format!("without a mesh: {wanted:#?}\nwith it, {place}, {ip}: {seen:#?}");
                differences.insert(format!("{}, {place}, {ip}", scenario.name), text);
            }
        }
    }
    ensure!(differences.is_empty(), "{differences:#?}");
    Ok(())
}

/// What the two applications do, each in its own order; `tell` and `hear` let one wait for the other outside of the
/// network.
struct Scenario {
    name: &'static str,
    client: fn(&mut Side) -> Result<()>,
    server: fn(&mut Side) -> Result<()>,
}

const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "the client half-closes and is answered",
        client: |side| side.send(b"question").half_close().read_to_end(),
        server: |side| side.read_to_end().map(|()| side.send(b"answer").close()),
    },
    Scenario {
        name: "the server half-closes and goes on listening",
        client: |side| side.read_to_end().map(|()| side.send(b"late question").half_close().close()),
        server: |side| side.send(b"greeting").half_close().read_to_end(),
    },
    Scenario {
        name: "both close at once",
        client: |side| side.half_close().read_to_end(),
        server: |side| side.half_close().read_to_end(),
    },
    Scenario {
        name: "the client closes without a word",
        client: |side| {
            side.close();
            Ok(())
        },
        server: |side| side.read_to_end(),
    },
    Scenario {
        name: "the server hangs up without a word",
        client: |side| side.read_to_end(),
        server: |side| {
            side.close();
            Ok(())
        },
    },
    Scenario {
        name: "the client resets",
        client: |side| {
            side.send(b"half a ques").hear()?;
            side.reset();
            Ok(())
        },
        server: |side| {
            side.read(11)?;
            side.tell();
            side.read_to_end()
        },
    },
    Scenario {
        name: "the server resets",
        client: |side| {
            side.read(11)?;
            side.tell();
            side.read_to_end()
        },
        server: |side| {
            side.send(b"half an ans").hear()?;
            side.reset();
            Ok(())
        },
    },
    Scenario {
        name: "the server resets right behind its last words",
        client: |side| side.read_to_end(),
        server: |side| {
            side.send(b"last words").reset();
            Ok(())
        },
    },
    Scenario {
        name: "the client resets right behind its last words",
        client: |side| {
            side.send(b"last words").reset();
            Ok(())
        },
        server: |side| side.read_to_end(),
    },
    Scenario {
        name: "the client half-closes, then the server resets",
        client: |side| {
            side.send(b"question").half_close();
            side.read_to_end()
        },
        server: |side| {
            side.read_to_end()?;
            side.reset();
            Ok(())
        },
    },
    Scenario {
        name: "the server half-closes, then resets",
        client: |side| {
            side.read_to_end()?;
            side.tell();
            side.send_until_broken()
        },
        server: |side| {
            side.half_close().hear()?;
            side.reset();
            Ok(())
        },
    },
    Scenario {
        name: "the server closes with the request unread",
        client: |side| {
            side.send(b"a request that nobody reads").tell();
            side.read_to_end()
        },
        server: |side| {
            side.hear()?;
            // What was sent lies in the receive queue, so that closing resets.
            side.wait_readable()?;
            side.close();
            Ok(())
        },
    },
    Scenario {
        name: "the client has gone while the server still talks",
        client: |side| {
            side.send(b"question");
            side.close();
            Ok(())
        },
        server: |side| {
            side.read_to_end()?;
            side.send_until_broken()
        },
    },
    Scenario {
        name: "the server never answers, and the client's patience ends",
        client: |side| {
            side.send(b"question").impatient();
            side.read_to_end()?;
            side.close();
            side.tell();
            Ok(())
        },
        server: |side| {
            side.read(8)?;
            side.hear()?;
            side.read_to_end()
        },
    },
    Scenario {
        name: "the client never asks, and the server's patience ends",
        client: |side| side.read_to_end(),
        server: |side| {
            side.impatient();
            side.read_to_end()?;
            side.send(b"408").close();
            Ok(())
        },
    },
    Scenario {
        name: "megabytes go both ways, each side half-closing",
        client: |side| side.exchange(3 << 20),
        server: |side| side.exchange(2 << 20),
    },
];

impl Scenario {
    fn play(&self, client: &Pod, server: &Pod, ip: IpAddr) -> Result<[Vec<String>; 2]> {
        // A port of its own: a process that another trial starts at this moment may hold the last one for a while yet.
        let listener = server.listen(0)?;
        let port = listener.local_addr()?.port();
        let (to_server, from_client) = channel();
        let (to_client, from_server) = channel();
        let stream = client.connect((ip, port)).with_context(|| self.name.to_owned())?;
        std::thread::scope(|scope| {
            let serving = scope.spawn(|| -> Result<Vec<String>> {
                let (stream, _) = listener.accept()?;
                let mut side = Side::new(stream, to_client, from_client)?;
                (self.server)(&mut side).with_context(|| format!("{}: server, after {:?}", self.name, side.seen))?;
                Ok(side.seen)
            });
            let mut side = Side::new(stream, to_server, from_server)?;
            (self.client)(&mut side).with_context(|| format!("{}: client, after {:?}", self.name, side.seen))?;
            let served = serving.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            Ok([side.seen, served])
        })
    }
}

/// One application and what it has seen.
struct Side {
    stream: Option<TcpStream>,
    seen: Vec<String>,
    other: Sender<()>,
    word: Receiver<()>,
}

impl Side {
    fn new(stream: TcpStream, other: Sender<()>, word: Receiver<()>) -> Result<Self> {
        stream.set_read_timeout(Some(BOUND))?;
        stream.set_write_timeout(Some(BOUND))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream: Some(stream), seen: Vec::new(), other, word })
    }

    fn stream(&self) -> &TcpStream {
        self.stream.as_ref().unwrap_or_else(|| panic!("closed already"))
    }

    fn send(&mut self, data: &[u8]) -> &mut Self {
        let sent = self.stream().write_all(data);
        self.see("send", sent.map(|()| data.len()));
        self
    }

    fn read(&mut self, count: usize) -> Result<()> {
        let mut got = vec![0; count];
        let read = self.stream().read_exact(&mut got);
        self.see("read", read.map(|()| String::from_utf8_lossy(&got).into_owned()));
        Ok(())
    }

    fn read_to_end(&mut self) -> Result<()> {
        let mut got = Vec::new();
        let end = self.stream().read_to_end(&mut got);
        let text = format!("read {:?} until", String::from_utf8_lossy(&got));
        self.see(&text, end.map(|_| "the end"));
        Ok(())
    }

    /// How many writes it takes differs from run to run; what the last one says does not.
    fn send_until_broken(&mut self) -> Result<()> {
        let deadline = std::time::Instant::now() + BOUND;
        loop {
            if let Err(error) = self.stream().write(b"more") {
                self.see("send", Err::<(), _>(error));
                return Ok(());
            }
            ensure!(std::time::Instant::now() < deadline, "it could write for ever");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Sends so much, half-closes, and reads what the other side sends, all at once.
    fn exchange(&mut self, length: usize) -> Result<()> {
        let stream = self.stream().try_clone()?;
        let (sent, got) = std::thread::scope(|scope| {
            let sending = scope.spawn(|| {
                let data: Vec<u8> = (0..length).map(|at| (at % 251) as u8).collect();
                (&stream).write_all(&data).and_then(|()| stream.shutdown(Shutdown::Write))
            });
            let mut got = Vec::new();
            let read = (&stream).read_to_end(&mut got);
            let in_order = got.iter().enumerate().all(|(at, byte)| *byte == (at % 251) as u8);
            (sending.join(), read.map(|count| format!("{count} bytes, as they were sent: {in_order}")))
        });
        self.see("read", got);
        self.see("send", sent.unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        Ok(())
    }

    fn half_close(&mut self) -> &mut Self {
        let closed = self.stream().shutdown(Shutdown::Write);
        self.see("half-close", closed);
        self
    }

    fn close(&mut self) {
        self.stream = None;
    }

    fn reset(&mut self) {
        let linger = SockRef::from(self.stream()).set_linger(Some(Duration::ZERO));
        self.see("reset", linger);
        self.stream = None;
    }

    fn impatient(&mut self) {
        let set = self.stream().set_read_timeout(Some(Duration::from_millis(200)));
        self.see("set a time-out", set);
    }

    fn wait_readable(&mut self) -> Result<()> {
        self.stream().peek(&mut [0; 1])?;
        Ok(())
    }

    fn tell(&mut self) {
        // The other application may be done already.
        let _ = self.other.send(());
    }

    fn hear(&mut self) -> Result<()> {
        self.word.recv_timeout(BOUND).context("the other application said nothing")
    }

    fn see<T: std::fmt::Debug>(&mut self, what: &str, outcome: std::io::Result<T>) {
        self.seen.push(match outcome {
            Ok(value) => format!("{what}: {value:?}"),
            // A read time-out is EAGAIN.
            Err(error) if error.kind() == ErrorKind::WouldBlock => format!("{what}: a time-out"),
            Err(error) => format!("{what}: {error}"),
        });
    }
}

fn silent_connections_live_for_long(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b"))?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let _server = cart.serve_echo(8080)?;
    let mut silent = web.connect((cart.ip(), 8080))?;
    silent.write_all(b"first")?;
    silent.read_exact(&mut [0; 5])?;
    const HOUR: u64 = 3600;
    for pod in [&web, &cart] {
        // The kernel forgets no half of it for hours: its mark would be lost with it.
        for state in ["established", "close_wait", "fin_wait"] {
            let knob = format!("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_{state}");
            let seconds: u64 = pod.run(|| std::fs::read_to_string(&knob))?.trim().parse()?;
            ensure!(seconds > 10 * HOUR, "{state}: {seconds} s in {}", pod.full_name());
        }
        // Whoever is gone is found out by keepalive, which a living peer answers.
        let keepalive = || {
            let mut command = std::process::Command::new("ss");
            let sockets = pod.output(command.args(["-tnoH", "state", "established"])).ok()?;
            let sockets = String::from_utf8_lossy(&sockets.stdout).into_owned();
            let mut ours = sockets.lines().filter(|line| !line.contains("::ffff:") && line.contains(":15008"));
            ours.all(|line| line.contains("timer:(keepalive,2min")).then_some(())
        };
        eventually(&format!("keepalive on the tunnel of {}", pod.full_name()), BOUND, keepalive)?;
    }
    // The tunnel that carries it counts as used: only one without streams is ever let go.
    let streams = |agent: &Agent| -> Result<f64> { Ok(agent.metrics()?.sum("selvedge_hbone_streams", &[])) };
    if crate::tunnel() == "hbone" {
        ensure!(streams(&agents[0])? == 1.0 && streams(&agents[1])? == 1.0);
    }
    silent.write_all(b"later")?;
    silent.read_exact(&mut [0; 5])?;
    Ok(())
}
