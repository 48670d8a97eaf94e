//! Agents that end and come back, clients that give up, and where connect() is eager.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use libtest_mimic::Trial;
use selvedge_lab::{AgentOptions, BOUND, Conversation, Lab, Namespace, PodSpec, eventually, trial_with};

use super::{DEAD, HOLE, LIVE, PATIENCE, Scene, Told, answers, held, told};
use crate::capture_modes::iptables_without;
use crate::lab;

pub fn trials() -> Vec<Trial> {
    vec![
        trial_with(
            "truthful::a_client_that_dials_while_the_agent_starts_anew_is_connected",
            lab(),
            the_agent_starts_anew,
        ),
        trial_with(
            "truthful::a_syn_that_waits_outlives_the_worker_and_is_not_sent_again",
            lab(),
            a_syn_outlives_the_worker,
        ),
        trial_with("truthful::a_peers_agent_that_is_away_is_waited_for", lab(), a_peers_agent_is_away),
        trial_with("truthful::a_server_that_comes_up_while_its_client_waits_is_reached", lab(), the_server_comes_up),
        trial_with("truthful::a_client_that_never_completes_lets_its_server_go", lab(), a_client_never_completes),
        trial_with("truthful::data_in_the_syn_arrives", lab(), data_in_the_syn_arrives),
        trial_with("truthful::eager_is_had_by_flag_by_namespace_and_by_pod", lab(), eager_on_demand),
        trial_with("truthful::where_syns_cannot_wait_connect_is_eager_and_that_is_told", lab(), eager_without_nfqueue),
    ]
}

fn the_agent_starts_anew(lab: &Lab) -> Result<()> {
    let scene = Scene::new(lab)?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let calls: Vec<(SocketAddr, Told)> = [(LIVE, Told::Connected), (DEAD, Told::Error(ErrorKind::ConnectionRefused))]
        .into_iter()
        .flat_map(|(port, told)| scene.cart.ips().iter().map(move |ip| (SocketAddr::new(*ip, port), told)))
        .collect();
    for victim in &agents {
        let before = victim.kill_worker()?;
        thread::scope(|scope| {
            let dialling: Vec<_> = calls
                .iter()
                .flat_map(|call| [(&scene.web, call), (&scene.stranger, call)])
                .map(|(client, (to, wanted))| scope.spawn(move || (client, to, *wanted, told(client, *to, BOUND))))
                .collect();
            for dialled in dialling {
                let (client, to, wanted, told) = dialled.join().map_err(|_| anyhow::anyhow!("a client panicked"))?;
                // Who is connected as the worker dies is reset.
                let reset = wanted == Told::Connected && told == Told::Error(ErrorKind::ConnectionReset);
                ensure!(told == wanted || reset, "{} to {to}: {told:?}", client.full_name());
            }
            anyhow::Ok(())
        })?;
        eventually("another worker is there", BOUND, || victim.worker().filter(|worker| *worker != before))?;
        for (to, wanted) in &calls {
            eventually("all is as before", BOUND, || (told(&scene.web, *to, BOUND) == *wanted).then_some(()))?;
        }
    }
    Ok(())
}

fn a_syn_outlives_the_worker(lab: &Lab) -> Result<()> {
    let scene = Scene::new(lab)?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let ip = scene.cart.ip();
    let _server = scene.cart.serve_echo(SocketAddr::new(ip, HOLE))?;
    let drops = |change: &str| scene.cart.sh(&format!("iptables -w {change} INPUT -p tcp --dport {HOLE} -j DROP"));
    // Where it takes the next worker longer than the client's first second, the client sends again all the same.
    for _ in 0..20 {
        let before = repeated_syns(&scene.web)?;
        thread::scope(|scope| {
            let dialling = scope.spawn(|| scene.web.connect((ip, HOLE)));
            eventually("the client waits", BOUND, || (held(&agents[0]).ok()? == 1.0).then_some(()))?;
            agents[0].kill_worker()?;
            drops("-D")?;
            let stream = dialling.join().map_err(|_| anyhow::anyhow!("the client panicked"))??;
            Conversation::over(stream)?.exchange("hello")
        })?;
        drops("-A")?;
        if repeated_syns(&scene.web)? == before {
            return Ok(());
        }
        agents[0].wait_ready()?;
    }
    bail!("each client had to send its SYN again")
}

