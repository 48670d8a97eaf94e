//! Addresses, links and routes: a bridge in the control plane's machine, a leg to each node, and static routes between
//! the nodes' ranges of pod addresses.

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::cluster::machine::Machine;

pub const PODS: &str = "10.244.0.0/16";
pub const SERVICES: &str = "10.96.0.0/16";
pub const KUBERNETES_SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
pub const DNS_SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
pub const CONTROL: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 1);
/// As many as the addresses above have room for.
pub const MOST_NODES: u8 = 200;

/// The address of a node, counted from one.
pub fn node_ip(number: u8) -> IpAddr {
    Ipv4Addr::new(10, 200, 0, 10 + number).into()
}

/// A node's pods, counted as the nodes are.
pub fn pod_range(number: u8) -> String {
    format!("10.244.{number}.0/24")
}

/// Links the machines, which run already.
pub fn connect(control: &Machine, nodes: &[Machine]) -> Result<()> {
    let mut lines = vec![
        "link add br0 type bridge".to_owned(),
        format!("addr add {CONTROL}/24 dev br0"),
        "link set br0 up".to_owned(),
    ];
    for (number, node) in (1_u8..).zip(nodes) {
        lines.push(format!("link add {0} type veth peer name eth0 netns {1}", node.name, node.pid()?));
        lines.push(format!("link set {} master br0 up", node.name));
        lines.push(format!("route add {} via {}", pod_range(number), node.ip));
    }
    ip(control, &lines)?;
    for node in nodes {
        let mut lines = vec![
            format!("addr add {}/24 dev eth0", node.ip),
            "link set eth0 up".to_owned(),
            format!("route add default via {CONTROL}"),
        ];
        let others = (1_u8..).zip(nodes).filter(|(_, other)| other.name != node.name);
        lines.extend(others.map(|(number, other)| format!("route add {} via {}", pod_range(number), other.ip)));
        ip(node, &lines)?;
    }
    Ok(())
}

/// Runs lines of `ip` in a machine's network namespace, with process numbers as the host has them.
fn ip(machine: &Machine, lines: &[String]) -> Result<()> {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net=/proc/{}/ns/net", machine.pid()?)).args(["ip", "-batch", "-"]);
    let mut child = command.stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().context("cannot run nsenter")?;
    let mut input = child.stdin.take().context("no standard input")?;
    input.write_all(lines.join("\n").as_bytes())?;
    drop(input);
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "cannot set up the network of {}: {}", machine.name, said.trim());
    Ok(())
}
