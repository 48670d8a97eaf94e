//! A pod joins and leaves while its connections run.

use std::net::SocketAddr;
use std::sync::mpsc;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::{Agent, AgentOptions, BOUND, Conversation, End, Lab, Pod, PodSpec, Server, eventually, trial_with};

use crate::lab;

pub fn trials() -> Vec<Trial> {
    vec![
        trial_with(
            "lifecycle::joining_touches_no_connection_that_runs",
            lab(),
            joining_touches_no_connection_that_runs,
        ),
        trial_with("lifecycle::a_client_that_leaves_shows_no_byte_of_its_captured_connections", lab(), |lab| {
            leaving_shows_no_byte(lab, &["web"])
        }),
        trial_with("lifecycle::a_server_that_leaves_shows_no_byte_of_its_captured_connections", lab(), |lab| {
            leaving_shows_no_byte(lab, &["cart"])
        }),
        trial_with("lifecycle::both_ends_that_leave_show_no_byte_of_their_captured_connections", lab(), |lab| {
            leaving_shows_no_byte(lab, &["web", "cart"])
        }),
        trial_with("lifecycle::what_outlives_the_drain_limit_is_reset", lab(), what_outlives_the_drain_limit_is_reset),
        trial_with("lifecycle::a_pod_may_rejoin_while_it_leaves", lab(), a_pod_may_rejoin_while_it_leaves),
        trial_with("lifecycle::rejoining_leaves_one_set_of_rules", lab(), rejoining_leaves_one_set_of_rules),
    ]
}

fn joining_touches_no_connection_that_runs(lab: &Lab) -> Result<()> {
    lab.namespace("shop", false)?;
    let two = Two::new(lab, &AgentOptions::default())?;
    let _other = two.web.serve_echo(PORT)?;
    let link = lab.link()?;
    let mut running = Vec::new();
    for (from, to) in [(&two.web, &two.cart), (&two.cart, &two.web)] {
        for ip in to.ips() {
            let mut open = from.converse((*ip, PORT))?;
            open.exchange("before")?;
            running.push(open);
            running.push(from.converse((*ip, PORT))?); // has said nothing yet
        }
    }
    for (uncaptured, joined) in [(&two.web, &two.agents[0]), (&two.cart, &two.agents[1])] {
        lab.join(uncaptured, true)?;
        joined.wait_pods("captured", 1)?;
        for (number, open) in running.iter_mut().enumerate() {
            open.exchange(&format!("goes on {number}")).context("a connection made before joining")?;
        }
    }
    let before = link.tcp_packets(TUNNEL)?;
    for (number, (from, to)) in [(&two.web, &two.cart), (&two.cart, &two.web)].into_iter().enumerate() {
        let needle = format!("captured {number}");
        from.converse((to.ip(), PORT))?.exchange(&needle)?;
        ensure!(!link.find(needle.as_bytes())?.is_found(), "a new connection was readable on the link");
    }
    ensure!(link.tcp_packets(TUNNEL)? > before, "new connections did not go through the tunnel");
    for open in &mut running {
        open.exchange("and on")?;
        open.finish_speaking()?;
        ensure!(open.end()? == End::Closed(Vec::new()), "a connection made before joining did not end in order");
    }
    Ok(())
}

/// Connections in every state, through the tunnel; then pods leave, and what is sent from then on stays unreadable.
fn leaving_shows_no_byte(lab: &Lab, leaving: &[&str]) -> Result<()> {
    let two = Two::new(lab, &AgentOptions::default().arg("--drain").arg("60s"))?;
    let leavers: Vec<&Pod> = [&two.web, &two.cart].into_iter().filter(|pod| leaving.contains(&pod.name())).collect();
    let agent_of = |pod: &Pod| two.agents.iter().find(|agent| agent.node() == pod.node_name());
    let link = lab.link()?;
    let to = SocketAddr::from((two.cart.ip(), PORT));

    let mut busy = two.web.converse(to)?;
    busy.exchange("needle of the busy one")?;
    let mut silent = two.web.converse(to)?;
    let mut client_done = HalfClosed::by_the_client(&two, 9001)?;
    let mut server_done = HalfClosed::by_the_server(&two, 9002)?;
    let mut v6 = two.web.converse((two.cart.ip_v6().unwrap_or(two.cart.ip()), PORT))?;
    v6.exchange("needle of the sixth")?;

    for pod in &leavers {
        lab.join(pod, false)?;
    }
    for pod in &leavers {
        agent_of(pod).context("no agent")?.wait_pods("leaving", 1)?;
        let rules = pod.networking()?;
        ensure!(rules.count("--on-port 15006") == 0, "still captures new connections: {rules:?}");
    }
    // From here on new connections are direct: what is looked for can be found.
    eventually("a new connection is direct", BOUND, || {
        let mut direct = two.web.converse(to).ok()?;
        direct.exchange("needle in clear").ok()?;
        link.find(b"needle in clear").ok()?.is_found().then_some(())
    })?;

    busy.exchange("needle one: busy")?;
    v6.exchange("needle two: sixth")?;
    silent.exchange("needle three: no longer silent")?;
    client_done.tell("needle four: to a client that has finished")?;
    server_done.tell("needle five: to a server that has finished")?;
    for needle in ["needle one", "needle two", "needle three", "needle four", "needle five", "needle of"] {
        ensure!(!link.find(needle.as_bytes())?.is_found(), "{needle:?} was readable on the link");
    }
    for open in [&mut busy, &mut silent, &mut v6] {
        open.finish_speaking()?;
        ensure!(open.end()? == End::Closed(Vec::new()), "it did not end in order");
    }
    client_done.close()?;
    server_done.close()?;
    for pod in &leavers {
        eventually("the pod has left", BOUND, || (pod.networking().ok()?.count("SELVEDGE") == 0).then_some(()))?;
    }
    Ok(())
}

