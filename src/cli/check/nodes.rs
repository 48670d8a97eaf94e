//! Whether the machines can run the agent.

use std::collections::BTreeMap;

use super::facts::Facts;
use super::{Area, Findings};

pub fn judge(facts: &Facts, findings: &mut Findings) {
    match version(&facts.version) {
        Some(version) if version < LEAST_KUBERNETES => findings.error(
            Area::Cluster,
            format!("Kubernetes {} is older than 1.32", facts.version),
            "upgrade the cluster: the agent does not start on it",
        ),
        _ => findings.ok(Area::Cluster, format!("Kubernetes {}", facts.version)),
    }
    let nodes = match &facts.nodes {
        Ok(nodes) => nodes,
        Err(cause) => return findings.unknown(Area::Cluster, format!("the nodes: {cause}")),
    };
    let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
    for node in nodes {
        let name = node.metadata.name.as_deref().unwrap_or_default();
        let Some(info) = node.status.as_ref().and_then(|status| status.node_info.as_ref()) else {
            findings.unknown(Area::Cluster, format!("node {name} has not said yet what it is"));
            continue;
        };
        let kernel = version(&info.kernel_version);
        if info.operating_system != "linux" {
            findings.warn(
                Area::Cluster,
                format!("node {name} runs {}", info.operating_system),
                "no agent runs there: pods on it stay outside the mesh",
            );
        } else if !ARCHITECTURES.contains(&&*info.architecture) {
            findings.error(
                Area::Cluster,
                format!("node {name} is of the architecture {}", info.architecture),
                "the image is made for amd64 and arm64; build one, and keep joined pods off this node until then",
            );
        } else if kernel.is_some_and(|kernel| kernel < LEAST_KERNEL) {
            findings.warn(
                Area::Cluster,
                format!("node {name} has Linux {}", info.kernel_version),
                "nothing older than 5.4 has been tried; capture falls back to REDIRECT and eager connect() where it must",
            );
        } else {
            let kind = format!("Linux {} on {}", info.kernel_version, info.architecture);
            *kinds.entry(kind).or_default() += 1;
        }
    }
    for (kind, count) in kinds {
        findings.ok(Area::Cluster, format!("{count} nodes with {kind}"));
    }
}

/// The first two numbers of `v1.36.4` or `6.1.0-13-amd64`.
fn version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.trim_start_matches('v').split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

const LEAST_KUBERNETES: (u32, u32) = (1, 32);
const LEAST_KERNEL: (u32, u32) = (5, 4);
const ARCHITECTURES: [&str; 2] = ["amd64", "arm64"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_systems_write_them() {
        assert_eq!(version("v1.36.4-gke.100"), Some((1, 36)));
        assert_eq!(version("6.18.0-13-amd64"), Some((6, 18)));
        assert_eq!(version("unknown"), None);
    }
}
