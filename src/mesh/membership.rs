use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU16;
use std::sync::Arc;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{Gateway, Labels, NamespacedName, WaypointProblem};

/// What our own keys, as annotation or label, ask for on one namespace, service or pod.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Settings {
    pub mesh: Option<MeshMode>,
    pub waypoint: Option<Waypoint>,
    pub exclude_inbound_ports: BTreeSet<u16>,
    pub exclude_outbound_ports: BTreeSet<u16>,
    pub exclude_outbound_cidrs: Vec<IpNet>,
    pub connect: Option<Connect>,
}

impl Settings {
    /// Reads our keys; annotations and labels count alike. What cannot be read is reported and has no effect,
    /// but for `selvedge.dev/mesh`, where the joined reading wins: a misspelt value must not mean plaintext.
    pub fn read(
        annotations: &BTreeMap<String, String>,
        labels: &BTreeMap<String, String>,
    ) -> (Self, Vec<SettingsProblem>) {
        let mut settings = Self::default();
        let mut problems = Vec::new();
        for (field, map) in [("metadata.annotations", annotations), ("metadata.labels", labels)] {
            for (key, value) in map {
                let Some(name) = key.strip_prefix(PREFIX) else { continue };
                if let Err(cause) = settings.read_one(name, value) {
                    problems.push(SettingsProblem { field: format!("{field}[{key}]"), cause });
                }
            }
        }
        (settings, problems)
    }

    fn read_one(&mut self, name: &str, value: &str) -> Result<(), String> {
        match name {
            "mesh" => {
                let mode = match value {
                    "enabled" => Ok(MeshMode::Enabled),
                    "disabled" => Ok(MeshMode::Disabled),
                    "required" => Ok(MeshMode::Required),
                    _ => Err(format!("{value:?} is none of enabled, disabled, required; it is read as enabled")),
                };
                let asked = *mode.as_ref().unwrap_or(&MeshMode::Enabled);
                self.mesh = Some(self.mesh.map_or(asked, |other| other.max(asked)));
                mode.map(drop)
            }
            "waypoint" => {
                let asked = match value {
                    "none" => Waypoint::None,
                    "node" => Waypoint::Node,
                    _ => Waypoint::Gateway(value.into()),
                };
                match self.waypoint.insert(asked) {
                    Waypoint::Gateway(written) if Waypoint::gateway_name(written, &"any".into()).is_none() => {
                        Err(format!("{value:?} is none of node, none, <gateway>, <namespace>/<gateway>: {NO_WAYPOINT}"))
                    }
                    _ => Ok(()),
                }
            }
            "exclude-inbound-ports" => read_ports(value, &mut self.exclude_inbound_ports),
            "exclude-outbound-ports" => read_ports(value, &mut self.exclude_outbound_ports),
            "exclude-outbound-cidrs" => {
                let mut nets: BTreeSet<IpNet> = BTreeSet::new();
                let result = read_list(value, &mut nets, "a range such as 10.0.0.0/8");
                self.exclude_outbound_cidrs.extend(nets);
                result
            }
            "connect" => {
                self.connect = match value {
                    "truthful" => Some(Connect::Truthful),
                    "eager" => Some(Connect::Eager),
                    _ => return Err(format!("{value:?} is neither truthful nor eager; it has no effect")),
                };
                Ok(())
            }
            // A misspelt `mesh` would leave its pods in plaintext without a word.
            _ => Err(format!("there is no such key, it has no effect; known are {}", KEYS.join(", "))),
        }
    }
}

/// What `selvedge.dev/mesh` says. In conflict the greater wins: joined over not joined.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum MeshMode {
    Disabled,
    Enabled,
    /// On a namespace: its pods' opt-outs and exclusions are void.
    Required,
}

/// What `selvedge.dev/waypoint` says: where requests are told apart.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Waypoint {
    /// Nowhere: connections are carried as they are.
    None,
    /// By the agents of both ends.
    Node,
    /// In a process of its own, of this Gateway: `name` or `namespace/name`.
    Gateway(Arc<str>),
}

impl Waypoint {
    /// Whether somebody reads requests.
    pub fn reads(&self) -> bool {
        !matches!(self, Self::None)
    }

    /// The Gateway that a Service of a namespace means; none where what it wrote is no name.
    pub fn gateway_name(written: &str, namespace: &Arc<str>) -> Option<NamespacedName> {
        let (namespace, name) = match written.split_once('/') {
            Some((namespace, name)) => (namespace.into(), name),
            None => (namespace.clone(), written),
        };
        let is_name = !namespace.is_empty() && !name.is_empty() && !name.contains('/');
        is_name.then(|| NamespacedName { namespace, name: name.into() })
    }