fn what_outlives_the_drain_limit_is_reset(lab: &Lab) -> Result<()> {
    let two = Two::new(lab, &AgentOptions::default().arg("--drain").arg("1s"))?;
    let (held, sockets) = mpsc::channel();
    let _server = Server::start(two.cart.listen(9003)?, move |stream| drop(held.send(stream)));
    for (number, pod) in [&two.web, &two.cart].into_iter().enumerate() {
        let before = pod.networking()?;
        let mut client = Conversation::over(two.web.connect((two.cart.ip(), 9003))?)?;
        client.say("all of it")?;
        let mut server = Conversation::over(sockets.recv_timeout(BOUND)?)?;
        server.hear("all of it")?;
        lab.join(pod, false)?;
        ensure!(client.end()? == End::Reset(0), "the client saw no reset");
        ensure!(server.end()? == End::Reset(0), "the server saw no reset");
        eventually("the pod has left", BOUND, || (pod.networking().ok()?.count("SELVEDGE") == 0).then_some(()))?;
        lab.join(pod, true)?;
        two.agents[number].wait_pods("captured", 1)?;
        let again = pod.networking()?;
        ensure!(again.without_marks() == before.without_marks(), "{:?}", before.difference(&again));
    }
    Ok(())
}

fn a_pod_may_rejoin_while_it_leaves(lab: &Lab) -> Result<()> {
    let two = Two::new(lab, &AgentOptions::default().arg("--drain").arg("60s"))?;
    let link = lab.link()?;
    let mut open = two.web.converse((two.cart.ip(), PORT))?;
    open.exchange("before")?;
    for pod in [&two.web, &two.cart] {
        let agent = two.agents.iter().find(|agent| agent.node() == pod.node_name()).context("no agent")?;
        let joined = pod.networking()?;
        for round in 0..3 {
            lab.join(pod, false)?;
            agent.wait_pods("leaving", 1)?;
            open.exchange(&format!("while leaving {round}"))?;
            lab.join(pod, true)?;
            agent.wait_pods("captured", 1)?;
            open.exchange(&format!("joined again {round}"))?;
        }
        let again = pod.networking()?;
        ensure!(again == joined, "{:?}", joined.difference(&again));
        two.web.converse((two.cart.ip(), PORT))?.exchange("needle of a new one")?;
        ensure!(!link.find(b"needle of a new one")?.is_found(), "a new connection was readable on the link");
    }
    open.finish_speaking()?;
    ensure!(open.end()? == End::Closed(Vec::new()), "it did not end in order");
    Ok(())
}

fn rejoining_leaves_one_set_of_rules(lab: &Lab) -> Result<()> {
    lab.namespace("shop", false)?;
    let two = Two::new(lab, &AgentOptions::default())?;
    let outside = two.web.networking()?;
    let mut joined = None;
    for _ in 0..3 {
        lab.join(&two.web, true)?;
        two.agents[0].wait_pods("captured", 1)?;
        let now = two.web.networking()?.without_marks();
        let first = joined.get_or_insert_with(|| now.clone());
        ensure!(*first == now, "{:?}", first.difference(&now));
        lab.join(&two.web, false)?;
        two.agents[0].wait_pods("captured", 0)?;
        two.agents[0].wait_pods("leaving", 0)?;
        let now = two.web.networking()?;
        ensure!(outside == now, "something is left: {:?}", outside.difference(&now));
    }
    Ok(())
}

/// A client on one node, an echo server on the other, and their agents.
struct Two {
    web: Pod,
    cart: Pod,
    agents: Vec<Agent>,
    _server: Server,
}

impl Two {
    fn new(lab: &Lab, options: &AgentOptions) -> Result<Self> {
        let web = lab.pod(PodSpec::new("shop/web", "node-a").service_account("web"))?;
        let cart = lab.pod(PodSpec::new("shop/cart", "node-b").service_account("cart"))?;
        let server = cart.serve_echo(PORT)?;
        Ok(Self { agents: lab.start_agents(options)?, web, cart, _server: server })
    }
}

/// A connection of which one side has finished speaking, and only listens.
struct HalfClosed {
    speaks: Conversation,
    listens: Conversation,
    _server: Server,
}

impl HalfClosed {
    fn by_the_client(two: &Two, port: u16) -> Result<Self> {
        let (client, server, _server) = Self::open(two, port)?;
        Self::finish(client, server, _server)
    }

    fn by_the_server(two: &Two, port: u16) -> Result<Self> {
        let (client, server, _server) = Self::open(two, port)?;
        Self::finish(server, client, _server)
    }

    fn open(two: &Two, port: u16) -> Result<(Conversation, Conversation, Server)> {
        let (held, sockets) = mpsc::channel();
        let server = Server::start(two.cart.listen(port)?, move |stream| drop(held.send(stream)));
        let client = Conversation::over(two.web.connect((two.cart.ip(), port))?)?;
        Ok((client, Conversation::over(sockets.recv_timeout(BOUND)?)?, server))
    }

    fn finish(listens: Conversation, mut speaks: Conversation, _server: Server) -> Result<Self> {
        listens.finish_speaking()?;
        ensure!(speaks.end()? == End::Closed(Vec::new()), "the half-close did not arrive");
        Ok(Self { speaks, listens, _server })
    }

    fn tell(&mut self, text: &str) -> Result<()> {
        self.speaks.say(text)?;
        self.listens.hear(text)
    }

    fn close(mut self) -> Result<()> {
        self.speaks.finish_speaking()?;
        ensure!(self.listens.end()? == End::Closed(Vec::new()), "it did not end in order");
        Ok(())
    }
}

const PORT: u16 = 9000;
const TUNNEL: u16 = 15008;