/// How many SYNs were sent a second time in this namespace.
fn repeated_syns(namespace: &Namespace) -> Result<u64> {
    let text = namespace.run(|| std::fs::read_to_string("/proc/thread-self/net/netstat"))?;
    let mut lines = text.lines().filter(|line| line.starts_with("TcpExt:")).map(str::split_whitespace);
    let (names, values) = (lines.next().context("no names")?, lines.next().context("no values")?);
    let (_, count) = names.zip(values).find(|(name, _)| *name == "TCPSynRetrans").context("TCPSynRetrans")?;
    Ok(count.parse()?)
}

fn a_peers_agent_is_away(lab: &Lab) -> Result<()> {
    let scene = Scene::new(lab)?;
    let mut agents = lab.start_agents(&AgentOptions::default())?;
    ensure!(told(&scene.web, (scene.cart.ip(), LIVE).into(), BOUND) == Told::Connected);
    agents.remove(1).crash();
    let told_nothing = told(&scene.web, (scene.cart.ip(), LIVE).into(), PATIENCE);
    ensure!(told_nothing == Told::Silence, "{told_nothing:?}");
    let calls = [(LIVE, Told::Connected), (DEAD, Told::Error(ErrorKind::ConnectionRefused))];
    let web = &scene.web;
    let _back = thread::scope(|scope| {
        let dialling: Vec<_> = (scene.cart.ips().iter())
            .flat_map(|ip| calls.map(|(port, wanted)| (SocketAddr::new(*ip, port), wanted)))
            .map(|(to, wanted)| (to, wanted, scope.spawn(move || told(web, to, BOUND))))
            .collect();
        let all = dialling.len() as f64;
        eventually("they wait", BOUND, || (held(&agents[0]).ok()? == all).then_some(()))?;
        let back = lab.node("node-b").start_agent(&AgentOptions::default())?;
        for (to, wanted, dialling) in dialling {
            let told = dialling.join().map_err(|_| anyhow::anyhow!("a client panicked"))?;
            ensure!(told == wanted, "{to}: {told:?}");
        }
        anyhow::Ok(back)
    })?;
    Ok(())
}

fn the_server_comes_up(lab: &Lab) -> Result<()> {
    let scene = Scene::new(lab)?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    for ip in scene.cart.ips() {
        let tool = if ip.is_ipv4() { "iptables" } else { "ip6tables" };
        let _server = scene.cart.serve_echo(SocketAddr::new(*ip, HOLE))?;
        thread::scope(|scope| {
            let dialling = scope.spawn(|| told(&scene.web, (*ip, HOLE).into(), BOUND));
            eventually("the client waits", BOUND, || (held(&agents[0]).ok()? == 1.0).then_some(()))?;
            scene.cart.sh(&format!("{tool} -w -D INPUT -p tcp --dport {HOLE} -j DROP"))?;
            let told = dialling.join().map_err(|_| anyhow::anyhow!("the client panicked"))?;
            ensure!(told == Told::Connected, "{ip}: {told:?}");
            anyhow::Ok(())
        })?;
    }
    Ok(())
}

fn a_client_never_completes(lab: &Lab) -> Result<()> {
    let scene = Scene::new(lab)?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    let server = scene.cart.serve_echo(UNHEARD)?;
    // The server's answer to the SYN does not reach the client.
    for tool in ["iptables", "ip6tables"] {
        scene
            .stranger
            .sh(&format!("{tool} -w -A INPUT -p tcp --sport {UNHEARD} --tcp-flags SYN,ACK SYN,ACK -j DROP"))?;
    }
    for ip in scene.cart.ips() {
        let before = server.peers().len();
        let told = told(&scene.stranger, (*ip, UNHEARD).into(), PATIENCE);
        ensure!(told == Told::Silence, "{ip}: {told:?}");
        eventually("the server hears of it", BOUND, || (server.peers().len() > before).then_some(()))?;
        eventually("the server is let go", BOUND, || {
            (server.live() == 0 && held(&agents[1]).ok()? == 0.0).then_some(())
        })?;
        ensure!(server.peers().len() == before + 1, "it heard of it more than once: {:?}", server.peers());
    }
    Ok(())
}

fn data_in_the_syn_arrives(lab: &Lab) -> Result<()> {
    let scene = Scene::new(lab)?;
    // As client, without waiting for a cookie.
    for pod in [&scene.web, &scene.stranger] {
        pod.sysctl("ipv4.tcp_fastopen", "5")?;
    }
    let _agents = lab.start_agents(&AgentOptions::default())?;
    for client in [&scene.web, &scene.stranger] {
        for ip in scene.cart.ips() {
            let heard = client.run(|| fast_open((*ip, LIVE).into())).with_context(|| format!("to {ip}"))?;
            ensure!(heard == b"hello", "{heard:?}");
            let refused = client.run(|| fast_open((*ip, DEAD).into())).err().context("a dead port was connected to")?;
            ensure!(refused.kind() == ErrorKind::ConnectionRefused, "{refused}");
        }
    }
    Ok(())
}

