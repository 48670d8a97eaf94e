//! Unchanged programs, with and without the mesh.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use libtest_mimic::Trial;
use selvedge_lab::{AgentOptions, BOUND, Lab, Namespace, Pod, Server, ServiceSpec, eventually, trial_with};

use super::{DEAD, HOLE, Scene, Told, told};
use crate::lab;

pub fn trials() -> Vec<Trial> {
    vec![
        trial_with("truthful::nc_and_curl_say_what_they_say_without_the_mesh", lab(), nc_and_curl),
        trial_with("truthful::libpq_goes_on_to_its_second_host_when_the_first_is_down", lab(), libpq),
        trial_with("truthful::a_name_with_one_dead_family_is_reached_by_the_other", lab(), one_dead_family),
        trial_with("truthful::a_service_with_one_dead_endpoint_always_connects", lab(), one_dead_endpoint),
    ]
}

/// What programs say of a server behind a firewall that tells them so.
pub struct Firewalled {
    calls: Vec<Vec<String>>,
    said: Vec<String>,
}

impl Firewalled {
    /// Asks without a mesh, with a rule of the server's own host that rejects.
    pub fn ask(client: &Namespace, server: &Pod, port: u16) -> Result<Self> {
        let mut calls = Vec::new();
        for ip in server.ips() {
            let to = SocketAddr::new(*ip, port);
            // The kernel sends ICMP sparingly; the SYN comes again.
            calls.push(words(&format!("nc -z -v -w 20 {ip} {port}")));
            calls.push(words(&format!("curl --silent --show-error --output /dev/null --max-time 20 http://{to}/")));
        }
        let rules = |change: &str| {
            let v4 = format!(
                "iptables -w {change} INPUT -p tcp --dport {port} -j REJECT --reject-with icmp-admin-prohibited"
            );
            let v6 = format!(
                "ip6tables -w {change} INPUT -p tcp --dport {port} -j REJECT --reject-with icmp6-adm-prohibited"
            );
            server.sh(&format!("{v4} && {v6}"))
        };
        rules("-A")?;
        let said: Vec<_> = calls.iter().map(|call| says(client, call)).collect::<Result<_>>()?;
        rules("-D")?;
        // By ICMP, and not by silence.
        let prohibited = |said: &&String| said.contains("No route to host") || said.contains("Permission denied");
        ensure!(said.iter().filter(prohibited).count() == server.ips().len(), "{said:#?}");
        ensure!(said.iter().all(|said| !said.contains("exit 0")), "{said:#?}");
        Ok(Self { calls, said })
    }

    /// Whether they say the same now.
    pub fn is_the_same(&self, client: &Namespace) -> Result<()> {
        for (call, before) in self.calls.iter().zip(&self.said) {
            let said = says(client, call)?;
            ensure!(said == *before, "{}:\n{said}\nand of a firewall:\n{before}", call.join(" "));
        }
        Ok(())
    }
}

fn nc_and_curl(lab: &Lab) -> Result<()> {
    let scene = Scene::new(lab)?;
    let _servers = [scene.cart.serve_http(WEB, "cart")?, scene.near.serve_http(WEB, "near")?];
    let mut calls: Vec<(&Namespace, Vec<String>)> = Vec::new();
    for (client, ip) in
        [(&scene.web, scene.cart.ip()), (&scene.web, scene.near.ip()), (&scene.stranger, scene.cart.ip())]
    {
        for port in [WEB, DEAD, HOLE] {
            // A server that is not there for the first second would be there for none.
            let patience = if port == HOLE { "2" } else { "20" };
            calls.push((client, words(&format!("nc -z -v -w {patience} {ip} {port}"))));
            let curl = "curl --silent --show-error --output /dev/null --max-time 20 --connect-timeout";
            calls.push((client, words(&format!("{curl} {patience} http://{ip}:{port}/"))));
        }
    }
    let bare: Vec<String> = calls.iter().map(|(client, call)| says(client, call)).collect::<Result<_>>()?;
    ensure!(bare[0].contains("exit 0") && bare[2].contains("refused") && bare[4].contains("exit 1"), "{bare:#?}");
    let _agents = lab.start_agents(&AgentOptions::default())?;
    for ((client, call), bare) in calls.iter().zip(bare) {
        let said = says(client, call)?;
        ensure!(said == bare, "{}:\n{said}\nand without the mesh:\n{bare}", call.join(" "));
    }
    Ok(())
}

