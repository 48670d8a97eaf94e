//! The text of our rules, for `iptables-restore --noflush`. Pure: what goes in, as a string.
//!
//! All of it lives in two chains of our own in each table, [`OUT`] and [`IN`]; naming a chain in the text empties
//! it, and a table is replaced as one transaction, so there is never a moment between the old rules and the new.
//!
//! Marks are compared by their low 16 bits ([`MASK`]); the bits above are the verdicts of a packet's wait in a queue.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::hold;
use crate::mesh::Exclusions;

mod in_place;

pub use in_place::{InPlace, OtherMesh, TableInPlace};

/// How connections are taken.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// The accepted socket's local address is the original destination; no NAT.
    Tproxy,
    /// Destination NAT; the original destination is `SO_ORIGINAL_DST`.
    Redirect,
}

impl Mode {
    /// As a person writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tproxy => "tproxy",
            Self::Redirect => "redirect",
        }
    }
}

/// IPv4 and IPv6 have rules, tables and routes of their own.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IpVersion {
    V4,
    V6,
}

/// What packets and connections of one pod are marked with; drawn at random for each pod, so that a program in the
/// pod that may set marks does not know which.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Marks {
    /// `SO_MARK` of our own sockets in the pod.
    pub own: u32,
    /// Captured outbound connections, as packet and connection mark.
    pub outbound: u32,
    /// Connections of ours to the application that carry the client's address: the application's answers.
    pub back: u32,
}

/// Where our listeners are.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Ports {
    pub outbound: u16,
    pub plaintext: u16,
    pub tunnel: u16,
}

/// Whether new connections are captured.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    Capturing,
    /// Nothing new is captured; connections that were keep their marks until the last has ended.
    Leaving,
}

/// All that the rules of one pod depend on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RuleSet {
    pub mode: Mode,
    pub phase: Phase,
    pub marks: Marks,
    pub ports: Ports,
    pub exclusions: Exclusions,
    pub probes: Option<Probes>,
    /// Whether SYNs wait for the agent's answer.
    pub hold: bool,
}

/// SYNs from these addresses to these ports wait in a queue for [`super::probe`] to say whether they are probes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Probes {
    pub queue: u16,
    pub ports: BTreeSet<u16>,
    pub node_addresses: BTreeSet<IpAddr>,
}

impl Marks {
    /// Three different marks, none zero. `random` gives 16 random bits.
    pub fn draw(mut random: impl FnMut() -> u16) -> Self {
        let mut next = |taken: &[u32]| loop {
            let mark = u32::from(random());
            // 0x539 marks another mesh's sockets, and must never be taken for ours.
            if mark != 0 && mark != 0x539 && !taken.contains(&mark) {
                return mark;
            }
        };
        let own = next(&[]);
        let outbound = next(&[own]);
        Self { own, outbound, back: next(&[own, outbound]) }
    }

    /// The marks that rules in place were made with, so that connections which the kernel took meanwhile stay taken.
    pub fn read(in_place: &InPlace) -> Option<Self> {
        let mangle = in_place.tables.iter().find(|table| table.table == "mangle")?;
        let mut out = mangle.rules.iter().filter(|rule| rule.starts_with(&format!("-A {OUT} ")));
        let own = out.find_map(|rule| mark_after(rule, "-m mark --mark "))?;
        let mut restored =
            out.filter(|rule| rule.contains("-j MARK")).filter_map(|r| mark_after(r, "-m connmark --mark "));
        let back = restored.next()?;
        // Under REDIRECT there is no outbound mark; any third value will do.
        let spare = || (1..=0xffff).find(|mark| ![own, back, 0x539].contains(mark));
        let outbound = restored.next().or_else(spare)?;
        let distinct = own != back && own != outbound && back != outbound;
        distinct.then_some(Self { own, outbound, back })
    }
}

impl Default for Ports {
    fn default() -> Self {
        Self { outbound: 15001, plaintext: 15006, tunnel: 15008 }
    }
}

impl RuleSet {
    /// The text that makes the rules so, given what is in place.
    pub fn program(&self, version: IpVersion, in_place: &InPlace) -> String {
        let mut text = String::new();
        self.mangle(version, in_place, &mut text);
        let nat_in_place = in_place.table("nat").is_some_and(|table| !table.is_empty());
        if self.mode == Mode::Redirect {
            self.nat(version, in_place, &mut text);
        } else if nat_in_place {
            remove_table("nat", in_place, &mut text);
        }
        // An earlier version had rules there.
        if in_place.table("filter").is_some_and(|table| !table.is_empty()) {
            remove_table("filter", in_place, &mut text);
        }
        text
    }

