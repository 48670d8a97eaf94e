//! What is set side by side, and where.

use std::fmt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::bench::measure::Measurement;
use crate::bench::proxies::Proxy;

/// Where the two ends are.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Place {
    /// Both in the mesh, on two nodes.
    TwoNodes,
    /// Both in the mesh, on one node.
    OneNode,
    /// On two nodes, the server outside the mesh.
    Outside,
    /// On two nodes, each request told apart by its path and headers.
    Requests,
}

impl Place {
    pub const ALL: [Self; 4] = [Self::TwoNodes, Self::OneNode, Self::Outside, Self::Requests];

    /// Whether a measurement says something there.
    pub fn has(self, measurement: Measurement) -> bool {
        self != Self::Requests || matches!(measurement, Measurement::Requests { .. })
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TwoNodes => "two nodes",
            Self::OneNode => "one node",
            Self::Outside => "to a pod outside the mesh",
            Self::Requests => "layer 7",
        })
    }
}

/// One way of getting from the client to the server.
#[derive(Clone, Debug)]
pub struct Variant {
    pub place: Place,
    pub name: String,
    pub carrier: Carrier,
}

#[derive(Clone, Debug)]
pub enum Carrier {
    /// The network alone.
    Nothing,
    /// The bare relay that all others of its place are compared with.
    Relay,
    Agents(&'static [Flag]),
    /// Agents with so many routes, of which the last is the one that is met.
    Routes(usize),
    /// A waypoint in a process of its own on the client's node, between the agents.
    Waypoint,
    /// A proxy of layer 7 on the client's node, which all others of its place are compared with.
    Proxy(Proxy),
    /// Another node proxy, by the command that starts it on a node.
    Other(String),
}

/// A flag of the agent.
#[derive(Clone, Copy, Debug)]
pub struct Flag {
    name: &'static str,
    value: &'static str,
    /// Without the flag the agent does something else.
    essential: bool,
}

impl Variant {
    fn new(place: Place, name: &str, carrier: Carrier) -> Self {
        Self { place, name: name.into(), carrier }
    }

    /// What others are compared with.
    pub fn is_limit(&self) -> bool {
        matches!(self.carrier, Carrier::Relay | Carrier::Proxy(_))
    }

    /// Whether it is held against what we want.
    pub fn is_ours(&self) -> bool {
        matches!(self.carrier, Carrier::Agents(_) | Carrier::Routes(_) | Carrier::Waypoint)
    }

    /// Whether its ratios to the limit are shown.
    pub fn is_compared(&self) -> bool {
        self.is_ours() || matches!(self.carrier, Carrier::Other(_))
    }

    pub fn title(&self) -> String {
        format!("{}, {}", self.place, self.name)
    }
}

/// Every variant that this binary can do, and the titles of those that it cannot.
pub fn all(
    binary: &Path,
    against: Option<&str>,
    wanted: impl Fn(Place) -> bool,
) -> Result<(Vec<Variant>, Vec<String>)> {
    let help = Command::new(binary).args(["agent", "--help"]).output();
    let help = help.with_context(|| format!("cannot run {}", binary.display()))?;
    let help = String::from_utf8_lossy(&help.stdout).into_owned();
    let (mut able, mut unable) = (Vec::new(), Vec::new());
    for (place, name, carrier) in TABLE {
        let variant = Variant::new(*place, name, carrier.clone());
        if let Carrier::Proxy(proxy) = carrier
            && let Err(error) = if wanted(*place) { proxy.install() } else { Ok(()) }
        {
            unable.push(format!("{}: not on this machine: {error:#}", variant.title()));
            continue;
        }
        match missing_flag(carrier, &help) {
            None => able.push(variant),
            Some(flag) => unable.push(format!("{}: not in this binary (no {})", variant.title(), flag.name)),
        }
    }
    if let Some(command) = against {
        let carried = Place::ALL.into_iter().filter(|place| *place != Place::Requests);
        able.extend(carried.map(|place| Variant::new(place, "against", Carrier::Other(command.into()))));
    }
    Ok((able, unable))
}

/// The titles of a place's variants.
pub fn titles(place: Place) -> impl Iterator<Item = String> {
    let here = TABLE.iter().filter(move |(at, ..)| *at == place);
    here.map(|(place, name, carrier)| Variant::new(*place, name, carrier.clone()).title())
}

/// The agent's arguments for a variant: the flags that the binary knows.
pub fn arguments(flags: &[Flag], binary: &Path) -> Result<Vec<String>> {
    let help = Command::new(binary).args(["agent", "--help"]).output()?;
    let help = String::from_utf8_lossy(&help.stdout).into_owned();
    let known = flags.iter().filter(|flag| knows(&help, flag));
    Ok(known.flat_map(|flag| [flag.name.to_owned(), flag.value.to_owned()]).collect())
}

fn missing_flag<'a>(carrier: &'a Carrier, help: &str) -> Option<&'a Flag> {
    match carrier {
        Carrier::Agents(flags) => flags.iter().find(|flag| flag.essential && !knows(help, flag)),
        _ => None,
    }
}