    /// Why Services of a namespace, which has these labels, have not got the waypoint in a process of its own that is
    /// meant; none where none is meant, or where they have it.
    pub fn problem(
        &self,
        namespace: &Arc<str>,
        labels: &Labels,
        gateway: impl FnOnce(&NamespacedName) -> Option<Gateway>,
    ) -> Option<WaypointProblem> {
        let Self::Gateway(written) = self else { return None };
        let Some(name) = Self::gateway_name(written, namespace) else {
            return Some(WaypointProblem::Malformed(written.clone()));
        };
        match gateway(&name) {
            Some(gateway) => gateway.admits(namespace, labels).err(),
            None => Some(WaypointProblem::Missing(name)),
        }
    }
}

/// When a client's `connect()` is answered: what `selvedge.dev/connect` says.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Connect {
    /// Once it is known whether the server is there and whether policy lets the client in.
    Truthful,
    /// At once; what is found out later is told by a reset.
    Eager,
}

impl Connect {
    /// As a person writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Truthful => "truthful",
            Self::Eager => "eager",
        }
    }
}

/// One of our keys that could not be read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SettingsProblem {
    pub field: String,
    pub cause: String,
}

/// Whether one pod is in the mesh, and what it leaves out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Membership {
    Joined(Exclusions),
    /// Not in the mesh, and why, in words.
    Outside(&'static str),
}

impl Membership {
    /// Decides membership (design section 4) from the namespace's and the pod's own settings.
    pub fn of(pod: &NamespacedName, host_network: bool, namespace: Option<&Settings>, own: &Settings) -> Self {
        if NEVER_JOINED.contains(&&*pod.namespace) {
            return Self::Outside("pods of this namespace never join");
        }
        if host_network {
            return Self::Outside("it uses the host's network");
        }
        let required = namespace.and_then(|n| n.mesh) == Some(MeshMode::Required);
        let mode = if required {
            MeshMode::Required
        } else {
            own.mesh.or(namespace.and_then(|n| n.mesh)).unwrap_or(MeshMode::Disabled)
        };
        if mode == MeshMode::Disabled {
            return Self::Outside(match own.mesh {
                Some(_) => "the pod opts out",
                None => "neither its namespace nor the pod itself is enabled",
            });
        }
        let mut exclusions = Exclusions::default();
        for settings in namespace.into_iter().chain((!required).then_some(own)) {
            exclusions.inbound_ports.extend(&settings.exclude_inbound_ports);
            exclusions.outbound_ports.extend(&settings.exclude_outbound_ports);
            exclusions.outbound_cidrs.extend(&settings.exclude_outbound_cidrs);
        }
        Self::Joined(exclusions)
    }

    pub fn is_joined(&self) -> bool {
        matches!(self, Self::Joined(_))
    }
}

/// What a joined pod leaves out of capture.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Exclusions {
    pub inbound_ports: BTreeSet<u16>,
    pub outbound_ports: BTreeSet<u16>,
    pub outbound_cidrs: BTreeSet<IpNet>,
}

fn read_ports(value: &str, into: &mut BTreeSet<u16>) -> Result<(), String> {
    let mut ports: BTreeSet<NonZeroU16> = BTreeSet::new();
    let result = read_list(value, &mut ports, "a port from 1 to 65535");
    into.extend(ports.into_iter().map(NonZeroU16::get));
    result
}

fn read_list<T: std::str::FromStr + Ord>(value: &str, into: &mut BTreeSet<T>, wanted: &str) -> Result<(), String> {
    let mut refused = Vec::new();
    for item in value.split(',').map(str::trim).filter(|item| !item.is_empty()) {
        match item.parse() {
            Ok(parsed) => {
                into.insert(parsed);
            }
            Err(_) => refused.push(format!("{item:?}")),
        }
    }
    if refused.is_empty() {
        return Ok(());
    }
    Err(format!("{} is not {wanted}; it has no effect", refused.join(", ")))
}

const PREFIX: &str = "selvedge.dev/";
const KEYS: [&str; 6] =
    ["mesh", "waypoint", "exclude-inbound-ports", "exclude-outbound-ports", "exclude-outbound-cidrs", "connect"];