    fn mangle(&self, version: IpVersion, in_place: &InPlace, text: &mut String) {
        let (own, back, outbound) = (masked(self.marks.own), masked(self.marks.back), masked(self.marks.outbound));
        let tproxy = self.mode == Mode::Tproxy;
        let capturing = self.phase == Phase::Capturing;
        let mut table = Table::begin("mangle", in_place, text);

        table.rule(OUT, &format!("-m mark --mark {own} -j RETURN"));
        table.rule(OUT, &format!("-m connmark --mark {back} -j MARK --set-xmark {back}"));
        table.rule(OUT, &format!("-m connmark --mark {back} -j RETURN"));
        if tproxy {
            table.rule(OUT, &format!("-m connmark --mark {outbound} -j MARK --set-xmark {outbound}"));
            table.rule(OUT, &format!("-m connmark --mark {outbound} -j RETURN"));
        }
        if capturing && (tproxy || self.hold) {
            self.outbound_exceptions(version, &mut table);
            if self.hold {
                hold::outbound(&mut table);
            }
            if tproxy {
                // Without `--syn`, joining would reset live connections: conntrack calls mid-stream packets NEW.
                table.rule(OUT, &format!("-p tcp --syn -m conntrack --ctstate NEW -j CONNMARK --set-xmark {outbound}"));
                table.rule(OUT, &format!("-m connmark --mark {outbound} -j MARK --set-xmark {outbound}"));
            }
        }

        table.rule(IN, &format!("-i lo -p tcp --syn -m mark --mark {own} -j CONNMARK --set-xmark {back}"));
        let on_ip = if version == IpVersion::V4 { "127.0.0.1" } else { "::1" };
        if tproxy {
            table.rule(
                IN,
                &format!(
                    "-i lo -p tcp -m mark --mark {outbound} -j TPROXY --on-port {} --on-ip {on_ip} --tproxy-mark {outbound}",
                    self.ports.outbound
                ),
            );
        }
        table.rule(IN, "-i lo -j RETURN");
        // A packet from outside never belongs to a connection between us and the application.
        table.rule(IN, &format!("-m connmark --mark {back} -j DROP"));
        if capturing {
            // What ends without capture, cheapest first: nearly every packet is of a tunnel.
            table.rule(IN, &format!("-p tcp --dport {} -j RETURN", self.ports.tunnel));
            if tproxy {
                // Our own connections' packets; --transparent, for an application bound to its pod IP must not match.
                table.rule(IN, "-p tcp -m socket --transparent -j RETURN");
            }
            // Forwarded by nested containers.
            table.rule(IN, "-m addrtype ! --dst-type LOCAL -j RETURN");
            if tproxy {
                // The application's established connections: made before joining, or left out.
                table.rule(IN, "-p tcp ! --syn -m socket -j RETURN");
            }
            for ports in port_lists(&self.exclusions.inbound_ports) {
                table.rule(IN, &format!("-p tcp -m multiport --dports {ports} -j RETURN"));
            }
            self.probes(version, &mut table);
            if self.hold {
                hold::inbound(&mut table);
            }
            if tproxy {
                let port = self.ports.plaintext;
                table.rule(IN, &format!("-p tcp -j TPROXY --on-port {port} --on-ip {on_ip}"));
            }
        }
        table.end();
    }

    fn nat(&self, version: IpVersion, in_place: &InPlace, text: &mut String) {
        let own = masked(self.marks.own);
        let mut table = Table::begin("nat", in_place, text);
        if self.phase == Phase::Capturing {
            table.rule(OUT, &format!("-m mark --mark {own} -j RETURN"));
            self.outbound_exceptions(version, &mut table);
            table.rule(OUT, &format!("-p tcp --syn -j REDIRECT --to-ports {}", self.ports.outbound));
            table.rule(IN, "-i lo -j RETURN");
            table.rule(IN, "-m addrtype ! --dst-type LOCAL -j RETURN");
            table.rule(IN, &format!("-m mark --mark {PROBE_PROVEN:#x}/{PROBE_PROVEN:#x} -j RETURN"));
            table.rule(IN, &format!("-p tcp --dport {} -j RETURN", self.ports.tunnel));
            for ports in port_lists(&self.exclusions.inbound_ports) {
                table.rule(IN, &format!("-p tcp -m multiport --dports {ports} -j RETURN"));
            }
            table.rule(IN, &format!("-p tcp --syn -j REDIRECT --to-ports {}", self.ports.plaintext));
        }
        table.end();
    }

    fn outbound_exceptions(&self, version: IpVersion, table: &mut Table<'_>) {
        table.rule(OUT, "-o lo -j RETURN");
        let never: &[&str] = match version {
            IpVersion::V4 => &["169.254.0.0/16", "224.0.0.0/4", "255.255.255.255/32"],
            IpVersion::V6 => &["fe80::/10", "ff00::/8"],
        };
        for range in never {
            table.rule(OUT, &format!("-d {range} -j RETURN"));
        }
        for ports in port_lists(&self.exclusions.outbound_ports) {
            table.rule(OUT, &format!("-p tcp -m multiport --dports {ports} -j RETURN"));
        }
        for range in self.exclusions.outbound_cidrs.iter().filter(|range| version.has(range.addr())) {
            table.rule(OUT, &format!("-d {} -j RETURN", IpNet::trunc(range)));
        }
    }

