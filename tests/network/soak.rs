//! Everything at once, for a while: conversations of every size and ending over every path, while policy changes. At the
//! end every byte is accounted for, and nothing is left of it all.
//!
//! `cargo xtask soak --minutes N` runs this for longer.

mod conversation;

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::{Agent, AgentOptions, Lab, Pod, PodSpec, authorization, eventually, trial_of};
use serde_json::json;

use crate::lab;
use conversation::{Plan, Route, Seed, answer, ask};

pub fn trials() -> Vec<Trial> {
    let of = |name: &str, tunnel: &'static str, same_node: &'static str| {
        trial_of(&format!("soak::{name}"), time(), lab(), move |lab| soak(lab, tunnel, same_node))
    };
    vec![
        of("every_byte_is_accounted_for_over_the_fast_tunnel_and_between_neighbours", "auto", "direct"),
        of("every_byte_is_accounted_for_over_hbone_and_the_tunnel_of_one_node", "hbone", "tunnel"),
    ]
}

/// For how long it talks.
fn time() -> Duration {
    let seconds = std::env::var(SECONDS).ok().and_then(|seconds| seconds.parse().ok());
    Duration::from_secs(seconds.unwrap_or(20))
}

fn soak(lab: &Lab, tunnel: &str, same_node: &str) -> Result<()> {
    lab.namespace("bare", false)?;
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b").service_account("cart"))?;
    let bare = lab.pod(PodSpec::new("bare/legacy", "node-b"))?;
    let clients = [
        lab.pod(PodSpec::new("shop/web", "node-a").service_account("web"))?,
        lab.pod(PodSpec::new("shop/neighbour", "node-b").service_account("neighbour"))?,
        lab.pod(PodSpec::new("shop/outcast", "node-a").service_account("outcast"))?,
    ];
    let [web, neighbour, outcast] = &clients;
    let agents =
        lab.start_agents(&AgentOptions::default().arg("--tunnel").arg(tunnel).arg("--same-node").arg(same_node))?;
    let routes = [
        ("between two nodes", web, &cart, Route::Steady),
        ("on one node", neighbour, &cart, Route::Steady),
        ("to outside the mesh", web, &bare, Route::Steady),
        ("from outside the mesh", &bare, &cart, Route::Steady),
        ("between two nodes, now and then forbidden", outcast, &cart, Route::NowAndThen),
    ];
    let listeners = [cart.listen(PORT)?, bare.listen(PORT)?];
    // What stays open once it was used: listeners' keepers, pools, pipes.
    for (_, client, server, _) in &routes {
        let connected = client.connect((server.ip(), PORT))?;
        let listener = if server.uid() == cart.uid() { &listeners[0] } else { &listeners[1] };
        drop((connected, listener.accept()?));
    }
    nothing_is_open(&agents)?;
    let baselines =
        agents.iter().map(|agent| agent.metrics().map(|m| m.sum(DESCRIPTORS, &[]))).collect::<Result<Vec<_>>>()?;

    let stage = &Stage { until: Instant::now() + time(), ended: AtomicBool::new(false), failures: Mutex::default() };
    let counts: Vec<AtomicU64> = routes.iter().map(|_| AtomicU64::new(0)).collect();
    let memory = thread::scope(|scope| {
        let servers: Vec<_> = listeners.iter().map(|listener| scope.spawn(move || stage.serve(listener))).collect();
        let talking: Vec<_> = (0..routes.len() * TALKERS)
            .map(|number| {
                let ((name, client, server, route), count) =
                    (&routes[number % routes.len()], &counts[number % routes.len()]);
                let to = SocketAddr::new(server.ip(), PORT);
                scope.spawn(move || client.run(|| stage.talk(name, to, *route, Seed::of(number), count)))
            })
            .collect();
        let changing = scope.spawn(|| stage.change_policy(lab));
        let memory = stage.watch(&agents);
        let changed = changing.join();
        drop(talking.into_iter().map(thread::ScopedJoinHandle::join).collect::<Vec<_>>());
        stage.ended.store(true, Ordering::Relaxed);
        for (listener, pod) in listeners.iter().zip([&cart, &bare]) {
            // Wakes who accepts; that it is nobody's conversation is no failure.
            drop(pod.connect((pod.ip(), listener.local_addr()?.port())));
        }
        drop(servers.into_iter().map(thread::ScopedJoinHandle::join).collect::<Vec<_>>());
        changed.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        memory
    })?;

    let failures = stage.failures();
    ensure!(failures.is_empty(), "{} failures: {:#?}", failures.len(), &failures[..failures.len().min(10)]);
    for ((name, ..), count) in routes.iter().zip(&counts) {
        let count = count.load(Ordering::Relaxed);
        println!("soak: {name}: {count} conversations");
    }
    nothing_is_open(&agents)?;
    flat(&agents, &memory)?;
    leaves_nothing(lab, &agents, &clients, &baselines)
}

/// What all threads of a soak share.
struct Stage {
    until: Instant,
    ended: AtomicBool,
    failures: Mutex<Vec<String>>,
}

