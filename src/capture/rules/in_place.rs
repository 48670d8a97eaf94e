//! What is in place, read out of `iptables-save`.

use std::borrow::Cow;
use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::PREFIX;

/// What is in place of ours in one family, as `iptables-save` shows it.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct InPlace {
    pub tables: Vec<TableInPlace>,
}

/// One table's part of it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TableInPlace {
    pub table: String,
    /// Our chains, and whatever else is named like them.
    pub chains: Vec<String>,
    /// Rules of our chains, and jumps to them, each as saved.
    pub rules: Vec<String>,
    /// Whether each jump to a chain of ours is the first rule of its chain, and there once.
    pub jumps_first: bool,
}

impl InPlace {
    /// Reads what is ours out of `iptables-save`, and whose other rules are there.
    pub fn parse(saved: &str) -> (Self, Option<OtherMesh>) {
        let mut in_place = Self::default();
        let mut other = None;
        let mut first_rule: BTreeSet<String> = BTreeSet::new();
        for line in saved.lines().map(str::trim) {
            if let Some(table) = line.strip_prefix('*') {
                first_rule.clear();
                in_place.tables.push(TableInPlace {
                    table: table.to_owned(),
                    chains: Vec::new(),
                    rules: Vec::new(),
                    jumps_first: true,
                });
                continue;
            }
            let Some(table) = in_place.tables.last_mut() else { continue };
            if let Some(chain) = line.strip_prefix(':').and_then(|rest| rest.split_whitespace().next()) {
                if chain.starts_with(PREFIX) {
                    table.chains.push(chain.to_owned());
                } else if let Some((_, mesh)) = OTHER_MESHES.iter().find(|(prefix, _)| chain.starts_with(prefix)) {
                    other = other.or(Some(OtherMesh { mesh: Cow::Borrowed(mesh), chain: chain.to_owned() }));
                }
                continue;
            }
            let Some(rule) = line.strip_prefix("-A ") else { continue };
            let chain = rule.split_whitespace().next().unwrap_or_default();
            let is_first = first_rule.insert(chain.to_owned());
            if chain.starts_with(PREFIX) {
                table.rules.push(line.to_owned());
            } else if rule.contains(&format!("-j {PREFIX}")) {
                table.jumps_first &= is_first;
                table.rules.push(line.to_owned());
            }
        }
        in_place.tables.retain(|table| !table.is_empty());
        (in_place, other)
    }

    pub fn is_empty(&self) -> bool {
        self.tables.iter().all(TableInPlace::is_empty)
    }

    pub(super) fn table(&self, name: &str) -> Option<&TableInPlace> {
        self.tables.iter().find(|table| table.table == name)
    }
}

impl TableInPlace {
    pub(super) fn is_empty(&self) -> bool {
        self.chains.is_empty() && self.rules.is_empty()
    }
}

/// Rules of another mesh in the pod: two captures of one connection would fight.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct OtherMesh {
    pub mesh: Cow<'static, str>,
    pub chain: String,
}

const OTHER_MESHES: [(&str, &str); 6] = [
    ("ISTIO_", "Istio"),
    ("PROXY_INIT_", "Linkerd"),
    ("LINKERD_", "Linkerd"),
    ("KUMA_", "Kuma"),
    ("CONSUL_", "Consul"),
    ("OSM_PROXY_", "Open Service Mesh"),
];