fn libpq(lab: &Lab) -> Result<()> {
    let scene = Scene::new(lab)?;
    let _postgres = [
        Server::start(scene.cart.listen(5432)?, |stream| drop(speak_postgres(stream))),
        Server::start(scene.near.listen(5433)?, |stream| drop(speak_postgres(stream))),
    ];
    let _agents = lab.start_agents(&AgentOptions::default())?;
    // Down is: the first of two. On another node and on this one, in both families.
    for (down, up) in [((&scene.near, 5432), (&scene.cart, 5432)), ((&scene.cart, 5433), (&scene.near, 5433))] {
        for (down_ip, up_ip) in down.0.ips().iter().zip(up.0.ips()) {
            let hosts = format!(
                "host={down_ip},{up_ip} port={},{} user=app dbname=app sslmode=disable gssencmode=disable",
                down.1, up.1
            );
            let said = says(&scene.web, &["psql", "--no-psqlrc", "-c", "select 1", &hosts].map(str::to_owned))?;
            ensure!(said.contains("exit 0") && said.contains("SELECT 0"), "{hosts}: {said}");
        }
    }
    Ok(())
}

fn one_dead_family(lab: &Lab) -> Result<()> {
    let scene = Scene::new(lab)?;
    let [v4, v6] = *scene.cart.ips() else { return Ok(()) };
    let _servers = [
        scene.cart.serve_http(SocketAddr::new(v4, 9004), "cart")?,
        scene.cart.serve_http(SocketAddr::new(v6, 9006), "cart")?,
    ];
    let _agents = lab.start_agents(&AgentOptions::default())?;
    for port in [9004, 9006] {
        let resolve = format!("cart.test:{port}:{v4},[{v6}]");
        let call = words(&format!("curl --silent --fail --max-time 20 --resolve {resolve} http://cart.test:{port}/"));
        let said = says(&scene.web, &call)?;
        ensure!(said.contains("exit 0"), "port {port}: {said}");
    }
    Ok(())
}

fn one_dead_endpoint(lab: &Lab) -> Result<()> {
    let scene = Scene::new(lab)?;
    let service = ServiceSpec::new("shop/any").cluster_ip(SERVICE.parse()?).port("tcp", 80, ONLY_CART);
    lab.service(&service.endpoint(&scene.cart).endpoint(&scene.near))?;
    let none = ServiceSpec::new("shop/none").cluster_ip(NOBODY.parse()?).port("tcp", 80, ONLY_CART);
    lab.service(&none.endpoint(&scene.near))?;
    let _server = scene.cart.serve_echo(ONLY_CART)?;
    let _agents = lab.start_agents(&AgentOptions::default())?;
    let (any, nobody): (IpAddr, IpAddr) = (SERVICE.parse()?, NOBODY.parse()?);
    eventually("the Service is known", BOUND, || {
        (told(&scene.web, (any, 80).into(), BOUND) == Told::Connected).then_some(())
    })?;
    for _ in 0..40 {
        let told = told(&scene.web, (any, 80).into(), BOUND);
        ensure!(told == Told::Connected, "one of two endpoints is dead: {told:?}");
    }
    let told = told(&scene.web, (nobody, 80).into(), BOUND);
    ensure!(told == Told::Error(std::io::ErrorKind::ConnectionRefused), "all endpoints are dead: {told:?}");
    Ok(())
}

/// What a program says and how it ends, without what differs from call to call.
fn says(client: &Namespace, call: &[String]) -> Result<String> {
    let (program, arguments) = call.split_first().context("no program")?;
    let mut command = Command::new(program);
    command.args(arguments).stdin(std::process::Stdio::null()).env("LC_ALL", "C");
    let output = client.output(&mut command).with_context(|| format!("cannot run {program}; install it"))?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    // curl tells how many milliseconds it took.
    let lines: Vec<&str> = text.lines().map(|line| line.split(" after ").next().unwrap_or(line)).collect();
    Ok(format!("exit {}: {}", output.status.code().unwrap_or(-1), lines.join("\n")))
}

/// As much of a database as a client that asks for nothing needs (PostgreSQL's frontend/backend protocol 3.0).
fn speak_postgres(mut stream: TcpStream) -> Result<()> {
    let mut length = [0; 4];
    stream.read_exact(&mut length)?;
    let mut startup = vec![0; (u32::from_be_bytes(length) as usize).saturating_sub(4)];
    stream.read_exact(&mut startup)?;
    // AuthenticationOk, ReadyForQuery.
    stream.write_all(b"R\0\0\0\x08\0\0\0\0Z\0\0\0\x05I")?;
    loop {
        let mut head = [0; 5];
        stream.read_exact(&mut head)?;
        let mut body = vec![0; (u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize).saturating_sub(4)];
        stream.read_exact(&mut body)?;
        match head[0] {
            // CommandComplete, ReadyForQuery.
            b'Q' => stream.write_all(b"C\0\0\0\x0dSELECT 0\0Z\0\0\0\x05I")?,
            b'X' => return Ok(()),
            other => bail!("message {other}"),
        }
    }
}

fn words(text: &str) -> Vec<String> {
    text.split(' ').map(str::to_owned).collect()
}

const SERVICE: &str = "10.96.0.80";
const NOBODY: &str = "10.96.0.81";
const ONLY_CART: u16 = 8181;
const WEB: u16 = 8088;
