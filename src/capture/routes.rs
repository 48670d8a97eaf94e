//! The routes that bring marked packets back to this host, and the kernel settings that captured flows need.
//!
//! One routing table of ours, with one route (everything is local, on `lo`), and two rules that lead to it by mark:
//! captured outbound packets, and the application's answers to connections that carry the client's address.

use std::io;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::route::{RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use serde::{Deserialize, Serialize};

use super::netlink::Netlink;
use super::rules::{IpVersion, MASK, Marks};
use super::sysctl;

/// What of our routing is in place in one family.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Routing {
    /// Mark and mask of each rule that leads to our table, in order.
    pub rules: Vec<(u32, u32)>,
    /// How many routes our table has.
    pub routes: usize,
}

impl Routing {
    pub fn wanted(marks: &Marks) -> Self {
        let mut rules = vec![(marks.outbound, MASK), (marks.back, MASK)];
        rules.sort_unstable();
        Self { rules, routes: 1 }
    }

    /// What is in place in the thread's present namespace.
    pub fn read(version: IpVersion) -> io::Result<Self> {
        let mut netlink = Netlink::open(NETLINK_ROUTE)?;
        let mut rules: Vec<_> = rules(&mut netlink, version)?.iter().filter_map(mark_of).collect();
        rules.sort_unstable();
        Ok(Self { rules, routes: routes(&mut netlink, version)?.len() })
    }

    /// Makes it so in the thread's present namespace: one route, each rule once, nothing else. Returns whether
    /// anything had to be changed.
    pub fn ensure(version: IpVersion, marks: &Marks) -> io::Result<bool> {
        let mut netlink = Netlink::open(NETLINK_ROUTE)?;
        let mut changed = false;
        if routes(&mut netlink, version)?.len() != 1 {
            let lo = loopback_index()?;
            match netlink.change(RouteNetlinkMessage::NewRoute(route(version, lo)), NLM_F_CREATE | NLM_F_EXCL) {
                Err(error) if error.raw_os_error() != Some(libc::EEXIST) => return Err(error),
                _ => changed = true,
            }
        }
        let mut wanted = Self::wanted(marks).rules;
        for rule in rules(&mut netlink, version)? {
            let position = mark_of(&rule).and_then(|mark| wanted.iter().position(|wanted| *wanted == mark));
            match position {
                Some(position) => drop(wanted.remove(position)),
                None => {
                    netlink.change(RouteNetlinkMessage::DelRule(rule), 0)?;
                    changed = true;
                }
            }
        }
        for (mark, mask) in wanted {
            netlink.change(RouteNetlinkMessage::NewRule(rule(version, mark, mask)), NLM_F_CREATE | NLM_F_EXCL)?;
            changed = true;
        }
        Ok(changed)
    }

    /// Takes all of it away in the thread's present namespace.
    pub fn remove(version: IpVersion) -> io::Result<()> {
        let mut netlink = Netlink::open(NETLINK_ROUTE)?;
        let mut result = Ok(());
        for rule in rules(&mut netlink, version)? {
            result = result.and(netlink.change(RouteNetlinkMessage::DelRule(rule), 0));
        }
        for route in routes(&mut netlink, version)? {
            result = result.and(netlink.change(RouteNetlinkMessage::DelRoute(route), 0));
        }
        result
    }
}

/// Raises what captured flows need in the thread's present namespace: conntrack must not forget a half-closed flow
/// that is silent, or its marks go and the application's answer leaves in clear. Needs the rules in place, for
/// conntrack's settings exist only where it is used. Returns what the values were.
pub fn raise_timeouts() -> io::Result<Timeouts> {
    let previous = Timeouts::read()?;
    Timeouts { close_wait: DAY, fin_wait: DAY }.write()?;
    Ok(Timeouts {
        // Ours, from before a restart: go back to the kernel's defaults (nf_conntrack-sysctl.rst).
        close_wait: if previous.close_wait == DAY { 60 } else { previous.close_wait },
        fin_wait: if previous.fin_wait == DAY { 120 } else { previous.fin_wait },
    })
}

/// conntrack's time-outs of half-closed connections, in seconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Timeouts {
    pub close_wait: u32,
    pub fin_wait: u32,
}

