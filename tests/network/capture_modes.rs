//! Capture by every way that a kernel may offer, in every family, and what `selvedge capture show` says of it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use selvedge_lab::{Agent, AgentOptions, BOUND, Families, Lab, LabOptions, PodSpec, eventually, trial_with};
use serde_json::Value;

use crate::lab;

pub fn trials() -> Vec<Trial> {
    vec![
        trial_with("capture_modes::tproxy_by_nft_carries_both_families", lab(), |lab| {
            both_families(lab, &["--capture=tproxy", "--iptables=nft"], ("tproxy", "nft"))
        }),
        trial_with("capture_modes::tproxy_by_legacy_carries_both_families", lab(), |lab| {
            both_families(lab, &["--capture=tproxy", "--iptables=legacy"], ("tproxy", "legacy"))
        }),
        trial_with("capture_modes::redirect_by_nft_carries_both_families", lab(), |lab| {
            both_families(lab, &["--capture=redirect", "--iptables=nft"], ("redirect", "nft"))
        }),
        trial_with("capture_modes::redirect_by_legacy_carries_both_families", lab(), |lab| {
            both_families(lab, &["--capture=redirect", "--iptables=legacy"], ("redirect", "legacy"))
        }),
        trial_with(
            "capture_modes::pods_with_ipv4_alone_are_captured",
            LabOptions { families: Families::V4, ..lab() },
            |lab| both_families(lab, &[], ("tproxy", "nft")),
        ),
        trial_with(
            "capture_modes::pods_with_ipv6_alone_are_captured",
            LabOptions { families: Families::V6, ..lab() },
            |lab| both_families(lab, &[], ("tproxy", "nft")),
        ),
        trial_with(
            "capture_modes::pods_are_captured_where_ipv6_is_off",
            LabOptions { families: Families::V4, ..lab() },
            pods_are_captured_where_ipv6_is_off,
        ),
        trial_with(
            "capture_modes::without_tproxy_auto_takes_redirect_and_says_so",
            lab(),
            without_tproxy_auto_takes_redirect_and_says_so,
        ),
        trial_with(
            "capture_modes::capture_show_tells_what_is_in_place_and_what_should_be",
            lab(),
            capture_show_tells_what_is_in_place_and_what_should_be,
        ),
    ]
}

fn both_families(lab: &Lab, arguments: &[&str], (mode, back_end): (&str, &str)) -> Result<()> {
    let options = arguments.iter().fold(AgentOptions::default(), |options, argument| options.arg(argument));
    traffic(lab, &options, (mode, back_end)).map(drop)
}

/// Traffic through the tunnel, to the outside and in from the outside, each seen to be captured.
fn traffic(lab: &Lab, options: &AgentOptions, (mode, back_end): (&str, &str)) -> Result<Vec<Agent>> {
    let web = lab.pod(PodSpec::new("shop/web", "node-a").service_account("web"))?;
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b").service_account("cart"))?;
    let off = lab.families() == Families::V4;
    for namespace in [web.network(), cart.network()].into_iter().filter(|_| off) {
        namespace.sysctl("ipv6.conf.all.disable_ipv6", "1")?;
    }
    let stranger = lab.pod(PodSpec::new("shop/stranger", "node-a").outside())?;
    let agents = lab.start_agents(options)?;
    let capture = agents[0].dump()?["capture"].clone();
    ensure!(capture["mode"] == mode && capture["back_end"] == back_end, "{capture}");
    let listen = |ip: std::net::IpAddr| std::net::SocketAddr::new(ip, 8080);
    let mut servers = Vec::new();
    for ip in cart.ips() {
        servers.push(cart.serve_http(listen(*ip), "cart")?);
    }
    for ip in lab.families().outside() {
        servers.push(lab.outside().serve_http(listen(ip), "outside")?);
    }
    let link = lab.link()?;
    for (own, ip) in web.ips().iter().zip(cart.ips()) {
        let answer = web.http_get((*ip, 8080), "/needle").with_context(|| format!("{own} to {ip}"))?;
        ensure!(answer.json()?["peer"] == own.to_string(), "{}", answer.text());
        ensure!(!link.find(b"needle")?.is_found(), "the request was readable on the link");
    }
    for (own, ip) in stranger.ips().iter().zip(cart.ips()) {
        let answer = stranger.http_get((*ip, 8080), "/").with_context(|| format!("{own} to {ip}"))?;
        ensure!(answer.json()?["peer"] == own.to_string(), "{}", answer.text());
        agents[1].access_line("plaintext was captured inbound", |line| {
            line["transport"] == "plaintext" && line["source_addr"].as_str().is_some_and(|from| of_host(from, *own))
        })?;
    }
    for (own, ip) in web.ips().iter().zip(lab.families().outside()) {
        let answer = web.http_get((ip, 8080), "/").with_context(|| format!("{own} to {ip}"))?;
        ensure!(answer.json()?["peer"] == own.to_string(), "{}", answer.text());
        agents[0].access_line("it passed through", |line| {
            line["direction"] == "passthrough" && line["destination_addr"].as_str().is_some_and(|to| of_host(to, ip))
        })?;
    }
    Ok(agents)
}

fn pods_are_captured_where_ipv6_is_off(lab: &Lab) -> Result<()> {
    for node in lab.nodes() {
        node.sysctl("ipv6.conf.all.disable_ipv6", "1")?;
    }
    let _agents = traffic(lab, &AgentOptions::default(), ("tproxy", "nft"))?;
    let shown = show(lab, "node-a", &["shop/web"])?;
    ensure!(shown.contains("listeners") && !shown.contains("[::"), "{shown}");
    Ok(())
}