    fn probes(&self, version: IpVersion, table: &mut Table<'_>) {
        let Some(probes) = &self.probes else { return };
        for ports in port_lists(&probes.ports) {
            for source in probes.node_addresses.iter().filter(|ip| version.has(**ip)) {
                // No --queue-bypass: it would not go on to the next rule but accept, past policy. Without a listener
                // on the queue the SYN is dropped, and the client sends it again.
                table.rule(
                    IN,
                    &format!(
                        "-s {source} -p tcp --syn -m multiport --dports {ports} -m mark ! --mark \
                         {PROBE_REFUTED:#x}/{PROBE_REFUTED:#x} -j NFQUEUE --queue-num {}",
                        probes.queue
                    ),
                );
            }
        }
    }
}

/// The text that removes whatever of ours is in place, to the last chain; none when nothing is.
pub fn removal(in_place: &InPlace) -> Option<String> {
    let mut text = String::new();
    for table in in_place.tables.iter().filter(|table| !table.is_empty()) {
        remove_table(&table.table, in_place, &mut text);
    }
    (!text.is_empty()).then_some(text)
}

impl IpVersion {
    /// As a person writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::V4 => "v4",
            Self::V6 => "v6",
        }
    }

    pub fn has(self, ip: IpAddr) -> bool {
        ip.is_ipv4() == (self == Self::V4)
    }
}

/// One table of the text, from its header to its COMMIT.
pub(super) struct Table<'a>(&'a mut String);

impl<'a> Table<'a> {
    /// Declares our chains, which empties them, and puts the jumps to them first, once.
    fn begin(name: &str, in_place: &InPlace, text: &'a mut String) -> Self {
        let _ = writeln!(text, "*{name}\n:{OUT} - [0:0]\n:{IN} - [0:0]");
        delete_jumps(in_place.table(name), text);
        let _ = writeln!(text, "-I OUTPUT 1 -p tcp -j {OUT}\n-I PREROUTING 1 -p tcp -j {IN}");
        Self(text)
    }

    pub(super) fn rule(&mut self, chain: &str, rule: &str) {
        let _ = writeln!(self.0, "-A {chain} {rule}");
    }

    pub(super) fn end(self) {
        self.0.push_str("COMMIT\n");
    }
}

fn remove_table(name: &str, in_place: &InPlace, text: &mut String) {
    let Some(table) = in_place.table(name) else { return };
    let _ = writeln!(text, "*{name}");
    for chain in &table.chains {
        let _ = writeln!(text, ":{chain} - [0:0]");
    }
    delete_jumps(Some(table), text);
    for chain in &table.chains {
        let _ = writeln!(text, "-X {chain}");
    }
    text.push_str("COMMIT\n");
}

/// Every jump to our chains from chains that are not ours, as often as it is there.
fn delete_jumps(table: Option<&TableInPlace>, text: &mut String) {
    for rule in table.into_iter().flat_map(|table| &table.rules) {
        if let Some(jump) = rule.strip_prefix("-A ").filter(|rule| !rule.starts_with(PREFIX)) {
            let _ = writeln!(text, "-D {jump}");
        }
    }
}

/// Ports as `multiport` takes them: at most 15 in a rule.
fn port_lists(ports: &BTreeSet<u16>) -> impl Iterator<Item = String> {
    let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
    let lists: Vec<String> = ports.chunks(15).map(|chunk| chunk.join(",")).collect();
    lists.into_iter()
}

fn masked(mark: u32) -> String {
    format!("{mark:#x}/{MASK:#x}")
}

fn mark_after(rule: &str, option: &str) -> Option<u32> {
    let value = rule.split_once(option)?.1.split_whitespace().next()?;
    let (mark, mask) = value.split_once('/')?;
    let number = |text: &str| u32::from_str_radix(text.strip_prefix("0x")?, 16).ok();
    (number(mask)? == MASK).then(|| number(mark)).flatten().filter(|mark| *mark != 0)
}

/// Chains of our own begin so, in every table.
pub const PREFIX: &str = "SELVEDGE_";
pub const OUT: &str = "SELVEDGE_OUT";
pub const IN: &str = "SELVEDGE_IN";
/// The bits of a mark that say whose it is.
pub const MASK: u32 = 0xffff;
/// Set by the queue's verdict on a SYN that is no probe: it goes on to policy.
pub const PROBE_REFUTED: u32 = 0x1_0000;
/// Set by the queue's verdict on a SYN that is a probe: nothing else takes it.
pub const PROBE_PROVEN: u32 = 0x2_0000;

#[cfg(test)]
mod tests;
