//! What policy would say of a connection, as its destination's agent decides it.

use std::net::{IpAddr, SocketAddr};

use super::Proxy;
use super::connections::Connection;
use super::pods::ServedPod;
use crate::mesh::{Destination, NamespacedName, Reason, Workload};
use crate::policy::Verdict;
use crate::transport::Behalf;

/// The pod that dialled, and the address that it used.
pub struct Source<'a> {
    pub proxy: &'a Proxy,
    pub pod: &'a ServedPod,
    pub ip: IpAddr,
    /// Where the pod is a waypoint: whom it speaks for, which is whom the destination's agent judges.
    pub behalf: Option<&'a Behalf>,
}

impl Source<'_> {
    /// Why policy allows the connection no more, if it does not.
    pub fn denied_now(&self, connection: &Connection) -> Option<Reason> {
        let to = connection.telemetry.destination()?;
        let Destination::Workload(workload) = self.proxy.model.read().mesh.destination(to) else { return None };
        self.denial(&workload, to).map(|(reason, _)| reason)
    }

    /// What policy holds against the connection, and which policy.
    pub fn denial(&self, workload: &Workload, to: SocketAddr) -> Option<(Reason, Option<NamespacedName>)> {
        let state = self.proxy.model.read();
        let (ip, identity) = match self.behalf {
            Some(behalf) => (behalf.address.ip(), Some(&behalf.identity)),
            None => (self.own_address(to).unwrap_or(self.ip), self.pod.captured.workload.identity.as_ref()),
        };
        let (query, _) = state.query(ip, identity, workload, to);
        let decision = state.policies.decide(&query);
        let reason = decision.reason.filter(|_| decision.verdict == Verdict::Deny)?;
        Some((reason, decision.clause.map(|clause| clause.policy.name)))
    }

    /// The address that the client used, where it is one of the pod's: what peers see must be it. An endpoint of
    /// the other family sees the pod's address of that family.
    pub fn own_address(&self, to: SocketAddr) -> Option<IpAddr> {
        let own = &self.pod.captured.workload.pod.ips;
        let same_family = |ip: &&IpAddr| ip.is_ipv4() == to.is_ipv4();
        own.iter().find(|ip| **ip == self.ip).filter(same_family).or_else(|| own.iter().find(same_family)).copied()
    }
}
