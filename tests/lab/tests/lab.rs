//! The lab itself: traffic is real, the search is honest, and nothing is left behind.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};

use anyhow::{Context, Result, ensure};
use libtest_mimic::{Arguments, Trial};
use selvedge_lab::{
    BOUND, Families, Lab, LabOptions, PodSpec, ServiceSpec, World, enter, eventually, read_documents, trial, trial_with,
};

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    let world = enter();
    if std::env::var_os(INNER).is_some() {
        return live_in_a_world_within();
    }
    arguments.test_threads.get_or_insert(4);
    println!("in a world of its own, {}", if world.user_namespace { "in a user namespace" } else { "as root" });
    libtest_mimic::run(&arguments, trials()).exit_code()
}

fn trials() -> Vec<Trial> {
    vec![
        trial("pods_on_two_nodes_talk_in_both_families", talk),
        trial("pods_reach_the_outside_and_their_node_reaches_them", outside),
        trial("the_search_finds_what_is_split_across_segments", split),
        trial("a_link_without_the_needle_is_searched_and_clean", clean),
        trial("a_server_that_speaks_first_and_one_that_half_closes_do", servers),
        trial("pods_and_services_are_written_as_manifests", manifests),
        trial("a_deleted_pod_gives_its_address_back_at_once", reuse),
        trial_with(
            "a_lab_of_one_family_has_no_address_of_the_other",
            LabOptions { families: Families::V4, ..LabOptions::default() },
            one_family,
        ),
        Trial::test("a_dropped_lab_leaves_no_mount_and_no_file", || Ok(nothing_left().map_err(|e| format!("{e:#}"))?)),
        world_trial("a_world_whose_starter_is_killed_ends_with_all_its_processes", killed),
        world_trial("a_world_passes_signals_in_and_the_exit_code_out", signalled),
        Trial::test("the_world_has_its_own_processes_and_network", || Ok(own_world().map_err(|e| format!("{e:#}"))?)),
    ]
}

fn talk(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b"))?;
    let server = cart.serve_http(8080, "cart")?;
    for ip in cart.ips() {
        let answer = web.http_get((*ip, 8080), "/hello")?;
        ensure!(answer.status == 200 && answer.header("x-pod") == Some("cart"), "{answer:?}");
        let mine = web.ips().iter().find(|own| own.is_ipv4() == ip.is_ipv4()).context("no address")?;
        ensure!(answer.json()?["peer"] == mine.to_string(), "{}", answer.text());
    }
    ensure!(server.peers().len() == cart.ips().len());
    Ok(())
}

fn outside(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
    let _away = lab.outside().serve_http(80, "away")?;
    for ip in lab.families().outside() {
        ensure!(web.http_get((ip, 80), "/")?.header("x-pod") == Some("away"));
    }
    let _server = web.serve_http(8080, "web")?;
    let probe = lab.node("node-a").http_get((web.ip(), 8080), "/healthz")?.json()?;
    ensure!(
        probe["peer"] == lab.node("node-a").gateways()[0].to_string(),
        "a probe comes from the node's end: {probe}"
    );
    Ok(())
}

fn split(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b"))?;
    let _server = cart.serve_echo(9000)?;
    let link = lab.link()?;
    let mut stream = web.connect((cart.ip(), 9000))?;
    stream.set_nodelay(true)?;
    for part in ["nee", "dle"] {
        stream.write_all(part.as_bytes())?;
        stream.read_exact(&mut [0; 3])?;
    }
    let found = link.find(b"needle")?;
    ensure!(found.packets == 0 && found.flows.len() == 2, "once there, once back: {found:?}");
    ensure!(link.tcp_packets(9000)? > 4 && link.tcp_packets(9001)? == 0);
    Ok(())
}

fn clean(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b"))?;
    let _server = cart.serve_http(8080, "cart")?;
    let link = lab.link()?;
    web.http_get((cart.ip(), 8080), "/hay")?;
    let found = link.find(b"needle")?;
    ensure!(!found.is_found() && found.searched_packets > 4, "{found:?}");
    ensure!(link.find(b"/hay")?.packets >= 1);
    Ok(())
}

fn servers(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b"))?;
    let server = cart.serve_greeting(25, "220 hello\r\n")?;
    let mut stream = web.connect_from(SocketAddr::new(web.ip(), 45_454), (cart.ip(), 25))?;
    stream.write_all(b"QUIT")?;
    stream.shutdown(Shutdown::Write)?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    ensure!(said == "220 hello\r\nQUIT", "{said:?}");
    ensure!(server.peers() == [SocketAddr::new(web.ip(), 45_454)]);
    eventually("the server's connection ends", BOUND, || (server.live() == 0).then_some(()))?;
    drop(server);
    let refused = web.connect((cart.ip(), 25)).map(drop).map_err(|error| error.kind());
    ensure!(refused == Err(std::io::ErrorKind::ConnectionRefused), "{refused:?}");
    Ok(())
}