/// Going on without the waypoint that was meant could open a door.
const NO_WAYPOINT: &str = "connections to the Service are refused until it is corrected";
const NEVER_JOINED: [&str; 2] = ["selvedge-system", "kube-system"];

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(pairs: &[(&str, &str)]) -> Settings {
        let map = pairs.iter().map(|(k, v)| (format!("selvedge.dev/{k}"), v.to_string())).collect();
        Settings::read(&map, &BTreeMap::new()).0
    }

    fn membership(namespace: &[(&str, &str)], pod: &[(&str, &str)]) -> Membership {
        Membership::of(&NamespacedName::new("shop", "cart"), false, Some(&settings(namespace)), &settings(pod))
    }

    #[test]
    fn a_pod_follows_its_namespace_unless_it_says_otherwise() {
        assert!(membership(&[("mesh", "enabled")], &[]).is_joined());
        assert!(!membership(&[("mesh", "enabled")], &[("mesh", "disabled")]).is_joined());
        assert!(membership(&[], &[("mesh", "enabled")]).is_joined());
        assert!(!membership(&[], &[]).is_joined());
    }

    #[test]
    fn required_voids_opt_outs_and_exclusions_of_pods() {
        let joined = membership(
            &[("mesh", "required"), ("exclude-inbound-ports", "9000")],
            &[("mesh", "disabled"), ("exclude-inbound-ports", "8080")],
        );
        let Membership::Joined(exclusions) = joined else { panic!("an opt-out held against required") };
        assert_eq!(exclusions.inbound_ports, BTreeSet::from([9000]));
    }

    #[test]
    fn the_joined_reading_wins_between_annotation_and_label() {
        let disabled = BTreeMap::from([("selvedge.dev/mesh".to_owned(), "disabled".to_owned())]);
        let enabled = BTreeMap::from([("selvedge.dev/mesh".to_owned(), "enabled".to_owned())]);
        assert_eq!(Settings::read(&disabled, &enabled).0.mesh, Some(MeshMode::Enabled));
        assert_eq!(Settings::read(&enabled, &disabled).0.mesh, Some(MeshMode::Enabled));
    }

    #[test]
    fn a_misspelt_value_is_reported_and_joins() {
        let map = BTreeMap::from([("selvedge.dev/mesh".to_owned(), "enable".to_owned())]);
        let (read, problems) = Settings::read(&map, &BTreeMap::new());
        assert_eq!(read.mesh, Some(MeshMode::Enabled));
        assert_eq!(problems[0].field, "metadata.annotations[selvedge.dev/mesh]");
    }

    #[test]
    fn a_waypoint_is_named_with_or_without_its_namespace() {
        for (value, wanted) in [
            ("node", Some(Waypoint::Node)),
            ("none", Some(Waypoint::None)),
            ("gw", Some(Waypoint::Gateway("gw".into()))),
            ("infra/gw", Some(Waypoint::Gateway("infra/gw".into()))),
            ("", None),
            ("infra/", None),
            ("a/b/c", None),
        ] {
            let map = BTreeMap::from([("selvedge.dev/waypoint".to_owned(), value.to_owned())]);
            let (read, problems) = Settings::read(&map, &BTreeMap::new());
            // What cannot be read still means a waypoint: without one, policy would be gone round.
            assert_eq!(read.waypoint, Some(wanted.clone().unwrap_or(Waypoint::Gateway(value.into()))));
            assert_eq!(problems.len(), usize::from(wanted.is_none()), "{value:?}: {problems:?}");
            assert!(problems.iter().all(|problem| problem.field == "metadata.annotations[selvedge.dev/waypoint]"));
        }
    }

    #[test]
    fn a_misspelt_key_is_reported() {
        let map = BTreeMap::from([("selvedge.dev/mehs".to_owned(), "enabled".to_owned())]);
        let (read, problems) = Settings::read(&map, &BTreeMap::new());
        assert_eq!(read, Settings::default());
        assert_eq!(problems[0].field, "metadata.annotations[selvedge.dev/mehs]");
        assert!(problems[0].cause.contains("known are mesh,"), "{}", problems[0].cause);
    }

    #[test]
    fn unreadable_exclusions_are_reported_and_the_others_hold() {
        let map = BTreeMap::from([("selvedge.dev/exclude-outbound-ports".to_owned(), "80, x,0,00,443".to_owned())]);
        let (read, problems) = Settings::read(&map, &BTreeMap::new());
        assert_eq!(read.exclude_outbound_ports, BTreeSet::from([80, 443]));
        assert!(problems[0].cause.contains("\"x\", \"0\", \"00\""), "{}", problems[0].cause);
    }

    #[test]
    fn system_namespaces_and_host_network_pods_never_join() {
        let enabled = settings(&[("mesh", "enabled")]);
        for (name, host) in
            [(("kube-system", "dns"), false), (("selvedge-system", "agent"), false), (("shop", "a"), true)]
        {
            let pod = NamespacedName::new(name.0, name.1);
            assert!(!Membership::of(&pod, host, Some(&enabled), &enabled).is_joined(), "{pod}");
        }
    }
}
