//! What a namespace has of rules, routes and settings, to be compared before and after.

use std::collections::BTreeMap;
use std::fs;

use anyhow::Result;

use crate::namespace::Namespace;

/// Packet filter by both back ends, routing rules, routes of all tables, and what captured flows have set.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Networking(BTreeMap<String, Vec<String>>);

impl Networking {
    pub(crate) fn read(namespace: &Namespace) -> Result<Self> {
        let mut parts = BTreeMap::new();
        for command in COMMANDS {
            let lines = namespace.sh(command)?;
            let lines = lines.lines().map(str::trim_end).filter(|line| !is_passing(line)).map(str::to_owned);
            let mut lines: Vec<_> = lines.collect();
            if command.ends_with("rule") {
                // Those of one priority stand in the order in which they came.
                lines.sort();
            }
            parts.insert(command.to_owned(), lines);
        }
        let read = |path: &str| namespace.run(|| fs::read_to_string(path)).ok().map(|value| value.trim().to_owned());
        for (path, default) in SETTINGS {
            parts.insert(path.to_owned(), vec![read(path).unwrap_or_else(|| default.to_owned())]);
        }
        Ok(Self(parts))
    }

    /// How many lines name this.
    pub fn count(&self, text: &str) -> usize {
        self.0.values().flatten().filter(|line| line.contains(text)).count()
    }

    /// The same with marks blotted out, which are drawn at random.
    pub fn without_marks(&self) -> Self {
        let blot = |line: &String| {
            let words = line.split(' ').map(|word| if is_mark(word) { "MARK" } else { word });
            words.collect::<Vec<_>>().join(" ")
        };
        let parts = self.0.iter().map(|(part, lines)| {
            let mut lines: Vec<_> = lines.iter().map(blot).collect();
            if part.ends_with("rule") {
                lines.sort();
            }
            (part.clone(), lines)
        });
        Self(parts.collect())
    }

    /// The first line in which two differ, for people.
    pub fn difference(&self, other: &Self) -> Option<String> {
        let differing = self.0.iter().find(|(part, lines)| other.0.get(*part) != Some(lines))?;
        Some(format!("{}:\n{:#?}\nand\n{:#?}", differing.0, differing.1, other.0.get(differing.0)))
    }
}

/// Comments, and what an empty table of the packet filter is shown by.
fn is_passing(line: &str) -> bool {
    let built_in = || ["ACCEPT", "DROP"].iter().any(|policy| line.contains(policy)) && line.starts_with(':');
    line.is_empty() || line.starts_with(['#', '*']) || line == "COMMIT" || built_in()
}

fn is_mark(word: &str) -> bool {
    let number = word.split('/').next().and_then(|number| number.strip_prefix("0x"));
    number.is_some_and(|hex| u32::from_str_radix(hex, 16).is_ok())
}

const COMMANDS: [&str; 8] = [
    "iptables-nft-save 2>/dev/null",
    "ip6tables-nft-save 2>/dev/null",
    "iptables-legacy-save 2>/dev/null",
    "ip6tables-legacy-save 2>/dev/null",
    "ip rule",
    "ip -6 rule",
    "ip route show table all",
    "ip -6 route show table all",
];

/// They exist only where connections have been tracked, with these defaults (nf_conntrack-sysctl.rst).
const SETTINGS: [(&str, &str); 2] = [
    ("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close_wait", "60"),
    ("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_fin_wait", "120"),
];