fn manifests(lab: &Lab) -> Result<()> {
    let spec = PodSpec::new("shop/cart", "node-b").service_account("cart").port("http", 8080).http_probe(8080, "/ok");
    let cart = lab.pod(spec)?;
    let vip = "10.96.0.10".parse()?;
    lab.service(&ServiceSpec::new("shop/cart").cluster_ip(vip).port("http", 80, 8080).endpoint(&cart))?;
    let objects = read_documents(lab.manifests())?;
    let kinds: Vec<_> = objects.iter().filter_map(|object| object["kind"].as_str()).collect();
    ensure!(kinds == ["EndpointSlice", "EndpointSlice", "Namespace", "Node", "Node", "Pod", "Service"], "{kinds:?}");
    let pod = objects.iter().find(|object| object["kind"] == "Pod").context("no pod")?;
    ensure!(pod["status"]["podIPs"][0]["ip"] == cart.ip().to_string() && pod["spec"]["nodeName"] == "node-b");
    lab.delete(cart)?;
    ensure!(!read_documents(lab.manifests())?.iter().any(|object| object["kind"] == "Pod"));
    Ok(())
}

fn reuse(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
    let first = lab.pod(PodSpec::new("shop/first", "node-b"))?;
    let ip = first.ip();
    let _held = first.serve_http(80, "first")?;
    ensure!(web.http_get((ip, 80), "/")?.header("x-pod") == Some("first"));
    lab.delete(first)?;
    let second = lab.pod(PodSpec::new("shop/second", "node-b").ip(ip))?;
    let _server = second.serve_http(80, "second")?;
    ensure!(web.http_get((ip, 80), "/")?.header("x-pod") == Some("second"));
    Ok(())
}

fn one_family(lab: &Lab) -> Result<()> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a"))?;
    ensure!(web.ips().len() == 1 && web.ip().is_ipv4() && web.ip_v6().is_none());
    let addresses = web.output(Command::new("ip").args(["-6", "addr", "show", "scope", "global"]))?;
    ensure!(addresses.stdout.is_empty(), "{}", String::from_utf8_lossy(&addresses.stdout));
    Ok(())
}

fn nothing_left() -> Result<()> {
    let lab = Lab::new(LabOptions::default())?;
    let home = lab.manifests().parent().context("no parent")?.to_owned();
    let pod = lab.pod(PodSpec::new("shop/web", "node-a"))?;
    let server = pod.serve_echo(80)?;
    ensure!(mounts_below(&home)? == 4, "outside, two nodes and a pod are pinned");
    drop((server, pod, lab));
    ensure!(!home.exists(), "{} is still there", home.display());
    ensure!(mounts_below(&home)? == 0);
    Ok(())
}

fn own_world() -> Result<()> {
    let world = World::current().context("no world")?;
    ensure!(world.pid > 0);
    ensure!(std::process::id() < 100, "process ids begin anew");
    let interfaces: Vec<_> = fs::read_to_string("/proc/net/dev")?.lines().skip(2).map(str::to_owned).collect();
    ensure!(interfaces.len() == 1 && interfaces[0].trim_start().starts_with("lo:"), "{interfaces:?}");
    Ok(())
}

/// What this program does as the subject of the two tests below.
fn live_in_a_world_within() -> ExitCode {
    let lab = Lab::new(LabOptions::default()).and_then(|lab| Ok((lab.pod(PodSpec::new("shop/web", "node-a"))?, lab)));
    println!("ready {}", lab.is_ok());
    let mut line = String::new();
    drop(std::io::stdin().read_line(&mut line));
    ExitCode::from(line.trim().parse::<u8>().unwrap_or(1))
}

fn world_trial(name: &str, body: fn() -> Result<()>) -> Trial {
    Trial::test(name, move || body().map_err(|error| format!("{error:#}").into()))
}

fn world_within() -> Result<Child> {
    let mut command = Command::new(std::env::current_exe()?);
    let mut child = command.env(INNER, "1").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().context("no stdout")?).read_line(&mut line)?;
    ensure!(line == "ready true\n", "{line:?}");
    Ok(child)
}

fn killed() -> Result<()> {
    let mut starter = world_within()?;
    let inside = descendants(starter.id());
    ensure!(inside.len() == 2, "its first process and the program: {inside:?}");
    starter.kill()?;
    starter.wait()?;
    eventually("every process of the world is gone", BOUND, || {
        inside.iter().all(|pid| !Path::new(&format!("/proc/{pid}/cwd")).exists()).then_some(())
    })
}

fn signalled() -> Result<()> {
    let mut starter = world_within()?;
    starter.stdin.take().context("no stdin")?.write_all(b"7\n")?;
    ensure!(starter.wait()?.code() == Some(7));
    let mut starter = world_within()?;
    ensure!(Command::new("kill").arg(starter.id().to_string()).status()?.success());
    ensure!(starter.wait()?.code() == Some(128 + 15));
    Ok(())
}

fn descendants(of: u32) -> Vec<u32> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let parent = |pid: u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse::<u32>().ok()
    };
    let children: Vec<u32> = pids.filter(|pid| parent(*pid) == Some(of)).collect();
    children.iter().copied().chain(children.iter().flat_map(|child| descendants(*child))).collect()
}

fn mounts_below(folder: &Path) -> Result<usize> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let prefix = format!("{}/", folder.display());
    Ok(mounts.lines().filter(|line| line.split(' ').nth(4).is_some_and(|at| at.starts_with(&prefix))).count())
}

/// Set for this program as the subject of its own tests.
const INNER: &str = "SELVEDGE_LAB_INNER";