fn without_tproxy_auto_takes_redirect_and_says_so(lab: &Lab) -> Result<()> {
    let _agents = traffic(lab, &iptables_without(lab, "TPROXY")?, ("redirect", "nft"))?;
    let shown = show(lab, "node-a", &[])?;
    ensure!(shown.contains("mode redirect") && shown.contains("not used: tproxy by nft"), "{shown}");
    let logs = lab.log_tails();
    ensure!(logs.contains("A way to capture does not work here") && logs.contains("tproxy by nft"), "{logs}");
    let port = (std::net::Ipv4Addr::LOCALHOST, 15020);
    let metrics = lab.node("node-a").http_get(port, "/metrics")?.text();
    ensure!(
        metrics.lines().any(|line| line.starts_with("selvedge_capture_info{") && line.contains("mode=\"redirect\"")),
        "{metrics}"
    );
    Ok(())
}

fn capture_show_tells_what_is_in_place_and_what_should_be(lab: &Lab) -> Result<()> {
    lab.deny_all("shop")?;
    let cart = lab.pod(PodSpec::new("shop/cart", "node-b").http_probe(8080, "/"))?;
    let _web = lab.pod(PodSpec::new("shop/web", "node-b"))?;
    let _agent = lab.node("node-b").start_agent(&AgentOptions::default())?;
    let all = show(lab, "node-b", &[])?;
    ensure!(all.contains("shop/cart: captured") && all.contains("shop/web: captured"), "{all}");
    let one = show(lab, "node-b", &["shop/cart"])?;
    for part in
        ["probe ports   8080", "outbound 127.0.0.1:15001", "tunnel [::]:15008", "SELVEDGE_IN", "as it should be"]
    {
        ensure!(one.contains(part), "no {part:?} in\n{one}");
    }
    ensure!(!one.contains("shop/web"), "{one}");
    let error = show(lab, "node-b", &["shop/none"]).err().context("a pod that is not there was shown")?;
    ensure!(error.to_string().contains("no joined pod shop/none"), "{error}");
    let netns = cart.path().display().to_string();
    let from_kernel = show(lab, "node-b", &["--netns", &netns])?;
    ensure!(from_kernel.contains("SELVEDGE_IN"), "{from_kernel}");
    serde_json::from_str::<Value>(&show(lab, "node-b", &["--netns", &netns, "-o", "json"])?)?;
    let json: Value = serde_json::from_str(&show(lab, "node-b", &["shop/cart", "-o", "json"])?)?;
    ensure!(json["pods"][0]["pod"] == "shop/cart" && json["pods"][0]["drift"] == Value::Array(Vec::new()), "{json}");

    let tamper = "iptables -w -t mangle -A SELVEDGE_IN -j ACCEPT; iptables -w -t mangle -D OUTPUT -p tcp -j SELVEDGE_OUT; \
                  ip -6 route flush table 15001";
    eventually("what is missing and what is too much is shown before it is mended", BOUND, || {
        cart.output(Command::new("sh").args(["-c", tamper])).ok()?;
        let shown = show(lab, "node-b", &["shop/cart"]).ok()?;
        let marked =
            ["extra    v4 nft mangle: -A SELVEDGE_IN -j ACCEPT", "missing  v4 nft mangle: -A OUTPUT", "v6 routing"];
        marked.iter().all(|mark| shown.contains(mark)).then_some(())
    })
    .with_context(|| show(lab, "node-b", &["shop/cart"]).unwrap_or_default())?;
    eventually("it is mended", BOUND, || {
        show(lab, "node-b", &["shop/cart"]).is_ok_and(|shown| shown.contains("as it should be")).then_some(())
    })
}

/// Agents whose iptables refuses one target, as a kernel without it does.
pub fn iptables_without(lab: &Lab, target: &str) -> Result<AgentOptions> {
    let folder = lab.ca().with_file_name(format!("iptables-without-{target}"));
    fs::create_dir_all(&folder)?;
    let path = std::env::var("PATH").unwrap_or_default();
    for name in ["iptables", "ip6tables"] {
        for variant in ["", "-nft", "-legacy"] {
            let program = format!("{name}{variant}-restore");
            let file = folder.join(&program);
            fs::write(
                &file,
                format!(
                    "#!/bin/sh\nPATH={path}:/usr/sbin:/sbin\n[ \"$1\" = --version ] && exec {program} --version\n\
                     rules=$(cat)\ncase $rules in *'-j {target}'*)\n\
                     echo 'Warning: Extension {target} revision 0 not supported, missing kernel module?' >&2\n\
                     exit 4\nesac\nprintf '%s\\n' \"$rules\" | {program} \"$@\"\n"
                ),
            )?;
            fs::set_permissions(&file, fs::Permissions::from_mode(0o755))?;
        }
    }
    Ok(AgentOptions::default().env("PATH", &format!("{}:{path}", folder.display())))
}

/// What `selvedge capture show` prints on a node.
pub fn show(lab: &Lab, node: &str, arguments: &[&str]) -> Result<String> {
    lab.selvedge(node, &[&["capture", "show"], arguments].concat())
}

/// Whether an address with a port, as the access log writes it, is of this host.
pub fn of_host(address: &str, ip: std::net::IpAddr) -> bool {
    address.parse::<std::net::SocketAddr>().is_ok_and(|address| address.ip() == ip)
}