/// Whether the help lists the flag, with the value among the possible ones where it names them.
fn knows(help: &str, flag: &Flag) -> bool {
    let mut lines = help.lines().skip_while(|line| line.split_whitespace().next() != Some(flag.name));
    if lines.next().is_none() {
        return false;
    }
    let about: Vec<&str> = lines.take_while(|line| !line.trim_start().starts_with("--")).collect();
    let about = about.join(" ");
    match about.split_once("[possible values:") {
        Some((_, values)) => values.split([',', ']', ' ']).any(|value| value == flag.value),
        None => true,
    }
}

const fn flag(name: &'static str, value: &'static str) -> Flag {
    Flag { name, value, essential: true }
}

/// A flag that only makes sure: an agent without it does the same.
const fn unless_default(name: &'static str, value: &'static str) -> Flag {
    Flag { name, value, essential: false }
}

/// Each place: no mesh, its limit, ours. What an agent's flag turns on is one line here.
const TABLE: &[(Place, &str, Carrier)] = &[
    (Place::TwoNodes, "no mesh", Carrier::Nothing),
    (Place::TwoNodes, "relay, 2 hops", Carrier::Relay),
    (Place::TwoNodes, "HBONE", Carrier::Agents(&[unless_default("--tunnel", "hbone")])),
    (Place::TwoNodes, "fast tunnel", Carrier::Agents(&[flag("--tunnel", "auto")])),
    (Place::TwoNodes, "eager", Carrier::Agents(&[flag("--connect", "eager")])),
    (Place::OneNode, "no mesh", Carrier::Nothing),
    (Place::OneNode, "relay, 1 hop", Carrier::Relay),
    (Place::OneNode, "direct", Carrier::Agents(&[flag("--same-node", "direct")])),
    (Place::OneNode, "eager", Carrier::Agents(&[flag("--connect", "eager")])),
    (Place::OneNode, "tunnel", Carrier::Agents(&[unless_default("--same-node", "tunnel")])),
    (Place::Outside, "relay, 1 hop", Carrier::Relay),
    (Place::Outside, "passthrough", Carrier::Agents(&[])),
    (Place::Outside, "eager", Carrier::Agents(&[flag("--connect", "eager")])),
    (Place::Requests, "no mesh", Carrier::Nothing),
    (Place::Requests, "nginx", Carrier::Proxy(Proxy::Nginx)),
    (Place::Requests, "HAProxy", Carrier::Proxy(Proxy::Haproxy)),
    (Place::Requests, "Envoy", Carrier::Proxy(Proxy::Envoy)),
    (Place::Requests, "on the node", Carrier::Routes(1)),
    (Place::Requests, "5,000 routes", Carrier::Routes(5000)),
    (Place::Requests, "in a waypoint", Carrier::Waypoint),
];

#[cfg(test)]
mod tests {
    use super::*;

    const HELP: &str = "Options:
      --tunnel <HOW>
          How bytes go between nodes

          [env: SELVEDGE_TUNNEL=]
          [possible values: auto, hbone]

      --workers <N>
          Threads, unlike --same-node
";

    #[test]
    fn a_flag_is_known_by_its_own_line_and_its_values() {
        assert!(knows(HELP, &flag("--tunnel", "auto")));
        assert!(!knows(HELP, &flag("--tunnel", "fast")));
        assert!(knows(HELP, &flag("--workers", "2")));
        assert!(!knows(HELP, &flag("--same-node", "direct")));
    }

    #[test]
    fn only_what_is_essential_must_be_known() {
        const OPTIONAL: &[Flag] = &[unless_default("--same-node", "tunnel")];
        const ESSENTIAL: &[Flag] = &[flag("--same-node", "direct")];
        assert!(missing_flag(&Carrier::Agents(OPTIONAL), HELP).is_none());
        assert!(missing_flag(&Carrier::Agents(ESSENTIAL), HELP).is_some());
        assert!(missing_flag(&Carrier::Relay, HELP).is_none());
    }

    #[test]
    fn every_place_has_one_limit_and_no_name_twice() {
        for place in Place::ALL {
            let here: Vec<_> = TABLE.iter().filter(|row| row.0 == place).collect();
            let relays = here.iter().filter(|row| matches!(row.2, Carrier::Relay)).count();
            assert_eq!(relays, usize::from(place != Place::Requests), "{place}");
            assert!(here.iter().all(|row| here.iter().filter(|other| other.1 == row.1).count() == 1), "{place}");
        }
    }
}