impl Stage {
    fn failures(&self) -> MutexGuard<'_, Vec<String>> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, text: String) {
        self.failures().push(text);
    }

    fn serve(&self, listener: &TcpListener) {
        thread::scope(|scope| {
            while let Ok((stream, _)) = listener.accept() {
                if self.ended.load(Ordering::Relaxed) {
                    return;
                }
                scope.spawn(move || {
                    if let Err(error) = answer(&stream) {
                        self.fail(format!("server: {error:#}"));
                    }
                });
            }
        });
    }

    fn talk(&self, name: &str, to: SocketAddr, route: Route, mut seed: Seed, count: &AtomicU64) {
        // However slow the machine is, some of each kind are spoken.
        while Instant::now() < self.until || count.load(Ordering::Relaxed) < LEAST {
            let plan = Plan::draw(&mut seed, route);
            let spoken = TcpStream::connect(to).map_err(anyhow::Error::from).and_then(|stream| ask(&stream, &plan));
            match spoken {
                Err(error) if !plan.forgives(&error) => {
                    self.fail(format!("{name}: {plan:?}: {error:#}"));
                    return;
                }
                _ => {
                    count.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    }

    /// Forbids one of the clients to talk, and lets it talk again.
    fn change_policy(&self, lab: &Lab) -> Result<()> {
        while Instant::now() < self.until {
            let outcast = json!({"source": {"principals": ["cluster.local/ns/shop/sa/outcast"]}});
            lab.put(&authorization("shop/no-outcast", json!({"action": "DENY", "rules": [{"from": [outcast]}]})))?;
            thread::sleep(Duration::from_millis(300));
            lab.remove("authorizationpolicy-shop-no-outcast.yaml")?;
            thread::sleep(Duration::from_millis(1200));
        }
        Ok(())
    }

    /// Each agent's memory, now and then, until the time is over.
    fn watch(&self, agents: &[Agent]) -> Result<Vec<Vec<f64>>> {
        let mut seen = vec![Vec::new(); agents.len()];
        while Instant::now() < self.until {
            thread::sleep(Duration::from_millis(500));
            for (agent, seen) in agents.iter().zip(&mut seen) {
                seen.push(agent.metrics()?.sum(MEMORY, &[]));
            }
        }
        Ok(seen)
    }
}

fn nothing_is_open(agents: &[Agent]) -> Result<()> {
    for agent in agents {
        let left = || -> Result<(f64, usize)> {
            let (metrics, dump) = (agent.metrics()?, agent.dump()?);
            let open = metrics.sum("selvedge_connections_open", &[]) + metrics.sum("selvedge_hbone_streams", &[]);
            Ok((open, dump["connections"].as_array().context("no list of connections")?.len()))
        };
        eventually(&format!("{} carries nothing", agent.node()), GONE, || (left().ok()? == (0.0, 0)).then_some(()))
            .with_context(|| format!("{:?} are left", left()))?;
    }
    Ok(())
}

/// Whether memory has stopped to grow: in the last third it is what it was in the second.
fn flat(agents: &[Agent], memory: &[Vec<f64>]) -> Result<()> {
    for (agent, seen) in agents.iter().zip(memory) {
        let most = |part: &[f64]| part.iter().copied().fold(0.0, f64::max);
        let (before, after) = (most(&seen[seen.len() / 3..seen.len() * 2 / 3]), most(&seen[seen.len() * 2 / 3..]));
        println!("soak: {}: {:.1} MB, then {:.1} MB", agent.node(), before / 1e6, after / 1e6);
        ensure!(after <= before * 1.25 + MEMORY_NOISE, "{} grew from {before} to {after}: {seen:?}", agent.node());
    }
    Ok(())
}

/// With their pods the pooled connections go, and with them the last descriptors.
fn leaves_nothing(lab: &Lab, agents: &[Agent], clients: &[Pod], baselines: &[f64]) -> Result<()> {
    for client in clients {
        lab.remove(&format!("pod-shop-{}.yaml", client.name()))?;
    }
    for (agent, baseline) in agents.iter().zip(baselines) {
        let left = || -> Result<(f64, f64)> {
            let metrics = agent.metrics()?;
            let tunnels =
                metrics.sum("selvedge_fast_connections", &[]) + metrics.sum("selvedge_hbone_connections", &[]);
            Ok((tunnels, metrics.sum(DESCRIPTORS, &[])))
        };
        let is_all = |(tunnels, descriptors): (f64, f64)| tunnels == 0.0 && descriptors <= baseline + PIPES_KEPT;
        eventually(&format!("nothing is left at {}", agent.node()), GONE, || is_all(left().ok()?).then_some(()))
            .with_context(|| format!("tunnels and descriptors: {:?}; {baseline} before", left()))?;
    }
    Ok(())
}

const PORT: u16 = 7000;
/// On each route.
const TALKERS: usize = 2;
/// Conversations of a route.
const LEAST: u64 = 20;
const SECONDS: &str = "SELVEDGE_SOAK_SECONDS";
const DESCRIPTORS: &str = "selvedge_process_open_fds";
const MEMORY: &str = "selvedge_process_resident_memory_bytes";
const MEMORY_NOISE: f64 = 8e6;
/// Two descriptors each, eight a thread.
const PIPES_KEPT: f64 = 64.0;
const GONE: Duration = Duration::from_secs(60);
