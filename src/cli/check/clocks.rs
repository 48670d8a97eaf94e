//! Whether the nodes' clocks agree with the API server's: certificates are good from one time to another.

use k8s_openapi::api::coordination::v1::Lease;

use super::facts::Facts;
use super::{Area, Findings};

/// Each kubelet renews a Lease and writes its own time into it; the API server notes beside it when that was.
pub fn judge(facts: &Facts, findings: &mut Findings) {
    let leases = match &facts.node_leases {
        Ok(leases) => leases,
        Err(cause) => return findings.unknown(Area::Clocks, format!("the nodes' Leases: {cause}")),
    };
    let (mut agreeing, before) = (0, findings.0.len());
    for lease in leases {
        let name = lease.metadata.name.as_deref().unwrap_or_default();
        let Some(ahead) = seconds_ahead(lease) else { continue };
        if ahead.abs() <= TOLERATED {
            agreeing += 1;
            continue;
        }
        let direction = if ahead > 0 { "ahead" } else { "behind" };
        let text = format!("the clock of node {name} is {} s {direction} of the API server's", ahead.abs());
        findings.error(
            Area::Clocks,
            text,
            "set it right (NTP): new certificates count as expired, or as not yet valid",
        );
    }
    if findings.0.len() == before {
        findings.ok(Area::Clocks, format!("the clocks of {agreeing} nodes agree with the API server's"));
    }
}

fn seconds_ahead(lease: &Lease) -> Option<i64> {
    let renewed = lease.spec.as_ref()?.renew_time.as_ref()?;
    let noted = lease.metadata.managed_fields.iter().flatten().filter_map(|entry| entry.time.as_ref()).max()?;
    Some(renewed.0.as_second() - noted.0.as_second())
}

/// A Lease is on its way for a moment, and the server notes whole seconds.
const TOLERATED: i64 = 10;