impl Timeouts {
    /// The kernel's own.
    pub const DEFAULT: Self = Self { close_wait: 60, fin_wait: 120 };

    pub fn read() -> io::Result<Self> {
        Ok(Self { close_wait: read_sysctl(CLOSE_WAIT)?, fin_wait: read_sysctl(FIN_WAIT)? })
    }

    pub fn are_raised(self) -> bool {
        self.close_wait >= DAY && self.fin_wait >= DAY
    }

    pub fn write(self) -> io::Result<()> {
        for (path, value) in [(CLOSE_WAIT, self.close_wait), (FIN_WAIT, self.fin_wait)] {
            sysctl::write(path, &value.to_string()).map_err(|error| at(path, &error))?;
        }
        Ok(())
    }
}

fn read_sysctl(path: &str) -> io::Result<u32> {
    let text = std::fs::read_to_string(path).map_err(|error| at(path, &error))?;
    text.trim().parse().map_err(|_| io::Error::other(format!("{path} holds {text:?}, no number")))
}

fn at(path: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{path}: {error}"))
}

fn rules(netlink: &mut Netlink, version: IpVersion) -> io::Result<Vec<RuleMessage>> {
    let mut request = RuleMessage::default();
    request.header.family = family(version);
    let dumped = netlink.dump(RouteNetlinkMessage::GetRule(request))?;
    Ok(dumped
        .into_iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewRule(rule) => Some(rule),
            _ => None,
        })
        .filter(|rule| rule.attributes.contains(&RuleAttribute::Table(TABLE)))
        .collect())
}

fn routes(netlink: &mut Netlink, version: IpVersion) -> io::Result<Vec<RouteMessage>> {
    let mut request = RouteMessage::default();
    request.header.address_family = family(version);
    let dumped = netlink.dump(RouteNetlinkMessage::GetRoute(request))?;
    Ok(dumped
        .into_iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewRoute(route) => Some(route),
            _ => None,
        })
        .filter(|route| route.attributes.contains(&RouteAttribute::Table(TABLE)))
        .collect())
}

fn mark_of(rule: &RuleMessage) -> Option<(u32, u32)> {
    let mark =
        rule.attributes.iter().find_map(|a| if let RuleAttribute::FwMark(mark) = a { Some(*mark) } else { None });
    let mask =
        rule.attributes.iter().find_map(|a| if let RuleAttribute::FwMask(mask) = a { Some(*mask) } else { None });
    Some((mark?, mask?))
}

fn rule(version: IpVersion, mark: u32, mask: u32) -> RuleMessage {
    let mut rule = RuleMessage::default();
    rule.header.family = family(version);
    rule.header.action = RuleAction::ToTable;
    rule.attributes = vec![
        RuleAttribute::Table(TABLE),
        RuleAttribute::Priority(PRIORITY),
        RuleAttribute::FwMark(mark),
        RuleAttribute::FwMask(mask),
        RuleAttribute::Protocol(RouteProtocol::Static),
    ];
    rule
}

fn route(version: IpVersion, lo: u32) -> RouteMessage {
    let mut route = RouteMessage::default();
    route.header.address_family = family(version);
    route.header.table = RouteHeader::RT_TABLE_UNSPEC;
    route.header.protocol = RouteProtocol::Static;
    route.header.scope = RouteScope::Host;
    route.header.kind = RouteType::Local;
    route.attributes = vec![RouteAttribute::Table(TABLE), RouteAttribute::Oif(lo)];
    route
}

fn loopback_index() -> io::Result<u32> {
    Ok(nix::net::if_::if_nametoindex("lo")?)
}

fn family(version: IpVersion) -> AddressFamily {
    match version {
        IpVersion::V4 => AddressFamily::Inet,
        IpVersion::V6 => AddressFamily::Inet6,
    }
}

/// Our routing table.
pub const TABLE: u32 = 15001;
/// Before any rule that a CNI sets, after the kernel's local table.
const PRIORITY: u32 = 90;
const DAY: u32 = 86_400;
const CLOSE_WAIT: &str = "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close_wait";
const FIN_WAIT: &str = "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_fin_wait";
