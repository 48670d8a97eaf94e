use std::net::{IpAddr, SocketAddr};

use super::{Exclusions, Identity, Membership, Reason, Workload};

/// How a connection from a captured pod reaches another pod. The proxy goes this way, and `explain` tells of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Path {
    /// In plaintext, and why.
    Plain(PlainBecause),
    /// Through a tunnel on which each side proves its identity.
    Tunnel {
        own: Identity,
        wanted: Identity,
    },
    /// The destination is to be captured and is not yet: PeerAuthentication there decides.
    Uncaptured,
    Refused(Reason, String),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PlainBecause {
    /// The pod talks to itself, and no byte leaves it.
    OwnPod,
    DestinationOutside,
    PortExcluded,
}

impl Path {
    /// The path from a captured pod to a pod's address.
    pub fn between(source: &Workload, destination: &Workload, port: u16) -> Self {
        if source.uid() == destination.uid() {
            return Self::Plain(PlainBecause::OwnPod);
        }
        let Membership::Joined(exclusions) = &destination.membership else {
            return Self::Plain(PlainBecause::DestinationOutside);
        };
        if exclusions.inbound_ports.contains(&port) {
            return Self::Plain(PlainBecause::PortExcluded);
        }
        if !destination.captured {
            return Self::Uncaptured;
        }
        let own = match source.own_identity() {
            Ok(own) => own,
            Err(text) => return Self::Refused(Reason::Identity, text),
        };
        let Some(wanted) = &destination.identity else {
            let text = format!("pod {} has no service account, so it cannot prove who it is", destination.name());
            return Self::Refused(Reason::Tls, text);
        };
        Self::Tunnel { own: own.clone(), wanted: wanted.clone() }
    }
}

impl Exclusions {
    /// Whether what the pod dials there is left out of capture.
    pub fn exclude_outbound(&self, dialled: SocketAddr) -> bool {
        self.outbound_ports.contains(&dialled.port())
            || self.outbound_cidrs.iter().any(|net| net.contains(&dialled.ip()))
    }
}

/// Whether an address may be believed as the source of a connection that came over the network: loopback,
/// link-local and the pod's own addresses may not, for none of them can have come from outside.
pub fn believable_source(source: IpAddr, own: &[IpAddr]) -> bool {
    let source = source.to_canonical();
    let link_local = match source {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    !(source.is_loopback() || source.is_unspecified() || source.is_multicast() || link_local || own.contains(&source))
}

/// Ports of the mesh itself, never a destination.
pub fn is_reserved_port(port: u16) -> bool {
    RESERVED_PORTS.contains(&port)
}

/// Outbound, plaintext inbound and tunnel: the field shares these numbers, so tools know them.
pub const RESERVED_PORTS: [u16; 3] = [15001, 15006, TUNNEL_PORT];
pub const TUNNEL_PORT: u16 = 15008;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_that_can_come_from_outside_are_believed() {
        let own: Vec<IpAddr> = vec!["10.1.0.2".parse().unwrap(), "fd00::2".parse().unwrap()];
        for text in ["127.0.0.1", "::1", "169.254.1.1", "fe80::1", "10.1.0.2", "fd00::2", "::ffff:127.0.0.1", "0.0.0.0"]
        {
            assert!(!believable_source(text.parse().unwrap(), &own), "{text} was believed");
        }
        for text in ["10.1.0.3", "192.0.2.1", "fd00::3"] {
            assert!(believable_source(text.parse().unwrap(), &own), "{text} was refused");
        }
    }
}