/// Sends with the SYN itself, and reads as much back.
fn fast_open(to: SocketAddr) -> std::io::Result<Vec<u8>> {
    use std::io::Read;
    let socket = socket2::Socket::new(socket2::Domain::for_address(to), socket2::Type::STREAM, None)?;
    socket.set_read_timeout(Some(BOUND))?;
    let sent = socket.send_to_with_flags(b"hello", &to.into(), libc::MSG_FASTOPEN)?;
    let mut heard = vec![0; sent];
    std::net::TcpStream::from(socket).read_exact(&mut heard)?;
    Ok(heard)
}

fn eager_on_demand(lab: &Lab) -> Result<()> {
    let scene = Scene::new(lab)?;
    let dead: SocketAddr = (scene.cart.ip(), DEAD).into();
    let (deceived, refused) = (Told::Error(ErrorKind::ConnectionReset), Told::Error(ErrorKind::ConnectionRefused));
    let by_pod = lab.pod(PodSpec::new("shop/eager", "node-a").annotation("selvedge.dev/connect", "eager"))?;
    let by_namespace = lab.pod(PodSpec::new("away/any", "node-a"))?;
    let namespace = |annotations: serde_json::Value| {
        lab.put(&serde_json::json!({
            "apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "away", "annotations": annotations},
        }))
    };
    namespace(serde_json::json!({"selvedge.dev/mesh": "enabled", "selvedge.dev/connect": "eager"}))?;
    let agents = lab.start_agents(&AgentOptions::default())?;
    ensure!(told(&by_pod, dead, BOUND) == deceived && told(&by_namespace, dead, BOUND) == deceived);
    ensure!(told(&scene.web, dead, BOUND) == refused);
    let shown = lab.selvedge("node-a", &["capture", "show", "shop/eager"])?;
    ensure!(shown.contains("connect() truthful, probes") && shown.contains("connect()     eager"), "{shown}");
    // It changes while the pod lives, and nothing that is open minds.
    let mut open = by_namespace.converse((scene.cart.ip(), LIVE))?;
    open.exchange("before")?;
    namespace(serde_json::json!({"selvedge.dev/mesh": "enabled", "selvedge.dev/connect": "truthful"}))?;
    eventually("it is truthful", BOUND, || (told(&by_namespace, dead, BOUND) == refused).then_some(()))?;
    open.exchange("between")?;
    namespace(serde_json::json!({"selvedge.dev/mesh": "enabled", "selvedge.dev/connect": "eager"}))?;
    eventually("it is eager", BOUND, || (told(&by_namespace, dead, BOUND) == deceived).then_some(()))?;
    open.exchange("after")?;
    drop(agents);

    let agents = lab.start_agents(&AgentOptions::default().arg("--connect=eager"))?;
    ensure!(told(&scene.web, dead, BOUND) == deceived);
    ensure!(agents[0].metrics()?.sum("selvedge_capture_info", &[("connect", "eager")]) == 1.0);
    ensure!(answers(&agents[0], "outbound", "refused")? == 0.0);
    Ok(())
}

fn eager_without_nfqueue(lab: &Lab) -> Result<()> {
    let scene = Scene::new(lab)?;
    let agents = lab.start_agents(&iptables_without(lab, "NFQUEUE")?)?;
    ensure!(told(&scene.web, (scene.cart.ip(), LIVE).into(), BOUND) == Told::Connected);
    let dead = told(&scene.web, (scene.cart.ip(), DEAD).into(), BOUND);
    ensure!(dead == Told::Error(ErrorKind::ConnectionReset), "{dead:?}");
    ensure!(agents[0].metrics()?.sum("selvedge_capture_info", &[("connect", "eager")]) == 1.0);
    ensure!(agents[0].log().contains("SYNs cannot wait here"), "{}", agents[0].log());
    let shown = lab.selvedge("node-a", &["capture", "show"])?;
    ensure!(shown.contains("connect() eager"), "{shown}");
    Ok(())
}

/// Where a client hears no answer.
const UNHEARD: u16 = 8383;
